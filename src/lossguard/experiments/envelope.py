"""What tuned optimizers reach on published tasks, and how much sooner another one reaches it.

``envelope.json`` is an extract of a file of google/learned_optimization (Apache-2.0). It holds the
lowest loss at each number of steps over Adam, Adam with two decays and RAdam, each at 15 rates.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import signal, stats

from ..validation import one_of

FILE = Path(__file__).with_name("envelope.json")
EVERY = 10
"""Steps from one loss to the next."""
DECAY = 0.95
"""Of the smoothing."""


class Envelope(NamedTuple):
    """The losses of one task."""

    steps: np.ndarray
    """[points], increasing from 0 to 100,000."""
    loss: np.ndarray
    """[points], the mean of five seeds, smoothed as ``smoothed`` does it; it never rises."""

    def at(self, step: float) -> float:
        """The loss at a step."""
        return float(np.exp(np.interp(step, self.steps, np.log(self.loss))))

    def steps_to(self, loss: np.ndarray | float) -> np.ndarray:
        """Steps to a loss: 0 to one that is higher than the first or not finite, 100,000 at most.

        >>> one = Envelope(np.array([0, 100, 200]), np.array([1.0, 0.1, 0.01]))
        >>> one.steps_to(np.array([0.1, 0.01, 0.001, 2.0, np.nan])).round(6).tolist()
        [100.0, 200.0, 200.0, 0.0, 0.0]
        """
        with np.errstate(divide="ignore"):  # a loss of 0
            given = np.log(np.where(np.isfinite(loss), loss, np.inf))
        return np.interp(given, np.log(self.loss)[::-1], self.steps[::-1])


def envelope(task: str) -> Envelope:
    """The published envelope of a task.

    Args:
        task: a name of ``lossguard.tasks.published.PUBLISHED``.

    Raises:
        ValueError: if there is none of that name.

    >>> round(envelope("ImageMLP_FashionMnist_Relu128x128").at(978), 3)
    0.373
    """
    content = {name: one for name, one in json.loads(FILE.read_text()).items() if "steps" in one}
    if task not in content:
        raise ValueError(f"task of an envelope must be {one_of(content, task)}")
    return Envelope(*(np.array(content[task][name], float) for name in Envelope._fields))


def smoothed(losses: np.ndarray) -> np.ndarray:
    """y <- 0.95 y + 0.05 loss along the last axis, from the first loss on: it lags 190 steps.

    >>> smoothed(np.array([1.0, 0.0, 0.0])).round(4).tolist()
    [1.0, 0.95, 0.9025]
    """
    losses = np.asarray(losses, float)
    made, _ = signal.lfilter([1 - DECAY], [1, -DECAY], losses, zi=DECAY * losses[..., :1])
    return made


class Mean(NamedTuple):
    """An interquartile mean."""

    value: float
    low: float
    """The 95 % interval of it, when seeds are drawn again with replacement within each task."""
    high: float


def interquartile_mean(scores: Sequence[np.ndarray], *, draws: int = 2_000) -> Mean:
    """The mean of the middle half of all scores (Agarwal et al., 2021, arXiv 2108.13264).

    As their package rliable computes it, which needs arch, pandas and seaborn beside SciPy.

    Args:
        scores: of each task, those of its seeds.
        draws: of the bootstrap.

    >>> interquartile_mean([np.array([0.0, 1.0]), np.array([2.0, 100.0])], draws=10).value
    1.5
    """

    def middle(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)

    found = stats.bootstrap(
        tuple(scores), middle, n_resamples=draws, method="percentile", rng=np.random.default_rng(0)
    )
    return Mean(float(middle(*scores)), *map(float, found.confidence_interval))

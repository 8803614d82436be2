"""The records that claims are judged by: which run speaks for a recipe, and its losses at marks.

Letters: m a method, k an optimizer step, K the last one of a run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ..config import as_config
from ..curves import last_step, mark_loss, over_seeds
from ..records import Record
from .experiment import Experiment
from .recipes import PAPERS

FREE = ("title", "steps", "seeds", "seed", "methods", "vectorize")
"""Settings in which a run may differ from its recipe and still speak for it."""
FUNCTIONS = ("make_task", "make_methods")
"""Compared only by whether they are this package's: they may have been renamed since the run."""


@dataclass(frozen=True)
class Run:
    """A run of one of the paper's recipes."""

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    curves: pl.DataFrame
    recipe: Experiment
    """Its length in optimizer steps and its methods are the paper's."""
    _losses: dict[int, dict[str, float]] = field(default_factory=dict, compare=False)

    @property
    def last(self) -> int:
        """K."""
        return last_step(self.curves)

    def losses(self, k: int) -> dict[str, float]:
        """Loss(m, k) of each method: the mean over seeds; infinite where it is not finite.

        A loss that is not finite is worse than any other, and no loss is as good as it.
        """
        if k not in self._losses:
            means = over_seeds(mark_loss(self.curves, k), "loss")
            self._losses[k] = {
                method: loss if math.isfinite(loss) else math.inf for method, loss in means.items()
            }
        return self._losses[k]

    @property
    def full_length(self) -> int:
        """The length that the recipe asks for, in optimizer steps."""
        return self.recipe.steps

    def has(self, *methods: str) -> bool:
        """Whether it ran these methods."""
        return set(methods) <= set(self.config["methods"])

    @property
    def methods_at_full_length(self) -> int:
        """How many of the recipe's methods it took to the recipe's length."""
        if self.last < self.full_length:
            return 0
        return len({*self.recipe.methods} & {*self.config["methods"]})


class Evidence(NamedTuple):
    """What the records of several folders hold."""

    runs: Sequence[Run]
    """Of the paper's recipes, with their settings but for ``FREE``."""
    meta: Mapping[str, pl.DataFrame]
    """Curves of meta-training, by the name of the learned optimizer; of several, the last given."""

    def run(self, name: str, *methods: str) -> Run | None:
        """The run that speaks for a recipe: it has these methods, and its seeds start at 0.

        Of several it is the one that took the most of the recipe's methods to the recipe's length,
        then the one with the most seeds, then the longest, then the last given. So one that has
        them all at that length speaks for every claim about the recipe.
        """
        fit = [
            run
            for run in self.runs
            if run.config["name"] == name and run.config["seed"] == 0 and run.has(*methods)
        ]
        return max(
            reversed(fit),
            key=lambda run: (run.methods_at_full_length, run.config["seeds"], run.last),
            default=None,
        )


def gather(records: Mapping[Path, Record]) -> Evidence:
    """What the records of these folders say; those of other experiments are passed over."""
    runs, meta = [], {}
    for folder, record in records.items():
        config, manifest, curves = record
        name = config["name"]
        if record.is_meta:
            meta[name] = curves
        elif name in PAPERS:
            recipe = PAPERS[name]()
            if has_settings(config, recipe):
                runs.append(Run(folder, config, manifest, curves, recipe))
    return Evidence(runs, meta)


def has_settings(config: Mapping[str, Any], recipe: Experiment) -> bool:
    """Whether a run has the settings of a recipe, but for ``FREE``."""

    def plain(name: str, value: Any) -> Any:
        ours = name in FUNCTIONS and str(value).startswith("lossguard.")
        return "lossguard" if ours else value

    return all(
        plain(name, config.get(name, value)) == plain(name, value)
        for name, value in as_config(recipe).items()
        if name not in FREE
    )


def marks(last: int) -> list[int]:
    """The steps at which claims are checked: 100, 300, 1,000, 3,000, ... up to the last."""
    return [k for power in range(2, 10) for k in (10**power, 3 * 10**power) if k <= last]

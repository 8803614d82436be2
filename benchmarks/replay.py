"""What ``Rewind`` makes of losses that others have logged, a loss a step.

    python -m benchmarks.replay losses.npz
    python -m benchmarks.replay losses.npz labels.json

The file has an array of losses for each run; labels, ``{run: {"label": what happened}}``, have the
runs counted by them. They are played to a ``Rewind`` of a model of one
weight, which is added to each loss: it is 0, and where the model is to be hurt a number that stays
until the run goes back. So the half rate after a return, and what a network does after a fault,
aren't in it. Runs of 3,000 steps or more are also hurt at three places, or get harder data there:
losses that stay higher whatever the run does. Two minutes for 160,000 losses.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from lossguard.torch import Rewind

RISES = 0.1, 0.2, 0.4, 0.8
PLACES = 0.3, 0.6, 0.9
LONG = 3000
WITHIN = 200
SLOW = 2000


def play(
    losses: Sequence[float], hurt: Callable[[int], float] = lambda step: 0.0
) -> tuple[Rewind, list[float]]:
    """The ``Rewind`` at the end, and the weight after each step; ``hurt`` is added before it."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nn.init.zeros_(model.weight)
    rewind, weights = Rewind(model, optimizer), []
    weight = model.weight.data
    for step, loss in enumerate(losses):
        weight += hurt(step)
        optimizer.step()
        rewind.observe(loss + weight.item())
        weights.append(weight.item())
    rewind.read()
    return rewind, weights


def count(runs: Sequence[Sequence[float]]) -> str:
    """A row of what it did."""
    rewinds = [play(run)[0] for run in runs]
    kinds = [event.kind for one in rewinds for event in one.events]
    suspected = kinds.count("trial") + kinds.count("unanswered")
    steps = sum(map(len, runs))
    lost = sum(one.discarded for one in rewinds)
    slower = sum(one.scale < 1 for one in rewinds)
    return (
        f"{len(runs)} runs, {steps} steps: {suspected} suspicions, {kinds.count('return')} returns "
        f"that stay, {100 * lost / steps:.2f} % of the steps lost, {slower} end at a lower rate"
    )


def undone(run: Sequence[float], place: float, rise: float) -> int | None:
    """Steps after which a rise was undone for good; None: it wasn't in time."""
    begin = round(place * len(run))
    _, weights = play(run[: begin + WITHIN], lambda step: rise if step == begin else 0.0)
    after = np.array(weights[begin:])
    return None if after[-1] > 1e-6 else int(np.flatnonzero(after > 1e-6)[-1]) + 1


def left_of_slow(run: Sequence[float], rise: float) -> float:
    """What stays of a rise over ``SLOW`` steps from 30 % on, ``WITHIN`` steps after its end."""
    begin = round(PLACES[0] * len(run))
    end = begin + SLOW
    slope = rise / SLOW
    _, weights = play(run[: end + WITHIN], lambda step: slope * (begin <= step < end))
    return weights[-1]


def wandering(correlation: float, steps: int = 20_000) -> list[float]:
    """Losses of level 3 and deviation 0.1, each of which is correlated with the one before."""
    fresh = np.random.default_rng(0).normal(0, 0.1 * (1 - correlation**2) ** 0.5, steps)
    noise = [0.0]
    for one in fresh:
        noise.append(correlation * noise[-1] + one)
    return [3 + one for one in noise[1:]]


def main(file: str, labels: str | None = None) -> None:
    """All tables."""
    with np.load(file) as archive:
        named = {name: archive[name].tolist() for name in archive.files}
    runs = [*named.values()]
    print("as they are:", count(runs), flush=True)
    if labels is not None:
        label_of = {
            name: one["label"] for name, one in json.loads(Path(labels).read_text()).items()
        }
        for label in sorted(set(label_of.values())):
            print(f"{label}:", count([named[n] for n in named if label_of[n] == label]), flush=True)
    long = [run for run in runs if len(run) >= LONG]
    harder = []
    for run in long:
        begin = len(run) // 2
        harder.append([*run[:begin], *(loss + 0.4 for loss in run[begin:])])
    print("0.4 more from the half on, whatever it does:", count(harder), flush=True)
    print(f"undone within {WITHIN} steps, of {len(long)} runs, at 30, 60 and 90 %; median delay")
    for rise in RISES:
        places = [[undone(run, place, rise) for run in long] for place in PLACES]
        delays = [one for found in places for one in found if one is not None]
        hits = ", ".join(str(sum(one is not None for one in found)) for found in places)
        print(f"{rise:g}: {hits}; {median(delays) if delays else 'none'}", flush=True)

    for rise in (0.5, 1.0):
        left = sorted(left_of_slow(run, rise) for run in long if 0.7 * len(run) > SLOW)
        print(
            f"of {rise:g} over {SLOW} steps stay {left[0]:.2f} to {left[-1]:.2f}, median "
            f"{median(left):.2f}",
            flush=True,
        )
    for correlation in (0.8, 0.95):
        print(f"noise of correlation {correlation:g}:", count([wandering(correlation)]), flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    main(*sys.argv[1:])

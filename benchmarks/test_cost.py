"""What the recommended guard costs once the learned optimizer has nothing left to give.

On real MNIST, from ``LOSSGUARD_DATA``. Off by default; ``make bench`` runs it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lossguard
from lossguard import rollout
from lossguard.tasks import MLP, Task, load_dataset

PLATEAU, CYCLES, CHUNK = 300, 2_000, 100
"""Cycles until the learned optimizer is on its plateau, cycles measured, cycles a turn."""


def test_cost_after_the_plateau(report: Callable[..., None]) -> None:
    """Seconds of 20,000 steps, over those of the fallback lanes that the promise still needs."""
    if not Path(os.environ.get("LOSSGUARD_DATA", ""), "mnist").is_dir():
        pytest.skip("LOSSGUARD_DATA names no folder with mnist")
    task = Task(load_dataset("mnist", scaling="unit"), MLP())
    fallback = optax.sgd(lossguard.paper_decay(3.0, 50_000))
    learned = lossguard.pretrained("lstm-mnist-mlp")
    guards = {
        "alone": lossguard.unguarded(fallback),
        "recommended": lossguard.recommended(learned, fallback),
        "paper": lossguard.loss_guard(learned, fallback),
    }
    objective = task.objective(jax.random.key(2))
    params = task.init(jax.random.key(1))

    def go(name: str, cycles: int) -> np.ndarray:
        states[name], decisions = rollout(guards[name], states[name], objective, cycles=cycles)
        return np.asarray(decisions.gradients - decisions.learned_updates)

    states = {name: guard.init(params) for name, guard in guards.items()}
    for name in guards:
        for _ in range(PLATEAU // CHUNK):
            go(name, CHUNK)

    seconds, lanes = dict.fromkeys(guards, 0.0), []
    for turn in range(CYCLES // CHUNK):
        for name in guards if turn < 2 else ("alone", "recommended"):  # the paper's is slow
            begin = time.perf_counter()
            steps = go(name, CHUNK)
            seconds[name] += time.perf_counter() - begin
            if name == "recommended":
                lanes.append(steps.sum() / (10 * CHUNK))
    seconds["paper"] *= CYCLES / CHUNK / 2
    needed = float(np.mean(lanes))
    report(
        lambda: go("recommended", CHUNK),
        "at most 1.15 of the lanes needed",
        over_the_lanes_needed=round(seconds["recommended"] / seconds["alone"] / needed, 2),
        lanes_needed=round(needed, 2),
        recommended_over_the_fallback=round(seconds["recommended"] / seconds["alone"], 2),
        paper_over_the_fallback=round(seconds["paper"] / seconds["alone"], 1),
    )

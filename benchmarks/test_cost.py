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
    """Seconds of 20,000 steps over those of the fallback alone, and what was computed a step."""
    if not Path(os.environ.get("LOSSGUARD_DATA", ""), "mnist").is_dir():
        pytest.skip("LOSSGUARD_DATA names no folder with mnist")
    task = Task(load_dataset("mnist", scaling="unit"), MLP())
    fallback = optax.sgd(lossguard.paper_decay(3.0, 50_000))
    learned = lossguard.pretrained("lstm-mnist-mlp")
    guards = {
        "alone": lossguard.unguarded(fallback),
        "recommended": lossguard.recommended(learned, fallback),
        "hedged": lossguard.hedged(learned, fallback),
        "paper": lossguard.loss_guard(learned, fallback),
    }
    objective = task.objective(jax.random.key(2))
    params = task.init(jax.random.key(1))

    def go(name: str, cycles: int) -> lossguard.Decision:
        states[name], decisions = rollout(guards[name], states[name], objective, cycles=cycles)
        return jax.tree.map(np.asarray, decisions)

    states = {name: guard.init(params) for name, guard in guards.items()}
    for name in guards:
        for _ in range(PLATEAU // CHUNK):
            go(name, CHUNK)

    seconds, spent, turns = dict.fromkeys(guards, 0.0), {}, CYCLES // CHUNK
    for turn in range(turns):
        for name in guards if turn < 2 else ("alone", "recommended", "hedged"):  # it is slow
            begin = time.perf_counter()
            decisions = go(name, CHUNK)
            seconds[name] += time.perf_counter() - begin
            counts = np.array([decisions.gradients.sum(), decisions.learned_updates.sum()])
            spent[name] = spent.get(name, 0) + counts
    seconds["paper"] *= turns / 2
    steps = 10 * CYCLES
    report(
        lambda: go("recommended", CHUNK),
        "recommended at most 1.12 gradients a step",
        **{
            f"{name}_over_the_fallback": round(seconds[name] / seconds["alone"], 2)
            for name in ("recommended", "hedged", "paper")
        },
        **{
            f"{name}_gradients_and_learned_updates_a_step": (spent[name] / steps).round(3).tolist()
            for name in ("recommended", "hedged")
        },
    )

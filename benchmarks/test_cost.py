"""What guards cost in seconds: once it is clear who leads, where a lane is idle, to compile.

Off by default; ``make bench`` runs it.
"""

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import guards_of, milliseconds

import lossguard
from lossguard import rollout
from lossguard.tasks import MLP, Task, load_dataset

PLATEAU, CYCLES, CHUNK = 300, 2_000, 100
"""Cycles until the learned optimizer is on its plateau, cycles measured, cycles a turn."""
SEEDS = 20
"""Runs side by side, under ``vmap``."""
X = jax.random.normal(jax.random.key(0), (128, 784))
START = {"a": jnp.ones((784, 20)) / 28, "b": jnp.ones((20, 10)) / 5}


def objective(params: dict[str, jax.Array], i: jax.Array) -> jax.Array:
    """As large as MNIST + MLP, without its data."""
    outputs = jnp.tanh(jnp.roll(X, i, 0) @ params["a"]) @ params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.arange(128) % 10).mean()


def guards() -> dict[str, lossguard.Guard]:
    """Over SGD, of the LSTM; and the two alone."""
    fallback, learned = optax.sgd(0.1), lossguard.pretrained("lstm-mnist-mlp")
    return {
        "alone": lossguard.unguarded(fallback),
        "learned": lossguard.unguarded(learned),
        "rewind": lossguard.unguarded(lossguard.rewind(learned)),
        **guards_of(learned, fallback),
    }


def test_compile_time(report: Callable[..., None]) -> None:
    """CPU seconds to trace and compile a step, by guard: of one run, and of 20 under ``vmap``."""

    found = {}
    for name, guard in guards().items():
        state, seconds = guard.init(START), []
        step = lambda state, guard=guard: guard.step(state, objective)  # noqa: E731
        many = jax.tree.map(lambda leaf: jnp.stack([leaf] * SEEDS), state)
        for form, at in ((step, state), (jax.vmap(step), many)):
            before = time.process_time()
            jax.jit(form).lower(at).compile()
            seconds.append(round(time.process_time() - before, 1))
        found[name] = seconds
    report(lambda: None, "each under 10 CPU seconds", **found)


def test_idle_lanes(report: Callable[..., None]) -> None:
    """Cycles in which nothing is tried, over those of the fallback alone."""
    fallback, learned = optax.sgd(0.1), lossguard.pretrained("lstm-mnist-mlp")
    idle = jnp.int32(10**9)  # steps that trials have had already: none is due

    def quiet(guard: lossguard.Guard) -> Callable[[], object]:
        state = guard.init(START)
        if hasattr(state.inner, "relay"):
            relay = state.inner.relay._replace(trial_cost=idle)
            state = state._replace(inner=state.inner._replace(relay=relay), steps=jnp.int32(100))
        # Not donated: the same cycles again.
        run = jax.jit(lambda state: rollout(guard, state, objective, cycles=CHUNK))
        return lambda: jax.block_until_ready(run(state))

    candidates = {
        "alone": quiet(lossguard.unguarded(fallback)),
        "recommended": quiet(lossguard.recommended(learned, fallback)),
        "hedged": quiet(lossguard.hedged(learned, fallback)),
    }
    times = milliseconds(candidates, 9)
    ratios = {
        f"{name}_over_the_fallback": round(times[name] / times["alone"], 3)
        for name in ("recommended", "hedged")
    }
    report(candidates["recommended"], "at most 1.05", **ratios)


def test_rewind(report: Callable[..., None]) -> None:
    """Steps of AdamW under ``rewind`` over those of AdamW alone, of 670,000 parameters."""
    keys, sizes = jax.random.split(jax.random.key(1), 3), (784, 512, 512, 10)
    start = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, pairwise(sizes), strict=True)
    ]

    def loss(params: list[jax.Array], i: jax.Array) -> jax.Array:
        hidden = jnp.roll(X, i, 0)
        for weight in params[:-1]:
            hidden = jax.nn.relu(hidden @ weight)
        return optax.softmax_cross_entropy_with_integer_labels(
            hidden @ params[-1], jnp.arange(128) % 10
        ).mean()

    def steps(optimizer: optax.GradientTransformation) -> Callable[[], object]:
        guard = lossguard.unguarded(optimizer)
        state = guard.init(start)
        run = jax.jit(lambda state: rollout(guard, state, loss, cycles=10))
        return lambda: jax.block_until_ready(run(state))

    adamw = optax.adamw(1e-3)
    candidates = {"alone": steps(adamw), "rewind": steps(lossguard.rewind(adamw))}
    times = milliseconds(candidates, 9)
    ratio = round(times["rewind"] / times["alone"], 2)
    report(candidates["rewind"], "no bound", rewind_over_adamw=ratio)


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

"""What a probe begins from: a fresh learned optimizer, an old one, or one with the last gradients.

    lossguard run examples/warming_up.py:spirals        # or mnist
    lossguard run examples/warming_up.py:spirals --loser keep --methods SGDnm "patience 10, kept"

While the learned optimizer keeps losing, the recommended guard tries it ever less often, from a
fresh state. Here the gradients of the fallback's last nt steps are fed to that state first, at nt
learned updates a probe. Where losers keep their states, a probe may also begin from the last one's.
It also shows a guard around a guard: two pure functions.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree

from lossguard import Decision, Guard, GuardState, backoff, loss_guard, pretrained
from lossguard.experiments import Experiment
from lossguard.experiments.experiment import Methods, paper_methods, sgd_fallback, with_methods
from lossguard.experiments.recipes import fig03, fig05
from lossguard.guards.branch import Branch, optimizer_step
from lossguard.guards.protocol import Objective, Params
from lossguard.guards.recommended import settings

PATIENCE = 200, 30, 10
"""Losses running after which waits begin; the first is the recommended guard's."""


def warmed_up(guard: Guard, learned: Any, fallback: Any, nt: int) -> Guard:
    """A loss guard, whose probes after a wait begin with the gradients of the cycle before.

    Args:
        guard: hedged, with z, and checks apart, so that a cycle takes nt minibatches.
        learned: its learned optimizer, in optax's form with extra arguments.
        fallback: its fallback, likewise.
        nt: optimizer steps a cycle.
    """

    def init(params: Params) -> GuardState:
        state = guard.init(params)
        return remember(state, state)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        before, inner = state.inner
        now = state._replace(inner=inner)
        due = (inner.probing.wait > 0) & (inner.probing.left == 0)
        warm = partial(replay, before, objective, state.minibatches - nt)
        fresh = learned.init(state.params)
        lanes = inner.lanes._replace(
            learned=(jax.lax.cond(due, warm, lambda _: inner.lanes.learned[0], fresh),)
        )
        after, decision = guard.step(now._replace(inner=inner._replace(lanes=lanes)), objective)
        return remember(now, after), decision

    def remember(before: GuardState, after: GuardState) -> GuardState:
        """The later state, and where lane z was in the earlier one."""
        z = Branch(before.params, before.inner.lanes.fallback)
        return after._replace(inner=(z, after.inner))

    def replay(z: Branch, objective: Objective, i: Array, fresh: PyTree) -> PyTree:
        """A learned state after the gradients that lane z met from minibatch i on."""

        def one(t: Array, carry: tuple[Branch, PyTree]) -> tuple[Branch, PyTree]:
            z, state = carry
            loss, gradient = jax.value_and_grad(objective)(z.params, i + t)
            _, state = learned.update(gradient, state, z.params, value=loss)
            z, _ = optimizer_step(fallback, z, objective, i + t)
            return z, state

        return jax.lax.fori_loop(0, nt, one, (z, fresh))[1]

    return Guard(init, step)


def methods(e: Experiment) -> Methods:
    """SGDnm, and the recommended guard with less and less patience, cold, warmed up and kept."""
    learned = optax.with_extra_args_support(pretrained(e.learned))
    fallback = optax.with_extra_args_support(sgd_fallback(e))

    def make(patience: int, begins: str) -> Guard:
        options: Mapping[str, Any] = settings(e.nt, e.nc, 16 * e.nc) | {
            "loser": e.loser,
            "probing": backoff(patience=patience, most=512, start="keep" if begins else "reset"),
        }
        guard = loss_guard(learned, fallback, nt=e.nt, nc=e.nc, **options)
        return warmed_up(guard, learned, fallback, e.nt) if begins == ", warmed up" else guard

    guards = {
        f"patience {patience}{begins}": partial(make, patience, begins)
        for patience in PATIENCE
        for begins in ("", ", warmed up", *([", kept"] if e.loser == "keep" else []))
    }
    return {"SGDnm": paper_methods(e)["SGDnm"], **guards}


def on(e: Experiment) -> Experiment:
    """An experiment with these methods; losers begin anew, as the recommended guard's do."""
    title = f"What a probe begins from, on {e.tested_on}"
    return with_methods(methods, replace(e, loser="reset"), title=title)


def spirals() -> Experiment:
    """Spirals + MLP."""
    return replace(on(fig05()), name="warming-up-spirals", steps=20_000, seeds=8)


def mnist() -> Experiment:
    """MNIST + MLP."""
    return replace(on(fig03()), name="warming-up-mnist", steps=5_000)

"""Guards side by side, of which the best is followed: a guard of guards."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..validation import check_count, check_decay, check_kind
from .branch import check
from .protocol import (
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    as_arrays,
    check_state,
    loss_dtype,
    start,
    sum_dtype,
)
from .soundness import is_sound, keep_schedules, select
from .stacked import stacked


class BestOfState(NamedTuple):
    """What the guards are at, each on its own path."""

    members: tuple[GuardState, ...]
    records: Float[Array, " members"]
    """D of each."""
    drawn: Int[Array, ""]
    """Check minibatches so far."""


def best_of(guards: Sequence[Guard], *, nc: int = 0, decay: float = 0.9) -> Guard:
    """Run several guards, each on its own path, and follow the one whose recent losses are lowest.

    On the same minibatches, for each guard j:

        d[j] <- mean_t F(branch of j, i+t)          before each of its steps of this cycle
        D[j] <- decay D[j] + d[j]
        x <- x[j] of the lowest D[j]

    Ten steps' check can't tell which of several optimizers is better in the long run; paths that
    none of the others disturbs can. For any guards and at any time, the discounted sum of the
    losses that x reports is at most that of each guard which was finite so far ("be the leader":
    Kalai and Vempala, 2005):

        sum_c decay^(C-c) d[followed in c](c)  <=  min_j sum_c decay^(C-c) d[j](c)

    Where data repeat, training losses are lower for whoever overfits. With ``nc``

        d[j] <- mean_k F(x[j], -1-(c nc+k)),   k = 0 .. nc-1   after cycle c = 0, 1, ...

    whose minibatches, of numbers below 0, the objective may take from held-out data. Members that
    number their checks apart, as ``recommended`` does, decide by the same ones, which flatters them
    beside others.

    Args:
        guards: any guards whose longest cycles have the same nt. Those whose windows adapt are
            compared cycle by cycle, however long. The first is followed where all are level.
        nc: check minibatches a cycle; by default none.
        decay: D remembers about 1 / (1 - decay) cycles.

    ``decision.winner`` numbers the guards; ``gradients``, ``forwards`` and ``learned_updates`` are
    the sums over them, the rest is of the one that is followed. A guard whose losses or parameters
    are not finite begins anew at x, its schedules going on, with the record of the one that is
    followed. If that is true of all, x stays, the records are 0, and ``winner`` is -1. Losses that
    are finite for no guard, for the minibatches' fault, don't count.

    Memory and cost: those of the guards together, and nc forward passes of each.

    Raises:
        ValueError: if there are no guards, or something else is one of them, nc is not an integer
            of at least 0, or decay not above 0 and below 1; in the first step, if their longest
            cycles differ, or there are checks and the objective is ``stacked``.

    >>> import optax
    >>> from lossguard import recommended
    >>> candidates = [optax.sgd(3.0), optax.adam(0.5)]
    >>> guard = best_of([recommended(one, optax.sgd(0.1)) for one in candidates])
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(state.steps), int(decision.gradients)
    (10, 40)
    """
    members = tuple(guards)
    if not members:
        raise ValueError("guards must be at least one guard, got none")
    for one in members:
        check_kind("each of guards", one, Guard, "unguarded(optimizer)")
    nc, decay = check_count("nc", nc, least=0), check_decay(decay)

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        dtype = sum_dtype(params)
        states = tuple(guard.init(params) for guard in members)
        return start(params, BestOfState(states, jnp.zeros(len(members), dtype), jnp.int32(0)))

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, BestOfState)
        if nc and isinstance(objective, stacked):
            raise ValueError(f"nc must be 0 for stacked minibatches, got {nc}")
        i = state.minibatches  # of all: they are compared on the same ones
        before = (at._replace(minibatches=i) for at in state.inner.members)
        stepped = [guard.step(at, objective) for guard, at in zip(members, before, strict=True)]
        states, decisions = zip(*stepped, strict=True)
        windows = {len(decision.losses) for decision in decisions}
        if len(windows) > 1:
            raise ValueError(f"guards must have the same nt, got {sorted(windows)}")

        now = current(state, objective, states, decisions)
        now = jnp.where(jnp.isfinite(now).any(), now, 0)  # a minibatch that is lost on all
        records = decay * state.inner.records + now.astype(state.inner.records.dtype)
        sound = jnp.stack([is_sound(at.params, state.params) for at in states])
        fit = jnp.isfinite(records) & sound
        records = jnp.where(fit, records, jnp.inf)
        best = jnp.argmin(records)
        followed, decision = jax.tree.map(
            lambda *leaves: jnp.stack(leaves)[best],
            *((at.params, d) for at, d in zip(states, decisions, strict=True)),
        )
        x = select(fit.any(), followed, state.params)
        records = jnp.where(fit, records, jnp.where(fit.any(), records[best], 0))
        states = tuple(
            jax.lax.cond(fit[j], lambda at=at: at, lambda j=j, at=at: anew(members[j], x, at))
            for j, at in enumerate(states)
        )
        decision = decision._replace(
            winner=jnp.where(fit.any(), best, -1).astype(jnp.int32),
            gradients=sum(d.gradients for d in decisions),
            forwards=sum(d.forwards for d in decisions) + nc * len(members),
            learned_updates=sum(d.learned_updates for d in decisions),
        )
        minibatches = jnp.stack([at.minibatches for at in states]).max()
        steps = state.steps + decision.steps
        inner = BestOfState(states, records, state.inner.drawn + nc)
        return GuardState(x, steps, minibatches, inner), decision

    def current(
        before: GuardState,
        objective: Objective,
        after: Sequence[GuardState],
        decisions: Sequence[Decision],
    ) -> Float[Array, " members"]:
        """d of each guard in this cycle."""
        if not nc:
            return jnp.stack([mean_loss(decision) for decision in decisions])
        dtype = loss_dtype(objective, before.params, before.minibatches)
        ends, first = [at.params for at in after], -1 - before.inner.drawn
        losses, _ = check(ends, objective, first, stride=-1, looks=(nc,), most=nc, dtype=dtype)
        return losses.mean(axis=1)

    return Guard(init, step)


def anew(guard: Guard, x: Params, was: GuardState) -> GuardState:
    """A guard's first state, at x, with the counts and schedules that it had."""
    fresh = guard.init(x)._replace(steps=was.steps, minibatches=was.minibatches)
    return jax.tree.map_with_path(
        lambda path, new, old: old if path[-1:] == (DRAWN,) else new,
        keep_schedules(fresh, was),
        was,
    )


DRAWN = jax.tree_util.GetAttrKey("drawn")
"""Of a guard's own state: the check minibatches so far, where they are numbered apart."""


def mean_loss(decision: Decision) -> Float[Array, ""]:
    """The mean training loss of a cycle, of the branch given out."""
    counts = jnp.arange(len(decision.losses)) < decision.steps
    return jnp.mean(decision.losses, where=counts)

"""The guard that we recommend where compute is scarce: a relay, and the fallback by itself."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..rules import BELOW, MORE
from ..validation import check_part
from . import progress as progresses
from . import trial as trials
from .cycle import Cycle, guard_of
from .lanes import with_extra_args
from .losses import Point
from .protocol import OWN, Decision, Guard, advance
from .relay import Relay, RelayState, go_back, lead_from, leader
from .soundness import select


class RecommendedState(NamedTuple):
    """The relay of x, and what is known of the fallback by itself."""

    relay: RelayState
    own_steps: Int[Array, ""]
    """Steps of the fallback by itself."""
    progress: progresses.Progress
    """Of the fallback by itself; not smoothed, as s may run seldom."""
    against: trials.Trial
    """A trial of s against x, in the cycles in which both run."""
    GOES_ON = ("own_steps",)


def recommended(learned: Any, fallback: Any, *, nt: int = 10, share: float = 0.05) -> Guard:
    """Whoever leads runs; a challenger runs in a small share of the steps.

    x is where the fallback is, until the learned optimizer, on trial from there, is better by three
    standard errors. From then on x is where that one is, until its loss stalls or rises. Meanwhile
    the fallback's own run stays behind as lane s; x goes back to it if it wins a trial against x.
    ``docs/guards.md`` has the rules.

    A cycle costs nt gradients, and nt more for each challenger that runs in it: the learned one on
    trial, in at most max(first, ``share`` k + sqrt(k)) of k steps, first being ten, rounded up to
    whole cycles; s while x is off its path, in at most ``share`` k of them, or five times that if
    by then its loss, falling on as it does, would be a tenth below that of x.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is trusted, likewise.
        nt: optimizer steps a cycle.
        share: of the steps, for each challenger; up to five times that for s.

    ``decision.losses`` are of the leader before the cycle: x's, without hindsight. ``learned_loss``
    and ``fallback_loss`` are of a trial. A lane that is not finite can't lead, and x stays finite
    if it begins so.

    Memory: four copies of the parameters, two states of the fallback, one of the learned optimizer.

    Raises:
        ValueError: if nt is not an integer of at least 1, or share not at least 0 and below 1; in a
            step, if there aren't nt minibatches.

    >>> import optax
    >>> guard = recommended(optax.sgd(0.4), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner), float(decision.price())  # the learned one has won its first trial
    (0, 20.0)
    """
    share = check_part("share", share)
    learned, fallback = with_extra_args("learned", learned), with_extra_args("fallback", fallback)
    relay = Relay(learned, fallback, share)

    def begin(x: Point) -> RecommendedState:
        own = progresses.begin()
        return RecommendedState(relay.begin(x), jnp.int32(0), own, trials.unbounded())

    return guard_of(begin, partial(cycle, relay), nt=nt)


def cycle(
    relay: Relay, x: Point, inner: RecommendedState, now: Cycle
) -> tuple[Point, RecommendedState, Decision]:
    """The relay, and s if it is due."""
    on_own = inner.relay.winner == OWN
    runs = ~on_own & is_due(inner, now.k, relay.share)
    state, decision, (of_s, _) = relay.step(lead_from(inner.relay, x), runs, now)

    tried, won, lost = trials.play(inner.against, of_s, decision.losses)
    against = select(won | lost, trials.unbounded(), tried)
    loss = trials.finite_mean(jnp.where(on_own, decision.losses, of_s))  # NaN where s stands still
    progress = progresses.add(inner.progress, loss, now.nt, memory=0)
    state = go_back(state, runs & won, progress.recent)
    after = RecommendedState(
        relay=state,
        own_steps=advance(inner.own_steps, jnp.where(on_own | runs, now.nt, 0)),
        progress=progress,
        against=select(runs, against, inner.against),
    )
    return leader(state), after, decision._replace(winner=state.winner)


def is_due(inner: RecommendedState, k: Int[Array, ""], share: float) -> Bool[Array, ""]:
    """Whether s has had fewer than its part of the k steps so far."""
    more, loss = min(1.0, MORE * share), inner.relay.progress.recent
    own_steps, k = inner.own_steps.astype(float), k.astype(float)
    soon = progresses.expected_at(inner.progress, more * k) < loss - BELOW * jnp.abs(loss)
    return own_steps < jnp.where(soon, more, share) * k

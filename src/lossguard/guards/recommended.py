"""The guard that we recommend where compute is scarce: a relay, and the fallback by itself."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..validation import check_count, check_share
from . import progress as progresses
from . import trial as trials
from .lanes import Lane, is_fine, train_if
from .progress import Progress
from .protocol import (
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    advance,
    as_arrays,
    check_state,
    following,
    loss_dtype,
    start,
    sum_dtype,
    with_extra_args,
)
from .relay import Leg, Relay, RelayState, at, lead_from, leader, report
from .soundness import renew_if_unsound, select, with_sound_gradients
from .stacked import check_stacked
from .trial import Trial

LOOKS = 3
"""Cycles on which s is compared with x, each time that it is."""
MORE = 5
"""Times ``share``: that of s where, as its losses fall, it would be below x by then."""
BELOW = 0.1
"""By this part of the loss of x."""


class RecommendedState(NamedTuple):
    """The relay of x, and the fallback by itself."""

    relay: RelayState
    s: Lane
    """The fallback by itself. While x is on its path x stands for it, and s is where it was."""
    on_own: Bool[Array, ""]
    """Whether x is on the path of the fallback by itself."""
    own_steps: Int[Array, ""]
    """Steps of the fallback by itself."""
    progress: Progress
    """Of the fallback by itself; not smoothed, as s may run seldom."""
    against: Trial
    """A trial of s against x, in the cycles in which both run."""


def recommended(learned: Any, fallback: Any, *, nt: int = 10, share: float = 0.05) -> Guard:
    """Whoever leads runs; a challenger runs in a small share of the steps.

    x is the leader's, who is one of two:

    - *The fallback.* Now and then the learned optimizer is tried from x, beside it and on the same
      minibatches. It takes over if it is better by three standard errors.
    - *The learned optimizer.* It leads while its loss falls: by a power of 1/4 of its age at least.
      When it stalls the fallback goes on from there, or from a snapshot if the loss has risen.

    When the learned optimizer first takes over, the fallback's own run stays behind as lane s. It
    runs until it has had ``share`` of the steps, or five times that, if by then its loss, falling
    on as it does, would be a tenth below that of x. x goes back to it if it wins a trial against x.

    So a cycle costs nt gradients, and nt more for each challenger that runs in it: y on trial while
    the fallback leads, in at most ``share`` of the steps and sqrt(k) more; s while x is off its
    path, in at most that share. Training losses decide; no minibatch is only checked on.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is trusted, likewise.
        nt: optimizer steps a cycle.
        share: of the steps, for each challenger.

    ``decision.losses`` are of the leader before the cycle: x's, without hindsight. ``learned_loss``
    and ``fallback_loss`` are of a trial. A lane that is not finite can't lead, and x stays finite
    if it begins so.

    Memory: four copies of the parameters, two states of the fallback, one of the learned optimizer.

    Raises:
        ValueError: if nt is not an integer of at least 1, or share not at least 0 and below 1; in a
            step, if the objective is ``stacked`` and holds fewer than nt minibatches.

    >>> import optax
    >>> guard = recommended(optax.sgd(0.4), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner), float(decision.price())  # the learned one has won its first trial
    (0, 20.0)
    """
    nt, share = check_count("nt", nt), check_share(share)
    more = min(1.0, MORE * share)
    trusted = with_extra_args("fallback", fallback)
    relay = Relay(with_extra_args("learned", learned), trusted, nt, share)

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        zero = jnp.zeros((), sum_dtype(params))
        inner = RecommendedState(
            relay=relay.init(params),
            s=Lane(params, trusted.init(params)),
            on_own=jnp.array(True),
            own_steps=jnp.int32(0),
            progress=progresses.begin(zero),
            against=new_trial(zero),
        )
        return start(params, inner)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, RecommendedState)
        check_stacked(objective, nt)
        inner, i, k = state.inner, state.minibatches, state.steps
        loss_dtype(objective, state.params, i)  # refuses what is no loss
        objective = with_sound_gradients(objective)
        own_steps, steps = (n.astype(inner.against.bound.dtype) for n in (inner.own_steps, k))
        now = inner.relay.progress.recent
        soon = progresses.expected_at(inner.progress, more * steps) < now - BELOW * jnp.abs(now)
        due = jnp.where(soon, more, share) * steps
        runs = ~inner.on_own & (own_steps < due)
        x, leg = relay.step(lead_from(inner.relay, state.params), objective, i, k)
        s, of_s = train_if(runs, trusted, inner.s, objective, i, nt=nt, dtype=leg.losses.dtype)
        inner = settle(inner._replace(relay=x), s, leg, of_s, runs)
        decision = report(leg, inner.relay, on_own=inner.on_own, s_ran=runs)
        after = GuardState(leader(inner.relay), advance(k, nt), following(i, nt), inner)
        return after, decision

    def settle(
        inner: RecommendedState,
        s: Lane,
        leg: Leg,
        of_s: Float[Array, " nt"],
        runs: Bool[Array, ""],
    ) -> RecommendedState:
        """x leaves the fallback's own path, stays off it, or goes back to it."""
        fine = is_fine(s, jnp.where(runs, of_s, 0), inner.s.params)
        s = Lane(select(fine, s.params, inner.s.params), s.state)
        s = s._replace(state=renew_if_unsound(trusted, s.params, s.state))
        leaves = inner.on_own & leg.taken_over
        heard = runs & fine
        against = select(heard, trials.add(inner.against, of_s, leg.losses), inner.against)
        won, lost = trials.outcome(against, of_s)
        back = heard & won
        against = select(leaves | (heard & (won | lost)), new_trial(against.bound), against)
        ran = heard | (inner.on_own & leg.fine_z)
        loss = jnp.where(heard, of_s, leg.losses).mean()
        progress = progresses.add(inner.progress, loss, nt, memory=0)
        progress = select(ran, progress, inner.progress)
        return RecommendedState(
            relay=select(back, at(inner.relay, s, progress.recent), inner.relay),
            s=select(leaves, inner.relay.z, s),
            on_own=(inner.on_own & ~leaves) | back,
            own_steps=advance(inner.own_steps, jnp.where(inner.on_own | runs, nt, 0)),
            progress=progress,
            against=against,
        )

    return Guard(init, step)


def new_trial(like: Float[Array, ""]) -> Trial:
    """A trial of s against x, which s wins by its losses alone."""
    return trials.begin(jnp.int32(LOOKS), jnp.full_like(like, jnp.inf))

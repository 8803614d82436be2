"""The guard for where optimizer steps are scarce: never above the fallback after as many steps."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..validation import check_count, check_share
from .lanes import Lane, is_fine, train_if
from .protocol import (
    OWN,
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
from .soundness import keep_schedules, renew_if_unsound, select, with_sound_gradients
from .stacked import check_stacked

DECAY = 0.7
"""Weight of the past in the regret, a cycle."""
PATIENCE = 0.1
"""x goes back to s once s has led for this part of the cycles since x left it, at a stretch."""
LEAST = 3
"""The least number of these cycles."""


class HedgedState(NamedTuple):
    """The relay of x, the fallback by itself, and how x has done against it."""

    relay: RelayState
    s: Lane
    """The fallback by itself; while x is on its path x stands for it, and s is where it was."""
    on_own: Bool[Array, ""]
    """Whether x is on that path."""
    regret: Float[Array, ""]
    """R, the discounted sum of x's losses less those of s."""
    away: Int[Array, ""]
    """Cycles since x left the path of s."""
    behind: Int[Array, ""]
    """Cycles in a row in which s led."""


def hedged(learned: Any, fallback: Any, *, nt: int = 10, share: float = 0.05) -> Guard:
    """In every run the training losses that it reports never sum up to more than the fallback's.

    x is run as in ``recommended``. Beside it runs s, the fallback by itself, on every minibatch:

        R <- 0.7 R + sum_t [F(x, i+t) - F(s, i+t)]    over the nt steps of a cycle
        params <- s   if R > 0   else x

    x goes on while s leads, and goes back to s if that lasts for a tenth of the cycles since x left
    the path of s. While x is on that path, x is s, and s costs nothing.

    ``decision.losses`` are those of the lane that leads after the cycle, with hindsight. For these,
    at the end of every cycle and in every run,

        sum losses  <=  sum losses of the fallback alone

    if the fallback alone stays finite, up to rounding (``docs/guarantees.md``).

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is trusted, likewise.
        nt: optimizer steps a cycle.
        share: of the steps, for the learned optimizer while it is only on trial.

    Price of a step, in gradients: 1 and at most ``share`` on the fallback's path, 2 and at most
    ``share`` off it; sqrt(k) more in all. Memory: five copies of the parameters, two states of the
    fallback, one of the learned optimizer.

    Raises:
        ValueError: as ``recommended``.

    >>> import optax
    >>> guard = hedged(optax.sgd(0.4), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner), float(decision.price())
    (0, 20.0)
    """
    nt, share = check_count("nt", nt), check_share(share)
    trusted = with_extra_args("fallback", fallback)
    relay = Relay(with_extra_args("learned", learned), trusted, nt, share)

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        inner = HedgedState(
            relay=relay.init(params),
            s=Lane(params, trusted.init(params)),
            on_own=jnp.array(True),
            regret=jnp.zeros((), sum_dtype(params)),
            away=jnp.int32(0),
            behind=jnp.int32(0),
        )
        return start(params, inner)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, HedgedState)
        check_stacked(objective, nt)
        inner, i, k = state.inner, state.minibatches, state.steps
        loss_dtype(objective, state.params, i)  # refuses what is no loss
        objective = with_sound_gradients(objective)
        gave_s = inner.regret > 0
        inner = inner._replace(
            relay=select(gave_s, inner.relay, lead_from(inner.relay, state.params)),
            s=inner.s._replace(params=select(gave_s, state.params, inner.s.params)),
        )
        x, leg = relay.step(inner.relay, objective, i, k)
        runs = ~inner.on_own
        s, of_s = train_if(runs, trusted, inner.s, objective, i, nt=nt, dtype=leg.losses.dtype)
        inner, gives_s = settle(inner._replace(relay=x), s, leg, of_s)
        decision = report(leg, inner.relay, on_own=inner.on_own, s_ran=runs)
        decision = decision._replace(
            used_learned=decision.used_learned & ~gives_s,
            losses=jnp.where(gives_s, of_s, leg.losses),
            winner=jnp.where(gives_s, OWN, decision.winner).astype(jnp.int32),
        )
        params = select(inner.regret > 0, inner.s.params, leader(inner.relay))
        return GuardState(params, advance(k, nt), following(i, nt), inner), decision

    def settle(
        inner: HedgedState, s: Lane, leg: Leg, of_s: Float[Array, " nt"]
    ) -> tuple[HedgedState, Bool[Array, ""]]:
        """The state after the cycle, and whether s leads in what is reported of it."""
        runs, before, x = ~inner.on_own, inner.s.params, leader(inner.relay)
        fine = is_fine(s, jnp.where(runs, of_s, 0), before)
        s_state = renew_if_unsound(trusted, s.params, s.state)
        s_state = select(fine, s_state, keep_schedules(trusted.init(x), s_state))
        s = Lane(select(fine, s.params, x), s_state)  # not finite any more: it begins again at x

        known = runs & fine
        d = (leg.losses.sum() - of_s.sum()).astype(inner.regret.dtype)
        d = jnp.where(jnp.isfinite(d), d, jnp.inf)  # x had a loss that isn't finite, and s hadn't
        regret = jnp.where(known, DECAY * inner.regret + d, 0)
        gives_s = regret > 0
        leaves = inner.on_own & leg.taken_over
        away = jnp.where(runs, advance(inner.away, 1), 0)
        behind = jnp.where(gives_s, inner.behind + 1, 0)
        patience = jnp.maximum(LEAST, PATIENCE * away.astype(regret.dtype))
        back = known & ((behind.astype(regret.dtype) >= patience) | jnp.isinf(regret))
        after = HedgedState(
            relay=select(back, at(inner.relay, s, of_s.mean()), inner.relay),
            s=select(leaves, inner.relay.z, s),
            on_own=(inner.on_own & ~leaves) | back,
            regret=jnp.where(back, 0, regret),
            away=jnp.where(back, 0, away),
            behind=jnp.where(back, 0, behind),
        )
        return after, gives_s

    return Guard(init, step)

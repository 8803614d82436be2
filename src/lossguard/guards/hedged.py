"""The guard for where optimizer steps are scarce: a promise on the losses of every cycle."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..rules import DECAY, PATIENCE, STRETCH
from ..validation import check_part
from .clocks import renew
from .cycle import Cycle, guard_of
from .lanes import Lane, with_extra_args
from .losses import Point
from .protocol import OWN, Decision, Guard, advance
from .relay import Relay, RelayState, go_back, lead_from, leader
from .soundness import select
from .trial import bounded, breaks, finite_mean


class HedgedState(NamedTuple):
    """The relay of x, and how x has done against the fallback by itself."""

    relay: RelayState
    regret: Float[Array, ""]
    """R, the discounted sum of x's losses less those of s."""
    away: Int[Array, ""]
    """Cycles since x left the path of s."""
    behind: Int[Array, ""]
    """Cycles in a row in which R was positive."""
    s_leads: Bool[Array, ""]
    """Whether the parameters that were returned are those of s."""


def hedged(learned: Any, fallback: Any, *, nt: int = 10, share: float = 0.05) -> Guard:
    """Report training losses, with hindsight, that are in no cycle above the fallback's.

    x is run as in ``recommended``. Beside it runs s, the fallback by itself, on every minibatch:

        d <- sum_t [F(x, i+t) - F(s, i+t)]    over the nt steps of a cycle
        R <- 0.7 R + d
        params <- s   if d > 0 or R > 0   else x

    x goes on meanwhile, and goes back to s if R stays positive for a tenth of the cycles since x
    left the path of s, three at least. While x is on that path, x is s, and s costs nothing.

    ``decision.losses`` are those of the lane that is returned after the cycle, with hindsight. For
    these, in every cycle of every run,

        sum losses  <=  sum losses of the fallback alone

    if the fallback alone stays finite, up to rounding (``docs/guarantees.md``).

    Arguments, errors and memory are those of ``recommended``; ``share`` is for trials, which cost
    as much as there. Price in gradients beside them: 1 a step on the fallback's path, 2 off it.

    >>> import optax
    >>> guard = hedged(optax.sgd(0.4), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner), float(decision.price())
    (0, 20.0)
    """
    share = check_part("share", share)
    learned, fallback = with_extra_args("learned", learned), with_extra_args("fallback", fallback)
    relay = Relay(learned, fallback, share)

    def begin(x: Point) -> HedgedState:
        zero = jnp.int32(0)
        return HedgedState(relay.begin(x), jnp.zeros(()), zero, zero, jnp.array(False))

    return guard_of(begin, partial(cycle, relay), nt=nt)


def cycle(
    relay: Relay, x: Point, inner: HedgedState, now: Cycle
) -> tuple[Point, HedgedState, Decision]:
    """The relay, beside s while x is off its path."""
    was, runs = inner.relay, inner.relay.winner != OWN
    edited = was._replace(s=was.s._replace(at=x))
    start = select(inner.s_leads, edited, lead_from(was, x))
    state, decision, (of_s, aux_s) = relay.step(start, runs, now)
    x, finite = leader(state), jnp.isfinite(of_s)
    broken = runs & breaks(of_s, decision.losses)
    s = jax.lax.cond(
        broken, lambda: Lane(x, renew(relay.fallback, x.params, state.s.state)), lambda: state.s
    )
    state = state._replace(s=s)

    compared = runs & ~broken
    d = jnp.where(finite, bounded(decision.losses) - bounded(of_s), 0).sum()
    regret = jnp.where(compared, DECAY * inner.regret + d, 0)
    s_leads = compared & ((d > 0) | (regret > 0))
    away = jnp.where(runs, advance(inner.away, 1), 0)
    behind = jnp.where(regret > 0, inner.behind + 1, 0)
    patience = jnp.maximum(STRETCH, PATIENCE * away.astype(float))
    back = finite.any() & (behind.astype(float) >= patience)
    state = go_back(state, back, finite_mean(of_s))
    decision = decision._replace(
        used_learned=decision.used_learned & ~s_leads,
        losses=jnp.where(s_leads, of_s, decision.losses),
        winner=jnp.where(s_leads, OWN, state.winner),
        aux=select(s_leads, aux_s, decision.aux),
    )
    regret, away, behind = (jnp.where(back, 0, one) for one in (regret, away, behind))
    after = HedgedState(state, regret, away, behind, s_leads & ~back)
    return select(after.s_leads, state.s.at, leader(state)), after, decision

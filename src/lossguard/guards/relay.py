"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    the parameters of the leader's lane
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, or is the snapshot that x can go back to while y leads
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import progress as progresses
from . import trial as trials
from .lanes import Lane, Optimizer, is_fine, train_if
from .progress import Progress
from .protocol import (
    FALLBACK,
    LEARNED,
    OWN,
    Decision,
    Objective,
    Params,
    advance,
    sum_dtype,
)
from .soundness import advance_schedules, keep_schedules, renew_if_unsound, select
from .trial import Trial

STALL = 0.25
"""The learned optimizer leads while its loss falls at least by this power of its age."""
PART = 0.6
"""The length of a trial, as a part of what trials may have cost by then."""
YOUTH = 16
"""k / 16 is the age that y is taken for when it takes over."""
SETTLED = 4
"""Cycles before a lead of y is judged by its loss."""
RISE = 0.5
"""The part by which the loss may be above that at the snapshot."""
GAIN = 0.2
"""The part by which it has to be below it for the snapshot to move."""
YOUNG_GAIN = 0.5
"""The same until the lead of y is known for longer."""
LEAST = 10
"""Optimizer steps of a trial, at least."""


class RelayState(NamedTuple):
    """Both lanes, and what is known of them."""

    y: Lane
    z: Lane
    learned_leads: Bool[Array, ""]
    progress: Progress
    """Of the leader."""
    level: Float[Array, ""]
    """The smoothed loss at the snapshot."""
    trial: Trial
    tried: Int[Array, ""]
    """Optimizer steps that y has taken on trial."""


class Leg(NamedTuple):
    """What happened in a cycle."""

    losses: Float[Array, " nt"]
    """Of the leader, before each step."""
    challenger: Float[Array, " nt"]
    """Of y on trial; NaN if there was no trial."""
    learned_led: Bool[Array, ""]
    tried: Bool[Array, ""]
    """Whether y was on trial."""
    fine_y: Bool[Array, ""]
    """Whether y stayed finite, if it ran."""
    fine_z: Bool[Array, ""]
    """Whether z stayed finite, if it ran."""
    taken_over: Bool[Array, ""]
    """Whether y has won, and leads from now on."""


@dataclass(frozen=True)
class Relay:
    """The rules.

    - While z leads, y is tried from time to time, from x with a fresh state: in at most ``share``
      of the steps, and sqrt(k) more. It leads if it wins (``trial.py``).
    - y leads while its smoothed loss falls by a power of at least 1/4 of its age, and is not 1.5
      times what it was at the snapshot. Then z goes on: from x, or, after a rise, from there.
    - The snapshot is where z was when y took over. It moves to x when the loss is a fifth
      lower, at first half as high.
    """

    learned: Optimizer
    fallback: Optimizer
    nt: int
    share: float

    def init(self, params: Params) -> RelayState:
        """z leads, and there is no trial."""
        dtype = sum_dtype(params)
        zero = jnp.zeros((), dtype)
        return RelayState(
            y=Lane(params, self.learned.init(params)),
            z=Lane(params, self.fallback.init(params)),
            learned_leads=jnp.array(False),
            progress=progresses.begin(zero),
            level=zero,
            trial=trials.none(dtype),
            tried=jnp.int32(0),
        )

    def step(
        self, state: RelayState, objective: Objective, i: Int[Array, ""], k: Int[Array, ""]
    ) -> tuple[RelayState, Leg]:
        """One cycle on minibatches i .. i+nt-1, after k steps of the leader."""
        nt, leads = self.nt, state.learned_leads
        dtype = state.progress.recent.dtype
        y, trial = self._begin_trial(state, k)
        tried = trial.length > 0
        z_after, of_z = train_if(~leads, self.fallback, state.z, objective, i, nt=nt, dtype=dtype)
        y_after, of_y = train_if(leads | tried, self.learned, y, objective, i, nt=nt, dtype=dtype)
        fine_y = ~(leads | tried) | is_fine(y_after, of_y, y.params)
        fine_z = leads | is_fine(z_after, of_z, state.z.params)
        z_after = Lane(
            select(fine_z, z_after.params, state.z.params),
            select(leads, advance_schedules(z_after.state, nt), z_after.state),
        )
        z_after = z_after._replace(
            state=renew_if_unsound(self.fallback, z_after.params, z_after.state)
        )

        losses = jnp.where(leads, of_y, of_z)
        fine = jnp.where(leads, fine_y, fine_z)
        progress = progresses.add(state.progress, losses.mean(), nt)
        progress = select(fine, progress, state.progress)
        now = state._replace(
            y=y_after,
            z=z_after,
            progress=progress,
            tried=advance(state.tried, jnp.where(tried, nt, 0)),
        )
        trial = trials.add(trial, of_y, losses)
        now, taken_over = self._end_trial(now, trial, of_y, fine_y, fine_z, k)
        now = select(leads, self._keep_or_hand_over(now, fine_y), now)
        return now, Leg(
            losses=losses,
            challenger=jnp.where(tried, of_y, jnp.nan),
            learned_led=leads,
            tried=tried,
            fine_y=fine_y,
            fine_z=fine_z,
            taken_over=taken_over,
        )

    def _begin_trial(self, state: RelayState, k: Int[Array, ""]) -> tuple[Lane, Trial]:
        """y at x with a fresh state, if a trial is due; and the trial."""
        steps, tried = (count.astype(state.level.dtype) for count in (k, state.tried))
        least = -(-LEAST // self.nt)
        length = jnp.maximum(least, jnp.round(PART * self.share * steps / self.nt))
        due = (tried + length * self.nt <= self.share * steps + jnp.sqrt(steps)) | (k == 0)
        begins = due & ~state.learned_leads & (state.trial.length == 0)
        x = state.z.params
        fresh = keep_schedules(self.learned.init(x), state.y.state)
        unknown = state.progress.age == 0
        trial = trials.begin(
            length.astype(jnp.int32), jnp.where(unknown, jnp.nan, state.progress.recent)
        )
        return select(begins, (Lane(x, fresh), trial), (state.y, state.trial))

    def _end_trial(
        self,
        state: RelayState,
        trial: Trial,
        of_y: Float[Array, " nt"],
        fine_y: Bool[Array, ""],
        fine_z: Bool[Array, ""],
        k: Int[Array, ""],
    ) -> tuple[RelayState, Bool[Array, ""]]:
        """After a cycle of a trial, if there is one; and whether y has taken over."""
        won, lost = trials.outcome(trial, of_y)
        tried = trial.length > 0
        won, lost = tried & fine_y & (won | ~fine_z), tried & (lost | ~fine_y)
        over = won | lost | ~tried
        none = trials.none(trial.total.dtype)
        began = progresses.begin(of_y.mean(), k // YOUTH)
        after = state._replace(
            learned_leads=state.learned_leads | won,
            level=jnp.where(won, state.progress.lasting, state.level),
            progress=select(won, began, state.progress),
            trial=select(over, none, trial),
        )
        return after, won

    def _keep_or_hand_over(self, state: RelayState, fine: Bool[Array, ""]) -> RelayState:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot."""
        now, level = state.progress.lasting, state.level
        young = state.progress.earlier_age == 0
        settled = state.progress.age >= state.progress.later_age + SETTLED * self.nt
        worse = young & settled & (state.progress.recent > level)
        risen = now > level + RISE * jnp.abs(level)
        ends = ~fine | worse | risen | (progresses.rate(state.progress) < STALL)
        gain = jnp.where(young, YOUNG_GAIN, GAIN)
        better = fine & ~ends & (now < level - gain * jnp.abs(level))
        from_x = better | (ends & fine & ~risen)
        z = state.z._replace(params=select(from_x, state.y.params, state.z.params))
        # z's path goes on from where y has come to: from there it is fast or slow again.
        progress = select(
            ends, progresses.begin(jnp.where(from_x, state.progress.recent, level)), state.progress
        )
        return state._replace(
            z=z,
            learned_leads=~ends,
            level=jnp.where(better, now, level),
            progress=progress,
        )


def leader(state: RelayState) -> Params:
    """x."""
    return select(state.learned_leads, state.y.params, state.z.params)


def lead_from(state: RelayState, x: Params) -> RelayState:
    """The same with x put in the leader's place."""
    y, z, leads = state.y, state.z, state.learned_leads
    return state._replace(
        y=y._replace(params=select(leads, x, y.params)),
        z=z._replace(params=select(leads, z.params, x)),
    )


def at(relay: RelayState, s: Lane, loss: Float[Array, ""]) -> RelayState:
    """The relay where s is, with the fallback in the lead and no trial."""
    return relay._replace(
        z=s,
        learned_leads=jnp.array(False),
        progress=progresses.begin(loss),
        trial=trials.none(loss.dtype),
    )


def report(
    leg: Leg, state: RelayState, *, on_own: Bool[Array, ""], s_ran: Bool[Array, ""]
) -> Decision:
    """The decision of a cycle, after which x is on the fallback's own path or is not."""
    nt, ran_y = len(leg.losses), leg.learned_led | leg.tried
    winner = jnp.where(state.learned_leads, LEARNED, jnp.where(on_own, OWN, FALLBACK))
    return Decision(
        used_learned=jnp.full(nt, leg.learned_led),
        losses=leg.losses,
        learned_loss=leg.challenger.mean(),
        fallback_loss=jnp.where(leg.tried, leg.losses.mean(), jnp.nan),
        finite_learned=leg.fine_y,
        finite_fallback=leg.fine_z,
        winner=winner.astype(jnp.int32),
        gradients=nt * (1 + leg.tried.astype(jnp.int32) + s_ran.astype(jnp.int32)),
        forwards=jnp.int32(0),
        learned_updates=nt * ran_y.astype(jnp.int32),
    )

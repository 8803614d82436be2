"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    the parameters of the leader's lane
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, is on trial from x, or is the snapshot that x can go back to
s    the fallback by itself, which y has never moved: stays behind when x leaves its path
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import progress as progresses
from . import trial as trials
from .cycle import Cycle, sum_dtype
from .lanes import Lane, Optimizer, is_fine, train_if
from .progress import Progress
from .protocol import FALLBACK, LEARNED, NEITHER, OWN, Decision, Params, advance
from .soundness import advance_schedules, renew, renew_if_unsound, select, with_sound_gradients
from .trial import Trial

FIRST = 10
"""Optimizer steps of the first trial."""
LEAST = 20
"""The same of a later one, at least."""
PART = 0.3
"""The length of a trial, as a part of the share that trials have had by then."""
ROOT = 2
"""Trials may take this many times sqrt(k) steps beside their share."""
STALL = 0.25
"""The learned optimizer stalls where its loss falls by less than this power of its age."""
CLEAR = 0.05
"""By this part of the loss it has to be better than the fallback to lead on where it stalls."""
YOUTH = 16
"""k / 16 is the age that y is taken for when it takes over."""
RISE = 0.5
"""The part by which the loss may be above that at the snapshot."""
GAIN = 0.2
"""The part by which it has to be below it for the snapshot to move."""


class RelayState(NamedTuple):
    """The lanes, and what is known of y and z."""

    y: Lane
    z: Lane
    s: Lane
    """While x is on its path z stands for it, and s is where it was."""
    on_own: Bool[Array, ""]
    """Whether x is on the path of s."""
    learned_leads: Bool[Array, ""]
    progress: Progress
    """Of the leader."""
    level: Float[Array, ""]
    """The smoothed loss at the snapshot."""
    trial: Trial
    tried: Int[Array, ""]
    """Optimizer steps that have been taken on trial."""


class Leg(NamedTuple):
    """What happened in a cycle."""

    decision: Decision
    """Of y and z; ``winner`` is yet to be told."""
    of_s: Float[Array, " nt"]
    """The losses of s; NaN if it didn't run."""
    fine_s: Bool[Array, ""]
    """Whether s stayed finite, if it ran."""
    leaves: Bool[Array, ""]
    """Whether y took over from the fallback's own path."""


@dataclass(frozen=True)
class Relay:
    """The rules, of which ``recommended`` tells; trials are those of ``trial.py``.

    A trial takes 0.3 share k steps, 20 at least, the first one 10. One begins where all of them
    take at most share k + 2 sqrt(k) steps, one of y where another one could follow, and not before
    the leader has led for as long.

    The snapshot is where z was when y took over. It moves to x when the loss is a fifth lower, and
    when z has lost a trial. After a loss of 1.5 times that at the snapshot z goes on from there.
    When s runs, and when x goes back to it, is the affair of who has the relay.
    """

    learned: Optimizer
    fallback: Optimizer
    share: float

    def begin(self, params: Params) -> RelayState:
        """z leads, and there is no trial."""
        dtype = sum_dtype(params)
        zero, z = jnp.zeros((), dtype), Lane(params, self.fallback.init(params))
        return RelayState(
            y=Lane(params, self.learned.init(params)),
            z=z,
            s=z,
            on_own=jnp.array(True),
            learned_leads=jnp.array(False),
            progress=progresses.begin(zero),
            level=zero,
            trial=trials.begin(0, dtype),
            tried=jnp.int32(0),
        )

    def step(
        self, state: RelayState, s_runs: Bool[Array, ""], now: Cycle
    ) -> tuple[RelayState, Leg]:
        """One cycle. A gradient that isn't finite is one of 0."""
        nt, leads, dtype = now.nt, state.learned_leads, state.level.dtype
        now = now._replace(objective=with_sound_gradients(now.objective), dtype=dtype)
        state = self._begin_trial(state, now)
        on_trial = state.trial.length > 0
        y_runs, z_runs = leads | on_trial, ~leads | on_trial
        y, of_y = train_if(y_runs, self.learned, state.y, now)
        fine_y = ~y_runs | is_fine(y, of_y, state.y.params)
        z, of_z, fine_z = self._run_fallback(z_runs, state.z, now)
        s, of_s, fine_s = self._run_fallback(s_runs, state.s, now)

        losses, others = select(leads, (of_y, of_z), (of_z, of_y))
        progress = progresses.add(state.progress, losses.mean(), nt)
        after = state._replace(
            y=_in_time(y, y_runs, nt),
            z=_in_time(z, z_runs, nt),
            s=s,
            progress=select(jnp.where(leads, fine_y, fine_z), progress, state.progress),
            trial=select(on_trial, trials.add(state.trial, others, losses), state.trial),
            tried=advance(state.tried, jnp.where(on_trial, nt, 0)),
        )
        after = self._settle(after, fine_y, fine_z, now)
        decision = Decision(
            used_learned=jnp.full(nt, leads),
            losses=losses,
            learned_loss=jnp.where(on_trial, of_y.mean(), jnp.nan),
            fallback_loss=jnp.where(on_trial, of_z.mean(), jnp.nan),
            finite_learned=fine_y,
            finite_fallback=fine_z,
            winner=jnp.int32(NEITHER),
            gradients=nt * (1 + on_trial.astype(jnp.int32) + s_runs.astype(jnp.int32)),
            forwards=jnp.int32(0),
            learned_updates=nt * y_runs.astype(jnp.int32),
        )
        return after, Leg(decision, of_s, fine_s, ~leads & after.learned_leads & state.on_own)

    def _run_fallback(
        self, runs: Bool[Array, ""], lane: Lane, now: Cycle
    ) -> tuple[Lane, Float[Array, " nt"], Bool[Array, ""]]:
        """The lane, its losses, and whether it is fine; if not, it stays where it was."""
        after, losses = train_if(runs, self.fallback, lane, now)
        fine = ~runs | is_fine(after, losses, lane.params)
        params = select(fine, after.params, lane.params)
        state = renew_if_unsound(self.fallback, params, after.state)
        return Lane(params, state), losses, fine

    def _begin_trial(self, state: RelayState, now: Cycle) -> RelayState:
        """If a trial is due, the challenger is at x: y with a fresh state, or z."""
        leads, dtype, x = state.learned_leads, state.level.dtype, leader(state)
        k = now.k.astype(dtype)
        least = _cycles(jnp.where(now.k == 0, FIRST, LEAST), now.nt)
        length = jnp.maximum(least, jnp.round(PART * self.share * k / now.nt).astype(jnp.int32))
        steps = length * now.nt
        # A trial of y leaves enough for one of z, should y take over.
        spent = state.tried + jnp.where(leads, 1, 2) * steps
        due = spent.astype(dtype) <= self.share * k + ROOT * jnp.sqrt(k)
        rested = state.progress.age >= state.progress.later_age + steps
        due &= rested & ~(leads & self._is_first(state, now.nt))
        begins = (state.trial.length == 0) & (due | (now.k == 0))
        of_y, of_z = begins & ~leads, begins & leads
        y = Lane(x, renew(self.learned, x, state.y.state))
        level = jnp.minimum(state.level, state.progress.lasting)
        return state._replace(
            y=select(of_y, y, state.y),
            z=state.z._replace(params=select(of_z, x, state.z.params)),
            level=jnp.where(of_z, level, state.level),
            trial=select(begins, trials.begin(length, dtype), state.trial),
        )

    def _settle(
        self, state: RelayState, fine_y: Bool[Array, ""], fine_z: Bool[Array, ""], now: Cycle
    ) -> RelayState:
        """After a cycle: who leads, from where, and where the snapshot is."""
        leads, trial, level = state.learned_leads, state.trial, state.level
        recent, lasting = state.progress.recent, state.progress.lasting
        fine_leader, fine_challenger = select(leads, (fine_y, fine_z), (fine_z, fine_y))
        on_trial, stalls = trial.length > 0, leads & (progresses.rate(state.progress) < STALL)
        won, lost = trials.outcome(trial)
        difference = trials.mean_difference(trial)
        won |= ~fine_leader | (lost & stalls & ~(difference > CLEAR * jnp.abs(recent)))
        won &= on_trial & fine_challenger
        lost = on_trial & ~won & (lost | ~fine_challenger)

        risen = lasting > level + RISE * jnp.abs(level)
        breaks = leads & (~fine_y | risen)
        ends = leads & ~won & (breaks | (stalls & self._is_first(state, now.nt)))
        better = ~on_trial & (lasting < level - GAIN * jnp.abs(level))
        moves = leads & ~won & ~breaks & (ends | lost | better)
        loss = recent + jnp.where(jnp.isfinite(difference), difference, 0)
        taken_over = progresses.begin(loss, jnp.where(leads, 0, now.k // YOUTH))
        # z's path goes on from where y has come to: from there it is fast or slow again.
        handed_over = progresses.begin(jnp.where(breaks, level, recent))
        progress = select(won, taken_over, select(ends, handed_over, state.progress))
        level = jnp.where(moves, jnp.minimum(level, lasting), level)
        return state._replace(
            z=state.z._replace(params=select(moves, state.y.params, state.z.params)),
            learned_leads=(leads ^ won) & ~ends,
            progress=progress,
            level=jnp.where(won & ~leads, lasting, level),
            trial=select(won | lost | ends, trials.begin(0, trial.total.dtype), trial),
        )

    def _is_first(self, state: RelayState, nt: int) -> Bool[Array, ""]:
        """Whether no trial but the first has begun."""
        return state.tried <= nt * _cycles(FIRST, nt)


def _cycles(steps: Any, nt: int) -> Any:
    """As many cycles as have so many optimizer steps at least."""
    return -(-steps // nt)


def _in_time(lane: Lane, ran: Bool[Array, ""], nt: int) -> Lane:
    """The lane after a cycle; schedules follow the steps of the run, in cycles of others too."""
    return lane._replace(state=select(ran, lane.state, advance_schedules(lane.state, nt)))


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


def own_path(
    state: RelayState, s: Lane, leg: Leg, back: Bool[Array, ""], loss: Float[Array, ""]
) -> tuple[RelayState, Decision]:
    """x leaves the fallback's own path, is off it beside s, or goes ``back`` to s, at its loss."""
    there = state._replace(
        z=s,
        s=s,
        learned_leads=jnp.array(False),
        progress=progresses.begin(loss),
        trial=trials.begin(0, loss.dtype),
    )
    here = state._replace(s=select(leg.leaves, state.z, s))
    state = select(back, there, here)._replace(on_own=(state.on_own & ~leg.leaves) | back)
    winner = jnp.where(state.learned_leads, LEARNED, jnp.where(state.on_own, OWN, FALLBACK))
    return state, leg.decision._replace(winner=winner.astype(jnp.int32))

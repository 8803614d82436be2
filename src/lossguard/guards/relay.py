"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    the parameters of the leader's lane
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, or is the snapshot that x can go back to while y leads
s    the fallback by itself, which y has never moved: stays behind when x leaves its path
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import rules
from . import progress as progresses
from . import trial as trials
from .clocks import advance_schedules, check_schedules, renew
from .cycle import Cycle
from .lanes import Lane, Optimizer, Report, run_if
from .losses import Point, sound
from .protocol import FALLBACK, LEARNED, OWN, Decision, advance
from .soundness import select


class RelayState(NamedTuple):
    """The lanes, and what is known of y and z."""

    y: Lane
    z: Lane
    s: Lane
    """While x is on its path z stands for it, and s is where it was."""
    z_warms_up: Bool[Array, ""]
    """Whether z has taken no step since its memory was made new."""
    winner: Int[Array, ""]
    """That of ``Decision``: 0 while y leads; while z does, 2 if x is on the path of s, else 1."""
    progress: progresses.Progress
    """Of the leader."""
    level: Float[Array, ""]
    """The smoothed loss at the snapshot."""
    trial: trials.Trial
    """Of y against z."""
    trial_cost: Int[Array, ""]
    """Steps that trials are charged."""
    GOES_ON = ("trial_cost",)


@dataclass(frozen=True)
class Relay:
    """The rules, which ``docs/guards.md`` tells.

    When s runs, and when x goes back to it, is the affair of the guard.
    """

    learned: Optimizer
    fallback: Optimizer
    share: float

    def begin(self, x: Point) -> RelayState:
        """z leads, on the path of s, and there is no trial."""
        y = Lane(x, self.learned.init(x.params))
        z = Lane(x, self.fallback.init(x.params))
        check_schedules("learned", y.state)
        check_schedules("fallback", z.state)
        return RelayState(
            y=y,
            z=z,
            s=z,
            z_warms_up=jnp.array(False),
            winner=jnp.int32(OWN),
            progress=progresses.begin(),
            level=jnp.zeros(()),
            trial=trials.none(),
            trial_cost=jnp.int32(0),
        )

    def step(
        self, state: RelayState, s_runs: Bool[Array, ""], now: Cycle
    ) -> tuple[RelayState, Decision, Report]:
        """The state after a cycle, the decision, and the report of s (NaN if it didn't run)."""
        nt, leads = now.nt, state.winner == LEARNED
        now = now._replace(loss=sound(now.loss))
        y, trial = self._begin_trial(state, now)
        tried = trial.length > 0
        z, report_z = run_if(~leads, self.fallback, state.z, now, state.z_warms_up)
        y, report_y = run_if(leads | tried, self.learned, y, now)
        s, report_s = run_if(s_runs, self.fallback, state.s, now)
        of_y = report_y.losses
        losses, aux = select(leads, report_y, report_z)
        after = state._replace(  # schedules follow the steps of the run, in cycles of others too
            y=advance_schedules(y, jnp.where(leads | tried, 0, nt)),
            z=advance_schedules(z, jnp.where(leads, nt, 0)),
            s=s,
            z_warms_up=state.z_warms_up & leads,
            progress=progresses.add(state.progress, trials.finite_mean(losses), nt),
            trial=trial,
            trial_cost=advance(state.trial_cost, jnp.where(tried, nt, 0)),
        )
        ended = self._end_trial(after, of_y, losses, now)
        after = select(leads, self._keep_or_hand_over(after, of_y), ended)
        decision = Decision(
            used_learned=jnp.full(nt, leads),
            losses=losses,
            winner=after.winner,
            gradients=nt * (1 + tried.astype(jnp.int32) + s_runs.astype(jnp.int32)),
            learned_loss=jnp.where(tried, trials.finite_mean(of_y), jnp.nan),
            fallback_loss=jnp.where(tried, trials.finite_mean(losses), jnp.nan),
            learned_updates=nt * (leads | tried).astype(jnp.int32),
            aux=aux,
        )
        return after, decision, report_s

    def _begin_trial(self, state: RelayState, now: Cycle) -> tuple[Lane, trials.Trial]:
        """y at x with a fresh state, if a trial is due; and the trial."""
        k, cost = (count.astype(float) for count in (now.k, state.trial_cost))
        length = jnp.maximum(
            -(-rules.TRIAL_STEPS // now.nt), jnp.round(rules.PART * self.share * k / now.nt)
        )
        due = (cost + length * now.nt <= self.share * k + jnp.sqrt(k)) | (now.k == 0)
        begins = due & (state.winner != LEARNED) & (state.trial.length == 0)

        def begin() -> tuple[Lane, trials.Trial]:
            x = state.z.at
            fresh = Lane(x, renew(self.learned, x.params, state.y.state))
            return fresh, trials.begin(length.astype(jnp.int32), state.progress.recent)

        return jax.lax.cond(begins, begin, lambda: (state.y, state.trial))

    def _end_trial(
        self, state: RelayState, of_y: Float[Array, " nt"], of_z: Float[Array, " nt"], now: Cycle
    ) -> RelayState:
        """After a cycle of a trial, if there is one: y takes over, it goes on, or it is over."""
        trial, won, lost = trials.play(state.trial, of_y, of_z)
        tried = trial.length > 0
        won, over = tried & won, won | lost | trials.breaks(of_y, of_z) | ~tried
        began = progresses.begin(trials.finite_mean(of_y), now.k // rules.YOUTH)
        return state._replace(
            s=select(won & (state.winner == OWN), state.z, state.s),
            winner=jnp.where(won, LEARNED, state.winner),
            level=jnp.where(won, state.progress.lasting, state.level),
            progress=select(won, began, state.progress),
            trial=select(over, trials.none(), trial),
        )

    def _keep_or_hand_over(self, state: RelayState, of_y: Float[Array, " nt"]) -> RelayState:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot.

        Where its last loss isn't finite, x is no point to go on from. What z remembers is of where
        it was: Adam's moments, of gradients there, would hold it back at x for thousands of steps.
        So they are made new. Then its first steps would be too long: its first cycle is a warm-up.
        """
        x, z, level = state.y.at, state.z, state.level
        loss, recent = state.progress.lasting, state.progress.recent
        young = state.progress.earlier_age == 0
        finite = jnp.isfinite(of_y)
        risen = ~finite.any() | (loss > level + rules.RISE * jnp.abs(level))
        ends = risen | (finite[-1] & (progresses.rate(state.progress) < rules.STALL))
        gain = jnp.where(young, rules.YOUNG_GAIN, rules.GAIN)
        better = ~ends & finite[-1] & (loss < level - gain * jnp.abs(level))
        from_x = better | (ends & ~risen)
        z = jax.lax.cond(
            from_x, lambda: Lane(x, renew(self.fallback, x.params, z.state)), lambda: z
        )
        # z's path goes on from where y has come to: from there it is fast or slow again.
        progress = select(ends, progresses.begin(jnp.where(from_x, recent, level)), state.progress)
        return state._replace(
            z=z,
            z_warms_up=state.z_warms_up | from_x,
            winner=jnp.where(ends, FALLBACK, LEARNED),
            level=jnp.where(better, loss, level),
            progress=progress,
        )


def leader(state: RelayState) -> Point:
    """x."""
    return select(state.winner == LEARNED, state.y.at, state.z.at)


def lead_from(state: RelayState, x: Point) -> RelayState:
    """The same with x put in the leader's place."""
    y, z, leads = state.y, state.z, state.winner == LEARNED
    return state._replace(
        y=y._replace(at=select(leads, x, y.at)), z=z._replace(at=select(leads, z.at, x))
    )


def go_back(state: RelayState, back: Bool[Array, ""], loss: Float[Array, ""]) -> RelayState:
    """x goes on from s, at its loss, on the fallback's own path; or the state as it is."""
    there = state._replace(
        z=state.s,
        z_warms_up=jnp.array(False),
        winner=jnp.int32(OWN),
        progress=progresses.begin(loss),
        trial=trials.none(),
    )
    return select(back, there, state)

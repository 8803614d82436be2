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
from .cycle import Cycle
from .lanes import Lane, Optimizer, keep_if_fine, passed_over, run_if
from .progress import Progress
from .protocol import FALLBACK, LEARNED, OWN, Decision, Params, advance
from .soundness import advance_schedules, check_schedules, renew, select, sound
from .trial import Trial


class RelayState(NamedTuple):
    """The lanes, and what is known of y and z."""

    y: Lane
    z: Lane
    s: Lane
    """While x is on its path z stands for it, and s is where it was."""
    on_own: Bool[Array, ""]
    """Whether x is on the path of s."""
    learned_leads: Bool[Array, ""]
    failed: Bool[Array, ""]
    """Whether y leads and wasn't finite in its last cycle, which it took back."""
    progress: Progress
    """Of the leader."""
    level: Float[Array, ""]
    """The smoothed loss at the snapshot."""
    trial: Trial
    """Of y against z."""
    trial_cost: Int[Array, ""]
    """Steps that trials are charged."""
    GOES_ON = ("trial_cost",)


@dataclass(frozen=True)
class Relay:
    """The rules, of which ``recommended`` tells; trials are those of ``trial.py``.

    The snapshot is where z was when y took over. It moves to x when the loss is a fifth lower, at
    first half as high. After a loss of 1.5 times that at the snapshot z goes on from there, and
    where y stalls from x. When y first takes over, s stays where z was. When it runs, and when x
    goes back to it, is the affair of the guard.
    """

    learned: Optimizer
    fallback: Optimizer
    share: float

    def begin(self, params: Params) -> RelayState:
        """z leads, and there is no trial."""
        y = Lane(params, self.learned.init(params))
        z = Lane(params, self.fallback.init(params))
        check_schedules("learned", y.state)
        check_schedules("fallback", z.state)
        return RelayState(
            y=y,
            z=z,
            s=z,
            on_own=jnp.array(True),
            learned_leads=jnp.array(False),
            failed=jnp.array(False),
            progress=progresses.unknown(),
            level=jnp.zeros(()),
            trial=trials.none(),
            trial_cost=jnp.int32(0),
        )

    def step(
        self, state: RelayState, s_runs: Bool[Array, ""], now: Cycle
    ) -> tuple[RelayState, Decision, Float[Array, " nt"], Bool[Array, " 2"], Bool[Array, " nt"]]:
        """One cycle. A gradient that isn't finite is one of 0.

        Returns:
            The state, the decision, the losses of s (NaN if it didn't run), whether z and s stayed
            finite if they ran, and the minibatches that are passed over: there losses are a mean.

        If all are, z and s are where their steps led, y can't take over, and a leading y isn't
        fine: who is to blame?
        """
        nt, leads = now.nt, state.learned_leads
        now = now._replace(objective=sound(now.objective))
        y, trial = self._begin_trial(state, now)
        tried = trial.length > 0
        z, of_z, fine_z = run_if(~leads, self.fallback, state.z, now)
        y_after, of_y, fine_y = run_if(leads | tried, self.learned, y, now)
        s, of_s, fine_s = run_if(s_runs, self.fallback, state.s, now)
        void, (of_y, of_z, of_s) = passed_over(of_y, of_z, of_s)
        lost = void.all()
        fine_y &= ~(leads & lost)
        y_after, fine_y = keep_if_fine(y_after, y, of_y, fine_y, leads | tried, void)
        z, fine_z = keep_if_fine(z, state.z, of_z, fine_z, ~leads, void)
        s, fine_s = keep_if_fine(s, state.s, of_s, fine_s, s_runs, void)

        losses = jnp.where(leads, of_y, of_z)
        progress = progresses.add(state.progress, losses.mean(), nt)
        progress = select(jnp.where(leads, fine_y, fine_z) & ~lost, progress, state.progress)
        after = state._replace(
            y=_in_time(y_after, leads | tried, nt),
            z=_in_time(z, ~leads, nt),
            s=s,
            progress=progress,
            trial_cost=advance(state.trial_cost, jnp.where(tried, nt, 0)),
        )
        trial = trials.add(trial, of_y, losses, void)
        holds = fine_z | lost  # y takes over from a z that breaks, but not for lost minibatches
        ended = self._end_trial(after, trial, of_y, losses, fine_y, holds, now.k)
        kept = self._keep_or_hand_over(after, fine_y, lost, nt)
        after = select(leads, kept, ended)
        decision = Decision(
            used_learned=jnp.full(nt, leads),
            losses=losses,
            winner=jnp.where(after.learned_leads, LEARNED, jnp.where(after.on_own, OWN, FALLBACK)),
            gradients=nt * (1 + tried.astype(jnp.int32) + s_runs.astype(jnp.int32)),
            learned_loss=jnp.where(tried, of_y.mean(), jnp.nan),
            fallback_loss=jnp.where(tried, losses.mean(), jnp.nan),
            learned_updates=nt * (leads | tried).astype(jnp.int32),
        )
        return after, decision, of_s, jnp.stack([fine_z, fine_s]), void

    def _begin_trial(self, state: RelayState, now: Cycle) -> tuple[Lane, Trial]:
        """y at x with a fresh state, if a trial is due; and the trial."""
        k, cost = (count.astype(float) for count in (now.k, state.trial_cost))
        length = jnp.maximum(
            -(-rules.TRIAL_STEPS // now.nt), jnp.round(rules.PART * self.share * k / now.nt)
        )
        due = (cost + length * now.nt <= self.share * k + jnp.sqrt(k)) | (now.k == 0)
        begins = due & ~state.learned_leads & (state.trial.length == 0)

        def begin() -> tuple[Lane, Trial]:
            fresh = Lane(state.z.params, renew(self.learned, state.z.params, state.y.state))
            return fresh, trials.begin(length.astype(jnp.int32), state.progress.recent)

        return jax.lax.cond(begins, begin, lambda: (state.y, state.trial))

    def _end_trial(
        self,
        state: RelayState,
        trial: Trial,
        of_y: Float[Array, " nt"],
        of_z: Float[Array, " nt"],
        fine_y: Bool[Array, ""],
        fine_z: Bool[Array, ""],
        k: Int[Array, ""],
    ) -> RelayState:
        """After a cycle of a trial, if there is one: y takes over, it goes on, or it is over."""
        won, lost = trials.outcome(trial, of_y, of_z)
        tried = trial.length > 0
        won, lost = tried & fine_y & (won | ~fine_z), tried & (lost | ~fine_y)
        over = won | lost | ~tried
        began = progresses.begin(of_y.mean(), k // rules.YOUTH)
        return state._replace(
            s=select(won & state.on_own, state.z, state.s),
            on_own=state.on_own & ~won,
            learned_leads=won,
            level=jnp.where(won, state.progress.lasting, state.level),
            progress=select(won, began, state.progress),
            trial=select(over, trials.none(), trial),
        )

    def _keep_or_hand_over(
        self, state: RelayState, fine: Bool[Array, ""], lost: Bool[Array, ""], nt: int
    ) -> RelayState:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot.

        Where it wasn't fine y takes the cycle back; the second time at a stretch it is over, or at
        once if the cycle is as long as a trial and has no finite loss.
        """
        loss, recent, level = state.progress.lasting, state.progress.recent, state.level
        young = state.progress.earlier_age == 0
        risen = loss > level + rules.RISE * jnp.abs(level)
        stalls = progresses.rate(state.progress) < rules.STALL
        over = state.failed | (lost & (nt >= rules.TRIAL_STEPS))
        ends = jnp.where(fine, risen | stalls, over)
        gain = jnp.where(young, rules.YOUNG_GAIN, rules.GAIN)
        better = fine & ~ends & (loss < level - gain * jnp.abs(level))
        from_x = better | (ends & fine & ~risen)
        z = state.z._replace(params=select(from_x, state.y.params, state.z.params))
        # z's path goes on from where y has come to: from there it is fast or slow again.
        progress = select(ends, progresses.begin(jnp.where(from_x, recent, level)), state.progress)
        return state._replace(
            z=z,
            learned_leads=~ends,
            failed=~fine & ~ends,
            level=jnp.where(better, loss, level),
            progress=progress,
        )


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


def go_back(state: RelayState, back: Bool[Array, ""], loss: Float[Array, ""]) -> RelayState:
    """x goes on from s, at its loss, on the fallback's own path; or the state as it is."""
    there = state._replace(
        z=state.s,
        on_own=jnp.array(True),
        learned_leads=jnp.array(False),
        failed=jnp.array(False),
        progress=progresses.begin(loss),
        trial=trials.none(),
    )
    return select(back, there, state)

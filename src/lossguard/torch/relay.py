"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    where the leader's lane is
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, is on trial from x, or is the snapshot that x can go back to
s    the fallback by itself, which y has never moved: stays behind when x leaves its path

The rules are those of ``lossguard.recommended`` and ``lossguard.hedged``.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lossguard.torch.decision import FALLBACK, LEARNED, NEITHER, OWN, Decision, Seen, mean
from lossguard.torch.losses import NONE, Progress, Trial

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane

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


class State(NamedTuple):
    """What is known: of the leader, progress; at the snapshot, the smoothed loss, level."""

    on_own: bool = True
    """Whether x is on the path of s."""
    learned_leads: bool = False
    progress: Progress = Progress.begun(0.0)
    level: float = 0.0
    trial: Trial = NONE
    tried: int = 0
    """Optimizer steps that have been taken on trial."""


class Relay:
    """The rules.

    A trial takes 0.3 share k steps, 20 at least, the first one 10. One begins where all of them
    take at most share k + 2 sqrt(k) steps, one of y where another one could follow, and not before
    the leader has led for as long.

    The snapshot is where z was when y took over. It moves to x when the loss is a fifth lower, and
    when z has lost a trial. After a loss of 1.5 times that at the snapshot z goes on from there.
    When s runs, and when x goes back to it, is the affair of who has the relay.
    """

    def __init__(self, y: "Lane", z: "Lane", s: "Lane", nt: int, share: float) -> None:
        self.y, self.z, self.s, self.nt, self.share = y, z, s, nt, share
        self.state = State()

    @property
    def leader(self) -> "Lane":
        """Where x is."""
        return self.y if self.state.learned_leads else self.z

    def begin(self, k: int, s_runs: bool) -> "list[Lane]":
        """The lanes that run in the cycle after k steps of the leader, beside the live one."""
        if self.state.trial == NONE:
            self._begin_trial(k)
        leads, on_trial = self.state.learned_leads, self.state.trial != NONE
        y_runs, z_runs = leads or on_trial, not leads or on_trial
        if z_runs:
            self.z.keep()
        runs = (self.y, y_runs), (self.z, z_runs), (self.s, s_runs)
        return [lane for lane, one_runs in runs if one_runs and not lane.live]

    def settle(self, seen: Mapping[str, Seen], k: int) -> tuple[Decision, bool]:
        """After the cycle: what is to be told of it, and whether y takes over from the own path."""
        y, z, state, led = seen.get("y"), seen.get("z"), self.state, self.state.learned_leads
        fine_y, fine_z = y is None or y.fine, z is None or z.fine
        if not fine_z:
            self.z.go_back()
        leader, challenger = (y, z) if led else (z, y)
        assert leader is not None
        if leader.fine:
            progress = state.progress.after(mean(leader.losses), self.nt)
            state = state._replace(progress=progress)
        on_trial = challenger is not None
        if on_trial:
            trial = state.trial.after(challenger.losses, leader.losses)
            state = state._replace(trial=trial, tried=state.tried + self.nt)
        self.state = self._settled(state, fine_y, fine_z, k)
        decision = Decision(
            used_learned=[led] * self.nt,
            losses=leader.losses,
            winner=NEITHER,
            gradients=self.nt * len(seen),
            learned_updates=self.nt * (y is not None),
            learned_loss=mean(y.losses) if on_trial and y else math.nan,
            fallback_loss=mean(z.losses) if on_trial and z else math.nan,
            finite_learned=fine_y,
            finite_fallback=fine_z,
        )
        return decision, self.state.learned_leads and not led and state.on_own

    def own_path(self, decision: Decision, leaves: bool, back: float | None) -> Decision:
        """x leaves the fallback's own path, is off it beside s, or goes back to s, at its loss."""
        if leaves:
            self.s.become(self.z)
            self.state = self.state._replace(on_own=False)
        if back is not None:
            self.z.become(self.s)
            began = Progress.begun(back)
            self.state = self.state._replace(
                on_own=True, learned_leads=False, progress=began, trial=NONE
            )
        winner = OWN if self.state.on_own else FALLBACK
        return decision._replace(winner=LEARNED if self.state.learned_leads else winner)

    def _begin_trial(self, k: int) -> None:
        """If a trial is due, the challenger is at x: y with a fresh memory, or z."""
        state, leads = self.state, self.state.learned_leads
        length = -(-(LEAST if k else FIRST) // self.nt)
        length = max(length, round(PART * self.share * k / self.nt))
        steps = length * self.nt
        # A trial of y leaves enough for one of z, should y take over.
        spent = state.tried + (steps if leads else 2 * steps)
        due = spent <= self.share * k + ROOT * math.sqrt(k)
        rested = state.progress.age >= state.progress.later_age + steps
        due = due and rested and not (leads and self._is_first(state))
        if not (due or k == 0):
            return
        self.state = state._replace(trial=Trial(length))
        if leads:
            self.z.start_at(self.y.point)
            level = min(state.level, state.progress.lasting)
            self.state = self.state._replace(level=level)
        else:
            self.y.start_at(self.z.point)
            self.y.forget(clock=k)

    def _settled(self, state: State, fine_y: bool, fine_z: bool, k: int) -> State:
        """After a cycle: who leads, from where, and where the snapshot is."""
        leads, trial, level, progress = (
            state.learned_leads,
            state.trial,
            state.level,
            state.progress,
        )
        recent, lasting, on_trial = progress.recent, progress.lasting, trial != NONE
        fine_leader, fine_challenger = (fine_y, fine_z) if leads else (fine_z, fine_y)
        stalls = leads and progress.rate < STALL
        won, lost = trial.outcome()
        gives_way = lost and stalls and not trial.mean > CLEAR * abs(recent)
        won = on_trial and fine_challenger and (won or not fine_leader or gives_way)
        lost = on_trial and not won and (lost or not fine_challenger)
        if won:
            loss = recent + (trial.mean if math.isfinite(trial.mean) else 0)
            return state._replace(
                learned_leads=not leads,
                progress=Progress.begun(loss, 0 if leads else k // YOUTH),
                level=level if leads else lasting,
                trial=NONE,
            )
        if lost:
            state = state._replace(trial=NONE)
        if not leads:
            return state
        risen = lasting > level + RISE * abs(level)
        breaks = not fine_y or risen
        ends = breaks or (stalls and self._is_first(state))
        better = not on_trial and lasting < level - GAIN * abs(level)
        if not breaks and (ends or lost or better):
            self.z.start_at(self.y.point)
            state = state._replace(level=min(level, lasting))
        if not ends:
            return state
        # z's path goes on from where y has come to: from there it is fast or slow again.
        began = Progress.begun(level if breaks else recent)
        return state._replace(learned_leads=False, progress=began, trial=NONE)

    def _is_first(self, state: State) -> bool:
        """Whether no trial but the first has begun."""
        return state.tried <= self.nt * -(-FIRST // self.nt)

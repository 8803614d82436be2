"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    where the leader's lane is
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, or is the snapshot that x can go back to while y leads
s    the fallback by itself, which y has never moved: stays behind when x leaves its path

The rules are those of ``lossguard.recommended`` and ``lossguard.hedged``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lossguard import rules
from lossguard.torch.guards.decision import (
    FALLBACK,
    LEARNED,
    OWN,
    Decision,
    Seen,
    any_finite,
    breaks,
    finite_mean,
)
from lossguard.torch.guards.losses import NONE, Progress, Trial

if TYPE_CHECKING:
    from lossguard.torch.guards.lane import Lane


class State(NamedTuple):
    """What is known: of the leader, progress; at the snapshot, the smoothed loss, level."""

    on_own: bool = True
    """Whether x is on the path of s."""
    learned_leads: bool = False
    progress: Progress = Progress.begun(math.nan)
    level: float = 0.0
    trial: Trial = NONE
    """Of y against z."""
    trial_cost: int = 0
    """Steps that trials are charged."""


class Relay:
    """The rules, which ``docs/guards.md`` tells.

    When s runs, and when x goes back to it, is the affair of the guard.
    """

    def __init__(self, z: "Lane", y: "Lane", s: "Lane", nt: int, share: float) -> None:
        self.y, self.z, self.s, self.nt, self.share = y, z, s, nt, share
        self.state = State()

    @property
    def leader(self) -> "Lane":
        """Where x is."""
        return self.y if self.state.learned_leads else self.z

    def begin(self, k: int, s_runs: bool) -> "list[Lane]":
        """The lanes that run in the cycle after k steps of the leader, beside the live one."""
        leads, progress = self.state.learned_leads, self.state.progress
        if not leads and self.state.trial == NONE:
            length = max(
                -(-rules.TRIAL_STEPS // self.nt), round(rules.PART * self.share * k / self.nt)
            )
            budget = self.share * k + math.sqrt(k)
            if self.state.trial_cost + length * self.nt <= budget or k == 0:
                self.state = self.state._replace(trial=Trial(length, progress.recent))
        trial = self.state.trial
        if trial != NONE and trial.cycles == 0:
            self.y.start_afresh_at(self.z.point)
            self.y.wind(k)
        self.leader.keep()
        runs = (self.y, leads or trial != NONE), (self.z, not leads), (self.s, s_runs)
        return [lane for lane, one_runs in runs if one_runs and not lane.live]

    def settle(self, seen: Mapping[str, Seen], k: int) -> Decision:
        """After the cycle: who leads, and what is to be told of it."""
        y, z, state, led = seen.get("y"), seen.get("z"), self.state, self.state.learned_leads
        for lane, one in ((self.z, z), (self.y, y)):
            if one is not None and not one.finite:
                lane.go_back()
        if z is not None:
            self.z.warm_up = 0
        losses, of_y = seen["y" if led else "z"].told, [] if y is None or led else y.told
        progress = state.progress.after(finite_mean(losses), self.nt)
        state = state._replace(progress=progress)
        if state.trial != NONE:
            trial = state.trial.after(of_y, losses)
            state = state._replace(trial=trial, trial_cost=state.trial_cost + self.nt)
            won, lost = trial.outcome(of_y, losses)
            if won:
                if state.on_own:
                    self.s.become(self.z)
                state = State(
                    on_own=False,
                    learned_leads=True,
                    progress=Progress.begun(finite_mean(of_y), k // rules.YOUTH),
                    level=state.progress.lasting,
                    trial_cost=state.trial_cost,
                )
            elif lost or breaks(of_y, losses):
                state = state._replace(trial=NONE)
        if led:
            state = self._keep_or_hand_over(state, losses)
        self.state = state
        of_z = OWN if state.on_own else FALLBACK
        return Decision(
            used_learned=[led] * self.nt,
            losses=losses,
            winner=LEARNED if state.learned_leads else of_z,
            gradients=self.nt * len(seen),
            learned_updates=self.nt * (y is not None),
            learned_loss=finite_mean(of_y),
            fallback_loss=finite_mean(losses) if of_y else math.nan,
        )

    def go_back(self, loss: float) -> None:
        """x goes back to s, at its loss."""
        self.z.become(self.s)
        self.state = State(progress=Progress.begun(loss), trial_cost=self.state.trial_cost)

    def _keep_or_hand_over(self, state: State, of_y: Sequence[float]) -> State:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot.

        Where its last loss isn't finite, x is no point to go on from. What z remembers is of where
        it was: Adam's moments, of gradients there, would hold it back at x for thousands of steps.
        So they are made new. Then its first steps would be too long: its first cycle is a warm-up.
        """
        progress, level, here = state.progress, state.level, math.isfinite(of_y[-1])
        now = progress.lasting
        risen = not any_finite(of_y) or now > level + rules.RISE * abs(level)
        if risen or (here and progress.rate < rules.STALL):
            if not risen:
                self._have_z_at_x()
            # z's path goes on from where y has come to: from there it is fast or slow again.
            began = Progress.begun(level if risen else progress.recent)
            return state._replace(learned_leads=False, progress=began)
        gain = rules.YOUNG_GAIN if progress.earlier_age == 0 else rules.GAIN
        if here and now < level - gain * abs(level):
            self._have_z_at_x()
            return state._replace(level=now)
        return state

    def _have_z_at_x(self) -> None:
        self.z.start_afresh_at(self.y.point)
        self.z.warm_up = self.nt

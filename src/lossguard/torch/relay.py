"""The relay: a learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    where the leader's lane is
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, or is the snapshot that x can go back to while y leads
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from lossguard.torch import progress as progresses
from lossguard.torch import trial as trials
from lossguard.torch.decision import Decision, Seen, mean
from lossguard.torch.progress import Progress
from lossguard.torch.trial import NONE, Trial

if TYPE_CHECKING:
    from lossguard.torch.lane import Lane

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


class Leg(NamedTuple):
    """What happened in a cycle.

    Attributes:
        losses: of the leader, before each step.
        challenger: of y on trial; none if there was no trial.
        learned_led: whether y led.
        fine_y: whether y stayed finite, if it ran.
        fine_z: whether z stayed finite, if it ran.
        taken_over: whether y has won, and leads from now on.
    """

    losses: list[float]
    challenger: list[float]
    learned_led: bool
    fine_y: bool
    fine_z: bool
    taken_over: bool

    @property
    def tried(self) -> bool:
        """Whether y was on trial."""
        return bool(self.challenger)


class State(NamedTuple):
    """What is known of both lanes.

    Attributes:
        learned_leads: whether y leads.
        progress: of the leader.
        level: the smoothed loss at the snapshot.
        trial: of y; ``NONE``: there is none.
        tried: optimizer steps that y has taken on trial.
    """

    learned_leads: bool
    progress: Progress
    level: float
    trial: Trial
    tried: int


class Relay:
    """The rules.

    - While z leads, y is tried from time to time, from x with a fresh state: in at most ``share``
      of the steps, and sqrt(k) more. It leads if it wins (``trial.py``).
    - y leads while its smoothed loss falls by a power of at least 1/4 of its age, and is not 1.5
      times what it was at the snapshot. Then z goes on: from x, or, after a rise, from there.
    - The snapshot is where z was when y took over. It moves to x when the loss is a fifth
      lower, at first half as high.
    """

    def __init__(self, y: "Lane", z: "Lane", nt: int, share: float) -> None:
        self.y, self.z, self.nt, self.share = y, z, nt, share
        self.state = State(False, progresses.begin(0.0), 0.0, NONE, 0)

    @property
    def leader(self) -> "Lane":
        """Where x is."""
        return self.y if self.state.learned_leads else self.z

    def begin(self, k: int) -> "list[Lane]":
        """The lanes that run in the cycle after k steps of the leader."""
        if self.state.learned_leads:
            return [self.y]
        if self.state.trial == NONE:
            self._begin_trial(k)
        trial = self.state.trial
        if trial != NONE and trial.cycles == 0:
            self.y.start_at(self.z.point)
            self.y.forget()
        self.z.keep()
        return [self.z] if trial == NONE else [self.y, self.z]

    def settle(self, y: Seen | None, z: Seen | None, k: int) -> Leg:
        """After the cycle, in which these of the lanes ran."""
        state, led = self.state, self.state.learned_leads
        fine_y, fine_z = y is None or y.fine, z is None or z.fine
        if not fine_z:
            self.z.go_back()
        leader = y if led else z
        assert leader is not None
        losses, of_y = leader.losses, [] if y is None or led else y.losses
        if fine_y if led else fine_z:
            state = state._replace(progress=progresses.add(state.progress, mean(losses), self.nt))
        taken_over = False
        if state.trial != NONE:
            trial = trials.add(state.trial, of_y, losses)
            state = state._replace(trial=trial, tried=state.tried + self.nt)
            won, lost = trials.outcome(trial, of_y)
            taken_over = fine_y and (won or not fine_z)
            if taken_over:
                began = progresses.begin(mean(of_y), k // YOUTH)
                level = state.progress.lasting
                state = state._replace(learned_leads=True, level=level, progress=began, trial=NONE)
            elif lost or not fine_y:
                state = state._replace(trial=NONE)
        self.state = self._keep_or_hand_over(state, fine_y) if led else state
        return Leg(losses, of_y, led, fine_y, fine_z, taken_over)

    def go_on_from(self, s: "Lane", loss: float) -> None:
        """Have z be where s is, and lead, with no trial."""
        self.z.become(s)
        began = progresses.begin(loss)
        self.state = self.state._replace(learned_leads=False, progress=began, trial=NONE)

    def _begin_trial(self, k: int) -> None:
        budget = self.share * k + math.sqrt(k)
        length = max(-(-LEAST // self.nt), round(PART * self.share * k / self.nt))
        if self.state.tried + length * self.nt <= budget or k == 0:
            progress = self.state.progress
            bound = progress.recent if progress.age else math.nan
            self.state = self.state._replace(trial=Trial(length, bound))

    def _keep_or_hand_over(self, state: State, fine: bool) -> State:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot."""
        progress, level = state.progress, state.level
        now, young = progress.lasting, progress.earlier_age == 0
        settled = progress.age >= progress.later_age + SETTLED * self.nt
        worse = young and settled and progress.recent > level
        risen = now > level + RISE * abs(level)
        ends = not fine or worse or risen or progresses.rate(progress) < STALL
        gain = YOUNG_GAIN if young else GAIN
        better = not ends and now < level - gain * abs(level)
        from_x = better or (ends and fine and not risen)
        if from_x:
            self.z.start_at(self.y.point)
        if better:
            return state._replace(level=now)
        if not ends:
            return state
        # z's path goes on from where y has come to: from there it is fast or slow again.
        began = progresses.begin(progress.recent if from_x else level)
        return state._replace(learned_leads=False, progress=began)


def report(leg: Leg, winner: int, nt: int, lanes: int) -> Decision:
    """The decision of a cycle in which so many lanes ran."""
    return Decision(
        used_learned=[leg.learned_led] * nt,
        losses=leg.losses,
        winner=winner,
        gradients=nt * lanes,
        learned_updates=nt * (leg.learned_led or leg.tried),
        learned_loss=mean(leg.challenger) if leg.tried else math.nan,
        fallback_loss=mean(leg.losses) if leg.tried else math.nan,
        finite_learned=leg.fine_y,
        finite_fallback=leg.fine_z,
    )

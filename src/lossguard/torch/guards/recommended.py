"""The guard that we recommend where compute is scarce: a relay, and the fallback by itself.

A learned optimizer and a fallback take turns at one iterate, x. One of them leads.

x    where the leader's lane is
y    the learned lane: leads, or is on trial from x
z    the fallback's lane: leads, or is the snapshot that x can go back to while y leads
s    the fallback by itself, which y has never moved: stays behind when x leaves its path
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import distributed
from torch.optim import Optimizer

from lossguard import rules
from lossguard.torch.guards.cycle import Guard, Module
from lossguard.torch.guards.decision import (
    FALLBACK,
    LEARNED,
    NONE,
    OWN,
    UNBOUNDED,
    Decision,
    Progress,
    Seen,
    Trial,
    any_finite,
    breaks,
    finite_mean,
)
from lossguard.torch.guards.lane import Lane
from lossguard.validation import check_part


class Known(NamedTuple):
    """What is known of x: of the leader, progress; at the snapshot, the smoothed loss, level."""

    on_own: bool = True
    """Whether x is on the path of s."""
    learned_leads: bool = False
    progress: Progress = Progress.begun(math.nan)
    level: float = 0.0
    trial: Trial = NONE
    """Of y against z."""
    trial_cost: int = 0
    """Steps that trials are charged."""


class Recommended(Guard):
    """Whoever leads runs; a challenger runs in a small share of the steps.

    The model is the leader's: the fallback's, beside which the learned optimizer is tried now and
    then; or the learned one's, from when it wins a trial until its losses stall. Meanwhile the
    fallback's own run stays behind as lane s, and the model goes back to it if that wins a trial.
    The rules are those of ``lossguard.recommended``; ``docs/guards.md`` tells them.

    A step costs one gradient, and one more for each challenger that runs in the cycle: y on trial,
    in at most max(first, ``share`` k + sqrt(k)) of k steps, first being ten, rounded up to whole
    cycles; s, in at most ``share`` k of them, or five times that where it would soon be a tenth
    below the model.

    Args:
        learned: the optimizer that is not trusted.
        fallback: the one that is, over the same parameters.
        nt: optimizer steps, and minibatches, from one decision to the next.
        share: of the steps, for each challenger; up to five times that for s.
        model: the module whose buffers (BatchNorm's statistics) belong to a lane; None if the
            parameters are in no module.
        process_group: the ranks that decide together; all of them by default.
        callback: called with every decision.

    ``decision.losses`` are of the leader before the cycle, without hindsight. ``learned_loss`` and
    ``fallback_loss`` are of a trial. A lane that is not finite can't lead, and at the ends of
    cycles the model is finite if it began so.

    Raises:
        ValueError: if an argument isn't one of the above.

    Memory: three copies of the parameters and buffers beside the model, two states of the fallback,
    one of the learned optimizer; a fourth copy while a challenger runs, a fifth while s does.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = Recommended(learned, fallback, model=None)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for batch in range(10):
    ...     loss = guard.step(closure)
    >>> guard.last_decision.winner, guard.last_decision.price()  # it has won its first trial
    (0, 20.0)
    """

    remembered = (*Guard.remembered, "known", "_own_steps", "_own_progress", "_own_trial")

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: Module = ...,
        nt: int = 10,
        share: float = 0.05,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        self.share = check_part("share", share)
        optimizers = {"fallback": fallback, "learned": learned}
        lanes = {"z": "fallback", "y": "learned", "s": "fallback"}
        super().__init__(
            optimizers, lanes, model, nt, process_group=process_group, callback=callback
        )
        self._z, self._y, self._s = self._lanes.values()
        self.known = Known()
        self._own_steps = 0
        """Of s, and its progress; that is not smoothed, as s may run seldom."""
        self._own_progress = Progress.begun(math.nan)
        self._own_trial = UNBOUNDED
        """Of s against x, by their losses alone."""

    def _begin(self) -> list[Lane]:
        known, k = self.known, self.steps
        if not known.learned_leads and known.trial == NONE:
            length = max(
                -(-rules.TRIAL_STEPS // self.nt), round(rules.PART * self.share * k / self.nt)
            )
            budget = self.share * k + math.sqrt(k)
            if known.trial_cost + length * self.nt <= budget or k == 0:
                known = known._replace(trial=Trial(length, known.progress.recent))
        if known.trial != NONE and known.trial.cycles == 0:
            self._y.start_afresh_at(self._z.point)
            self._y.memory.wind(k)
        self.known = known
        now = known.progress.recent
        more = min(1.0, rules.MORE * self.share)
        soon = self._own_progress.expected_at(more * k) < now - rules.BELOW * abs(now)
        s_runs = not known.on_own and self._own_steps < (more if soon else self.share) * k
        if s_runs:
            self._s.keep()
        runs = {
            self._y: known.learned_leads or known.trial != NONE,
            self._z: not known.learned_leads,
            self._s: s_runs,
        }
        return [lane for lane, one_runs in runs.items() if one_runs and not lane.live]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        on_own = self.known.on_own
        decision = self._settle_x(seen)
        own = seen["s"].told if "s" in seen else decision.losses
        if on_own or "s" in seen:
            self._own_steps += self.nt
            self._own_progress = self._own_progress.after(finite_mean(own), self.nt, memory=0)
        if "s" in seen:
            if not seen["s"].finite:
                self._s.go_back()
            trial = self._own_trial.after(own, decision.losses)
            won, lost = trial.outcome(own, decision.losses)
            self._own_trial = UNBOUNDED if won or lost else trial
            if won:
                self._z.become(self._s)
                progress = Progress.begun(self._own_progress.recent)
                self.known = Known(progress=progress, trial_cost=self.known.trial_cost)
                decision = decision._replace(winner=OWN)
        self._lead(self._y if self.known.learned_leads else self._z)
        return decision

    def _settle_x(self, seen: Mapping[str, Seen]) -> Decision:
        """What the relay says, s aside."""
        known, led = self.known, self.known.learned_leads
        for lane in (self._z, self._y):
            if lane.name in seen and not seen[lane.name].finite:
                lane.go_back()
        losses = seen["y" if led else "z"].told
        of_y = seen["y"].told if "y" in seen and not led else []
        known = known._replace(progress=known.progress.after(finite_mean(losses), self.nt))
        if known.trial != NONE:
            known = self._after_trial(known, of_y, losses)
        if led:
            known = self._keep_or_hand_over(known, losses)
        self.known = known
        of_z = OWN if known.on_own else FALLBACK
        return Decision(
            used_learned=[led] * self.nt,
            losses=losses,
            winner=LEARNED if known.learned_leads else of_z,
            gradients=self.nt * len(seen),
            learned_updates=self.nt * ("y" in seen),
            learned_loss=finite_mean(of_y),
            fallback_loss=finite_mean(losses) if of_y else math.nan,
        )

    def _after_trial(self, known: Known, of_y: Sequence[float], of_z: Sequence[float]) -> Known:
        """After a cycle of y's trial: it leads, goes on, or is over."""
        trial = known.trial.after(of_y, of_z)
        cost = known.trial_cost + self.nt
        won, lost = trial.outcome(of_y, of_z)
        if not won:
            over = lost or breaks(of_y, of_z)
            return known._replace(trial=NONE if over else trial, trial_cost=cost)
        if known.on_own:
            self._s.become(self._z)
        return Known(
            on_own=False,
            learned_leads=True,
            progress=Progress.begun(finite_mean(of_y), self.steps // rules.YOUTH),
            level=known.progress.lasting,
            trial_cost=cost,
        )

    def _keep_or_hand_over(self, known: Known, of_y: Sequence[float]) -> Known:
        """After a cycle that y led: it leads on, or z goes on from x or from the snapshot.

        Where its last loss isn't finite, x is no point to go on from. What z remembers is of where
        it was: Adam's moments, of gradients there, would hold it back at x for thousands of steps.
        So they are made new. Then its first steps would be too long: its first cycle is a warm-up.
        """
        progress, level, here = known.progress, known.level, math.isfinite(of_y[-1])
        now = progress.lasting
        risen = not any_finite(of_y) or now > level + rules.RISE * abs(level)
        hands_over = risen or (here and progress.rate < rules.STALL)
        gain = rules.YOUNG_GAIN if progress.earlier_age == 0 else rules.GAIN
        advances = here and now < level - gain * abs(level)
        if not risen and (hands_over or advances):
            self._z.start_afresh_at(self._y.point, warm_up=self.nt)
        if hands_over:
            # z's path goes on from where y has come to: from there it is fast or slow again.
            began = Progress.begun(level if risen else progress.recent)
            return known._replace(learned_leads=False, progress=began)
        return known._replace(level=now) if advances else known

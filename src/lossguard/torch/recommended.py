"""The guard that we recommend where compute is scarce: a relay, and the fallback by itself."""

import math
from collections.abc import Mapping

from lossguard.torch import trial as trials
from lossguard.torch.decision import FALLBACK, LEARNED, OWN, Decision, Seen, mean
from lossguard.torch.guard import GuardOfTwo
from lossguard.torch.lane import Lane
from lossguard.torch.relay import Leg, report
from lossguard.torch.trial import Trial

LOOKS = 3
"""Cycles on which s is compared with x, each time that it is."""


class Recommended(GuardOfTwo):
    """Whoever leads runs; a challenger runs in a small share of the steps.

    The model is the leader's, who is one of two:

    - *The fallback.* Now and then the learned optimizer is tried from the model, beside it and on
      the same minibatches. It takes over if it is better by three standard errors.
    - *The learned optimizer.* It leads while its loss falls: by a power of 1/4 of its age at least.
      When it stalls the fallback goes on from there, or from a snapshot if the loss has risen.

    When the learned optimizer first takes over, the fallback's own run stays behind as lane s. It
    runs until it has had a share of the steps; the model goes back to it if it wins a trial.

    So a step costs one gradient, and one more for each challenger that runs in the cycle: y on
    trial while the fallback leads, in at most ``share`` of the steps and sqrt(k) more; s while the
    model is off its path, in at most ``share`` of them. Training losses decide.

    Args:
        learned: the optimizer that is not trusted.
        fallback: the one that is, over the same parameters.
        nt: optimizer steps, and minibatches, from one decision to the next.
        share: of the steps, for each challenger.
        model: the module whose buffers (BatchNorm's statistics) belong to a lane; None if the
            parameters are in no module.
        process_group: the ranks that decide together; all of them by default.
        callback: called with every decision.

    ``decision.losses`` are of the leader before the cycle, without hindsight. ``learned_loss`` and
    ``fallback_loss`` are of a trial. A lane that is not finite can't lead, and at the ends of
    cycles the model is finite if it began so.

    Memory: three copies of the parameters and buffers beside the model, two states of the fallback,
    one of the learned optimizer; while s runs a fourth copy.

    Raises:
        ValueError: if an argument isn't one of the above.

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

    remembered = ("_on_own", "_own_steps", "_against", "_relay.state")

    _own_steps = 0
    _against = Trial(LOOKS, math.inf)
    """Of s against x, by their losses alone."""

    def _begin(self) -> list[Lane]:
        relay = self._relay.begin(self.steps)
        self._watch.twins = self._relay.twins
        runs = not self._on_own and self._own_steps < self._relay.share * self.steps
        if runs:
            self._s.keep()
        return [lane for lane in (*relay, *[self._s][:runs]) if not lane.live]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        s = seen.get("s")
        leg = self._relay.settle(seen.get("y"), seen.get("z"), self.steps)
        self._settle_own(leg, s)
        self._lead(self._relay.leader)
        winner = OWN if self._on_own else FALLBACK
        return report(
            leg, LEARNED if self._relay.leader.name == "y" else winner, self.nt, len(seen)
        )

    def _settle_own(self, leg: Leg, s: Seen | None) -> None:
        """x leaves the fallback's own path, stays off it, or goes back to it."""
        runs, on_own = s is not None, self._on_own
        if s is not None and not s.fine:
            self._s.go_back()
        if on_own and leg.taken_over:
            self._s.become(self._relay.z)
            self._on_own, self._against = False, Trial(LOOKS, math.inf)
        elif s is not None and s.fine:
            self._against = trials.add(self._against, s.losses, leg.losses)
            won, lost = trials.outcome(self._against, s.losses)
            if won or lost:
                self._against = Trial(LOOKS, math.inf)
            if won:
                self._relay.go_on_from(self._s, mean(s.losses))
                self._on_own = True
        self._own_steps += self.nt * (on_own or runs)

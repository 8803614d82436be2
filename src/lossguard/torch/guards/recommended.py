"""The guard that we recommend where compute is scarce: a relay, and the fallback by itself."""

import math
from collections.abc import Mapping

from lossguard.rules import BELOW, MORE
from lossguard.torch.guards.decision import OWN, Decision, Seen, finite_mean
from lossguard.torch.guards.guard import GuardOfTwo
from lossguard.torch.guards.lane import Lane
from lossguard.torch.guards.losses import UNBOUNDED, Progress


class Recommended(GuardOfTwo):
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

    remembered = (*GuardOfTwo.remembered, "_own_steps", "_progress", "_against")

    _own_steps = 0
    _progress = Progress.begun(math.nan)
    """Of the fallback by itself; not smoothed, as s may run seldom."""
    _against = UNBOUNDED
    """Of s against x, by their losses alone."""

    def _begin(self) -> list[Lane]:
        relay, now = self._relay, self._relay.state.progress.recent
        share, more = relay.share, min(1.0, MORE * relay.share)
        if self._progress.expected_at(more * self.steps) < now - BELOW * abs(now):
            share = more
        s_runs = not relay.state.on_own and self._own_steps < share * self.steps
        lanes = relay.begin(self.steps, s_runs)
        if relay.s in lanes:
            relay.s.keep()
        return lanes

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        s, relay, on_own = seen.get("s"), self._relay, self._relay.state.on_own
        decision = relay.settle(seen, self.steps)
        if on_own or s is not None:
            own = decision.losses if s is None else s.told
            self._own_steps += self.nt
            self._progress = self._progress.after(finite_mean(own), self.nt, memory=0)
        if s is not None:
            if not s.finite:
                relay.s.go_back()
            self._against = self._against.after(s.told, decision.losses)
            won, lost = self._against.outcome(s.told, decision.losses)
            if won or lost:
                self._against = UNBOUNDED
            if won:
                relay.go_back(self._progress.recent)
                decision = decision._replace(winner=OWN)
        self._lead(relay.leader)
        return decision

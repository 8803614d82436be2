"""The guard for where optimizer steps are scarce: a promise on sums of the losses it reports."""

import math
from collections.abc import Mapping, Sequence

from lossguard.rules import DECAY, PATIENCE, STRETCH
from lossguard.torch.guards.decision import (
    OWN,
    Decision,
    Seen,
    any_finite,
    bounded,
    breaks,
    finite_mean,
)
from lossguard.torch.guards.guard import GuardOfTwo
from lossguard.torch.guards.lane import Lane


class Hedged(GuardOfTwo):
    """Report training losses, with hindsight, that never sum up to more than the fallback's.

    x is run as in ``Recommended``. Beside it runs s, the fallback by itself, on every minibatch:

        R <- 0.7 R + sum_t [F(x, i+t) - F(s, i+t)]    over the nt steps of a cycle
        model <- s   if R > 0   else x

    x goes back to s if s leads for a tenth of the cycles since x left its path, three at least.
    While x is on that path, x is s, and s costs nothing. ``decision.losses`` are those of the lane
    that leads after the cycle, with hindsight. For these, at the end of every cycle and in every
    run,

        sum losses  <=  sum losses of the fallback alone

    if the fallback alone stays finite, up to rounding. What ``step`` returns is without hindsight.

    Args:
        learned, fallback, nt, model, process_group, callback: as in ``Recommended``.
        share: of the steps, for trials.

    Raises:
        ValueError: if an argument isn't one of the above.

    Price in gradients: 1 a step on the fallback's path, 2 off it; and 1 for each step on trial, at
    most max(first, ``share`` k + sqrt(k)) of k, first being ten, rounded up to whole cycles.
    Memory: four copies of the parameters and buffers beside the model, a fifth one while another
    lane runs, two states of the fallback, one of the learned optimizer.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = Hedged(learned, fallback, model=None)
    >>> for batch in range(10):
    ...     for lane in guard.lanes():
    ...         loss = w.square().sum()
    ...         loss.backward()
    ...         lane.step(loss)
    >>> guard.last_decision.winner, guard.last_decision.price()
    (0, 20.0)
    """

    remembered = (*GuardOfTwo.remembered, "_regret", "_away", "_behind")

    _regret, _away, _behind = 0.0, 0, 0

    def _begin(self) -> list[Lane]:
        return self._relay.begin(self.steps, not self._relay.state.on_own)

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        s, relay, leader = seen.get("s"), self._relay, None
        decision = relay.settle(seen, self.steps)
        if s is not None and self._follow(decision.losses, s):
            own = [False] * self.nt
            decision = decision._replace(winner=OWN, losses=s.told, used_learned=own)
            if self._behind < max(STRETCH, PATIENCE * self._away) or not any_finite(s.told):
                leader = relay.s
            else:
                relay.go_back(finite_mean(s.told))
                self._regret, self._away, self._behind = 0.0, 0, 0
        self._lead(leader or relay.leader)
        return decision

    def _follow(self, losses: Sequence[float], s: Seen) -> bool:
        """Add up how x has done against s; whether s leads."""
        broken = breaks(s.told, losses)
        if broken or not s.finite:  # not finite any more: it begins again at x
            self._relay.s.start_afresh_at(self._relay.leader.point)
        rows = zip(bounded(losses), bounded(s.told), map(math.isfinite, s.told), strict=True)
        d = sum(x - f for x, f, finite in rows if finite)
        self._regret = 0.0 if broken else DECAY * self._regret + d
        self._away += 1
        self._behind = self._behind + 1 if self._regret > 0 else 0
        return self._regret > 0

"""The guard for where optimizer steps are scarce: never above the fallback after as many steps."""

import math
from collections.abc import Mapping

from lossguard.torch.decision import FALLBACK, LEARNED, OWN, Decision, Seen, mean
from lossguard.torch.guard import GuardOfTwo
from lossguard.torch.lane import Lane
from lossguard.torch.relay import Leg, report

DECAY = 0.7
"""Weight of the past in the regret, a cycle."""
PATIENCE = 0.1
"""x goes back to s once s has led for this part of the cycles since x left it, at a stretch."""
LEAST = 3
"""The least number of these cycles."""


class Hedged(GuardOfTwo):
    """In every run the training losses that it reports never sum up to more than the fallback's.

    x is run as in ``Recommended``. Beside it runs s, the fallback by itself, on every minibatch:

        R <- 0.7 R + sum_t [F(x, i+t) - F(s, i+t)]    over the nt steps of a cycle
        model <- s   if R > 0   else x

    x goes on while s leads, and goes back to s if that lasts for a tenth of the cycles since x left
    the path of s. While x is on that path, x is s, and s costs nothing.

    ``decision.losses`` are those of the lane that leads after the cycle, with hindsight. For these,
    at the end of every cycle and in every run,

        sum losses  <=  sum losses of the fallback alone

    if the fallback alone stays finite, up to rounding. What ``step`` returns is without hindsight.

    Args:
        learned, fallback, nt, model, process_group, callback: as in ``Recommended``.
        share: of the steps, for the learned optimizer while it is only on trial.

    Price of a step, in gradients: 1 and at most ``share`` on the fallback's path, 2 and at most
    ``share`` off it. Memory: four copies of the parameters and buffers beside the model, two states
    of the fallback, one of the learned optimizer.

    Raises:
        ValueError: if an argument isn't one of the above.

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

    remembered = ("_on_own", "_regret", "_away", "_behind", "_relay.state")

    _regret, _away, _behind = 0.0, 0, 0

    def _begin(self) -> list[Lane]:
        relay = self._relay.begin(self.steps)
        return [lane for lane in (*relay, *([] if self._on_own else [self._s])) if not lane.live]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        s = seen.get("s")
        leg = self._relay.settle(seen.get("y"), seen.get("z"), self.steps)
        known = self._follow(leg, s)
        gives_s, leaves = self._regret > 0, self._on_own and leg.taken_over
        back = known and (
            self._behind >= max(LEAST, PATIENCE * self._away) or math.isinf(self._regret)
        )
        if leaves:
            self._s.become(self._relay.z)
            self._on_own = False
        if back and s is not None:
            self._relay.go_on_from(self._s, mean(s.losses))
            self._on_own, self._regret, self._away, self._behind = True, 0.0, 0, 0
        self._lead(self._s if self._regret > 0 else self._relay.leader)
        winner = OWN if self._on_own else FALLBACK
        winner = LEARNED if self._relay.leader.name == "y" else winner
        decision = report(leg, OWN if gives_s else winner, self.nt, len(seen))
        if gives_s and s is not None:
            return decision._replace(losses=s.losses, used_learned=[False] * self.nt)
        return decision

    def _follow(self, leg: Leg, s: Seen | None) -> bool:
        """Add up how x has done against s; whether that is known."""
        if s is None:
            self._regret, self._away, self._behind = 0.0, 0, 0
            return False
        if not s.fine:  # not finite any more: it begins again at x
            self._s.start_at(self._relay.leader.point)
            self._s.forget()
        d = sum(leg.losses) - sum(s.losses)
        d = d if math.isfinite(d) else math.inf  # x had a loss that isn't finite, and s hadn't
        self._regret = DECAY * self._regret + d if s.fine else 0.0
        self._away += 1
        self._behind = self._behind + 1 if self._regret > 0 else 0
        return s.fine

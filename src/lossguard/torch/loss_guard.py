"""The paper's guard: Algorithm 2 (LGL2O).

Letters: x the kept iterate, y the learned branch, z the fallback branch, nt optimizer steps a
cycle, nc check minibatches, i the number of a minibatch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from torch import distributed, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import check_fallback
from lossguard.torch.decision import FALLBACK, LEARNED, NEITHER, Decision, Seen, mean
from lossguard.torch.guard import Guard
from lossguard.torch.lane import Lane
from lossguard.validation import check_choice, check_count

Loser = Literal["keep", "reset"]


class LossGuard(Guard):
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

        y <- x;  z <- x
        for t in 0 .. nt-1:  y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t))
        x <- y   if mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j),  j in 0 .. nc-1,   else z
        i <- i + nt + nc

    The first nt calls of a cycle train both branches, the next nc only evaluate them, without
    gradients (``guard.checking``), and the last decides. Within a cycle the model is the branch
    that was kept last; at its end it is x.

    Where the paper is silent: a branch whose parameters or check losses are not finite can't win,
    and if neither can, x stays; an optimizer state that is no longer finite is made new.

    Args:
        learned, fallback, model, process_group, callback: as in ``Recommended``.
        nt: optimizer steps a cycle.
        nc: check minibatches a cycle.
        loser: the optimizer state of the branch that lost. "keep": it runs on from its own nt
            steps; "reset": as at the start.

    Memory: two copies of the parameters and buffers beside the model, and both optimizer states.
    Cost a cycle: 2 nt gradients, nt learned updates, 2 nc forward passes.

    Raises:
        ValueError: if an argument isn't one of the above.

    Source: the paper's Algorithm 2.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, nt=2, nc=1, model=None)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for batch in range(3):
    ...     loss = guard.step(closure)
    >>> guard.last_decision.winner, round(float(w.detach()), 4)
    (0, 0.16)
    """

    trusted = ("z",)
    forgives = False

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        nt: int = 10,
        nc: int = 10,
        loser: Loser = "keep",
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        check_choice("loser", loser, get_args(Loser))
        check_fallback(fallback)
        self.loser = loser
        super().__init__(
            {"fallback": fallback, "learned": learned},
            {"y": "learned", "z": "fallback"},
            leader="z",
            nt=nt,
            nc=check_count("nc", nc),
            model=model,
            process_group=process_group,
            callback=callback,
        )

    def _begin(self) -> list[Lane]:
        (other,) = (lane for lane in self._lanes.values() if not lane.live)
        other.start_at(self._leader.point)  # lines 10, 11
        return [other]

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        y, z, nt = seen["y"], seen["z"], self.nt
        check_y, check_z = mean(y.checks), mean(z.checks)
        finite_y, finite_z = (
            one.finite and math.isfinite(check) for one, check in ((y, check_y), (z, check_z))
        )
        keep_y = finite_y and (check_y < check_z or not finite_z)  # line 16
        if keep_y or finite_z:
            self._lead(self._lanes["y" if keep_y else "z"])  # lines 17, 19
        else:
            self._leader.go_back()
        loser = self._lanes["z" if keep_y else "y"]
        if self.loser == "reset":
            loser.forget()
        return Decision(
            used_learned=[keep_y] * nt,
            losses=y.losses if keep_y else z.losses,
            learned_loss=check_y,
            fallback_loss=check_z,
            finite_learned=finite_y,
            finite_fallback=finite_z,
            winner=LEARNED if keep_y else FALLBACK if finite_z else NEITHER,
            gradients=2 * nt,
            forwards=2 * self.nc,
            learned_updates=nt,
        )

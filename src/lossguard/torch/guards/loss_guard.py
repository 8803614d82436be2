"""The guard of the paper, LGL2O: Algorithm 2.

Letters: x the kept iterate, y the learned branch, z the fallback's, nt optimizer steps a cycle, nc
check minibatches, i and k the numbers of minibatches.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from lossguard.torch.guards.cycle import Guard, Module
from lossguard.torch.guards.decision import FALLBACK, LEARNED, NEITHER, Decision, Seen, mean
from lossguard.torch.guards.lane import Lane
from lossguard.validation import check_choice, check_count, check_function

Loser = Literal["keep", "reset"]


class LossGuard(Guard):
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

        y <- x;  z <- x
        for t in 0 .. nt-1:  y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t))
        x <- y   if mean_j G(y, k+j) < mean_j G(z, k+j),  j in 0 .. nc-1,   else z
        i <- i + nt;  k <- k + nc

    Each call trains both branches, and the last of a cycle decides. Within a cycle the model is the
    branch that was kept last; at its end it is x. What isn't finite is treated as in
    ``lossguard.loss_guard``.

    Args:
        learned, fallback, model, process_group, callback: as in ``Recommended``.
        check: G: a function of a number k that returns the model's loss on check minibatch k, the
            same for both branches. In the paper these are fresh ones of the training data.
        nt, nc: optimizer steps and check minibatches a cycle.
        loser: the optimizer state of the branch that lost. "keep": it runs on from its own nt
            steps; "reset": as at the start.

    Raises:
        ValueError: if an argument isn't one of the above.

    Memory: two copies of the parameters and buffers beside the model, a third one while the other
    lane runs, and both optimizer states.
    Cost a cycle: 2 nt gradients, nt learned updates, 2 nc forward passes. Source: Algorithm 2.

    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> learned, fallback = torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1)
    >>> guard = LossGuard(learned, fallback, model=None, check=lambda k: w.square().sum(), nt=2)
    >>> for batch in range(2):
    ...     for lane in guard.lanes():
    ...         loss = w.square().sum()
    ...         loss.backward()
    ...         lane.step(loss)
    >>> guard.last_decision.winner, round(float(w.detach()), 4)
    (0, 0.16)
    """

    forgives = False

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: Module = ...,
        check: Callable[[int], Tensor],
        nt: int = 10,
        nc: int = 10,
        loser: Loser = "keep",
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        check_choice("loser", loser, get_args(Loser))
        check_function("check", check, "of a number")
        self.loser = loser
        optimizers, nc = {"fallback": fallback, "learned": learned}, check_count("nc", nc)
        lanes = {"z": "fallback", "y": "learned"}
        super().__init__(optimizers, lanes, model, nt, check, nc, process_group, callback)
        if any(p.dtype == torch.float16 for p in self._live.params):
            raise ValueError(
                "parameters must have more range than float16 for LossGuard, where a gradient that "
                "overflows is not left out, got some of float16"
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
            losses=y.losses if keep_y else z.losses if finite_z else [math.inf] * nt,
            learned_loss=check_y,
            fallback_loss=check_z,
            winner=LEARNED if keep_y else FALLBACK if finite_z else NEITHER,
            gradients=2 * nt,
            forwards=2 * self.nc,
            learned_updates=nt,
        )

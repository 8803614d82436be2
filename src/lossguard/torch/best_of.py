"""Optimizers side by side, each on its own path, of which the best is followed.

d    a lane's loss in a cycle: of its train minibatches, each before its step, or of check ones
D    its record: the discounted sum of d over all cycles
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch import arguments
from lossguard.torch.checkpoint import load_lane, save_lane
from lossguard.torch.closures import Closure
from lossguard.torch.consensus import outcome
from lossguard.torch.decision import NEITHER, Decision
from lossguard.torch.lane import Lane
from lossguard.torch.lane_guard import LaneGuard
from lossguard.torch.paths import Paths
from lossguard.torch.tensors import clone
from lossguard.validation import check_count, check_decay


class BestOf(LaneGuard):
    r"""Runs optimizers side by side, and follows the one whose recent losses are lowest.

    Every lane j, the learned optimizers and the fallback, goes on from where it is. In a cycle:

        w[j] <- optimizer j(w[j], grad F(w[j], i+t)),   t = 0 .. nt-1
        d[j] <- mean_t F(w[j], i+t)                     before each of these steps
        D[j] <- decay D[j] + d[j]
        x <- w[j] of the lowest D[j]

    Ten steps can't tell which of two learning rates is better in the long run: from any point, the
    lower one lowers the loss at once, since it takes noise out. Paths that none disturbs can. In
    every run, for any optimizers and at any time, the discounted sum of the decisions' ``losses``
    is at most that of each lane that was always finite and never stopped ("be the leader": Kalai
    and Vempala, 2005), so that of the fallback alone:

        sum_c decay^(C-c) d[followed in c](c)  <=  min_j sum_c decay^(C-c) d[j](c)

    Where data repeat, training losses are lower for whoever overfits. With ``nc``, the nc
    minibatches after a cycle's nt only check, as in ``LossGuard``: take them from held-out data
    (while ``guard.checking``, or with ``cycle``), and x is never worse there. Then

        d[j] <- mean_k F(w[j], i+nt+k),   k = 0 .. nc-1   after the cycle's steps

    A minibatch on which the fallback's loss isn't finite is left out for all. A learned lane whose
    loss isn't finite on one of the others begins anew at x, with the record of the lane followed;
    so does any lane whose parameters or buffers aren't. Between calls the model holds x, which
    changes at decisions only.

    Args:
        learned: the optimizer that isn't trusted, or several.
        fallback: the one that is, over the same parameters; it is followed where records are level.
            Its parameter groups are the guard's.
        nt: train minibatches per cycle.
        nc: check minibatches per cycle; by default none, and all of them train.
        decay: D remembers about 1 / (1 - decay) cycles.
        patience: cycles running in which a learned optimizer isn't followed, after which it stops
            for good, and costs nothing but memory any more; by default none does. Its rate may be
            on a schedule by which it gets ahead late.
        model, scaler, schedulers, offload, process_group, callback: as in ``LossGuard``.

    ``decision.winner`` numbers the learned optimizers from 0, then the fallback. ``learned_loss``
    and ``fallback_loss`` are d, of the best learned one and of the fallback.

    Memory: their states, and a copy of the parameters and buffers for each beside the model.

    Raises:
        ValueError: if an argument isn't one of the above.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> guard = BestOf(torch.optim.SGD([w], lr=0.4), torch.optim.SGD([w], lr=0.1), nt=2)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for batch in range(2):
    ...     loss = guard.step(closure)
    >>> guard.last_decision.winner, round(float(w.detach()), 4)
    (0, 0.16)
    """

    def __init__(
        self,
        learned: Optimizer | Sequence[Optimizer],
        fallback: Optimizer,
        *,
        nt: int = 10,
        nc: int = 0,
        decay: float = 0.9,
        patience: int | None = None,
        model: nn.Module | None = None,
        scaler: GradScaler | None = None,
        schedulers: Sequence[LRScheduler] = (),
        offload: Literal["cpu"] | None = None,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        self.nc = check_count("nc", nc, least=0)
        self.decay = check_decay(decay)
        self.patience = None if patience is None else check_count("patience", patience)
        super().__init__(
            learned,
            fallback,
            nt=nt,
            model=model,
            scaler=scaler,
            schedulers=schedulers,
            offload=offload,
            process_group=process_group,
            callback=callback,
        )
        names = ["learned"] * (len(self._inners) - 1) + ["fallback"]
        self._paths = Paths(
            [
                Lane(name, inner, "keep", clone(scaler), self._weights.copy(), own_path=True)
                for name, inner in zip(names, self._inners, strict=True)
            ],
            checks=self.nc > 0,
        )
        self._drive(self._paths)

    @property
    def records(self) -> list[float]:
        """D of each optimizer, the learned ones first; infinite of one that has stopped."""
        return list(self._paths.records)

    def cycle(
        self,
        loss_fn: Callable[[Any], Tensor],
        train_batches: Iterable[Any],
        check_batches: Iterable[Any] = (),
    ) -> Decision:
        """Take the minibatches of a whole cycle at once, one lane after the other.

        Args:
            loss_fn: the loss of a minibatch; the guard calls ``backward``.
            train_batches: nt minibatches.
            check_batches: other minibatches, of which it draws nc, or none where the fallback is
                the only one that hasn't stopped.
        """
        nc = self._checks(self._paths.running(self.patience))
        train, check = self._check_train(train_batches), list(islice(check_batches, nc))
        arguments.check_drawn("check_batches", len(check), nc, more_will_do=True)
        self._take(self._closures(loss_fn, [*train, *check]))
        return self.history[-1]

    def _run(self, closures: Sequence[Closure]) -> dict[int, list[Any]]:
        active = self._paths.running(self.patience)
        values = self._cycle.run(closures, active)
        if self._cycle.phase == self.nt + self._checks(active):
            self._decide(active)
        return values

    def _checks(self, active: Sequence[int]) -> int:
        """How many minibatches these lanes are checked on."""
        return self.nc if self._paths.checked(active) else 0

    def _decide(self, active: list[int]) -> None:
        paths, x, nc = self._paths, self._weights, self._checks(active)
        *learned, fallback = active
        seen = outcome([paths.all[number] for number in active], [], x, self.process_group)
        firsts = self._firsts(active, seen.trains)
        losses = dict(zip(active, seen.trains, strict=True))
        compared = dict(zip(active, seen.checks, strict=True)) if nc else losses
        d, fit = paths.record(compared, dict(zip(active, seen.sound, strict=True)), self.decay)
        winner = paths.kept if any(fit.values()) else NEITHER
        if winner != NEITHER:
            x.copy_from(paths.all[winner].copy)
        reset = paths.settle(fit, dict(zip(active, seen.broken, strict=True)), x)
        self._decided(
            Decision(
                used_learned=[winner in learned] * self.nt,
                losses=losses[fallback if winner == NEITHER else winner],
                learned_loss=_least([d[number] for number in learned]),
                fallback_loss=d[fallback],
                finite_learned=any(fit[number] for number in learned) or not learned,
                finite_fallback=fit[fallback],
                reset_learned=any(reset[number] for number in learned),
                reset_fallback=reset[fallback],
                winner=winner,
                steps=self.nt,
                gradients=self._cycle.gradients,
                forwards=nc * len(active),
                learned_updates=len(learned) * self.nt,
            ),
            firsts,
        )

    def _save(self) -> dict[str, Any]:
        paths = self._paths
        return {
            **super()._save(),
            "nc": self.nc,
            "patience": self.patience,
            "lanes": [save_lane(lane, self._cycle.phase) for lane in paths.all],
            "records": list(paths.records),
            "away": list(paths.away),
            "begun": paths.begun,
        }

    def _load(self, state: dict[str, Any]) -> None:
        paths = self._paths
        for lane, its_state in zip(paths.all, state["lanes"], strict=True):
            load_lane(lane, its_state)
        paths.records, paths.away = list(state["records"]), list(state["away"])
        paths.begun = state["begun"]
        super()._load(state)

    def _check_saved(self, saved: dict[str, Any]) -> None:
        super()._check_saved(saved)
        state = saved["guard"]
        ours, theirs = len(self._paths.all), len(state["lanes"])
        if ours != theirs:
            raise ValueError(f"state_dict must be of {ours} optimizers, got one of {theirs}")
        needed = {"nt": self.nt, "nc": self.nc, "patience": self.patience}
        if state["phase"] and any(state[name] != value for name, value in needed.items()):
            wanted, got = (
                ", ".join(f"{name}={options[name]}" for name in needed)
                for options in (needed, state)
            )
            raise ValueError(f"state_dict from within a cycle must have {wanted}, got {got}")


def _least(losses: Sequence[float]) -> float:
    """The lowest that is a number; NaN if there is none."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.nan)

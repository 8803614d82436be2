"""Optimizers side by side, each on its own path, of which the best is followed."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lossguard.torch.closures import scalar
from lossguard.torch.decision import NEITHER, Decision, Seen, mean
from lossguard.torch.guard import Guard
from lossguard.torch.lane import Lane
from lossguard.validation import check_count, check_decay, check_share


class BestOf(Guard):
    """Run several optimizers, each on its own path, and follow the one whose losses are lowest.

    On the same minibatches, for each optimizer j that runs in a cycle:

        d[j] <- mean_t F(w[j], i+t)          its training losses
        W[j] <- decay W[j] + 1
        D[j] <- D[j] + (d[j] - D[j]) / W[j]  their mean, of which each cycle forgets a part
        model <- w[j] of the lowest D[j]

    Without ``share`` all run in every cycle. Then for any optimizers and at any time

        sum_c decay^(C-c) d[followed in c](c)  <=  min_j sum_c decay^(C-c) d[j](c)

    over those that were finite so far ("be the leader": Kalai and Vempala, 2005). The losses are
    reported with hindsight: d is known before the leader is chosen.

    With ``share`` the leader runs, and each of the others in that share of the cycles: so several
    cost little more than one. A record is of the cycles in which its optimizer ran.

    Args:
        optimizers: of the same parameters. The first is followed where all are level, and its
            groups are the guard's. Or a function of a rate that makes one.
        rates: for each optimizer that this function is to make.
        model, nt, process_group, callback: as in ``Recommended``.
        share: of the cycles, for each optimizer that doesn't lead. None: all run.
        check: where data repeat, training losses are lower for whoever overfits. Then d[j] is the
            mean of ``check(k)``, the model's loss on held-out minibatch number k, at w[j] after the
            cycle, over nc minibatches 0, 1, 2, ...
        nc: check minibatches a cycle, where there is a ``check``.
        decay: D remembers about 1 / (1 - decay) cycles.

    ``decision.winner`` numbers the optimizers. One whose losses or parameters are not finite begins
    again at x, with the record of the one that is followed. If that is true of all, x stays and
    ``winner`` is -1. A minibatch that is lost on all doesn't count.

    Memory: one copy of the parameters and buffers for each optimizer, beside the model.

    Raises:
        ValueError: if an argument isn't one of the above.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> guard = BestOf(lambda rate: torch.optim.SGD([w], lr=rate), rates=(0.1, 0.4), model=None)
    >>> def closure():
    ...     guard.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for batch in range(10):
    ...     loss = guard.step(closure)
    >>> guard.last_decision.winner, guard.last_decision.gradients
    (1, 20)
    """

    remembered = ("records", "_weight", "_taken", "_checked")

    def __init__(
        self,
        optimizers: Sequence[Optimizer] | Callable[[float], Optimizer],
        *,
        rates: Sequence[float] = (),
        model: nn.Module | None,
        nt: int = 10,
        share: float | None = None,
        check: Callable[[int], Tensor] | None = None,
        nc: int = 2,
        decay: float = 0.9,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        if callable(optimizers):
            optimizers = [optimizers(rate) for rate in rates]
        elif rates:
            raise ValueError(f"rates must go with a function of a rate, got {optimizers!r}")
        if isinstance(optimizers, Optimizer) or not [*optimizers]:
            raise ValueError(f"optimizers must be a list of at least one, got {optimizers!r}")
        if not (check is None or callable(check)):
            raise ValueError(f"check must be None or a function of a number, got {check!r}")
        self.check, self.checks = check, check_count("nc", nc)
        self.share, self.decay = None if share is None else check_share(share), check_decay(decay)
        names = [str(k) for k in range(len(optimizers))]
        super().__init__(
            dict(zip((f"optimizers[{name}]" for name in names), optimizers, strict=True)),
            {name: f"optimizers[{name}]" for name in names},
            leader="0",
            nt=nt,
            model=model,
            process_group=process_group,
            callback=callback,
        )
        self.records = [math.nan] * len(names)
        """D of each."""
        self._weight = [0.0] * len(names)
        self._taken, self._checked = [0] * len(names), 0
        self._all = list(self._lanes.values())

    def _begin(self) -> list[Lane]:
        runs = [
            lane
            for lane, taken in zip(self._all, self._taken, strict=True)
            if not lane.live and (self.share is None or taken <= self.share * self.steps)
        ]
        if self.steps == 0:  # weights may have been loaded since the guard was built
            for lane in runs:
                lane.start_at(self._leader.point)
        self._watch.twins = set(self._lanes) if self.steps == 0 else set()
        return runs

    def _decide(self) -> Decision:
        if self.check is not None:
            self._measure(self.check)
        return super()._decide()

    def _measure(self, check: Callable[[int], Tensor]) -> None:
        """The losses of all that ran on the next check minibatches."""
        draws = self._randomness.state()
        for lane in [*self._others, self._leader]:
            lane.enter(checking=True)
            try:
                self._randomness.set(draws)
                torch.clear_autocast_cache()
                with torch.no_grad():
                    for j in range(self.checks):
                        lane.step(scalar(check(self._checked + j)))
                        lane.stepped = False
            except BaseException:
                self._weights.undo()
                raise
            lane.leave()
        self._checked += self.checks

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        d = [math.nan] * len(self._all)
        for name, one in seen.items():
            d[int(name)] = mean(one.losses if self.check is None else one.checks)
            self._taken[int(name)] += self.nt
        before = list(self.records)
        if any(map(math.isfinite, d)):  # else the minibatches are lost on all
            for name in seen:
                self._record(int(name), d[int(name)])
        fit = [
            seen[lane.name].finite and math.isfinite(record)
            if lane.name in seen
            else math.isfinite(record) or math.isnan(old)
            for lane, record, old in zip(self._all, self.records, before, strict=True)
        ]
        low = [
            r if f and r < math.inf else math.inf for r, f in zip(self.records, fit, strict=True)
        ]
        best = low.index(min(low))
        x = self._all[best].point if any(fit) else self._leader.values
        for k, lane in enumerate(self._all):
            if not fit[k]:
                lane.start_at(x)
                lane.forget()
                self.records[k], self._weight[k] = self.records[best], self._weight[best]
        followed = seen.get(str(best))
        self._lead(self._all[best])
        return Decision(
            used_learned=[followed is not None] * self.nt,
            losses=[math.nan] * self.nt if followed is None else followed.losses,
            finite_learned=followed is None or followed.fine,
            winner=best if any(fit) else NEITHER,
            gradients=self.nt * len(seen),
            forwards=0 if self.check is None else self.checks * len(seen),
            learned_updates=self.nt * len(seen),
        )

    def _record(self, k: int, d: float) -> None:
        self._weight[k] = self.decay * self._weight[k] + 1
        known = d if math.isnan(self.records[k]) else self.records[k]
        self.records[k] = known + (d - known) / self._weight[k]

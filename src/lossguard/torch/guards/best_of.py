"""Optimizers side by side, each on its own path, of which the best is followed."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress
from numbers import Real
from typing import NamedTuple

from torch import Tensor, distributed
from torch.optim import Optimizer

from lossguard.rules import HEAD_START
from lossguard.torch.arguments import check_rates
from lossguard.torch.guards.cycle import Guard, Module
from lossguard.torch.guards.decision import (
    NEITHER,
    UNBOUNDED,
    Decision,
    Seen,
    Trial,
    any_finite,
    mean,
)
from lossguard.torch.guards.lane import Lane
from lossguard.validation import check_decay, check_nc, check_part, told


class Record(NamedTuple):
    """What is known of an optimizer's losses.

    Attributes:
        mean: D; NaN before its first cycle.
        weight: W; 0 before that.
        lowest: the lowest D since it began.
        against: the leader on trial against it, which wins by its losses alone.
    """

    mean: float = math.nan
    weight: float = 0.0
    lowest: float = math.inf
    against: Trial = UNBOUNDED

    def after(self, d: float, decay: float) -> "Record":
        """After a cycle of mean loss d."""
        weight = decay * self.weight + 1
        known = self.mean if self.weight else d
        mean = known + (d - known) / weight
        return self._replace(mean=mean, weight=weight, lowest=min(self.lowest, mean))


def means(losses: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Of each over the minibatches on which any has a finite loss: the others tell nothing."""
    known = [any_finite(row) for row in zip(*losses.values(), strict=True)]
    return {
        k: mean([*compress(own, known)]) if any_finite(own) else math.nan
        for k, own in losses.items()
    }


class BestOf(Guard):
    """Run several optimizers, each on its own path, and follow the one whose losses are lowest.

    On the same minibatches, for each optimizer j that runs in a cycle, at a mean loss d:

        W[j] <- decay W[j] + 1;   D[j] <- D[j] + (d - D[j]) / W[j]
        model <- w[j] of the lowest D[j]

    All run in the first 100 steps; after 50 of them D begins anew: a bad start is forgotten by
    then. After the 100 the leader runs, and each of the others in a ``share`` of the cycles, so
    that several cost little more than one. Who didn't run can't take over.

    With ``share=None`` all run in every cycle. Then, without ``check``, the cycles' mean losses
    that are reported never sum up to more than those of any optimizer that isn't ruined, if all
    stay finite. They are reported with hindsight: d is known before the leader is chosen.

    Args:
        optimizers: of the same parameters. The first is followed where all are level, and its
            groups are the guard's. Or a function of a rate that makes one.
        rates: for each optimizer that this function is to make.
        model, nt, process_group, callback: as in ``Recommended``.
        share: of the cycles, for each optimizer that doesn't lead; None: all run in each.
        check: where data repeat, training losses are lower for whoever overfits. Then d is the mean
            of ``check(k)``, the loss at w[j] after the cycle on held-out minibatch number k, over
            nc minibatches 0, 1, 2, ...
        nc: check minibatches a cycle, with a ``check``; None for two.
        decay: D remembers about 1 / (1 - decay) cycles.

    An optimizer begins again at the model, with the record of the one that is followed, if it isn't
    finite or is ruined; a leader that isn't finite goes back to where the cycle began, as in
    ``lossguard.best_of`` (``docs/guards.md``). ``decision.winner`` numbers the optimizers, -1 where
    the model goes back.

    Raises:
        ValueError: if an argument isn't one of the above.

    Memory: one copy of the parameters and buffers for each optimizer, beside the model, and another
    one while a lane runs that isn't live.

    >>> import torch
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> guard = BestOf(lambda rate: torch.optim.SGD([w], lr=rate), rates=(0.1, 0.4), model=None)
    >>> for batch in range(10):
    ...     for lane in guard.lanes():
    ...         loss = w.square().sum()
    ...         loss.backward()
    ...         lane.step(loss)
    >>> guard.last_decision.winner, guard.last_decision.gradients
    (1, 20)
    """

    remembered = (*Guard.remembered, "records", "_spent")

    def __init__(
        self,
        optimizers: Sequence[Optimizer] | Callable[[float], Optimizer],
        *,
        rates: Sequence[float] = (),
        model: Module = ...,
        nt: int = 10,
        share: float | None = 0.05,
        check: Callable[[int], Tensor] | None = None,
        nc: int | None = None,
        decay: float = 0.9,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        if not isinstance(rates, Iterable):
            raise ValueError(f"rates must be a sequence of numbers, got {rates!r}")
        rates = [float(rate) if isinstance(rate, Real) else rate for rate in rates]
        if isinstance(optimizers, type):
            name = optimizers.__name__
            raise ValueError(
                f"optimizers must be a function of a rate, got the class {name} (write "
                f"BestOf(lambda rate: {name}(model.parameters(), lr=rate), rates=...))"
            )
        if callable(optimizers) and not rates:
            raise ValueError("rates must go with a function of a rate, got none (give rates=(...))")
        if rates and not callable(optimizers):
            raise ValueError(
                f"rates must go with a function of a rate, got {rates} and {told(optimizers)}"
            )
        if callable(optimizers):
            optimizers = list(map(optimizers, rates))
            check_rates(rates, optimizers)
        if not isinstance(optimizers, Iterable) or not (optimizers := [*optimizers]):
            raise ValueError(f"optimizers must be a list of at least one, got {told(optimizers)}")
        nc = check_nc(nc, check)
        self.share = None if share is None else check_part("share", share)
        self.decay = check_decay(decay)
        named = {f"optimizers[{k}]": one for k, one in enumerate(optimizers)}
        lanes = {str(k): name for k, name in enumerate(named)}
        super().__init__(named, lanes, model, nt, check, nc, process_group, callback)
        self.records = [Record() for _ in lanes]
        self._spent = [0] * len(lanes)
        """Steps of each beside the leader from the end of the head start on."""

    def _begin(self) -> list[Lane]:
        shared = self.steps - HEAD_START
        runs = [
            lane
            for lane, spent in zip(self._lanes.values(), self._spent, strict=True)
            if not lane.live and (self.share is None or shared < 0 or spent <= self.share * shared)
        ]
        if self.steps == 0:  # weights may have been loaded since the guard was built
            for lane in runs:
                lane.start_at(self._leader.point)
        return runs

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        leader, lanes = int(self._leader.name), [*self._lanes.values()]
        shown = {int(name): one for name, one in seen.items()}
        d = means({k: one.losses if self.check is None else one.checks for k, one in shown.items()})
        lost = not any(map(math.isfinite, d.values()))  # all minibatches are, on all
        fine = {k: one for k, one in shown.items() if one.finite and (lost or math.isfinite(d[k]))}
        known = {*fine}
        if leader not in fine:
            d[leader] = self.records[leader].mean
            if math.isfinite(shown[leader].losses[0]) and not math.isnan(d[leader]):
                known.add(leader)
        for k in () if lost else known:
            self.records[k] = self.records[k].after(d[k], self.decay)
        may_lead = [k for k in sorted(known) if not math.isnan(self.records[k].mean)]
        best = min(may_lead, key=lambda k: self.records[k].mean, default=leader)
        x = lanes[best].point if best in fine else self._leader.before
        again = shown.keys() - fine.keys()
        if leader in fine and not lost:
            again |= self._ruined(fine, leader) - {best}
        like = self.records[best]
        for k in again:
            lanes[k].start_afresh_at(x)
            self.records[k] = Record(like.mean, like.weight, lowest=like.mean)
        if best != leader:
            self.records = [record._replace(against=UNBOUNDED) for record in self.records]
        if self.share is not None:
            self._take_turns(shown, leader)
        self._lead(lanes[best])
        return Decision(
            used_learned=[True] * self.nt,
            losses=seen[str(best)].losses if best in fine else [math.inf] * self.nt,
            winner=best if best in fine else NEITHER,
            gradients=self.nt * len(seen),
            forwards=self.nc * len(seen),
            learned_updates=self.nt * len(seen),
        )

    def _take_turns(self, ran: Collection[int], leader: int) -> None:
        """After a cycle: turns count from the end of the head start on.

        Who leads then is told by its second half: D begins anew after the first.
        """
        half, after = HEAD_START // 2, self.steps + self.nt
        if self.steps < half <= after < HEAD_START:
            self.records = [record._replace(weight=0.0) for record in self.records]
        for k, lane in enumerate(self._lanes.values()):
            if k not in ran:
                lane.memory.wind(self.nt, on=True)
            elif k != leader and after >= HEAD_START:
                self._spent[k] += self.nt

    def _ruined(self, fine: Mapping[int, Seen], leader: int) -> set[int]:
        """Those that have lost a trial against the leader, and were once as good as it is."""
        ruined, leading = set(), fine[leader].losses
        for k, one in fine.items():
            if k != leader:
                record = self.records[k]
                against = record.against.after(leading, one.losses)
                won, over = against.outcome(leading, one.losses)
                self.records[k] = record._replace(against=UNBOUNDED if won or over else against)
                if won and 2 * record.lowest < record.mean + self.records[leader].mean:
                    ruined.add(k)
        return ruined

"""A run that spikes or diverges goes back to where it was good, on trial, and goes on from there.

run         what is decided at each read, from
detector    which says that losses have risen,
trial       whether the losses after a return are lower than before it,
response    what a run may lose, and at which rate it goes on, and
store       copies of the run to go back to
steps       hooks in which rates and gradients are changed
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import distributed, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import (
    Uncopied,
    all_innermost,
    check_functions,
    check_made,
    number,
)
from lossguard.torch.distributed import mean_of_ranks
from lossguard.torch.rewind.gradients import Gate
from lossguard.torch.rewind.response import Response
from lossguard.torch.rewind.run import RewindEvent as RewindEvent
from lossguard.torch.rewind.run import Run
from lossguard.torch.rewind.steps import Steps
from lossguard.torch.rewind.store import EVERY, Live, Store
from lossguard.torch.tensors import Number, stacked
from lossguard.validation import check_count, check_kind

LOG = logging.getLogger("lossguard.torch.rewind")
VERSION = 2
"""Of its state."""


class History(NamedTuple):
    """A read of ``Rewind``, for a figure.

    Attributes:
        call: the last one of those read.
        loss: their mean.
        score, threshold: of the detector, which suspects where the score is higher.
        scale: what rates are multiplied by from then on.
        on_trial: whether a return is on trial.
    """

    call: int
    loss: float
    score: float
    threshold: float
    scale: float
    on_trial: bool


def _check(model: Any, action: Any, every: Any, offload: Any) -> None:
    check_kind("model", model, nn.Module, "nn.Linear(2, 1)")
    check_made(model.parameters())
    if action not in ("rewind", "log"):
        raise ValueError(f'action must be "rewind" or "log", got {action!r}')
    if check_count("every", every) > EVERY:
        raise ValueError(f"every must be at most {EVERY}, got {every}")
    if not isinstance(offload, bool):
        raise ValueError(f"offload must be True or False, got {offload!r}")


def _known(flag: torch.Tensor | bool) -> torch.Tensor | bool:
    """As a bool, unless a device would have to be waited for."""
    return flag if isinstance(flag, torch.Tensor) and not flag.is_cpu else bool(flag)


class Rewind(Uncopied):
    """Watches a run: called after the optimizer's step, it wraps nothing.

    Where losses have risen for longer than their noise explains, the run goes back to the youngest
    copy of before, on trial: at half the rate, until losses are lower and the return stays, or are
    not and the run goes forward to where it was. After a return that stays the rate comes back
    within 1,024 quiet steps. A model that isn't finite goes back at once. Gradients that aren't
    finite, or far out of line, are made 0. ``docs/rewind.md`` shows what it sees.

    Memory: two copies of what is trained and what the optimizer remembers, a third during a trial.
    Under ``torch.distributed`` every rank calls it. All decide by the mean of their losses.

    Args:
        model: what is trained. What the optimizer trains goes back, and the buffers. All else must
            stay as it is.
        optimizer: or several that each train a part and all step before ``observe``. The memory
            goes back, rates and other settings don't. Another ``Rewind`` of one of them is closed.
        also: what else goes back, by its ``state_dict``: schedulers, averages of weights. Data,
            random numbers and what isn't named here go on.
        rho: the share of all steps that may be thrown away, or spent on trials that come to
            nothing, beside 256 steps.
        every: calls between two reads, at most 64.
        action: "log" tells what it suspects, and changes and copies nothing.
        offload: keep copies in the host's memory (pinned for CUDA): five, of up to 16,384 steps.
        audit: a function of a number, 0 to 15, that returns the loss on that minibatch of held-out
            data, the same one each time. It is called without gradients, where a rise is
            suspected: with it no steps are needed for a trial.
        callback: called with every event, when it is over; ``events`` has all of them.
        process_group: the ranks that decide together; all of them by default.

    Raises:
        ValueError: if an argument is of another kind or out of range, the optimizer has no rate or
            trains parameters that the model hasn't, or that aren't finite.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> rewind = Rewind(model, optimizer)
    >>> for minibatch in range(3):
    ...     loss = model(torch.ones(2)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     rewind.observe(loss)
    >>> rewind.calls, rewind.returns, rewind.scale
    (3, 0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        also: Sequence[Any] = (),
        rho: float = 0.1,
        every: int = 16,
        action: Literal["rewind", "log"] = "rewind",
        offload: bool = False,
        audit: Callable[[int], Any] | None = None,
        callback: Callable[[RewindEvent], object] | None = None,
        process_group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        _check(model, action, every, offload)
        optimizers = all_innermost(optimizer)
        check_functions(audit=audit, callback=callback)
        self._every = int(every)
        self._options = {"optimizers": len(optimizers), "also": len(also), "offload": offload}
        self._live = Live(model, optimizers, also, offload=offload)
        if not all(map(bool, self._live.are_finite())):
            raise ValueError("model must be finite, got one that isn't")
        acts, store = action == "rewind", Store(self._live, offload=offload)
        response, given = Response(rho), {"audit": audit, "group": process_group}
        self._run = Run(self._live, store, response, acts=acts, **given)
        self._group, self._callback = process_group, callback
        self._steps = Steps(optimizers, self, acts=acts)
        self._unread: list[list[Number]] = []
        """Of each call the loss, and for each optimizer the norm of the gradients and whether they
        were left out."""
        self.history: list[History] = []

    @property
    def events(self) -> list[RewindEvent]:
        """All that it did."""
        return self._run.events

    @property
    def scale(self) -> float:
        """What rates are multiplied by in the next step."""
        return self._run.scale

    @property
    def calls(self) -> int:
        """Calls of ``observe``."""
        return self._run.response.calls + len(self._unread)

    @property
    def returns(self) -> int:
        """How often it has gone back and stayed."""
        return self._run.response.returns

    @property
    def skipped(self) -> int:
        """Steps, of those read, that were left out for their gradients."""
        return self._run.skipped

    @property
    def discarded(self) -> int:
        """Steps thrown away by returns, or spent on trials that came to nothing."""
        response = self._run.response
        return response.discarded + response.fruitless + response.broken

    def observe(self, loss: Any) -> None:
        """Tell it the loss, one number, of a step that was just taken, from before the step."""
        self._unread.append([number(loss, "loss must be one number"), *self._steps.take()])
        now = self._run.on_trial
        if len(self._unread) >= min(self._every, now.trial.until_look if now else self._every):
            self.read()

    def read(self) -> None:
        """Read now, on every rank: at the end, or before the model is tested or saved by itself."""
        before = len(self.events)
        if self._steps.begun:
            self._read()
        for event in self.events[before:]:
            LOG.warning("%s", event)
            if self._callback is not None:
                self._callback(event)

    def logged(self) -> dict[str, float]:
        """Numbers for TensorBoard, W&B and the like."""
        return {
            "score": self._run.detector.score,
            "threshold": self._run.detector.threshold,
            "scale": self.scale,
            "returns": self.returns,
            "discarded": self.discarded,
            "skipped": self.skipped,
        }

    def state_dict(self, *, snapshots: bool = True) -> dict[str, Any]:
        """All but events and history, uncopied. Load the model's and the optimizer's own first.

        Args:
            snapshots: without them it is some numbers, also for torch.distributed.checkpoint. What
                loads it takes the model as it is then for good, and a trial for over.
        """
        return {
            "version": VERSION,
            "options": self._options,
            "gates": [gate.numbers() for gate in self._steps.gates],
            "unread": [[float(one) for one in row] for row in self._unread],
            **self._run.numbers(snapshots=snapshots),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the one whose ``state_dict`` this is, to the last bit on one device.

        Raises:
            ValueError: if it is of another model, options or version; nothing is loaded then.
        """
        check_kind("state", state, dict, "torch.load(path)")
        if (version := state.get("version")) != VERSION:
            raise ValueError(f"state must be of version {VERSION}, got {version}")
        if (theirs := state.get("options")) != self._options:
            raise ValueError(f"state must be of a Rewind with {self._options}, got {theirs}")
        gates = [Gate() for _ in self._steps.gates]
        for gate, numbers in zip(gates, state["gates"], strict=True):
            gate.load(numbers)
        unread = [list(row) for row in state["unread"]]
        self._run.load(state)
        self._unread = unread
        self._steps.become(gates, begun="store" in state and self.calls > 0)
        self._steps.go_on(self._run.scale, clips=self._run.clips)

    def begin(self) -> None:
        """Before the first step: where to go back to, as weights may have been loaded."""
        self._run.begin(len(self._unread))

    def close(self) -> None:
        """Take the hooks off the optimizers."""
        self._steps.remove()

    @torch.no_grad()
    def _read(self) -> None:
        """All losses since the last read; one wait for the device."""
        taken, run = len(self._unread), self._run
        remembers = self._live.memory_is_finite() if run.is_due(taken) else True
        flags = map(_known, (*self._live.are_finite(), remembers))
        told = stacked([*flags, *(one for row in self._unread for one in row)])
        sound, kept, remembers, *rest = mean_of_ranks(told, self._group).tolist()
        width = 1 + 2 * len(self._steps.gates)
        rows = [rest[k : k + width] for k in range(0, len(rest), width)]
        self._unread = []
        self._steps.hear([row[1::2] for row in rows])
        losses = [row[0] for row in rows]
        skipped = sum(any(flag > 0 for flag in row[2::2]) for row in rows)
        run.hear(losses, skipped, sound=sound == 1, kept=kept == 1, remembers=remembers == 1)
        self._steps.go_on(run.scale, clips=run.clips)
        if rows:
            seen = run.detector.score, run.detector.threshold, run.scale, bool(run.on_trial)
            self.history.append(History(self.calls, sum(losses) / taken, *seen))

"""A run that spikes or diverges goes back to where it was good, and goes on more carefully.

Letters: T calls of ``observe``, B = window / 4 losses a block.
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
    scalar,
)
from lossguard.torch.distributed import mean_of_ranks
from lossguard.torch.process import held, modes_kept
from lossguard.torch.rewind.careful import CarefulSteps
from lossguard.torch.rewind.rule import Rule
from lossguard.torch.rewind.snapshot import Live, Offload, Saved
from lossguard.torch.tensors import Number
from lossguard.validation import check_kind

LOG = logging.getLogger("lossguard.torch.rewind")
Cause = Literal["loss", "model", "audit"]


class RewindEvent(NamedTuple):
    """What ``Rewind`` did; each is logged as a warning of the logger ``lossguard.torch.rewind``.

    Attributes:
        kind: it went back; or there was an alarm at which it didn't; or no step since the snapshot
            was finite, which is set back at the same rate; or the buffers alone weren't finite, as
            after a forward pass of inputs that aren't, and were set back.
        cause: "loss" after an alarm, "audit" after one of the audits, "model" if the model, only
            its buffers, or the optimizer's memory, weren't finite.
        call: of ``observe``, from 1.
        thrown: steps that the return threw away.
        in_a_row: returns to this snapshot, this one included.
        scale: what the rates are multiplied by in the next step.
        skipped: steps so far whose gradients weren't finite, or that were taken back by themselves.
    """

    kind: Literal["return", "unanswered", "idle", "buffers"]
    cause: Cause
    call: int
    thrown: int
    in_a_row: int
    scale: float
    skipped: int = 0

    def __str__(self) -> str:
        """One line, for a log."""
        did = {
            "return": f"threw {self.thrown} steps away and goes on at {self.scale:.3g} of the rate",
            "unanswered": "goes on: its budget is spent, or three returns were no help",
            "idle": "set the model back, at the same rate: no step since then was finite",
            "buffers": "set back the buffers, which were not finite",
        }[self.kind]
        skipped = f", {self.skipped} steps not finite so far" if self.skipped else ""
        return f"Rewind {did} (cause: {self.cause}, call {self.call}{skipped})"


def _of_rule(name: str, doc: str) -> Any:
    return property(lambda self: getattr(self._rule, name), doc=doc)


class Rewind(Uncopied):
    """Watches a run: called after the optimizer's step, it wraps nothing.

    Alarm, snapshots, scale and budget are those of ``lossguard.rewind`` (``docs/guards.md``). Here
    the host reads the losses every ``every`` calls, and an alarm, and a model that isn't finite,
    wait for that. ``docs/rewind.md`` tells what it does and sees.

    Memory: two copies of all that goes back; a third one while the budget is spent, where each step
    is read, and one that makes the model not finite is taken back by itself. Under
    ``torch.distributed`` every rank calls it. All decide by the mean of their losses.

    Args:
        model: what is trained. Its parameters and buffers go back.
        optimizer: or several that each train a part and all step before ``observe``. The memory
            goes back, rates and other settings don't. Another ``Rewind`` of one of them is closed.
        schedulers: what else goes back, by its ``state_dict``, such as an average of weights. Data,
            random numbers and schedulers not named here go on.
        window: steps, a multiple of 8, at least 64; a snapshot is trusted after up to half of them.
        rho: the share of all steps that may be thrown away, beside one window.
        factor: what steps are multiplied by after a return.
        rise: the share of the progress since the start that has to be lost.
        every: calls between two reads; a divisor of window / 4.
        offload: keep snapshots in the host's memory (pinned for CUDA), or in the folder of a path.
        audit: a function that returns the loss on a held-out minibatch, called without gradients
            every B steps. A candidate that has lost more than four times ``rise`` of the progress
            there isn't trusted. Four such candidates more than others are an alarm.
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
        schedulers: Sequence[Any] = (),
        window: int = 256,
        rho: float = 0.1,
        factor: float = 0.5,
        rise: float = 0.05,
        every: int = 16,
        offload: Offload = False,
        audit: Callable[[], Any] | None = None,
        callback: Callable[[RewindEvent], object] | None = None,
        process_group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        check_kind("model", model, nn.Module, "nn.Linear(2, 1)")
        check_made(model.parameters())
        optimizers = all_innermost(optimizer)
        check_functions(audit=audit, callback=callback)
        self._rule = Rule(window, rho, factor, rise, every)
        counts = {"optimizers": len(optimizers), "schedulers": len(schedulers)}
        self._options = {"window": self._rule.window, "every": self._rule.every, **counts}
        self._live = Live(model, optimizers, schedulers, offload)
        self._group, self._audit, self._callback = process_group, audit, callback
        self._unread: list[tuple[Number, Number]] = []
        """Losses, and whether the gradients of their steps weren't finite."""
        self.events: list[RewindEvent] = []
        if not all(map(bool, self._live.are_finite())):
            raise ValueError("model must be finite, got one that isn't")
        self._trusted, self._candidate = self._live.save(), Saved()
        self._last: Saved | None = None
        """After the last step, while the run can't always go back and each step is read."""
        self._steps = CarefulSteps(optimizers, self)

    @property
    def scale(self) -> float:
        """What rates are multiplied by in the next step."""
        return self._rule.scale(len(self._unread))

    @property
    def calls(self) -> int:
        """T, calls of ``observe``."""
        return self._rule.calls + len(self._unread)

    returns = _of_rule("returns", "How often it has gone back.")
    thrown = _of_rule("thrown", "Steps thrown away: at most rho T + window in every run.")
    skipped = _of_rule("skipped", "Steps, of those read, that were not finite.")

    def observe(self, loss: Any) -> None:
        """Tell it the loss, one number, of a step that was just taken, from before the step."""
        self._unread.append((number(loss, "loss must be one number"), self._steps.take()))
        if self._last is not None or self.calls % self._rule.every == 0:
            self.read()

    def read(self) -> None:
        """Read now, on every rank: at the end, or before the model is tested or saved by itself."""
        before = len(self.events)
        with held():
            if self._unread:
                self._read()
        for event in self.events[before:]:
            LOG.warning("%s", event)
            if self._callback is not None:
                self._callback(event)

    def state_dict(self) -> dict[str, Any]:
        """All but the events, uncopied. Load the model's and the optimizer's own states first."""
        _, _, _, *unread = self._live.numbers(self._unread).tolist()  # waits for copies to the host
        rest = {"unread": unread, "options": self._options, "rule": self._rule.numbers()}
        return self._live.pack(self._trusted, self._candidate) | rest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the one whose ``state_dict`` this is, to the last bit on one device.

        Raises:
            ValueError: if it is of another model or options; nothing is loaded then.
        """
        if (theirs := state.get("options")) != self._options:
            raise ValueError(f"state must be of a Rewind with {self._options}, got {theirs}")
        trusted, candidate = self._live.unpack(state)
        told: list[Number] = list(map(float, state["unread"]))
        unread = [(told[k], told[k + 1]) for k in range(0, len(told), 2)]
        self._rule.load(state["rule"])  # whole or not at all
        self._trusted, self._candidate, self._unread = trusted, candidate, unread
        self._last = None if self._rule.can_always_return else self._live.save()

    def begin(self) -> None:
        """Before the first step: where to go back to, as weights may have been loaded."""
        if self.calls == 0 and all(map(bool, self._live.are_finite())):
            self._trusted = self._live.save(self._trusted)

    def close(self) -> None:
        """Take the hooks off the optimizers."""
        self._steps.remove()

    @torch.no_grad()
    def _read(self) -> None:
        """Hear all losses since the last read; one wait for the device."""
        numbers = self._live.numbers(self._unread, memory=self._rule.may_end(len(self._unread)))
        sound, kept, remembers, *told = mean_of_ranks(numbers, self._group).tolist()
        losses, skipped = told[::2], [flag > 0 for flag in told[1::2]]
        self._unread, finite, undone = [], sound == 1, False
        if not finite and self._last is not None:
            self._live.load(self._last)
            undone, skipped[-1], finite = not skipped[-1], True, True
        promotes, ends, unanswered, late = self._rule.hear(losses, skipped, undone=undone)
        if sound == 1 and kept < 1:  # after a forward pass of inputs that weren't, without a step
            self._live.load_buffers(self._last or self._trusted)
            self._tell("buffers", "model", 0)
        if promotes:
            self._trusted, self._candidate = self._candidate, self._trusted
        if unanswered:
            self._tell("unanswered", "loss", 0)
        if late is not None:
            self._go_back("loss", late)
        elif not finite:
            self._go_back("model", 0)
        elif ends and remembers < 1 and self._live.has_lost(self._trusted, self._group):
            self._go_back("model", 0)  # steps are 0 from now on, or soon NaN
        elif ends:
            self._new_candidate()
        elif self._rule.idle and self._rule.age == 0:
            self._live.load(self._trusted)  # momentum and weight decay have moved it
            self._tell("idle", "loss", 0)
        self._last = None if self._rule.can_always_return else self._live.save(self._last)

    def _go_back(self, cause: Cause, late: int) -> None:
        self._live.load(self._trusted)
        self._tell("return", cause, self._rule.go_back(late))

    def _tell(self, kind: Any, cause: Cause, thrown: int) -> None:
        numbers = self.calls, thrown, self._rule.in_a_row, self.scale, self.skipped
        self.events.append(RewindEvent(kind, cause, *numbers))

    def _new_candidate(self) -> None:
        """Copy the model as it is now, unless its audit says that it is worse."""
        rule = self._rule
        if self._audit is not None:
            with modes_kept(self._live.model):
                loss = scalar(self._audit(), "audit must return one number")
            too_high = rule.hear_audit(mean_of_ranks(loss, self._group).item())
            if rule.audits.rings and rule.may_return(0):
                self._go_back("audit", 0)
            elif rule.audits.rings:
                rule.forget()
                self._tell("unanswered", "audit", 0)
            if too_high:
                return
        if not self._candidate:
            self._live.refuse_copies(self._trusted)
        self._candidate = self._live.save(self._candidate)
        rule.candidate_age, rule.pending = 0, True

"""A run that spikes or diverges goes back to where it was good, and goes on more carefully.

The rule is that of ``lossguard.rewind``. Letters: T calls of ``observe``, B = window / 4 losses a
block.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lossguard.torch.alarm import Alarm, Audit
from lossguard.torch.careful import CarefulSteps
from lossguard.torch.rewind_checkpoint import load, state_of
from lossguard.torch.snapshot import Live, Saved
from lossguard.torch.tensors import local
from lossguard.validation import check_count, check_fraction, check_kind, check_real

IN_A_ROW = 3
"""Returns to one snapshot. If they don't help, its losses are no measure any more."""
SOON = 10
"""Windows. After a return so soon after another one the scale stays lower."""


class RewindEvent(NamedTuple):
    """What ``Rewind`` did.

    Attributes:
        kind: "return"; or "unanswered", an alarm at which it didn't go back.
        cause: "loss", "audit", or "model" where that wasn't finite.
        call: of ``observe``, from 1.
        thrown: steps that the return threw away; 0 of an alarm that was unanswered.
        in_a_row: returns to this snapshot, this one included.
        scale: what the rates are multiplied by in the next step.
    """

    kind: Literal["return", "unanswered"]
    cause: Literal["loss", "model", "audit"]
    call: int
    thrown: int
    in_a_row: int
    scale: float


class Rewind:
    """Watches one optimizer: called after the step, it wraps nothing.

        rewind = Rewind(model, optimizer)
        for x, t in loader:
            loss = loss_fn(model(x), t)
            loss.backward()
            optimizer.step(); scheduler.step(); optimizer.zero_grad()
            rewind.observe(loss)

    Alarm, snapshots, scale and budget are those of ``lossguard.rewind``: its docstring tells them.
    Here the host reads the losses every ``every`` calls, and an alarm waits for that.

    - A step whose gradients aren't finite is taken with gradients of 0; nothing waits for that.
    - A model that isn't finite at a read goes back at once. While the budget doesn't allow it, each
      step is read, and one that makes the model not finite is taken back by itself.
    - After a return the rates in ``param_groups`` are multiplied by ``scale`` during each step, and
      set back after it, so schedulers and loops that set them need to know nothing.
    - Under ``torch.distributed`` every rank calls ``observe``. They take the mean of their losses,
      and decide the same. FSDP2's shards are copied as shards.

    Args:
        model: what is trained. Its parameters and buffers go back.
        optimizer: its memory goes back, its settings don't.
        schedulers: what else goes back: anything with ``state_dict`` and ``load_state_dict``, such
            as an average of weights. Data, random numbers and schedulers not named here go on.
        window, rho, factor, rise: as in ``lossguard.rewind``.
        every: calls between two reads; a divisor of window / 4.
        offload: keep snapshots in the host's memory (pinned, where there is CUDA).
        fallback: called with the optimizer at each return soon after another one, to make its
            settings careful for good: instead of a scale that stays lower.
        audit: the loss on a held minibatch, without gradients; called once every B steps. A
            candidate is only trusted if it isn't worse there than the best trusted one by more than
            ``rise``, and 4 more worse ones than others are an alarm.
        on_event: called with each ``RewindEvent``.
        group: the ranks that decide together; all of them by default.

    Attributes:
        events: every ``RewindEvent`` so far.
        calls, returns, thrown, skipped: T, returns, steps thrown away, and steps whose loss or
            gradients weren't finite.
        scale: what rates are multiplied by in the next step.

    Memory: two copies of parameters, buffers and the optimizer's memory; a third one while the
    budget is spent.

    Raises:
        ValueError: if an argument is of another kind or out of range, the optimizer trains
            parameters that the model doesn't have, or the model isn't finite.

    >>> model = nn.Linear(2, 1)
    >>> rewind = Rewind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> rewind.observe(torch.tensor(0.5))
    >>> rewind.calls, rewind.returns, rewind.scale
    (1, 0, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        schedulers: Sequence[Any] = (),
        window: int = 256,
        rho: float = 0.1,
        factor: float = 0.5,
        rise: float = 0.05,
        every: int = 16,
        offload: bool = False,
        fallback: Callable[[Optimizer], Any] | None = None,
        audit: Callable[[], Any] | None = None,
        on_event: Callable[[RewindEvent], Any] | None = None,
        group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        check_kind("model", model, nn.Module, "nn.Linear(2, 1)")
        optimizer = innermost(optimizer)
        self.block = _checked_window(window) // 4
        self.window, self.every = int(window), check_count("every", every)
        if self.block % every:
            raise ValueError(f"every must divide window / 4 = {self.block}, got {every}")
        self._rho, rise = (
            check_real(name, value, "at least 0 and below 1", lambda v: 0 <= v < 1)
            for name, value in (("rho", rho), ("rise", rise))
        )
        self._factor = check_fraction("factor", factor)
        self._live = Live(model, optimizer, schedulers)
        self._offload, self._group, self._audit = offload, group, audit
        self._fallback, self._on_event = fallback, on_event
        device = local(next(iter(self._live.tensors.values()))).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._losses = torch.zeros(every, dtype=dtype, device=device)
        self._alarm, self._audits = Alarm(self.block, rise), Audit(rise)
        self.events: list[RewindEvent] = []
        self.calls = self.returns = self.thrown = self.skipped = 0
        self._unread = self._age = self._candidate_age = 0
        self._in_a_row = self._last_return = 0
        self._ramp, self._cap = self.block, 1.0
        self._pending = self._one_by_one = False
        self._candidate_audit = math.nan
        if not bool(self._live.is_finite()):
            raise ValueError("model must be finite, got one that isn't")
        self._trusted = self._live.save(None, offload)
        self._candidate: Saved | None = None
        self._last: Saved | None = None
        self._steps = CarefulSteps(optimizer, lambda: self.scale)

    @property
    def scale(self) -> float:
        """What rates are multiplied by in the next step."""
        risen = min(1.0, (self._ramp + self._unread) / self.block)
        return self._cap * (self._factor + (1 - self._factor) * risen)

    @torch.no_grad()
    def observe(self, loss: Any, grad_norm: Any = None) -> None:
        """Tell it the loss of a step that was just taken: a number or a tensor with one.

        Args:
            loss: before the step, as the loop has it.
            grad_norm: of its gradients, where it is known; if it isn't finite, nor is the step.

        Raises:
            ValueError: if there is more than one number.
        """
        loss = self._number("loss", loss)
        if grad_norm is not None:
            norm = self._number("grad_norm", grad_norm)
            loss = torch.where(norm.isfinite(), loss, math.nan)
        if self._steps.broken is not None:
            loss = torch.where(self._steps.broken.to(loss.device), math.nan, loss)
        self._steps.forget()
        self._losses[self._unread] = loss
        self._unread += 1
        self.calls += 1
        if self._one_by_one or self._unread == self.every:
            self._read()

    def state_dict(self) -> dict[str, Any]:
        """All but the events. Load the model's and the optimizer's own states before this one."""
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the one whose ``state_dict`` this is, to the last bit on one device.

        Raises:
            ValueError: if the state lacks something, or is of another model or other options.
        """
        load(self, state)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._steps.remove()

    def _number(self, name: str, value: Any) -> Tensor:
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise ValueError(f"{name} must be a single number, got shape {tuple(value.shape)}")
        return local(value).detach().reshape(()).to(self._losses)

    def _read(self) -> None:
        """Hear all losses since the last read; one wait for the device."""
        losses, finite = self._agree()
        self._unread = 0
        if not finite and self._one_by_one:
            assert self._last is not None
            self._live.load(self._last)
            losses[-1] = math.nan
        block_ends = False
        for i, loss in enumerate(losses):
            sound = math.isfinite(loss)
            self._alarm.hear(loss, sound)
            if self._alarm.rings and self._alarm_answered("loss", losses[i:]):
                block_ends = False
                break
            self.skipped += not sound
            if sound:
                self._age, self._candidate_age = self._age + 1, self._candidate_age + 1
                self._ramp += 1
                self._alarm.keep(loss)
            if self._alarm.ends:
                block_ends = True
                self._promote_or_not()
        else:
            if not finite and not self._one_by_one:
                self._go_back("model", 0)
            elif block_ends:
                self._new_candidate()
        spare = self._allowance() - self.thrown - self._age
        self._one_by_one = spare < self.every or self._in_a_row >= IN_A_ROW
        self._last = self._live.save(self._last, self._offload) if self._one_by_one else None

    def _agree(self) -> tuple[list[float], bool]:
        """The losses since the last read, and whether the model is finite: the ranks' means."""
        finite = self._live.is_finite().to(self._losses).reshape(1)
        *losses, finite = self._means(torch.cat([self._losses[: self._unread], finite])).tolist()
        return losses, finite == 1

    def _means(self, numbers: Tensor) -> Tensor:
        """Of the ranks. All of them call this at the same times."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return numbers
        distributed.all_reduce(numbers, group=self._group)
        return numbers / distributed.get_world_size(self._group)

    def _allowance(self) -> int:
        """Steps that may be thrown away in so many calls."""
        return self.window + math.floor(self._rho * (1 - 1e-6) * self.calls)

    def _alarm_answered(self, cause: Literal["loss", "audit"], rest: list[float]) -> bool:
        """Go back, if that may be; ``rest`` are the losses of steps that are to be thrown too."""
        late = sum(map(math.isfinite, rest))
        affordable = self.thrown + self._age + late <= self._allowance()
        if affordable and self._in_a_row < IN_A_ROW:
            self._go_back(cause, late)
            return True
        self._begin_again(forget=True)
        self._in_a_row = 0
        self._tell(RewindEvent("unanswered", cause, self.calls, 0, 0, self.scale))
        return False

    def _go_back(self, cause: Literal["loss", "model", "audit"], late: int) -> None:
        thrown = self._age + late
        self._live.load(self._trusted)
        self._begin_again(forget=False)
        self._age = 0
        self.thrown += thrown
        self.returns += 1
        self._in_a_row += 1
        soon = self.returns > 1 and self.calls - self._last_return <= SOON * self.window
        self._last_return = self.calls
        if soon:
            if self._fallback is None:
                self._cap *= self._factor
            else:
                self._fallback(self._live.optimizer)
        self._tell(RewindEvent("return", cause, self.calls, thrown, self._in_a_row, self.scale))

    def _begin_again(self, forget: bool) -> None:
        self._alarm.quiet(forget)
        self._audits.quiet(forget)
        self._pending, self._ramp = False, 0

    def _tell(self, event: RewindEvent) -> None:
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def _promote_or_not(self) -> None:
        """At the end of a block: the candidate's probation is over."""
        if self._alarm.is_calm and self._pending:
            assert self._candidate is not None
            self._trusted, self._candidate = self._candidate, self._trusted
            self._age, self._in_a_row, self._pending = self._candidate_age, 0, False
            self._audits.trust(self._candidate_audit)
        self._alarm.end_block()

    def _new_candidate(self) -> None:
        """Copy the model as it is now, unless its audit says that it is worse."""
        if self._audit is not None:
            value = self._means(self._number("audit", self._audit()).clone()).item()
            good = self._audits.hear(value)
            if self._audits.rings and self._alarm_answered("audit", []):
                return
            self._candidate_audit, self._pending = value, good
            if not good:
                return
        self._candidate = self._live.save(self._candidate, self._offload)
        self._candidate_age, self._pending = 0, True


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer beneath wrappers such as Accelerate's and Lightning's, which step that one."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    check_kind("optimizer", inner, Optimizer, "torch.optim.AdamW(model.parameters())")
    return inner


def _checked_window(window: int) -> int:
    if check_count("window", window, least=64) % 8:
        raise ValueError(f"window must be a multiple of 8, got {window!r}")
    return window

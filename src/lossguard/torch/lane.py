"""A lane: an optimizer, and where its next nt steps start from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.closures import Closure, check_scaled
from lossguard.torch.inner import Inner, Memory, params_of
from lossguard.torch.weights import Copy

Loser = Literal["keep", "rollback", "reset"]


class Lane:
    """One of the branches that a loss guard compares.

    Attributes:
        name: ``learned`` or ``fallback``, for error messages.
        inner: its optimizer. z and s share the fallback.
        loser: what happens to its memory when another lane wins.
        scaler: its gradient scaler, if gradients are scaled.
        copy: its parameters and buffers while another lane is in the model.
        own_path: whether it goes on from where it is, not from the kept iterate.
        memory: if it has to make way for another lane of its optimizer: what it remembers while it
            is not in the model.
        before: the memory before the cycle, for ``rollback``.
        train, check: its losses in this cycle, one per minibatch.
        lost: whether it is out of this cycle, for an error where its numbers aren't finite.
    """

    def __init__(
        self,
        name: str,
        inner: Inner,
        loser: Loser,
        scaler: GradScaler | None,
        copy: Copy,
        *,
        own_path: bool = False,
        makes_way: bool = False,
    ) -> None:
        self.name = name
        self.inner = inner
        self.loser = loser
        self.scaler = scaler
        self.copy = copy
        self.own_path = own_path
        self.memory: Memory | None = inner.remember() if makes_way else None
        self.before: Memory | None = None
        self.train: list[Tensor] = []
        self.check: list[Tensor] = []
        self.lost = False

    def begin(self) -> None:
        """Start a cycle."""
        self.train, self.check, self.lost = [], [], False
        self.before = self.inner.remember() if self.loser == "rollback" else None
        if self.scaler is not None and self.scaler.is_enabled():  # an error may cut a step
            self.scaler._per_optimizer_states.clear()

    def step(self, closure: Closure, *, last: bool) -> Any:
        """One optimizer step, the cycle's ``last`` or not; return the first value of the closure.

        An optimizer with ``train()`` and ``eval()``, as schedule-free ones have, is in its training
        mode during a cycle's steps only. So checks, and x, are at the iterate that it evaluates.
        """
        values: list[Any] = []
        called, failed = False, None

        def evaluate() -> Any:
            nonlocal called
            called = True
            with torch.enable_grad():
                values.append(closure())
            return values[-1]

        try:
            with self._remembering(), self.inner.stepping():
                self._advance(self.inner.optimizer, evaluate, last)
        except (TypeError, AttributeError) as error:  # as where it takes none, or wants the loss
            if called:
                raise
            failed = error
        if not called:
            raise ValueError(
                f"{self.name} must be an optimizer whose step(closure) calls the closure, got "
                f"{type(self.inner.optimizer).__name__} (LossStep adapts one with step(loss))"
            ) from failed
        return values[0]

    @property
    def switches(self) -> bool:
        """Whether its optimizer trains at another iterate than the one that it evaluates."""
        return callable(getattr(self.inner.optimizer, "train", None))

    def lose(self) -> None:
        """Take it out of this cycle after an error."""
        self.lost = True
        self.stop()

    def stop(self) -> None:
        """Leave the training mode after an error, without moving: where the lane was is lost."""
        groups = self.inner.optimizer.param_groups
        for options in groups if self.memory is None else self.memory.options:
            if self.switches and "train_mode" in options:
                options["train_mode"] = False

    def settle(self, *, won: bool, broken: bool) -> bool:
        """Apply the policy of a loser; whether the memory, if ``broken``, had to be reset."""
        if not won and self.loser == "rollback" and self.before is not None:
            self.inner.restore(self.before)
        elif not won and self.loser == "reset":
            self.inner.restore(self.inner.fresh)
        elif broken:
            self.inner.restore(self.inner.fresh)
            return True
        return False

    def settle_as(self, other: "Lane", *, won: bool, broken: bool) -> bool:
        """The same for a lane that didn't run, since ``other`` took its steps."""
        if (won or self.loser == "keep") and other.memory is not None:
            self.inner.restore(self.inner.fresh if broken else other.memory)
            return broken
        if self.loser == "reset":
            self.inner.restore(self.inner.fresh)
        return False

    def remembers_soundly(self) -> bool:
        """Whether its memory is finite."""
        return self.inner.is_finite(self.memory)

    def forget(self) -> None:
        """Have it remember what the optimizer knew when the guard was built."""
        if self.memory is None:
            self.inner.restore(self.inner.fresh)
        else:
            self.memory = self.inner.fresh.copy()

    def take_scale(self, other: "Lane") -> None:
        """Scale gradients as another lane does, where this one goes on from there."""
        if self.scaler is not None and other.scaler is not None:
            self.scaler.load_state_dict(other.scaler.state_dict())

    def hand_over(self, other: "Lane") -> None:
        """Let the other lane of its optimizer remember what this one does, and scale as it does."""
        if self.memory is not None:
            self.inner.restore(self.memory)
        other.take_scale(self)

    def grow(self) -> None:
        """Make room for the parameter group that its optimizer has just got."""
        if self.memory is None:
            self.inner.grow()
        else:
            self.memory.options.append(self.inner.remember().options[-1])

    def _advance(self, optimizer: Optimizer, evaluate: Closure, last: bool) -> None:
        if not self.train:
            _set_mode(optimizer, "train")
        if self.scaler is None:
            optimizer.step(evaluate)
        else:
            loss = evaluate()
            if any(p.grad is not None for p in params_of(optimizer)):  # else there's none to scale
                check_scaled(self.scaler, optimizer)
                self.scaler.step(optimizer, lambda: loss)
                self.scaler.update()
        if last:
            _set_mode(optimizer, "eval")

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Have a shared optimizer remember this lane's past inside, the other lane's outside."""
        if self.memory is None:
            yield
            return
        others = self.inner.exchange(self.memory)
        try:
            yield
        finally:
            self.memory = self.inner.exchange(others)


def _set_mode(optimizer: Optimizer, mode: str) -> None:
    switch = getattr(optimizer, mode, None)
    if callable(switch):
        switch()

"""A lane: an optimizer's run. Guards run several, and compare their losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.closures import Closure, forward_only, scalar
from lossguard.torch.interrupts import Held
from lossguard.torch.memory import Inner, Memory
from lossguard.torch.tensors import finite, local, transfer
from lossguard.torch.weights import Copy, Weights


class Place:
    """Where an optimizer is, and what it remembers.

    One lane of a guard is *live*: the model's own tensors are where it is. The others are in copies
    and get into the model for as long as they run. Several may share an optimizer, each with a
    memory of its own.

    Args:
        name: of the lane: y, z, s, or a number.
        inner: its optimizer.
        weights: the model.
        scaler: its gradient scaler, if gradients are scaled.
    """

    def __init__(
        self, name: str, inner: Inner, weights: Weights, scaler: GradScaler | None
    ) -> None:
        self.name, self.inner, self.weights, self.scaler = name, inner, weights, scaler
        self.values: Copy = [t.clone() for t in weights.live()]
        """Where it is; of the live lane, where it was when the cycle began."""
        self.live = False
        self.before: Copy | None = None
        """Of a lane that may have to go back, where it was when the cycle began."""
        self.losses: list[Tensor] = []
        self.checks: list[Tensor] = []
        self.lost = False
        """Whether it is out of this cycle, for an error where its numbers aren't finite."""
        self.checking = self.stepped = False
        self._parked: Memory | None = None
        if inner.holder is None:
            inner.holder = self
        else:
            self._parked = inner.fresh.copy()

    @property
    def optimizer(self) -> Optimizer:
        """Its optimizer, for a body that unscales gradients."""
        return self.inner.optimizer

    @property
    def point(self) -> Copy:
        """Where it is: the tensors themselves."""
        return self.weights.live() if self.live else self.values

    def begin(self) -> None:
        """Start a cycle."""
        self.losses, self.checks, self.lost = [], [], False
        if self.live:
            transfer(self.values, self.weights.live())

    def keep(self) -> None:
        """Note where it is, to go back there."""
        self.before = None if self.live else [t.clone() for t in self.values]

    def go_back(self) -> None:
        """Be where it was when the cycle began."""
        if self.live or self.before is not None:
            self.start_at(self.values if self.live else self.before or [])

    def start_at(self, point: Copy) -> None:
        """Be at another point; the memory stays."""
        if self.live:
            self.weights.write(point)
        else:
            transfer(self.values, point)
        self.move_copies(point)

    def become(self, other: "Place") -> None:
        """Be where another lane of the same optimizer is, and remember what it does."""
        self.start_at(other.point)
        self.remember(other.memory().copy())
        self.take_scale(other)

    def take_scale(self, other: "Place") -> None:
        """Scale gradients as another lane does, where this one goes on from there."""
        if self.scaler is not None and other.scaler is not None:
            self.scaler.load_state_dict(other.scaler.state_dict())

    def memory(self) -> Memory:
        """What it remembers, itself."""
        return self.inner.memory() if self._parked is None else self._parked

    def remember(self, memory: Memory) -> None:
        """Remember this instead."""
        self.inner.note(self.memory())
        if self._parked is None:
            self.inner.exchange(memory)
        else:
            self._parked = memory

    def forget(self) -> None:
        """Remember what the optimizer knew when the guard was built."""
        self.remember(self.inner.fresh.copy())
        self.move_copies(self.point)

    def note_copies(self, point: Copy) -> None:
        """Note which entries of its memory hold the parameters, as master weights do."""
        alike: dict[str, list[bool]] = {}
        for entries, value in self._entries(point):
            for key, entry in entries.items():
                if entry.shape == value.shape and entry.numel() > 1:
                    alike.setdefault(key, []).append(torch.equal(entry.to(value), value))
        self.inner.copies |= {key for key, flags in alike.items() if all(flags)}

    def move_copies(self, point: Copy) -> None:
        """Have these be the parameters at a point, or the next step would undo the move."""
        for entries, value in self._entries(point) if self.inner.copies else ():
            for key in self.inner.copies & entries.keys():
                entries[key].copy_(value)

    def _entries(self, point: Copy) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The tensors that it remembers of each parameter, with the parameter's value."""
        for p, value in zip(self.weights.params, point, strict=False):
            entries = self.memory().state.get(p)
            if isinstance(entries, dict):
                tensors = {k: local(e) for k, e in entries.items() if isinstance(e, Tensor)}
                yield tensors, value

    def __repr__(self) -> str:
        return f"lane {self.name} ({type(self.optimizer).__name__})"


class Lane(Place):
    """A place whose optimizer takes steps: what a minibatch does with it."""

    @property
    def switches(self) -> bool:
        """Whether its optimizer trains at another iterate than the one that it evaluates."""
        return callable(getattr(self.optimizer, "train", None))

    def enter(self, *, checking: bool) -> None:
        """Get into the model, with the memory in the optimizer."""
        self.checking, self.stepped = checking, False
        self.weights.clear_gradients()
        self.weights.enter(None if self.live else self.values)
        if self.scaler is not None and self.scaler.is_enabled():  # an error may have cut a step
            self.scaler._per_optimizer_states.clear()
        if self._parked is not None:
            self.inner.holder._parked = self.inner.exchange(self._parked)
            self.inner.holder, self._parked = self, None
        if self.switches:
            with torch.no_grad(), self.inner.stepping():
                getattr(self.optimizer, "eval" if checking else "train")()

    def leave(self) -> None:
        """Get out again."""
        self.weights.clear_gradients()
        self.weights.leave(None if self.live else self.values)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around a step of its optimizer."""
        with torch.no_grad(), self.weights.in_place(), self.inner.stepping():
            yield

    def run(self, closure: Closure) -> Any:
        """The value of the closure, and a step by its gradients; in a check, its value alone."""
        with torch.enable_grad():
            value = forward_only(closure) if self.checking else closure()
        self.step(value)
        return value

    def step(self, loss: Any) -> None:
        """One optimizer step by the gradients that ``backward`` has left; once in a loop's body.

        Args:
            loss: of the minibatch before the step, unscaled. In a check only this is used.

        Raises:
            ValueError: if it isn't one number, there are no gradients, or the lane has stepped.
        """
        if self.stepped:
            raise ValueError(f"lane.step must be called once for each lane, got again for {self}")
        value = scalar(loss)
        if self.checking:
            self.weights.renew_buffers(None if self.live else self.values)
            self.checks.append(value)
            self.stepped = True
            return
        self.check_gradients(value)
        given = self.given(loss)
        with Held(), self.updating():
            self.stepped = True
            if self.scaler is None:
                self.optimizer.step(*given)
            elif self.weights.have_gradients():  # else there is none to scale
                _check_scaled(self.scaler, self.optimizer)
                self.scaler.step(self.optimizer, *given)
                self.scaler.update()
            self.losses.append(value)

    def tensors(self, numbers: list[float]) -> list[Tensor]:
        """Losses as it keeps them."""
        device = self.values[0].device
        return [torch.tensor(one, dtype=torch.float64, device=device) for one in numbers]

    def miss(self, *, checking: bool) -> Tensor:
        """Note NaN as the loss of a minibatch, where it is lost."""
        nan = torch.full((), torch.nan, device=self.values[0].device)
        (self.checks if checking else self.losses).append(nan)
        return nan

    def check_gradients(self, loss: Tensor) -> None:
        """Refuse a body without a backward pass, which it may leave out for lost losses alone."""
        if not self.weights.have_gradients() and finite(loss):
            raise ValueError("closure must call backward, got no gradients from it")

    def given(self, loss: Any) -> tuple[Any, ...]:
        """What its ``step`` is given: nothing, or the loss if it asks for that."""
        return (loss,) if self.inner.takes_loss else ()

    def fill(self) -> None:
        """Have the optimizer make its state, by a step that is taken back."""
        previous = self.inner.exchange(self.inner.fresh.copy())
        self.weights.enter(self.weights.live())
        try:
            if self.switches:
                self.optimizer.train()  # pyright: ignore
            with self.updating():
                self.optimizer.step(*self.given(0.0))
        finally:
            filled = self.inner.exchange(previous)
            self.weights.undo()
        transfer(self.values, self.weights.live())
        self.remember(filled)


def _check_scaled(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Refuse gradients that the lane's scaler hasn't scaled, or has unscaled for another lane's."""
    if not scaler.is_enabled():
        return
    others = scaler._per_optimizer_states.keys() - {id(optimizer)}
    if scaler._scale is None or others:
        raise ValueError(
            "closure must scale by guard.scaler.scale(loss) and unscale by guard.unscale_(), got "
            + ("gradients unscaled for another optimizer" if others else "gradients not so scaled")
        )

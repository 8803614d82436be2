"""A lane: an optimizer's run. Guards run several, and compare their losses."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch.closures import Closure, forward_only, scalar
from lossguard.torch.interrupts import Held
from lossguard.torch.memory import Inner, Memory
from lossguard.torch.tensors import finite
from lossguard.torch.weights import Copy, Weights, transfer


class Place:
    """Where an optimizer is, and what it remembers: what a guard does with it between cycles.

    One lane of a guard is *live*: the model's own tensors are where it is. The others are in copies
    and get into the model for as long as they run. Several may share an optimizer, each with a
    memory of its own.

    Args:
        name: of the lane: x, y, z, s, or a number.
        inner: its optimizer.
        weights: the model.
        scaler: its gradient scaler, if gradients are scaled.
    """

    def __init__(
        self, name: str, inner: Inner, weights: Weights, scaler: GradScaler | None
    ) -> None:
        self.name = name
        self.inner = inner
        self.weights = weights
        self.scaler = scaler
        self.values: Copy = [t.clone() for t in weights.live()]
        """Where it is; of the live lane, where it was when the cycle began."""
        self.live = False
        self.before: Copy | None = None
        """Of a lane that may have to go back, where it was when the cycle began."""
        self.losses: list[Tensor] = []
        self.checks: list[Tensor] = []
        self.lost = False
        """Whether it is out of this cycle, for an error where its numbers aren't finite."""
        self.checking = False
        self.stepped = False
        self._takes = step_takes(inner.optimizer)
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
        if self.live:
            self.weights.write(self.values)
        elif self.before is not None:
            transfer(self.values, self.before)

    def start_at(self, point: Copy) -> None:
        """Be at another point; the memory stays."""
        if self.live:
            self.weights.write(point)
        else:
            transfer(self.values, point)

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
        if self.memory().state and not memory.state:
            self.inner.note(self.memory())
        if self._parked is None:
            self.inner.exchange(memory)
        else:
            self._parked = memory

    def forget(self) -> None:
        """Remember what the optimizer knew when the guard was built."""
        self.remember(self.inner.fresh.copy())

    def is_finite(self, reference: Copy) -> bool:
        """Whether its point is finite, or is what ``reference`` is there."""
        return self.weights.is_finite(self.point, reference)

    def remembers_soundly(self) -> bool:
        """Whether its memory is finite."""
        return self.inner.is_finite(self.memory())

    def check_memory(self) -> None:
        """Refuse a memory that holds the parameters themselves, in higher precision.

        The next step would undo what the guard has copied into the parameters.
        """
        point = dict(zip(self.weights.params, self.point, strict=False))
        for p, entries in self.memory().state.items():
            for entry in entries.values() if isinstance(entries, dict) and p in point else ():
                if isinstance(entry, Tensor) and _is_copy(entry, point[p]):
                    raise ValueError(
                        f"{self} must have an optimizer that keeps no copy of the parameters, got "
                        f"one in {entry.dtype}"
                    )

    def set_losses(self, losses: list[float], checks: list[float], *, lost: bool) -> None:
        """Go on within a cycle that has these losses."""
        device = self.values[0].device
        self.losses, self.checks = (
            [torch.tensor(one, dtype=torch.float64, device=device) for one in row]
            for row in (losses, checks)
        )
        self.lost = lost

    def __repr__(self) -> str:
        return f"lane {self.name} ({type(self.inner.optimizer).__name__})"


class Lane(Place):
    """A place whose optimizer takes steps: what a minibatch does with it."""

    @property
    def switches(self) -> bool:
        """Whether its optimizer trains at another iterate than the one that it evaluates."""
        return callable(getattr(self.inner.optimizer, "train", None))

    def enter(self, *, checking: bool) -> None:
        """Get into the model, with the memory in the optimizer."""
        self.checking, self.stepped = checking, False
        self.weights.clear_gradients()
        self.weights.enter([] if self.live else self.values)
        if self.scaler is not None and self.scaler.is_enabled():  # an error may have cut a step
            self.scaler._per_optimizer_states.clear()
        if self._parked is not None:
            self.inner.holder._parked = self.inner.exchange(self._parked)
            self.inner.holder, self._parked = self, None
        if self.switches:
            with torch.no_grad(), self.inner.stepping():
                getattr(self.inner.optimizer, "eval" if checking else "train")()

    def leave(self) -> None:
        """Get out again."""
        self.weights.clear_gradients()
        self.weights.leave([] if self.live else self.values)

    def run(self, closure: Closure) -> Any:
        """The value of the closure, and a step by its gradients; in a check, its value alone."""
        if self.checking:
            value = forward_only(closure)
            self.step(value)
            return value
        if self.scaler is None and self._takes == "closure":
            return self._run_inside(closure)
        with torch.enable_grad():
            value = closure()
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
            self.weights.renew_buffers([] if self.live else self.values)
            self.checks.append(value)
            self.stepped = True
            return
        self._check_gradients(value)
        optimizer, given = self.inner.optimizer, self._given_in_body(loss)
        with Held(), torch.no_grad(), self.weights.in_place(), self.inner.stepping():
            self.stepped = True
            if self.scaler is None:
                optimizer.step(*given)
            elif self.weights.have_gradients():  # else there is none to scale
                check_scaled(self.scaler, optimizer)
                self.scaler.step(optimizer, *given)
                self.scaler.update()
            self.losses.append(value)

    def miss(self, *, checking: bool) -> Tensor:
        """Note NaN as the loss of a minibatch, where it is lost."""
        nan = torch.full((), torch.nan, device=self.values[0].device)
        (self.checks if checking else self.losses).append(nan)
        return nan

    def _run_inside(self, closure: Closure) -> Any:
        """Have the optimizer call the closure; the value of its first call."""
        values: list[Any] = []
        held = Held()

        def evaluate() -> Any:
            with held.let_in(), torch.enable_grad():
                value = closure()
            if not values:
                values.append(value)
                self._check_gradients(scalar(value))
            self.stepped = True
            return value

        with held, torch.no_grad(), self.weights.in_place(), self.inner.stepping():
            self.inner.optimizer.step(evaluate)
            if not values:
                raise ValueError(
                    f"{self} must have an optimizer whose step(closure) calls the closure, got "
                    f"{type(self.inner.optimizer).__name__}"
                )
            self.losses.append(scalar(values[0]))
        return values[0]

    def _given_in_body(self, loss: Any) -> tuple[Any, ...]:
        """The same in a body, which can't be evaluated again."""
        if self._takes != "closure":
            return self.given(loss)
        (first, *_) = inspect.signature(self.inner.optimizer.step).parameters.values()
        if first.default is first.empty and first.kind is first.POSITIONAL_OR_KEYWORD:
            raise ValueError(
                f"{self} must be stepped by guard.step(closure), as its optimizer wants a closure"
            )
        return ()

    def _check_gradients(self, loss: Tensor) -> None:
        """Refuse a body without a backward pass, which it may leave out for lost losses alone."""
        if not self.weights.have_gradients() and finite(loss):
            raise ValueError("closure must call backward, got no gradients from it")

    def fill(self) -> None:
        """Have the optimizer make its state, by a step at a rate of 0 that leads nowhere."""
        groups = self.inner.optimizer.param_groups
        rates = [group.get("lr") for group in groups]
        self.weights.enter(self.values)
        previous = self.inner.exchange(self.inner.fresh.copy())
        try:
            for group in groups:
                group.update({"lr": 0 * group["lr"]} if "lr" in group else {})
            if self.switches:
                self.inner.optimizer.train()  # pyright: ignore
            with torch.no_grad(), self.weights.in_place(), self.inner.stepping():
                self.inner.optimizer.step(*self.given(0.0))
            filled = self.inner.exchange(previous)
        finally:
            self.weights.undo()
            for group, rate in zip(groups, rates, strict=True):
                group.update({"lr": rate} if "lr" in group else {})
        transfer(self.values, self.weights.live())
        self.remember(filled)

    def given(self, loss: Any) -> tuple[Any, ...]:
        """What its ``step`` is given, where gradients are there already."""
        return {"closure": (lambda: loss,), "loss": (loss,), "nothing": ()}[self._takes]


def _is_copy(entry: Tensor, value: Tensor) -> bool:
    """Whether it is the same numbers in another precision."""
    alike = entry.shape == value.shape and entry.dtype != value.dtype and entry.numel() > 1
    return alike and torch.equal(entry.to(value.dtype), value)


def step_takes(optimizer: Optimizer) -> str:
    """What an optimizer's ``step`` takes: a "closure", the "loss", or "nothing".

    Learned optimizers that read the loss take ``step(loss)``; Muon as published takes nothing.
    """
    names = list(inspect.signature(optimizer.step).parameters)
    return "nothing" if not names else "loss" if names[0] == "loss" else "closure"


def check_scaled(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Refuse gradients that the lane's scaler hasn't scaled, or has unscaled for another lane's."""
    if not scaler.is_enabled():
        return
    others = scaler._per_optimizer_states.keys() - {id(optimizer)}
    if scaler._scale is None or others:
        raise ValueError(
            "closure must scale by guard.scaler.scale(loss) and unscale by guard.unscale_(), got "
            + ("gradients unscaled for another optimizer" if others else "gradients not so scaled")
        )

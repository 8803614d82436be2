"""A lane: an optimizer's run. Guards run several, and compare their losses."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.arguments import scalar
from lossguard.torch.guards.weights import Copy, Weights
from lossguard.torch.memory import Inner, Memory
from lossguard.torch.tensors import clones, finite, transfer, zero_unsound

Mode = Literal["train", "eval"]
"""Of an optimizer whose iterates to train and to evaluate are two."""


class Lane:
    """Where an optimizer is, and what it remembers.

    One lane of a guard is *live*: it is in the model, whose own tensors are where it is. Each gets
    into it while it runs. Several may share an optimizer, each with a memory of its own. One that
    forgives takes a gradient with a number that isn't finite for 0.
    """

    def __init__(self, name: str, inner: Inner, weights: Weights, *, forgives: bool) -> None:
        self.name, self.inner, self.weights, self.forgives = name, inner, weights, forgives
        self.values: Copy = clones(weights.live())
        """Where it is while another one is in the model."""
        self.before: Copy = []
        """Of the leader and who else may have to go back, where it was when the cycle began."""
        self._buffers: Copy = []
        """Those of the model when it got into it."""
        self.losses: list[Tensor] = []
        self.checks: list[Tensor] = []
        self.begun = self.stepped = False
        self.warm_up = 0
        """The steps at the start of its next cycle over which its rates rise to the whole."""
        self._parked: Memory | None = None
        if inner.holder is None:
            inner.holder = self
        else:
            self._parked = inner.fresh()

    @property
    def optimizer(self) -> Optimizer:
        """Its optimizer, for a body that unscales gradients."""
        return self.inner.optimizer

    @property
    def live(self) -> bool:
        """Whether it is in the model."""
        return self.weights.holder is self

    @property
    def point(self) -> Copy:
        """Where it is: the tensors themselves."""
        return self.weights.live() if self.live else self.values

    def go_live(self, *, keep: bool = True) -> None:
        """Get into the model; keep where the lane has come to that was there, or forget it."""
        weights, other = self.weights, self.weights.holder
        if other is not self:
            weights.reshard()
            live = weights.live()
            if keep and other.values:
                transfer(other.values, live)
            elif keep:
                other.values = clones(live)
            weights.holder = self  # first: an error in the copying then costs this lane nothing
            transfer(live, self.values)

    def begin(self) -> None:
        """Start a cycle."""
        self.losses, self.before = [], []
        if self.live:
            self.values = []
            if self.inner.switches:
                self.enter()  # after ``eval``
            self.keep()

    def keep(self) -> None:
        """Note where it is when a cycle begins, to go back there."""
        self.before = self.before or clones(self.point)

    def go_back(self) -> None:
        """Be where it was when the cycle began."""
        if self.before:
            self.start_at(self.before)

    def start_at(self, point: Copy) -> None:
        """Be at another point; the memory stays."""
        self.inner.move_copies(self.memory(), point, self.point)
        if self.live:
            self.weights.write(point)
            self.weights.jumped = True
        else:
            transfer(self.values, point)

    def start_afresh_at(self, point: Copy) -> None:
        """Be at another point, and remember nothing."""
        self.start_at(point)
        self.forget()

    def become(self, other: "Lane") -> None:
        """Be where another lane of the same optimizer is, and remember what it does."""
        self.start_at(other.point)
        self.remember(other.memory().copy())
        self.warm_up = other.warm_up

    def memory(self) -> Memory:
        """What it remembers, itself."""
        return self.inner.memory() if self._parked is None else self._parked

    def remember(self, memory: Memory) -> None:
        """Remember this instead."""
        if self._parked is None:
            self.inner.exchange(memory)
        else:
            self._parked = memory

    def forget(self) -> None:
        """Remember what its optimizer did when the guard was built, mostly nothing; not the clock
        of a learned optimizer, which goes on from where it is."""
        memory = self.inner.fresh()
        for options, now in zip(memory.options, self.memory().options, strict=True):
            if "clock" in options:
                options["clock"] = now["clock"]
        self.remember(memory)
        self.inner.move_copies(self.memory(), self.point)

    def wind(self, clock: int, *, on: bool = False) -> None:
        """Set the clock of a learned optimizer, the steps of the run, if it has one.

        Or put it on by so much.
        """
        memory = self.memory()
        for options in memory.options:
            if "clock" in options:
                options["clock"] = clock + (options["clock"] if on else 0)
        self.remember(memory)

    def enter(self, mode: Mode = "train") -> None:
        """Get into the model, with the memory in the optimizer."""
        torch.clear_autocast_cache()  # autocast would go on with casts of other weights
        self.weights.clear_gradients()
        self.go_live()
        self._buffers = clones(self.weights.buffers())
        if self._parked is not None:
            self.inner.holder._parked = self.inner.exchange(self._parked)
            self.inner.holder, self._parked = self, None
        self.switch(mode)

    def switch(self, mode: Mode) -> None:
        """Have its optimizer train or evaluate, if these are two iterates."""
        if self.inner.switches:
            with torch.no_grad(), self.inner.stepping():
                getattr(self.optimizer, mode)()

    def leave(self, *, keep: bool) -> None:
        """End a minibatch; keep what it has made of the buffers, or undo that."""
        self.weights.clear_gradients()
        if self._buffers and not keep:
            transfer(self.weights.buffers(), self._buffers)
        self._buffers = []

    def step(self, loss: Any) -> None:
        """One optimizer step by the gradients that ``backward`` has left; once in a loop's body.

        Args:
            loss: of the minibatch before the step, unscaled.

        Raises:
            ValueError: if it isn't one number, there are no gradients, or the lane has stepped.
        """
        if self.stepped:
            raise ValueError(f"lane.step must be called once for each lane, got again for {self}")
        value = scalar(loss)
        self.check_gradients(value)
        self.inner.check_rates()
        self.begun = True  # if the optimizer raises, nobody knows how far it came
        if self.forgives:
            self.weights.mend(self._buffers, zero_unsound(self.weights.params))
        self.update(loss)
        self.note(value)

    def check_gradients(self, loss: Tensor) -> None:
        """Refuse a body without a backward pass, which it may leave out for lost losses alone."""
        if all(p.grad is None for p in self.weights.params) and finite(loss):
            raise ValueError("backward must be called in each body or closure, got no gradients")

    def update(self, loss: Any) -> None:
        """A step of its optimizer by the gradients that are there."""
        trained = [p.requires_grad for p in self.weights.params]
        try:
            part = (len(self.losses) + 1) / self.warm_up if self.warm_up else 1.0
            with torch.no_grad(), self.inner.stepping(part):
                self.optimizer.step(**({"loss": loss} if self.inner.takes_loss else {}))
        finally:
            for p, before in zip(self.weights.params, trained, strict=True):
                p.requires_grad_(before)  # whatever the optimizer has done

    def note(self, loss: Tensor) -> Tensor:
        """Note the loss of a minibatch, which is over for the lane."""
        self.losses.append(loss)
        self.stepped = True
        return loss

    def __repr__(self) -> str:
        return f"lane {self.name} ({type(self.optimizer).__name__})"

"""A lane: an optimizer's run. Guards run several in one model, and compare their losses."""

from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import scalar
from lossguard.torch.rates import Rates
from lossguard.torch.state import Inner, Memory
from lossguard.torch.tensors import (
    Number,
    clones,
    finite,
    local,
    own_buffers,
    transfer,
    zero_unsound,
)

Mode = Literal["train", "eval"]
"""Of an optimizer whose iterates to train and to evaluate are two."""
Copy = list[Tensor]
"""Parameters first, then buffers; of a sharded parameter this rank's shard alone."""
Beside = list[tuple[Tensor, Tensor | None]]


class Weights:
    """The live tensors: what the model is, and what the lane is that is in it.

    Another lane is copied into them while it runs, and out again. So a compiled model, a CUDA graph
    and whoever else holds the tensors see each lane.

    Attributes:
        params: the optimizers' parameters.
        model: for its buffers, if any.
        holder: the lane that is in the model.
    """

    def __init__(self, params: list[Tensor], model: nn.Module | None) -> None:
        self.params, self.model = params, model
        self.holder: Any = None
        self._jumped = False
        self._buffers = {} if model is None else dict(model.named_buffers())
        ours = set(params)
        self._others = [] if model is None else [p for p in model.parameters() if p not in ours]
        live = self.live()
        self._checked = [True] * len(live) if finite(live) else [finite(one) for one in live]
        """Of each tensor whether it was finite; masks may be infinite."""
        if any(p.requires_grad and not ok for p, ok in zip(params, self._checked, strict=False)):
            raise ValueError("parameters must be finite, got some that aren't and are trained")

    def live(self) -> Copy:
        return [*(local(p.detach()) for p in self.params), *self.buffers()]

    def buffers(self) -> Copy:
        """The buffers themselves, except those of which one number stands for several."""
        buffers = {} if self.model is None else own_buffers(self.model, self._buffers)
        return [local(buffer.detach()) for buffer in buffers.values()]

    def hold(self, lane: Any) -> None:
        """Have a lane in the model, where it is."""
        self.holder = lane  # first: an error in the copying then costs no lane anything
        self.write(lane.values)

    def write(self, values: Copy) -> None:
        """Be at other values. Gathered parameters, which an evaluation leaves, are dropped."""
        for module in () if self.model is None else self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None and hasattr(module, "unshard"):
                reshard()
        transfer(self.live(), values)

    def note_jump(self, values: Copy) -> None:
        """Note whether values where the model is to be from now on are elsewhere."""
        self._jumped |= not all(map(torch.equal, values[: len(self.params)], self.live()))

    def has_jumped(self) -> bool:
        """Whether it did so since it was asked."""
        jumped, self._jumped = self._jumped, False
        return jumped

    def are_finite(self, values: Copy) -> bool:
        """Whether values are, but for masks."""
        return finite(list(compress(values, self._checked)))

    def have_diverged(self) -> bool:
        """Whether the live parameters that are trained, or their gradients, aren't finite."""
        return not finite([(p.detach(), p.grad) for p in self.params if p.requires_grad])

    def mend(self, buffers: Copy, broken: Number) -> None:
        """Take the buffers back to a copy if a minibatch is broken.

        Inputs that aren't finite have made statistics of BatchNorm so, in the forward pass.
        """
        if broken is not False:
            for buffer, before in zip(self.buffers(), buffers, strict=False):
                if buffer.shape == before.shape and buffer.layout is torch.strided:
                    flag = torch.as_tensor(broken, dtype=torch.bool, device=buffer.device)
                    torch.where(flag, before, buffer, out=buffer)

    def gradients_beside(self) -> Beside:
        """Those of parameters that other optimizers step, and no lane."""
        grads = [(p, p.grad) for p in self._others if p.requires_grad]
        return [(p, None if grad is None else grad.clone()) for p, grad in grads]

    def reset_gradients(self, beside: Beside) -> None:
        """Forget the lanes' gradients, and set others to what they were, or lanes would add up."""
        for p in self.params:
            p.grad = None
        for p, grad in beside:
            p.grad = None if grad is None else grad.clone()

    def versions(self) -> list[tuple[Tensor, int]]:
        """The parameters that nobody steps, and how often they were written to."""
        return [(p, p._version) for p in self._others if not p.requires_grad]


class Lane:
    """Where an optimizer is, and what it remembers.

    The lane that leads is *live*: it is in the model, whose own tensors are where it is. Each gets
    into it while it runs. Several may share an optimizer, each with a memory of its own.

    Attributes:
        values: where it is while another one is in the model.
        before: of the leader and who else may have to go back, where it was when the cycle began.
        losses, checks: of this cycle.
        begun, stepped: whether its step of this minibatch has begun, and is over.
        warm_up: the steps at the start of its next cycle over which its rates rise to the whole.
    """

    def __init__(
        self, name: str, inner: Inner, weights: Weights, rates: Rates, *, forgives: bool
    ) -> None:
        """``forgives``: it takes a gradient with a number that isn't finite for 0."""
        self.name, self.inner, self.weights, self.forgives = name, inner, weights, forgives
        self._rates = rates
        self.values: Copy = clones(weights.live())
        self.before: Copy = []
        self._buffers: Copy = []
        """Those of the model when it got into it."""
        self.losses: list[Tensor] = []
        self.checks: list[Tensor] = []
        self.begun = self.stepped = False
        self.warm_up = 0
        inner.add(name)

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
        other = self.weights.holder
        if other is not self:
            if keep and other.values:
                transfer(other.values, self.weights.live())
            elif keep:
                other.values = clones(self.weights.live())
            self.weights.hold(self)

    def begin(self) -> None:
        """Start a cycle."""
        self.losses, self.checks, self.before = [], [], []
        if self.live:
            self.values = []
            if self.inner.switches:
                self.enter()  # after ``eval``
            self.keep()

    def prepare(self) -> None:
        """Before a minibatch on which it runs."""
        self.begun = self.stepped = False

    def keep(self) -> None:
        """Note where it is when a cycle begins, to go back there."""
        self.before = self.before or clones(self.point)

    def go_back(self) -> None:
        """Be where it was when the cycle began."""
        if self.before:
            self.start_at(self.before)

    def start_at(self, point: Copy) -> None:
        """Be at another point; the memory stays."""
        self.inner.move_copies(self.memory(), point)
        if self.live:
            self.weights.note_jump(point)
            self.weights.write(point)
        else:
            transfer(self.values, point)

    def start_afresh_at(self, point: Copy, *, warm_up: int = 0) -> None:
        """Be at another point, and remember nothing."""
        self.start_at(point)
        self.forget()
        self.warm_up = warm_up

    def end_warm_up(self) -> None:
        """Go on at the whole rates."""
        self.warm_up = 0

    def become(self, other: "Lane") -> None:
        """Be where another lane of the same optimizer is, and remember what it does."""
        self.start_at(other.point)
        self.remember(other.memory().copy())
        self.warm_up = other.warm_up

    def go_on(
        self, values: Copy, before: Copy, losses: list[Tensor], memory: Memory, warm_up: int
    ) -> None:
        """Go on from a saved cycle."""
        self.values, self.before, self.losses, self.warm_up = values, before, losses, warm_up
        self.checks = []  # of a cycle that was interrupted
        self.remember(memory)

    def memory(self) -> Memory:
        """What it remembers, itself."""
        return self.inner.memory(self.name)

    def remember(self, memory: Memory) -> None:
        """Remember this instead."""
        self.inner.remember(self.name, memory)

    def forget(self) -> None:
        """Remember what its optimizer did when the guard was built, mostly nothing."""
        self.remember(self.inner.fresh(self.memory()))
        self.inner.move_copies(self.memory(), self.point)

    def wind(self, clock: int, *, on: bool = False) -> None:
        """Set the clock of a learned optimizer, the steps of the run; or put it on by so much."""
        memory = self.memory()
        for options in memory.options:
            if "clock" in options:
                options["clock"] = clock + (options["clock"] if on else 0)
        self.remember(memory)

    def enter(self, mode: Mode = "train") -> None:
        """Get into the model, with the memory in the optimizer."""
        torch.clear_autocast_cache()  # autocast would go on with casts of other weights
        self.weights.reset_gradients([])
        self.go_live()
        self._buffers = clones(self.weights.buffers())
        self.inner.hold(self.name)
        self.switch(mode)

    def switch(self, mode: Mode) -> None:
        """Have its optimizer train or evaluate, if these are two iterates."""
        if self.inner.switches:
            with torch.no_grad(), self.inner.stepping():
                getattr(self.optimizer, mode)()

    def leave(self, *, keep: bool) -> None:
        """End a minibatch; keep what it has made of the buffers, or undo that."""
        self.weights.reset_gradients([])
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
        if all(p.grad is None for p in self.weights.params) and finite(value):
            raise ValueError("backward must be called in each body or closure, got no gradients")
        self._rates.check()
        self.begun = True  # if the optimizer raises, nobody knows how far it came
        if self.forgives:
            self.weights.mend(self._buffers, zero_unsound(self.weights.params))
        self.take_step(loss)
        self.note(value)

    def take_step(self, loss: Any) -> None:
        """A step of its optimizer by the gradients that are there."""
        trained = [p.requires_grad for p in self.weights.params]
        try:
            part = (len(self.losses) + 1) / self.warm_up if self.warm_up else 1.0
            with torch.no_grad(), self.inner.stepping(part):
                self.optimizer.step(**({"loss": loss} if self.inner.takes_loss else {}))
        finally:
            self._rates.mark()  # some optimizers set their own
            for p, before in zip(self.weights.params, trained, strict=True):
                p.requires_grad_(before)  # whatever the optimizer has done

    def note(self, loss: Tensor) -> Tensor:
        """Note the loss of a minibatch, which is over for the lane."""
        self.losses.append(loss)
        self.stepped = True
        return loss

    def __repr__(self) -> str:
        return f"lane {self.name} ({type(self.optimizer).__name__})"

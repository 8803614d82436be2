"""A lane: an optimizer's run. Guards run several in one model, and compare their losses."""

import inspect
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossguard.torch.arguments import scalar
from lossguard.torch.guards.memory import Copy, Kept, Memory, OwnMemory
from lossguard.torch.rates import Rates
from lossguard.torch.tensors import (
    Number,
    clones,
    finite,
    local,
    own_buffers,
    stacked,
    transfer,
    zero_unsound,
)

Mode = Literal["train", "eval"]
"""Of an optimizer whose iterates to train and to evaluate are two."""


class Live:
    """The live tensors: what the model is, and where the lane is that is in it.

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
        self._checked = [finite(one) for one in self.tensors()]
        """Of each tensor whether it was finite; masks may be infinite."""
        if any(p.requires_grad and not ok for p, ok in zip(params, self._checked, strict=False)):
            raise ValueError("parameters must be finite, got some that aren't and are trained")

    def tensors(self) -> Copy:
        return [*(local(p.detach()) for p in self.params), *self.buffers()]

    def buffers(self) -> Copy:
        """The buffers themselves, except those of which one number stands for several."""
        buffers = {} if self.model is None else own_buffers(self.model, self._buffers)
        return [local(buffer.detach()) for buffer in buffers.values()]

    def write(self, values: Copy) -> None:
        """Be at other values. Gathered parameters, which an evaluation leaves, are dropped."""
        for module in () if self.model is None else self.model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None and hasattr(module, "unshard"):
                reshard()
        transfer(self.tensors(), values)

    def note_jump(self, values: Copy) -> None:
        """Note whether values where the model is to be from now on are elsewhere."""
        self._jumped |= not all(map(torch.equal, values[: len(self.params)], self.tensors()))

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

    def forget_gradients(self) -> None:
        for p in self.params:
            p.grad = None


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
        self,
        name: str,
        optimizer: Optimizer,
        live: Live,
        rates: Rates,
        *,
        first: bool,
        forgives: bool,
    ) -> None:
        """``forgives``: it takes a gradient with a number that isn't finite for 0."""
        self.name, self.optimizer = name, optimizer
        self._live, self._rates, self._forgives = live, rates, forgives
        self._takes_loss = "loss" in inspect.signature(optimizer.step).parameters
        self._switches = callable(getattr(optimizer, "train", None))
        """Whether its optimizer trains at another iterate than the one that it evaluates."""
        self.memory = OwnMemory(optimizer, live.params, live.tensors(), first=first)
        self.values: Copy = clones(live.tensors())
        self.before: Copy = []
        self._buffers: Copy = []
        """Those of the model when it got into it."""
        self.losses: list[Tensor] = []
        self.checks: list[Tensor] = []
        self.begun = self.stepped = False
        self.warm_up = 0

    @property
    def live(self) -> bool:
        """Whether it is in the model."""
        return self._live.holder is self

    @property
    def point(self) -> Copy:
        """Where it is: the tensors themselves."""
        return self._live.tensors() if self.live else self.values

    def forget(self) -> None:
        """Remember what its optimizer did when the guard was built, mostly nothing."""
        self.memory.forget(self.point)

    def begin(self) -> None:
        """Start a cycle."""
        if self.losses:  # in its last cycle it has run
            self.warm_up = 0
        self.losses, self.checks, self.before = [], [], []
        if self.live:
            self.values = []
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
        """Be at another point; the memory stays, and copies of the parameters in it go along."""
        self.memory.go_along(self.point, point)
        if self.live:
            self._live.note_jump(point)
            self._live.write(point)
        else:
            transfer(self.values, point)

    def start_afresh_at(self, point: Copy, *, warm_up: int = 0) -> None:
        """Be at another point, and remember nothing."""
        self.start_at(point)
        self.forget()
        self.warm_up = warm_up

    def become(self, other: "Lane") -> None:
        """Be where another lane of the same optimizer is, and remember what it does."""
        self.start_at(other.point)
        self.memory.become(other.memory.now.copy())
        self.warm_up = other.warm_up

    def kept(self, *, within: bool) -> Kept:
        """All that it is, uncopied; ``within`` a cycle."""
        memory = self.memory.now
        blank = all(entries == {} for entries in memory.state.values())
        if blank:  # as torch.distributed.checkpoint loads only what is there on both sides
            state = memory.state or Memory.of(self.optimizer).state or self._first_state()
            memory = memory._replace(state=state)
        before = self.before if within else []
        losses = stacked(self.losses).tolist()
        return Kept(self.point, before, memory, blank, losses, self.warm_up)

    def go_on(self, kept: Kept) -> None:
        """Be what was kept of it, beside the model; ``hold`` has it in there."""
        self.values, self.before, self.warm_up = kept.values, kept.before, kept.warm_up
        self.memory.be_aside(kept.memory._replace(state={}) if kept.blank else kept.memory)
        self.losses = [scalar(loss) for loss in kept.losses]
        self.checks = []  # of a cycle that was interrupted

    def _first_state(self) -> dict[Any, Any]:
        """What its optimizer remembers after a first step, of which no trace is left."""
        live, memory, values = self._live, Memory.of(self.optimizer), clones(self._live.tensors())
        try:
            for p in live.params:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            if self._switches:
                self.optimizer.train()  # pyright: ignore
            self._take_step(0.0)
            return Memory.of(self.optimizer).state
        finally:
            memory.put_into(self.optimizer)
            live.forget_gradients()
            transfer(live.tensors(), values)

    def hold(self) -> None:
        """Have the model be where the lane is, and its optimizer remember what it does."""
        self._live.holder = self  # first: an error in the copying then costs no lane anything
        self._live.write(self.values)
        self.memory.go_in()

    def step_aside(self, *, keep: bool) -> None:
        """For another lane to get into the model; ``keep`` where this one has come to."""
        self.memory.go_out()
        if keep and self.values:
            transfer(self.values, self._live.tensors())
        elif keep:
            self.values = clones(self._live.tensors())

    def enter(self, mode: Mode = "train", *, keep: bool = True) -> None:
        """Get into the model; ``keep`` where the lane has come to that was there, or forget it."""
        torch.clear_autocast_cache()  # autocast would go on with casts of other weights
        self._live.forget_gradients()
        if not self.live:
            self._live.holder.step_aside(keep=keep)
            self.hold()
        self._buffers = clones(self._live.buffers())
        if self._switches:
            with torch.no_grad():
                getattr(self.optimizer, mode)()

    def leave(self, *, keep: bool) -> None:
        """End a minibatch; keep what it has made of the buffers, or undo that."""
        self._live.forget_gradients()
        if self._buffers and not keep:
            transfer(self._live.buffers(), self._buffers)
        self._buffers = []

    def prepare(self) -> None:
        """Before a minibatch on which it runs."""
        self.begun = self.stepped = False

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
        if all(p.grad is None for p in self._live.params) and finite(value):
            raise ValueError("backward must be called in each body or closure, got no gradients")
        self._rates.check()
        self.begun = True  # if the optimizer raises, nobody knows how far it came
        if self._forgives:
            self._live.mend(self._buffers, zero_unsound(self._live.params))
        self._take_step(loss)
        self.note(value)

    def _take_step(self, loss: Any) -> None:
        """A step of its optimizer by the gradients that are there."""
        part = (len(self.losses) + 1) / self.warm_up if self.warm_up else 1.0
        with self._rates.scaled(self.optimizer, part), torch.no_grad():
            self.optimizer.step(**({"loss": loss} if self._takes_loss else {}))

    def note(self, loss: Tensor) -> Tensor:
        """Note the loss of a minibatch, which is over for the lane."""
        self.losses.append(loss)
        self.stepped = True
        return loss

    def __repr__(self) -> str:
        return f"lane {self.name} ({type(self.optimizer).__name__})"

"""What guards that take lanes through cycles have in common, whatever they decide by.

nt   train minibatches per cycle: each is one optimizer step in every lane that runs
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch import arguments
from lossguard.torch.closures import Closure, described
from lossguard.torch.cycle import Course, Cycle
from lossguard.torch.decision import Decision
from lossguard.torch.guard import Guard
from lossguard.torch.tensors import clone
from lossguard.torch.weights import Weights
from lossguard.validation import check_count


class LaneGuard(Guard):
    """A guard whose decision ends a cycle of lanes, which are in the model only during ``step``.

    Attributes:
        nt: train minibatches per cycle.
        schedulers: which it steps once per train minibatch.
        process_group: the ranks that decide together; None is all of them.
        callback: called with every decision.
    """

    def __init__(
        self,
        learned: Optimizer | Sequence[Optimizer],
        fallback: Optimizer,
        *,
        nt: int,
        model: nn.Module | None,
        scaler: GradScaler | None,
        schedulers: Sequence[LRScheduler],
        offload: Literal["cpu"] | None,
        process_group: distributed.ProcessGroup | None,
        callback: Callable[[Decision], object] | None,
    ) -> None:
        several = arguments.listed(learned)
        params = arguments.shared_params(several, fallback)
        arguments.check_schedulers(schedulers, [*several, fallback])
        arguments.check_scaler(scaler)
        arguments.check_callback(callback)
        arguments.check_offload(offload)
        arguments.check_model(model, params)
        self.nt = check_count("nt", nt)
        weights = Weights(params, model, torch.device("cpu") if offload else None)
        super().__init__(learned, fallback, weights)
        self.schedulers = list(schedulers)
        self.process_group = process_group
        self.callback = callback

    def _drive(self, course: Course) -> None:
        """Take these lanes through cycles."""
        self._cycle = Cycle(course, self._weights, self.schedulers, self.nt)

    @property
    def phase(self) -> int:
        """Minibatches seen of this cycle; 0 between cycles, when ``step`` has just decided."""
        return self._cycle.phase

    @property
    def checking(self) -> bool:
        """Whether only the loss of the next minibatch is evaluated: a check, or the ratchet's."""
        return self._cycle.checking

    @property
    def scaler(self) -> GradScaler:
        """The gradient scaler of the running branch; use it inside the closure."""
        if self._cycle.running.scaler is None:
            kind = type(self).__name__
            raise AttributeError(f"scaler must be given to {kind} to scale losses, got None")
        return self._cycle.running.scaler

    def unscale_(self) -> None:
        """Unscale the running branch's gradients, to clip them inside the closure."""
        if not self.checking:
            self.scaler.unscale_(self._cycle.running.inner.optimizer)

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one minibatch of the stream.

        Args:
            closure: evaluates the minibatch's loss, calls ``backward`` and returns the loss. It is
                called once per lane; the guard clears the gradients before.

        Returns:
            The loss, of the lane that the model had before this call (the fallback's at first), so
            that it is not told with hindsight where the call decides; of z where that one takes
            none of this minibatch, as s may take no check minibatches.
        """
        kind = type(self).__name__
        closure = self._check_step(closure, f" (a GradScaler goes to {kind} as scaler)")
        lanes = self._cycle.lanes
        given, from_x = lanes.given, [k for k in range(len(lanes.all)) if lanes.begins_at_x(k)]
        values = self._take([closure])
        instead = max((k for k in values if k in from_x), default=max(values))
        return values[given if given in values else instead][0]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to all optimizers, with their own defaults in the learned ones.

        Args:
            param_group: as for any optimizer; its options are the fallback's.
        """
        if self._cycle.phase:
            raise ValueError(
                "param_group must be added between cycles, got one after "
                f"{self._cycle.phase} minibatches of one"
            )
        learned = [inner.optimizer for inner in self._inners[:-1]]
        self._cycle.grow(self._add_group(param_group, learned))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(learned={self.learned!r}, fallback={self.fallback!r})"

    def _take(self, closures: Sequence[Closure]) -> dict[int, list[Any]]:
        """The same as ``_run``; a cycle whose decision is interrupted is lost."""
        try:
            return self._run(closures)
        except BaseException:
            self._cycle.phase = 0
            raise

    def _run(self, closures: Sequence[Closure]) -> dict[int, list[Any]]:
        """Run every lane over some minibatches, and decide if those were enough."""
        raise NotImplementedError

    def _check_train(self, train_batches: Iterable[Any]) -> list[Any]:
        """The minibatches that a whole cycle trains on."""
        train = list(islice(train_batches, self.nt + 1))  # they may have no end
        arguments.check_drawn("train_batches", len(train), self.nt)
        if self._cycle.phase:
            raise ValueError(
                "cycle must start where the last one ended, got one after "
                f"{self._cycle.phase} minibatches of it"
            )
        return train

    def _closures(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any]
    ) -> list[Callable[[], Tensor]]:
        """What a loop would pass to ``step``, one for each minibatch."""

        def evaluate(batch: Any) -> Tensor:
            loss = loss_fn(batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"loss_fn must return the loss, one number, got {described(loss)}")
            if not self.checking:
                if self._weights.have_gradients():
                    raise ValueError("loss_fn must leave backward to the guard, got gradients")
                scaler = self._cycle.running.scaler
                (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        return [partial(evaluate, batch) for batch in batches]

    def _firsts(self, active: Sequence[int], trains: Sequence[Sequence[float]]) -> list[float]:
        """Training losses at x, on the cycle's first minibatch: they should be the same."""
        lanes = self._cycle.lanes
        rows = zip(active, trains, strict=True)
        return [t[0] for k, t in rows if lanes.begins_at_x(k) and not lanes.all[k].switches]

    def _decided(self, decision: Decision, firsts: Sequence[float]) -> None:
        """Note a decision, begin a new cycle, and warn of losses at x that differ."""
        self._cycle.phase = 0
        self.history.append(decision)
        if self.callback is not None:
            self.callback(decision)
        self._cycle.watch.compare(firsts)

    def _save(self) -> dict[str, Any]:
        cycle = self._cycle
        return {
            "nt": self.nt,
            "phase": cycle.phase,
            "gradients": cycle.gradients,
            "kept": cycle.lanes.kept,
            "random": cycle.randomness.state(),
            "x": self._weights.copy(),
            "schedulers": [clone(scheduler.state_dict()) for scheduler in self.schedulers],
        }

    def _load(self, state: dict[str, Any]) -> None:
        cycle = self._cycle
        for scheduler, its_state in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(clone(its_state))
        cycle.lanes.kept, cycle.gradients, cycle.phase = (
            state[name] for name in ("kept", "gradients", "phase")
        )
        self._weights.copy_from(state["x"])
        cycle.placing.begin()
        cycle.randomness.set(state["random"])

    def _check_saved(self, saved: dict[str, Any]) -> None:
        super()._check_saved(saved)
        ours, theirs = len(self.schedulers), len(saved["guard"]["schedulers"])
        if ours != theirs:
            raise ValueError(f"state_dict must be of {ours} schedulers, got one of {theirs}")

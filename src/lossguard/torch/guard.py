"""What the guards have in common: how they take lanes through minibatches."""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lossguard.torch import arguments, saving
from lossguard.torch.closures import Closure, checked
from lossguard.torch.consensus import agree, several
from lossguard.torch.decision import Decision, Seen
from lossguard.torch.face import Face
from lossguard.torch.interrupts import Held
from lossguard.torch.lane import Lane
from lossguard.torch.memory import Inner
from lossguard.torch.randomness import Randomness
from lossguard.torch.rates import Rates, copied
from lossguard.torch.relay import Relay
from lossguard.torch.tensors import clone, local, read, transfer
from lossguard.torch.watch import Watch
from lossguard.torch.weights import Weights
from lossguard.validation import check_count, check_share

HISTORY = 1000
"""Decisions that ``history`` keeps."""


class Cycle(Face):
    """A guard between minibatches: how cycles begin and end, and how it is saved."""

    _watch: Watch

    def _begin(self) -> list[Lane]:
        """The lanes that run in the cycle beside the live one, where they start from."""
        raise NotImplementedError

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        """Decide, by what the lanes that ran have shown; call ``_lead`` to have another lane."""
        raise NotImplementedError

    def _measure(self) -> None:
        """Evaluate what else the decision is to know, before ranks agree."""

    def _lead(self, lane: Lane) -> None:
        """Have another lane in the model from now on."""
        if lane is not self._leader:
            transfer(self._leader.values, self._weights.live())
            self._leader.live = False
            self._weights.write(lane.values)
            lane.live, self._leader = True, lane

    def _close(self, order: Sequence[Lane]) -> Decision | None:
        """After a minibatch."""
        self.phase += 1
        if self.phase == 1 and self.steps == 0:
            for lane in order:
                lane.note_copies(lane.point)
            self._watch.compare(order, [read(lane.losses[:1]) for lane in order])
        if not self.state:  # torch.distributed.checkpoint asks whether there is any
            self.state.update({p: {} for p in self._weights.params})
        if self.phase < self.nt + self.nc:
            return None
        try:
            decision = self._decide()
        finally:
            self.phase = 0
            for lane in order:
                lane.before = None
        self.steps += self.nt
        self.history.append(decision)
        return decision

    def _decide(self) -> Decision:
        ran = [self._leader, *self._others]
        self._measure()
        numbers, alarms = agree(
            read([loss for lane in ran for loss in (*lane.losses, *lane.checks)]),
            [
                *(not self._weights.is_finite(lane.point, self._leader.values) for lane in ran),
                *(not lane.inner.is_finite(lane.memory()) for lane in ran),
            ],
            self.process_group,
            local(self._weights.params[0]).device,
        )
        agreed, seen = iter(numbers), {}
        for k, lane in enumerate(ran):
            losses, checks = ([next(agreed) for _ in row] for row in (lane.losses, lane.checks))
            seen[lane.name] = Seen(losses, checks, not alarms[k])
            if alarms[len(ran) + k]:
                lane.forget()
        self._watch.compare(ran, [seen[lane.name].losses[:1] for lane in ran])
        self._weights.jumped = False
        return self._settle(seen)._replace(jumped=self._weights.jumped)

    def _fill(self, closure: Closure | None) -> bool:
        """Whether torch.distributed.checkpoint asks the optimizers to make their states.

        It does so by gradients and a step at rates of 0, before the first one.
        """
        rates = (float(group.get("lr", 1)) for group in self.param_groups)
        asked = closure is None and not self.state and not any(rates)
        asked = asked and self._weights.have_gradients()
        for lane in self._lanes.values() if asked else ():
            lane.fill()
            self._filled = True
        return asked

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the rest of the run depends on, at any point of a cycle.

        Loading it goes on bit by bit, parameters and buffers included, but not the global random
        state, which is the program's.
        """
        return saving.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state_dict: of a guard that was built in the same way.

        Raises:
            ValueError: if it wasn't. The guard is as it was before, then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        with Held():
            saving.load(self, state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


class Guard(Cycle):
    """An optimizer that runs lanes, of which the live one is what the model is.

    A cycle is nt minibatches on which the lanes that run take a step each, and nc on which they are
    only checked. The guards differ in which lanes run, and in what a cycle's losses decide.
    """

    trusted: tuple[str, ...] = ()
    """Lanes whose errors are passed on whatever their numbers are."""

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        lanes: Mapping[str, str],
        *,
        leader: str,
        nt: int,
        nc: int = 0,
        model: nn.Module | None,
        scaler: GradScaler | None = None,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        params = arguments.check_optimizers(optimizers)
        arguments.check_model(model, params)
        arguments.check_scaler_and_callback(scaler, callback)
        self.nt, self.nc = check_count("nt", nt), nc
        self.phase, self.steps = 0, 0
        self.history = deque(maxlen=HISTORY)
        self.process_group, self.callback = process_group, callback
        self._weights = Weights(params, model)
        inners = {name: Inner(optimizer) for name, optimizer in optimizers.items()}
        self._inners = list(inners.values())
        first = self._inners[0].optimizer
        self._built = False
        super().__init__([copied(group) for group in first.param_groups], dict(first.defaults))
        self._built = True
        self._rates = Rates(self.param_groups, list(optimizers.values()))
        self._randomness = Randomness(params)
        self._lanes = {
            name: Lane(name, inners[of], self._weights, clone(scaler)) for name, of in lanes.items()
        }
        self._leader = self._lanes[leader]
        self._leader.live = True
        self._others, self._inside, self._filled = [], None, False
        self._watch = Watch(self._weights)

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one minibatch.

        Args:
            closure: evaluates its loss, calls ``backward`` and returns the loss. It is called once
                for each lane that runs, the live one last; the guard clears the gradients before.

        Returns:
            The loss of the live lane before its step: of what the model was before this call.
        """
        if self._fill(closure):
            return None
        closure = checked(closure, f" (a GradScaler goes to {type(self).__name__} as scaler)")
        value: Any = torch.full((), torch.nan, device=self._weights.params[0].device)
        with closing(self.lanes()) as lanes:
            for lane in lanes:
                value = self._run(lane, closure)
        return value.detach().clone() if isinstance(value, Tensor) else value

    def lanes(self) -> Generator[Lane, None, None]:
        """The lanes that run on this minibatch, in the model one by one, the live one last.

        Where bodies are more than a closure takes: clipping, accumulation, scalers.

            for lane in guard.lanes():
                loss = loss_fn(model(x), t)
                loss.backward()
                clip(model.parameters())
                lane.step(loss)

        Raises:
            ValueError: if there are gradients before it, or the body does not call ``lane.step``.
        """
        with Held():
            order, draws = self._open()
        done = False
        try:
            for lane in order:
                if lane.lost:
                    lane.miss(checking=self.checking)
                    continue
                if len(order) > 1:
                    torch.clear_autocast_cache()  # autocast would go on with casts of other weights
                    self._randomness.set(draws)
                with Held():
                    self._inside = lane
                    lane.enter(checking=self.checking)
                yield lane
                if not lane.stepped:
                    raise ValueError("the body of guard.lanes() must call lane.step(loss)")
                with Held():
                    lane.leave()
                    self._inside = None
            with Held():
                decision = self._close(order)
                done = True
        except BaseException:
            with Held():
                if not done:
                    self._undo(order, draws)
            raise
        if decision is not None and self.callback is not None:
            self.callback(decision)

    def _open(self) -> tuple[list[Lane], list[Tensor]]:
        """Before a minibatch: the lanes that run, and the random state that each starts from."""
        if self._inside is not None:  # a loop that was left, and whose generator lives on
            self._undo([self._leader, *self._others], self._randomness.state())
        self._watch.check(self._inners)
        if self._filled:  # and nothing was loaded
            for lane in self._lanes.values():
                lane.forget()
            self._filled = False
        self._rates.apply()
        if self.phase == 0:
            self._others = self._begin()
            for lane in [self._leader, *self._others]:
                lane.begin()
        order = [*self._others, self._leader]
        for lane in order:
            lane.stepped = False
        return order, self._randomness.state() if len(order) > 1 else []

    def _run(self, lane: Lane, closure: Closure) -> Any:
        """The value of the closure, or NaN where a lane raises as its numbers aren't finite.

        It is out of the cycle then. Were the error passed on, it would come again in every cycle,
        and the fallback would never get on. Other ranks would not know of it.
        """
        try:
            return self._watch.run(lane, closure)
        except Exception as error:
            if lane.name in self.trusted or several(self.process_group):
                raise
            if not self._weights.have_diverged():
                raise
            self._watch.tell(error, lane)
            lane.lost = lane.stepped = True
            return lane.miss(checking=lane.checking)

    def _undo(self, order: Sequence[Lane], draws: list[Tensor]) -> None:
        """After an error the minibatch doesn't count; if a lane has stepped, nor does the cycle."""
        lane, self._inside = self._inside, None
        if lane is not None and lane.stepped:
            lane.leave()
        self._weights.undo()
        self._weights.clear_gradients()
        if draws:
            self._randomness.set(draws)
        if any(lane.stepped for lane in order):
            self.phase = 0
            if not self._weights.is_finite(self._weights.live(), self._leader.values):
                self._leader.go_back()


class GuardOfTwo(Guard):
    """A relay at x, of learned lane y and fallback lane z, beside s, the fallback's own run."""

    trusted = ("z", "s")

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        nt: int = 10,
        share: float = 0.05,
        scaler: GradScaler | None = None,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        share = check_share(share)
        arguments.check_fallback(fallback)
        super().__init__(
            {"fallback": fallback, "learned": learned},
            {"y": "learned", "z": "fallback", "s": "fallback"},
            leader="z",
            nt=nt,
            model=model,
            scaler=scaler,
            process_group=process_group,
            callback=callback,
        )
        self._relay = Relay(self._lanes["y"], self._lanes["z"], self.nt, share)
        self._s, self._on_own = self._lanes["s"], True

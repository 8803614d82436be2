"""Takes the lanes through the minibatches of a cycle: lines 10 to 15 of Algorithm 2."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lossguard.torch.closures import Closure, Watch, own, scalar
from lossguard.torch.forward_only import forward_only
from lossguard.torch.lane import Lane
from lossguard.torch.placing import placing
from lossguard.torch.randomness import Randomness
from lossguard.torch.ratchet import Best
from lossguard.torch.schedules import Schedules
from lossguard.torch.tensors import local
from lossguard.torch.weights import Copy, Weights


class Course(Protocol):
    """What a cycle asks of the lanes that it takes through minibatches.

    Attributes:
        all: the lanes, by their numbers.
        kept: the number of the one that x became last; of the last one before the first decision.
        given: the number of the one that the model has got; another one, while x is aside.
        best: b, where a ratchet holds x to it.
        aside: x, while the model holds another lane; None: the model has x.
    """

    all: list[Lane]
    kept: int
    best: Best | None
    aside: Copy | None

    @property
    def given(self) -> int:
        """The number of the lane that the model has got."""
        ...

    @property
    def watched(self) -> Best | None:
        """b, if its training losses are asked for in this cycle."""
        ...

    def checked(self, active: Sequence[int]) -> list[int]:
        """Those of the active lanes that take check minibatches."""
        ...

    def begins_at_x(self, number: int) -> bool:
        """Whether a lane's steps of this cycle start from x."""
        ...


class Cycle:
    """The cycle that a guard is in.

    Attributes:
        phase: minibatches seen in this cycle; the first nt of them train.
        gradients: gradients evaluated in this cycle.
        running: the lane in the model, or the last one that was.
        holding: whether b is in the model, for the ratchet.
        watch: over what closures do.
    """

    def __init__(
        self, lanes: Course, weights: Weights, schedulers: Sequence[LRScheduler], nt: int
    ) -> None:
        self.lanes = lanes
        self.weights = weights
        self.schedulers = schedulers
        self.nt = nt
        self.phase = 0
        self.gradients = 0
        self.running = lanes.all[-1]
        self.holding = False
        self.watch = Watch(weights)
        self.randomness = Randomness(weights.params)
        self.placing = placing(weights)

    @property
    def checking(self) -> bool:
        """Whether only the loss of the next minibatch is evaluated."""
        return self.holding or self.phase >= self.nt

    def run(self, closures: Sequence[Closure], active: Sequence[int]) -> dict[int, list[Any]]:
        """Run lanes over some minibatches, with the same random numbers; the model stays as it is.

        Args:
            closures: one per minibatch.
            active: numbers of the lanes that run in this cycle.

        Returns:
            The values of the closures, by the number of the lane, if it took any.
        """
        start, values = self.phase, {}
        checked, trains = self.lanes.checked(active), closures[: max(self.nt - start, 0)]
        taken = {number: closures if number in checked else trains for number in active}
        if start == 0:
            self._begin(active)
        schedules = Schedules(self.schedulers)
        draws = [self.randomness.state()]  # before each minibatch, and after the last
        inside: Lane | None = None
        try:
            for number in (k for k in active if taken[k]):
                inside, self.running = None, self.lanes.all[number]
                self.placing.enter(self.running.copy)
                inside = self.running
                values[number] = self._pass(inside, taken[number], start, draws, schedules)
            self._hold(trains, draws)
        except BaseException:
            self._lose(inside, schedules)
            raise
        finally:
            self.holding = False
            self.weights.clear_gradients()
            self.placing.leave()
            torch.clear_autocast_cache()
            self.randomness.set(draws[-1])
        self.phase = start + len(closures)
        return values

    def grow(self, params: list[Tensor]) -> None:
        """Make room for parameters that the optimizers have just got."""
        weights = self.weights
        before = len(weights.params)
        had, has = len(self.lanes.all[0].copy), len(weights.copy())
        if had != has:
            raise ValueError(
                f"model must have the buffers that it was built with, got {has - had} more: build "
                "a new guard"
            )
        weights.params += params
        weights.clear_gradients()  # theirs may be left from before
        best, aside = self.lanes.best, self.lanes.aside
        copies = [lane.copy for lane in self.lanes.all]
        copies += [] if best is None else [best.copy]
        for copy in copies if aside is None else [*copies, aside]:
            copy[before:before] = weights.copy()[before : before + len(params)]
        for lane in self.lanes.all:
            lane.grow()
        if best is not None and best.memory is not None:
            best.memory.options.append(self.lanes.all[-1].inner.remember().options[-1])
        self.randomness = Randomness(weights.params)
        self.placing = placing(weights)

    def _begin(self, active: Sequence[int]) -> None:
        self.gradients = 0
        self.placing.begin()
        if self.lanes.best is not None:
            self.lanes.best.begin(self.weights)
        for number in active:
            lane = self.lanes.all[number]
            lane.begin()
            if self.lanes.begins_at_x(number):  # lines 10 and 11: y <- x, z <- x
                self.weights.copy_to(lane.copy, self.lanes.aside)

    def _pass(
        self,
        lane: Lane,
        closures: Sequence[Closure],
        start: int,
        draws: list[Any],
        schedules: Schedules,
    ) -> list[Any]:
        """The lane in the model takes its minibatches; the first one to do so makes the draws."""
        values = []
        for k, closure in enumerate(closures):
            self.phase = start + k
            if not lane.lost:
                self.randomness.set(draws[k])
            values.append(self._evaluate(lane, closure, schedules, k))
            if len(draws) == k + 1 and not lane.lost:
                draws.append(self.randomness.state())
            if self.phase == min(self.nt, start + len(closures)) - 1:
                self.placing.save(lane.copy)  # after the last step that trains
        return values

    def _lose(self, inside: Lane | None, schedules: Schedules) -> None:
        """After an error the cycle is lost; x isn't, nor where lanes on own paths are."""
        for number, lane in enumerate(self.lanes.all):
            if self.lanes.begins_at_x(number):
                lane.stop()
            elif lane is inside and not self.checking:
                self.placing.save(lane.copy)
        if inside is not None:
            schedules.undo(inside)
        self.phase = 0

    def _evaluate(self, lane: Lane, closure: Closure, schedules: Schedules, k: int) -> Any:
        """One minibatch in the lane that is in the model; NaN if the lane is lost."""
        torch.clear_autocast_cache()  # or autocast would go on with casts of earlier weights
        if self.checking:
            value = self._unless_lost(lane, lambda: self._check(closure, lane.copy))
            lane.check.append(scalar(value))
            return value
        schedules.before(lane, k)
        value = self._unless_lost(lane, lambda: self._train(closure, lane))
        schedules.after(lane, k)
        lane.train.append(scalar(value))
        return value

    def _train(self, closure: Closure, lane: Lane) -> Any:
        """Lines 13 and 14: an optimizer step of a lane; the closure's value before it."""

        def evaluate() -> Any:
            self.gradients += 1
            return self.watch.call(closure)

        with torch.no_grad(), self.weights.in_place():
            return own(lane.step(evaluate, last=self.phase == self.nt - 1))

    def _unless_lost(self, lane: Lane, evaluate: Callable[[], Any]) -> Any:
        """The value, or NaN where a learned lane raises an error as its numbers aren't finite.

        It is out of the cycle then. Were the error passed on, it would come again in every cycle,
        and the fallback would never get on.
        """
        if not lane.lost:
            try:
                return evaluate()
            except Exception as error:
                if lane.name == "fallback" or not self.weights.have_diverged():
                    raise
                self.watch.tell(error, lane.inner.optimizer)
                lane.lose()
        return torch.full((), torch.nan, device=local(self.weights.params[0]).device)

    def _check(self, closure: Closure, copy: Copy) -> Any:
        """The closure's value at what is in the model, whose ``copy`` it leaves as it was."""
        value = own(forward_only(closure))
        self.weights.copy_buffers_from(self.weights.buffers_of(copy))
        return value

    def _hold(self, closures: Sequence[Closure], draws: Sequence[Any]) -> None:
        """The losses of b, with the same random numbers, if the ratchet asks for them."""
        best = self.lanes.watched
        if best is None or not closures:
            return
        self.holding = True
        self.placing.enter(best.copy)
        for k, closure in enumerate(closures):
            self.randomness.set(draws[k])
            torch.clear_autocast_cache()
            best.losses.append(scalar(self._check(closure, best.copy)))

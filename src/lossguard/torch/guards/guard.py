"""What the guards have in common: how they take lanes through minibatches."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lossguard.torch import arguments
from lossguard.torch.arguments import Closure, scalar
from lossguard.torch.guards import saving
from lossguard.torch.guards.decision import Decision, Seen
from lossguard.torch.guards.face import Face
from lossguard.torch.guards.lane import Lane
from lossguard.torch.guards.relay import Relay
from lossguard.torch.guards.weights import Beside
from lossguard.torch.process import modes_kept
from lossguard.torch.ranks import mean_of_ranks, several
from lossguard.torch.tensors import stacked
from lossguard.validation import check_part


class Guard(Face):
    """An optimizer that runs lanes, of which the live one is what the model is.

    A cycle is nt minibatches on which lanes step. Where there is a ``check``, they are compared on
    nc of its minibatches then.
    """

    forgives = True
    """Whether a gradient with a number that isn't finite counts as 0."""

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        lanes: Mapping[str, str],
        model: nn.Module | None,
        nt: int,
        check: Callable[[int], Tensor] | None = None,
        nc: int = 0,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        """The first optimizer's groups are the guard's. The first lane is live."""
        arguments.check_functions(callback=callback)
        super().__init__(optimizers, model, nt)
        self.check, self.nc = check, nc
        self.checked = 0
        self.process_group, self.callback = process_group, callback
        self._lanes = {
            name: Lane(name, self._inners[of], self._weights, forgives=self.forgives)
            for name, of in lanes.items()
        }
        self._leader = self._weights.holder = next(iter(self._lanes.values()))

    def _begin(self) -> list[Lane]:
        """The lanes that run in the cycle beside the live one, where they start from."""
        return []

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        """Decide, by what the lanes that ran have shown; call ``_lead`` to have another lane."""
        raise NotImplementedError

    def _lead(self, lane: Lane) -> None:
        """Have another lane in the model from now on."""
        if lane is not self._leader:
            params = lane.values[: len(self._weights.params)]
            self._weights.jumped |= not all(map(torch.equal, params, self._weights.live()))
            lane.go_live()
            self._leader = lane

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one minibatch; returns the loss of the live lane before its step.

        Args:
            closure: evaluates the loss, calls ``backward`` and returns the loss; called once for
                each lane that runs, the live one last, after gradients were cleared.
        """
        closure = arguments.checked(closure)
        with closing(self._loop()) as lanes:
            *_, value = [self._run(lane, closure) for lane in lanes]
        return value.detach().clone() if isinstance(value, Tensor) else value

    def lanes(self) -> Generator[Lane, None, None]:
        """The lanes that run on this minibatch, in the model one by one, the live one last.

        Where bodies are more than a closure takes: clipping, accumulation, scaling.

            for lane in guard.lanes():
                loss = loss_fn(model(x), t)
                loss.backward()
                clip(model.parameters())
                lane.step(loss)

        A loop that is left before the last lane has stepped doesn't count. Hooks that are
        registered for steps of the guard are called by ``step`` alone.

        Raises:
            ValueError: if there are gradients before it, or the body steps but by ``lane.step``.
        """
        return self.itself._loop()

    def _loop(self) -> Generator[Lane, None, None]:
        """``lanes``, of the guard itself."""
        draws, beside = self._open()
        order = self._order
        try:
            for lane in order:
                self._randomness.set(draws)
                self._weights.reset_gradients(beside)
                lane.enter()
                yield lane
                if self._order is not order:
                    raise ValueError("load_state_dict must be called between minibatches")
                if not lane.stepped:
                    raise ValueError("the body of guard.lanes() must call lane.step(loss)")
                self._check_rates()
                lane.leave(keep=True)
        except BaseException as error:
            if self._order is not order:  # closed late, while another loop is under way
                raise
            if not (isinstance(error, GeneratorExit) and self._leader.stepped):
                self._undo(draws)
                self._weights.reset_gradients(beside)
                raise
            self._leader.leave(keep=True)  # a loop that was left after the last step
        try:
            self._close()
        except BaseException:
            self._undo(draws)
            self._weights.reset_gradients(beside)
            raise
        self._tell()

    def _open(self) -> tuple[list[Tensor], Beside]:
        """Before a minibatch: random state, and gradients, that each lane starts from."""
        draws = self._randomness.state()
        self._undo(draws)  # a loop that was left, whose generator lives on
        optimizers = [inner.optimizer for inner in self._inners.values()]
        arguments.check_loop(optimizers, self._weights.params)
        self._rates.apply()
        for inner in self._inners.values():
            inner.note_rates()
        beside = self._weights.gradients_beside()
        if self.phase == 0:
            for lane in self._lanes.values():
                lane.begin()
            self._others = self._begin()
            self._shared = self._weights.note_shared() if self._alike else []
        self._order = [*self._others, self._leader]
        for lane in self._order:
            lane.begun = lane.stepped = False
        return draws, beside

    def _run(self, lane: Lane, closure: Closure) -> Any:
        """The value of the closure, after a step."""
        try:
            with torch.enable_grad():
                value = closure()
        except Exception as error:
            return lane.note(lost_loss(self, lane, error))
        lane.step(value)
        return value

    def _undo(self, draws: list[Tensor]) -> None:
        """After an error the minibatch doesn't count; if a step was begun, nor does the cycle."""
        if not self._order:
            return
        order, self._order = self._order, []
        inside = self._weights.holder
        inside.leave(keep=inside.stepped)
        self._leader.go_live(keep=inside.stepped)
        self._randomness.set(draws)
        if self.phase == self.nt or any(lane.begun or lane.stepped for lane in order):
            self.phase = 0
            if not self._weights.is_finite(self._weights.live()):
                self._leader.go_back()

    def _close(self) -> None:
        """After a minibatch, on which all lanes have stepped."""
        self.phase += 1
        self._opt_called = True  # or schedulers on it warn that nobody calls ``step``
        first = self.phase < min(2, self.nt)
        for lane in [one for one in self._order if not one.inner.noted]:
            lane.inner.note_copies(lane.memory(), self._leader.before, lane.point, first=first)
        if self._alike:
            self._alike = False
            arguments.compare([lane.losses[0] for lane in self._order])
            arguments.warn_if_written(self._shared)
        if self.phase == self.nt:
            self.history.append(self._decide())
            self.phase, self.steps = 0, self.steps + self.nt
        self._order = []

    def _decide(self) -> Decision:
        if self.check is not None:
            _measure(self, self.check)
        seen = _agreed([self._leader, *self._others], self.process_group)
        decision = self._settle(seen)._replace(jumped=self._weights.jumped)
        self._weights.jumped = False
        return decision

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the rest of the run depends on, at any point of a cycle.

        Loading it goes on bit by bit, but for the global random state, which is the program's.
        """
        return saving.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of a guard that was built in the same way; before the first step,
        from that of an optimizer alone. Load a schedule into a scheduler of the guard.

        Raises:
            ValueError: if it wasn't. This one is as it was before, then.
        """
        saving.load(self.itself, state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def _measure(guard: Guard, check: Callable[[int], Tensor]) -> None:
    """The losses on the next check minibatches, of all lanes that ran."""
    draws = guard._randomness.state()
    for lane in guard._order:
        guard._randomness.set(draws)
        lane.checks = []
        lane.enter("eval")
        try:
            with torch.no_grad(), modes_kept(guard._weights.model):
                for k in range(guard.checked, guard.checked + guard.nc):
                    lane.checks.append(_checked(guard, lane, check, k))
        finally:
            lane.leave(keep=False)
    guard.checked += guard.nc


def _checked(guard: Guard, lane: Lane, check: Callable[[int], Tensor], k: int) -> Tensor:
    try:
        value = check(k)
    except Exception as error:
        value = lost_loss(guard, lane, error)
    return scalar(value, "check must return one number")


def lost_loss(guard: Guard, lane: Lane, error: Exception) -> Tensor:
    """NaN for the loss of a lane that raises because its numbers aren't finite, with a warning.

    Such an error would come again in every cycle. Any other is passed on, and so are the fallback's
    and, of several ranks, all: the others would not know of it.
    """
    trusted = lane.inner is guard._inners.get("fallback")
    if trusted or several(guard.process_group) or not lane.weights.have_diverged():
        raise error
    warnings.warn(
        f"{lane} has numbers that aren't finite and raised {type(error).__name__}: such "
        "minibatches count as lost for it",
        RuntimeWarning,
        stacklevel=2,
    )
    return scalar(torch.nan)


def _agreed(ran: Sequence[Lane], group: distributed.ProcessGroup | None) -> dict[str, Seen]:
    """What the lanes have shown, on all ranks; a memory that isn't finite is lost."""
    losses = stacked([loss for lane in ran for loss in (*lane.losses, *lane.checks)])
    rows = [
        [*told, not lane.weights.is_finite(lane.point), not lane.inner.is_finite(lane.memory())]
        for lane, told in zip(ran, losses.reshape(len(ran), -1).tolist(), strict=True)
    ]
    agreed = mean_of_ranks(torch.tensor(rows, dtype=torch.float64, device="cpu"), group)
    seen = {}
    for lane, (*told, broken, lost) in zip(ran, agreed.tolist(), strict=True):
        nt = len(lane.losses)
        seen[lane.name] = Seen(told[:nt], told[nt:], finite=broken == 0)  # on any rank
        if lost > 0:
            lane.forget()
    return seen


class GuardOfTwo(Guard):
    """A relay at x, of learned lane y and fallback lane z, beside s, the fallback's own run."""

    remembered = ("_relay.state", "_relay.z.warm_up")

    def __init__(
        self,
        learned: Optimizer,
        fallback: Optimizer,
        *,
        model: nn.Module | None,
        nt: int = 10,
        share: float = 0.05,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        share = check_part("share", share)
        optimizers = {"fallback": fallback, "learned": learned}
        lanes = {"z": "fallback", "y": "learned", "s": "fallback"}
        super().__init__(
            optimizers, lanes, model, nt, process_group=process_group, callback=callback
        )
        z, y, s = self._lanes.values()
        self._relay = Relay(z, y, s, self.nt, share)

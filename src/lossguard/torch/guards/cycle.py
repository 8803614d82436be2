"""What the guards have in common: how they take lanes through the minibatches of a cycle.

A cycle is nt minibatches on which lanes step. Where there is a ``check``, they are compared on nc
of its minibatches then.
"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lossguard.torch import arguments
from lossguard.torch.arguments import Closure, scalar
from lossguard.torch.distributed import mean_of_ranks, several
from lossguard.torch.guards import saving
from lossguard.torch.guards.decision import Decision, Seen
from lossguard.torch.guards.lane import Lane, Live
from lossguard.torch.process import Randomness, modes_kept
from lossguard.torch.rates import PARAMS, SETTINGS, Rates, group_copy
from lossguard.torch.tensors import leaves, stacked
from lossguard.validation import check_count, named

Module = nn.Module | None | EllipsisType
"""What a guard takes as ``model``; it refuses ``...``, which stands where none is given."""


class Guard(arguments.Uncopied, Optimizer):
    """An optimizer that runs lanes, of which the live one is what the model is.

    Attributes:
        nt, nc: train and check minibatches per cycle; ``checked``: check minibatches so far.
        phase: minibatches seen of this cycle; 0 between cycles.
        steps: optimizer steps of the live lane in all cycles so far.
        history: the last 1,000 decisions since it was built; they aren't saved.
    """

    forgives = True
    """Whether a gradient with a number that isn't finite counts as 0."""
    remembered: tuple[str, ...] = ("phase", "steps", "checked")
    """What is saved of it, by the names of its attributes: numbers, tuples and lists of them."""
    _opt_called: bool

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        lanes: Mapping[str, str],
        model: Module,
        nt: int,
        check: Callable[[int], Tensor] | None = None,
        nc: int = 0,
        process_group: distributed.ProcessGroup | None = None,
        callback: Callable[[Decision], object] | None = None,
    ) -> None:
        """The first optimizer's groups are the guard's. The first lane is live."""
        arguments.check_functions(callback=callback)
        params = arguments.check_optimizers(optimizers)
        module = arguments.check_model(model, params)
        self.nt, self.nc = check_count("nt", nt), nc
        self.check, self.process_group, self.callback = check, process_group, callback
        self.phase = self.steps = self.checked = 0
        self.history: deque[Decision] = deque(maxlen=1000)
        first = next(iter(optimizers.values()))
        super().__init__([group_copy(group) for group in first.param_groups], dict(first.defaults))
        self.state.update({p: {} for p in params})  # else checkpointing would step to make some
        self._optimizers = dict(optimizers)
        self._rates = Rates(self.param_groups, list(optimizers.values()))
        self._randomness = Randomness(params)
        self._live = Live(params, module)
        self._lanes: dict[str, Lane] = {}
        for name, of in lanes.items():
            own = all(lane.optimizer is not optimizers[of] for lane in self._lanes.values())
            self._lanes[name] = Lane(
                name, optimizers[of], self._live, self._rates, first=own, forgives=self.forgives
            )
        self._leader = self._live.holder = next(iter(self._lanes.values()))
        self._others: list[Lane] = []
        """Those that run beside the leader in this cycle."""
        self._order: list[Lane] = []
        """All that run on the minibatch that is under way."""
        ours = set(params)
        self._beside = [p for p in module.parameters() if p not in ours] if module else []
        """Parameters of the model that no lane has."""
        self._start: tuple[list[Tensor], list[Tensor | None]] = [], []
        """Random state, and the gradients of those, with which each lane starts."""
        self._alike = True
        """Whether the next minibatch is the first, on which all lanes are at one point."""
        self._versions: list[int] = []
        """How often each that no lane has had been written to before it."""
        arguments.refuse_steps_beside(self)

    @property
    def last_decision(self) -> Decision | None:
        """That of the last cycle."""
        return self.history[-1] if self.history else None

    @property
    def itself(self) -> Any:
        """The guard, also beneath what Lightning makes of it: that has a copy of its attributes."""
        return vars(self).get("_optimizer", self)

    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore
        """Take one minibatch; returns the loss of the live lane before its step.

        Args:
            closure: evaluates the loss, calls ``backward`` and returns the loss; called once for
                each lane that runs, the live one last, after gradients were cleared.
        """
        closure = arguments.checked(closure)
        with closing(self._loop()) as lanes:
            *_, value = [_evaluate(self, lane, closure) for lane in lanes]
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

    def eval(self) -> None:
        """Have the model be what an optimizer with ``train()`` and ``eval()`` evaluates."""
        self.check_between("eval")
        self._leader.enter("eval")

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the rest of the run depends on, at any point of a cycle.

        Loading it goes on bit by bit, but for the global random state, which is the program's.
        """
        return _save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of a guard that was built in the same way; before the first step,
        from that of an optimizer alone. Load a schedule into a scheduler of the guard.

        Raises:
            ValueError: if it wasn't; parameters and memory are as they were before, then.
        """
        _load(self.itself, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, except when the guard is built."""
        if hasattr(self, "_live"):
            raise ValueError(
                "parameters must be in the optimizers when the guard is built, got others later: "
                "build another guard"
            )
        super().add_param_group(param_group)

    def check_between(self, call: str) -> None:
        if self._order:
            raise ValueError(
                f"{call} must be called between minibatches, got a call within one (or after a "
                "loop that was left: delete its guard.lanes())"
            )

    def _begin(self) -> list[Lane]:
        """The lanes that run in the cycle beside the live one, where they start from."""
        return []

    def _settle(self, seen: Mapping[str, Seen]) -> Decision:
        """Decide, by what the lanes that ran have shown; call ``_lead`` to have another lane."""
        raise NotImplementedError

    def _lead(self, lane: Lane) -> None:
        """Have another lane in the model from now on."""
        if lane is not self._leader:
            self._live.note_jump(lane.point)
            lane.enter()
            self._leader = lane

    def _loop(self) -> Generator[Lane, None, None]:
        """``lanes``, of the guard itself."""
        order = _open(self)
        try:
            for lane in order:
                _restore(self)
                lane.enter()
                yield lane
                if self._order is not order:
                    raise ValueError("load_state_dict must be called between minibatches")
                if not lane.stepped:
                    raise ValueError("the body of guard.lanes() must call lane.step(loss)")
                self._rates.check()
                lane.leave(keep=True)
        except BaseException as error:
            if self._order is not order:  # closed late, while another loop is under way
                raise
            if not (isinstance(error, GeneratorExit) and self._leader.stepped):
                _undo(self)
                raise
            self._leader.leave(keep=True)  # a loop that was left after the last step
        try:
            _close(self)
        except BaseException:
            _undo(self)
            raise
        if self.phase == 0 and self.callback is not None:
            self.callback(self.history[-1])


def _open(guard: Guard) -> list[Lane]:
    """Begin a minibatch; the lanes that run on it."""
    if guard._order:  # a loop that was left, whose generator lives on
        _undo(guard)
    arguments.check_loop(guard._optimizers.values(), guard._live.params)
    guard._rates.apply()
    grads = [None if p.grad is None else p.grad.clone() for p in guard._beside]
    guard._start = guard._randomness.state(), grads
    if guard.phase == 0:
        for lane in guard._lanes.values():
            lane.begin()
        guard._others = guard._begin()
    if guard._alike:
        guard._versions = [p._version for p in guard._beside]
    guard._order = [*guard._others, guard._leader]
    for lane in guard._order:
        lane.prepare()
    return guard._order


def _restore(guard: Guard) -> None:
    """Random state, and gradients that are no lane's, as each lane starts with them."""
    draws, grads = guard._start
    guard._randomness.set(draws)
    for p, grad in zip(guard._beside, grads, strict=True):
        p.grad = None if grad is None else grad.clone()


def _undo(guard: Guard) -> None:
    """After an error the minibatch doesn't count; if a step was begun, nor does the cycle."""
    order, guard._order = guard._order, []
    inside = guard._live.holder
    inside.leave(keep=inside.stepped)
    guard._leader.enter(keep=inside.stepped)
    _restore(guard)
    if guard.phase == guard.nt or any(lane.begun or lane.stepped for lane in order):
        guard.phase = 0
        if not guard._live.are_finite(guard._live.tensors()):
            guard._leader.go_back()


def _close(guard: Guard) -> None:
    """After a minibatch, on which all lanes have stepped."""
    guard.phase += 1
    guard._opt_called = True  # or schedulers on it warn that nobody calls ``step``
    if guard._alike:
        guard._alike = False
        arguments.compare([lane.losses[0] for lane in guard._order])
        arguments.warn_if_written(guard._beside, guard._versions)
    if guard.phase == guard.nt:
        if guard.check is not None:
            _measure(guard, guard.check)
        decision = guard._settle(_seen(guard))
        guard.history.append(decision._replace(jumped=guard._live.has_jumped()))
        guard.phase, guard.steps = 0, guard.steps + guard.nt
    guard._order = []


def _measure(guard: Guard, check: Callable[[int], Tensor]) -> None:
    """The losses on the next check minibatches, of all lanes that ran."""
    draws = guard._randomness.state()
    for lane in guard._order:
        guard._randomness.set(draws)
        lane.enter("eval")
        try:
            with torch.no_grad(), modes_kept(guard._live.model):
                for k in range(guard.checked, guard.checked + guard.nc):
                    try:
                        value = check(k)
                    except Exception as error:
                        value = _lost_loss(guard, lane, error)
                    lane.checks.append(scalar(value, "check must return one number"))
        finally:
            lane.leave(keep=False)
    guard.checked += guard.nc


def _evaluate(guard: Guard, lane: Lane, closure: Closure) -> Any:
    """The value of the closure, after a step."""
    try:
        with torch.enable_grad():
            value = closure()
    except Exception as error:
        return lane.note(_lost_loss(guard, lane, error))
    lane.step(value)
    return value


def _lost_loss(guard: Guard, lane: Lane, error: Exception) -> Tensor:
    """NaN for the loss of a lane that raises because its numbers aren't finite, with a warning.

    Such an error would come again in every cycle. Any other is passed on, and so are the fallback's
    and, of several ranks, all: the others would not know of it.
    """
    trusted = lane.optimizer is guard._optimizers.get("fallback")
    if trusted or several(guard.process_group) or not guard._live.have_diverged():
        raise error
    warnings.warn(
        f"{lane} has numbers that aren't finite and raised {type(error).__name__}: such "
        "minibatches count as lost for it",
        RuntimeWarning,
        stacklevel=2,
    )
    return scalar(torch.nan)


def _seen(guard: Guard) -> dict[str, Seen]:
    """What the lanes that ran have shown, on all ranks; a memory that isn't finite is lost."""
    ran = [guard._leader, *guard._others]
    losses = stacked([loss for lane in ran for loss in (*lane.losses, *lane.checks)])
    rows = [
        [*told, not guard._live.are_finite(lane.point), not lane.memory.is_finite()]
        for lane, told in zip(ran, losses.reshape(len(ran), -1).tolist(), strict=True)
    ]
    agreed = mean_of_ranks(
        torch.tensor(rows, dtype=torch.float64, device="cpu"), guard.process_group
    )
    seen = {}
    for lane, (*told, broken, lost) in zip(ran, agreed.tolist(), strict=True):
        nt = len(lane.losses)
        seen[lane.name] = Seen(told[:nt], told[nt:], finite=broken == 0)  # on any rank
        if lost > 0:
            lane.forget()
    return seen


def _save(guard: Guard) -> dict[str, Any]:
    guard.check_between("state_dict")
    guard._rates.apply()  # what is set, but not carried over, would be lost
    draws = guard._randomness.state()
    kept = {name: lane.kept(within=guard.phase > 0) for name, lane in guard._lanes.items()}
    guard._randomness.set(draws)  # of which steps that some lanes take to be saved may draw
    rest = {
        "kind": _kind(guard),
        "leader": guard._leader.name,
        "running": [lane.name for lane in guard._others],
        "numbers": list(leaves([getattr(guard, name) for name in guard.remembered])),
        "rates": guard._rates.saved(),
    }
    return saving.packed(guard, guard._live.params, kept, rest)


def _load(guard: Guard, state_dict: dict[str, Any]) -> None:
    params, lanes = guard._live.params, guard._lanes
    state, groups, rest = saving.opened(state_dict, params[0])
    if groups and not rest and guard._alike:
        _take_over(guard, state_dict)
        return
    if rest.get("kind") != _kind(guard):
        got = rest.get("kind") or (
            f"one with the keys {list(state_dict)} (an optimizer's own is taken over before the "
            "first step)"
        )
        raise ValueError(f"state_dict must be of a guard with {_kind(guard)}, got {got}")
    kept = {name: saving.unpacked(lane, params, state, rest) for name, lane in lanes.items()}
    leader, *others = (lanes[name] for name in (rest["leader"], *rest["running"]))
    before = [getattr(guard, name) for name in guard.remembered]
    numbers = saving.filled(before, rest["numbers"], type(guard).__name__)
    pairs = zip(guard._rates.saved(), rest["rates"], strict=True)
    rates = [(base, given, settings) for _, (base, given, settings) in pairs]
    for name, one in kept.items():  # from here on nothing may fail
        lanes[name].go_on(one)
    for group, entries in zip(guard.param_groups, groups, strict=True):
        group.update({key: value for key, value in entries.items() if key != "params"})
    guard._rates.go_on(rates)
    for name, number in zip(guard.remembered, numbers, strict=True):
        setattr(guard, name, number)
    guard._leader, guard._others, guard._order = leader, others, []
    leader.hold()
    guard._alike = guard.phase == guard.steps == 0  # as a trainer loads what it has just saved


def _kind(guard: Guard) -> dict[str, Any]:
    """What two guards must have in common to load from each other."""
    optimizers = [
        [type(one).__name__, *(len(group["params"]) for group in one.param_groups)]
        for one in guard._optimizers.values()
    ]
    lanes = {"lanes": list(guard._lanes), "optimizers": optimizers}
    return {"kind": type(guard).__name__, **lanes, "nt": guard.nt, "nc": guard.nc}


def _take_over(guard: Guard, state_dict: dict[str, Any]) -> None:
    """Have the live lane go on from an optimizer's own state, with all rates in proportion."""
    entries = state_dict["state"].values()
    if entries and not any(entries):
        raise ValueError(
            "state_dict must hold what is known of each parameter, got nothing of any (get and set "
            "it without flatten_optimizer_state_dict)"
        )
    optimizer = guard._leader.optimizer
    groups = [dict(group) for group in optimizer.param_groups]
    for was, now in zip(groups, state_dict["param_groups"], strict=False):
        if now.get("maximize"):
            raise ValueError("state_dict must be of a run that minimizes, got maximize=True")
        if lacking := was.keys() - now.keys():
            raise ValueError(
                f"state_dict must be of {named(type(optimizer))}, which goes on with it, or of "
                f"{named(type(guard))}, got one without {min(lacking)}"
            )
    optimizer.load_state_dict(state_dict)
    rates = [group.get("lr") for group in optimizer.param_groups]
    for was, now, ours in zip(groups, optimizer.param_groups, guard.param_groups, strict=True):
        ours.update({key: now[key] for key in now.keys() & SETTINGS - PARAMS - {"lr"}})
        now.update({"lr": was["lr"]} if "lr" in was else {})
    guard._rates.note()
    for ours, rate in zip(guard.param_groups, rates, strict=True):
        ours.update({} if rate is None else {"lr": float(rate)})
    guard._rates.apply()
    guard._alike = False

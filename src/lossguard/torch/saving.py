"""A guard's ``state_dict``, in the layout of any optimizer's.

    state           by parameter: x.value, the model's; for each lane LANE.value, LANE.memory.KEY,
                    within a cycle LANE.before; fresh.K.memory.KEY of optimizer K when it was built:
                    plain tensors, or DTensors under fully_shard
    param_groups    the guard's; the first has numbers and buffers under ``guard``

So it is what torch.distributed.checkpoint saves under the names of parameters, and reshards.
"""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lossguard.torch.memory import Inner, Memory
from lossguard.torch.parts import Part, pack, unpack
from lossguard.torch.tensors import clone, read
from lossguard.torch.weights import Weights, transfer

Saved = dict[str, Any]
NUMBERS = ("nt", "nc", "phase", "steps")


class Saving(Optimizer):
    """Saves and loads a guard: between calls, at any point of a cycle.

    What it saves shares nothing with the guard. Loading goes on bit by bit: parameters and buffers
    included, but not the global random state, which is the program's.
    """

    _lanes: Mapping[str, Any]
    _inners: list[Inner]
    _leader: Any
    _others: list[Any]
    _weights: Weights
    _rates: Any
    _filled: bool

    def state_dict(self) -> Saved:
        """A copy of all that the rest of the run depends on."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._rates.apply()  # what is set, but not carried over, would be lost
        state, rest = pack(self._weights.params, self._parts(within=self._get("phase") > 0))
        numbers = {
            "kind": type(self).__name__,
            "lanes": list(self._lanes),
            **{name: self._get(name) for name in NUMBERS},
            "leader": self._leader.name,
            "running": [lane.name for lane in self._others],
            "losses": [[read(lane.losses), read(lane.checks)] for lane in self._lanes.values()],
            "lost": [lane.lost for lane in self._lanes.values()],
            "scalers": [_scale(lane.scaler) for lane in self._lanes.values()],
            "blank": [not lane.memory().state for lane in self._lanes.values()],
            "own": [sorted(inner.own) for inner in self._inners],
            "options": [clone(inner.options()) for inner in self._inners],
            "rates": self._rates.numbers(),
            "rest": rest,
            "rules": self._numbers(),
        }
        index = iter(range(len(self._weights.params)))
        groups: list[Saved] = [
            {**clone({k: v for k, v in group.items() if k not in ("params", "guard")}),
             "params": [next(index) for _ in group["params"]]}
            for group in self.param_groups
        ]  # fmt: skip
        groups[0]["guard"] = numbers
        saved: Saved = {"state": state, "param_groups": groups}
        for hook in self._optimizer_state_dict_post_hooks.values():
            saved = hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: Saved) -> None:
        """Go on from a saved state.

        Args:
            state_dict: of a guard that was built in the same way.

        Raises:
            ValueError: if it wasn't. The guard is as it was before, then.
        """
        saved = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = hook(self, saved) or saved
        groups = saved.get("param_groups", [])
        numbers = groups[0].get("guard", {}) if groups else {}
        self._check_kind(numbers, list(saved))
        keys = [key for group in groups for key in group["params"]]
        params = self._weights.params
        if len(keys) != len(params) or len(groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict must be of {len(params)} parameters in {len(self.param_groups)} "
                f"groups, got one of {len(keys)} in {len(groups)}"
            )
        state = [saved["state"].get(key, {}) for key in keys]
        within = numbers["phase"] > 0
        parts = unpack(params, self._parts(within=within), state, numbers["rest"])
        try:
            rules = self._read(numbers["rules"])
        except (KeyError, TypeError, ValueError) as error:
            kind = type(self).__name__
            raise ValueError(f"state_dict must have the numbers of a {kind}, got others") from error
        self._take(numbers, groups, parts)
        self._set_rules(rules)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> Saved:
        raise ValueError(
            "a guard can't be copied or pickled, as the copy's optimizers would have no model: "
            "build another one, and load state_dict() into it"
        )

    def _take(self, numbers: Saved, groups: list[Saved], parts: list[Part]) -> None:
        """Put everything in place; nothing here may fail."""
        lanes, (x, *theirs) = list(self._lanes.values()), parts
        for inner, own, fresh in zip(
            self._inners, numbers["own"], theirs[len(lanes) :], strict=True
        ):
            inner.own, inner.fresh = set(own), Memory(fresh.memory, fresh.options)
        self._weights.reshard()
        transfer(self._weights.live(), x.copies["value"])
        of_lanes = (numbers[name] for name in ("blank", "losses", "lost", "scalers"))
        for lane, part, blank, losses, lost, scale in zip(
            lanes, theirs[: len(lanes)], *of_lanes, strict=True
        ):
            transfer(lane.values, part.copies["value"])
            lane.before = part.copies.get("before")
            lane.remember(Memory({} if blank else part.memory, part.options))
            lane.set_losses(*losses, lost=lost)
            if lane.scaler is not None and scale:
                lane.scaler.load_state_dict(dict(scale))
            lane.live = lane.name == numbers["leader"]
        self._leader = self._lanes[numbers["leader"]]
        self._others = [self._lanes[name] for name in numbers["running"]]
        for inner, options in zip(self._inners, numbers["options"], strict=True):
            for group, entries in zip(inner.optimizer.param_groups, options, strict=True):
                group.update({k: v for k, v in clone(entries).items() if k not in inner.own})
        for group, entries in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in entries.items() if k not in ("params", "guard")})
        self._rates.load(numbers["rates"])
        for name in ("phase", "steps"):
            setattr(self, name, numbers[name])
        self._filled = False
        self.state.update({p: {} for p in self._weights.params})

    def _parts(self, *, within: bool) -> list[Part]:
        """The model, the lanes and the fresh memories, as they are."""
        for lane in self._lanes.values():
            if lane.memory().state:
                lane.inner.note(lane.memory())
        model = Part("x", {"value": self._weights.live()}, {}, [], False)
        lanes = [
            Part(
                lane.name,
                {"value": lane.values} | ({"before": lane.before or lane.values} if within else {}),
                lane.memory().state or lane.inner.zeros(),
                lane.memory().options,
                _capturable(lane.inner),
            )
            for lane in self._lanes.values()
        ]
        fresh = [
            Part(f"fresh.{k}", {}, inner.fresh.state, inner.fresh.options, _capturable(inner))
            for k, inner in enumerate(self._inners)
        ]
        return [model, *lanes, *fresh]

    # What torch.distributed.checkpoint asks of an optimizer that it is to load.

    def _is_asked_to_fill(self) -> bool:
        """Whether there are gradients, and every rate is 0, before the first step."""
        rates = [float(group.get("lr", 1)) for group in self.param_groups]
        return not self.state and not any(rates) and self._weights.have_gradients()

    def _fill(self) -> None:
        """Have every optimizer make its state, by a step that doesn't move."""
        for lane in self._lanes.values():
            lane.fill()
        self._filled = True

    def _check_kind(self, numbers: Saved, keys: list[str]) -> None:
        """Refuse the ``state_dict`` of another optimizer."""
        kind, ours = numbers.get("kind"), type(self).__name__
        if kind != ours:
            theirs = f"a {kind}'s" if kind else f"one with the keys {keys}"
            raise ValueError(f"state_dict must be a {ours}'s, got {theirs}")
        wanted = {"lanes": list(self._lanes), "nt": self._get("nt"), "nc": self._get("nc")}
        got = {name: numbers[name] for name in wanted}
        if got != wanted:
            raise ValueError(f"state_dict must be of a guard with {wanted}, got {got}")

    def _get(self, name: str) -> Any:
        return getattr(self, name)

    def _numbers(self) -> Saved:
        """What the rules know, as plain numbers and lists of them."""
        raise NotImplementedError

    def _read(self, numbers: Saved) -> Any:
        """What ``_numbers`` saved, read."""
        raise NotImplementedError

    def _set_rules(self, rules: Any) -> None:
        """Go on by what ``_read`` has read."""
        raise NotImplementedError


def _scale(scaler: Any) -> Saved | None:
    return None if scaler is None else scaler.state_dict()


def _capturable(inner: Inner) -> bool:
    groups = inner.optimizer.param_groups
    return any(group.get("capturable") or group.get("fused") for group in groups)

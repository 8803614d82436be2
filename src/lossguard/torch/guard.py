"""What the guards have in common as optimizers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.arguments import listed
from lossguard.torch.closures import Closure, checked
from lossguard.torch.decision import Decision
from lossguard.torch.facade import Facade
from lossguard.torch.inner import Inner, params_of
from lossguard.torch.tensors import clone
from lossguard.torch.weights import Weights


class Guard(Facade):
    """A facade of the fallback that keeps a history of decisions, and can be saved.

    Attributes:
        learned: the optimizer that isn't trusted, or several.
        fallback: the one that is.
        history: all decisions.
    """

    def __init__(
        self, learned: Optimizer | Sequence[Optimizer], fallback: Optimizer, weights: Weights
    ) -> None:
        for name, one in (*(("learned", one) for one in listed(learned)), ("fallback", fallback)):
            if isinstance(one, Guard):
                raise ValueError(f"{name} must be no guard itself, got a {type(one).__name__}")
        super().__init__(fallback)
        self.learned = learned
        self.fallback = fallback
        self.history: list[Decision] = []
        self._weights = weights
        self._inners = [Inner(optimizer) for optimizer in (*listed(learned), fallback)]

    @property
    def last_decision(self) -> Decision | None:
        """The last decision: of a whole cycle, or of nt whole steps of the residual guard."""
        return self.history[-1] if self.history else None

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the rest of the run depends on, at any point of a cycle.

        The keys ``state`` and ``param_groups`` are the fallback's, as for any optimizer.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        *learned, fallback = self._inners
        saved = {
            **fallback.state_dict(),
            "learned": [inner.state_dict() for inner in learned],
            "guard": {
                "kind": type(self).__name__,
                "own": [sorted(inner.own) for inner in self._inners],
                "fresh": [inner.state_dict(inner.fresh) for inner in self._inners],
                "history": [decision._asdict() for decision in self.history],
                **self._save(),
            },
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state bit by bit: parameters, buffers and random numbers included.

        Args:
            state_dict: of a guard that was built in the same way.
        """
        saved = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = pre_hook(self, saved) or saved
        self._check_saved(saved)
        state = saved["guard"]
        fallback = {key: value for key, value in saved.items() if key not in ("learned", "guard")}
        for inner, its_state in zip(self._inners, [*saved["learned"], fallback], strict=True):
            inner.load_state_dict(its_state)
        for inner, names, fresh in zip(self._inners, state["own"], state["fresh"], strict=True):
            inner.own = set(names)
            inner.fresh = inner.memory_in(fresh)
        self.history = [Decision(**clone(decision)) for decision in state["history"]]
        self._load(state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_step(self, closure: Closure | None, hint: str = "") -> Closure:
        """The closure of a step; refuse others, and gradients that it has not computed."""
        closure = checked(closure, hint)
        for inner in self._inners:
            count = len(params_of(inner.optimizer))
            if count != len(self._weights.params):
                raise ValueError(
                    "parameters must be added by the guard's add_param_group, got "
                    f"{type(inner.optimizer).__name__} with {count} instead of "
                    f"{len(self._weights.params)}"
                )
        if self._weights.have_gradients():
            raise ValueError(
                "gradients must be computed inside the closure, got some before the step (call "
                "zero_grad before it, and accumulate inside the closure)"
            )
        return closure

    def _save(self) -> dict[str, Any]:
        """A copy of what the guard remembers beside its optimizers and its history."""
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        """Put a copy of what ``_save`` made in place."""
        raise NotImplementedError

    def _check_saved(self, saved: dict[str, Any]) -> None:
        """Refuse the ``state_dict`` of another optimizer."""
        kind, ours = saved.get("guard", {}).get("kind"), type(self).__name__
        if kind != ours:
            theirs = f"a {kind}'s" if kind else f"one with the keys {list(saved)}"
            raise ValueError(f"state_dict must be a {ours}'s, got {theirs}")
        self._weights.check_shapes(saved["guard"]["x"])

    def _add_group(self, param_group: dict[str, Any], learned: Sequence[Optimizer]) -> list[Tensor]:
        """Add parameters to all optimizers, or to none, and return them.

        In ``learned`` they have its own defaults.
        """
        self.fallback.add_param_group(param_group)
        params = list(self.fallback.param_groups[-1]["params"])
        have = [self.fallback]
        try:
            for one in learned:
                one.add_param_group({"params": list(params)})
                have.append(one)
        except BaseException:
            for one in have:
                one.param_groups.pop()
            raise
        return params

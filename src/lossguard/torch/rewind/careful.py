"""What ``Rewind`` does to an optimizer's steps: they are careful ones for a while."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import Group, copied_rate, set_rates
from lossguard.torch.tensors import Number, zero_unsound

JUDGED = 16
"""Calls that are compared with the steps between them, after as many that aren't."""


class CarefulSteps:
    """Hooks of optimizers: rates times ``rewind.scale`` in a step, and no unsound gradients.

    Between steps the rates are those that the user and the schedulers set, so that schedulers of
    every kind go on from their own numbers. Once nobody has the ``Rewind`` they do nothing.

    Attributes:
        broken: whether gradients weren't finite since it was read.
        closed: whether they do nothing any more.

    It warns if in the second ``JUDGED`` calls of ``take`` there are half as many steps or fewer, or
    twice as many or more. In the first a GradScaler may leave some out.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rewind: Any) -> None:
        for hook in [h for one in optimizers for h in one._optimizer_step_pre_hooks.values()]:
            if isinstance(other := getattr(hook, "__self__", None), CarefulSteps):
                other.remove()  # or both would multiply the rates
        self.broken: Number = False
        self.closed, self._begun = False, False
        self._calls, self._steps = 0, dict.fromkeys(map(id, optimizers), 0)
        self._rewind = weakref.ref(rewind)
        self._groups: list[Group] = []
        """Of the optimizer whose step is under way."""
        self._rates: list[float | Tensor] = []
        """Their rates between steps, while it multiplies them."""
        self._hooks = []
        for one in optimizers:
            before = one.register_step_pre_hook(self._before)
            after = one.register_step_post_hook(self._after)
            hooks: Any = one._optimizer_step_post_hooks
            hooks.move_to_end(after.id, last=False)  # before others, which may step a scheduler
            self._hooks += [before, after, one.register_state_dict_post_hook(self._saved)]

    def take(self) -> Number:
        """``broken``, which is read."""
        if self.closed:
            raise ValueError("Rewind must be open, got one that close() or another one has closed")
        self._calls += 1
        if self._calls == JUDGED:
            self._steps = dict.fromkeys(self._steps, 0)
        elif self._calls == 2 * JUDGED:
            most, least = max(self._steps.values()), min(self._steps.values())
            if 2 * most <= JUDGED or least >= 2 * JUDGED:
                warnings.warn(
                    "Rewind.observe must be called once after each optimizer step, got "
                    f"{JUDGED} calls for {most} steps",
                    RuntimeWarning,
                    stacklevel=3,
                )
        broken, self.broken = self.broken, False
        return broken

    def remove(self) -> None:
        self.closed = True
        self._restore()
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        self._restore()  # if the last step raised an error half-way, or calls this one
        rewind = self._rewind()
        if rewind is None:  # a hook that is removed in a step would end PyTorch's loop over them
            self.closed = True
            return None
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "optimizer.step must be called outside of a CUDA graph for Rewind, got a step in "
                "its capture: no hooks run where it is replayed (capture only forward and backward)"
            )
        if not self._begun:
            self._begun = True
            rewind.begin()
        itself, *given = args
        closure: Any = kwargs.get("closure", given[0] if given else None)

        def sound() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._restore()  # there may be no other step, but a checkpoint
                raise
            self._look(optimizer)
            return loss

        if not callable(closure):
            self._look(optimizer)
        elif "closure" in kwargs:
            kwargs = {**kwargs, "closure": sound}
        else:
            args = (itself, sound, *given[1:])
        scale, self._groups = rewind.scale, optimizer.param_groups
        if scale != 1:
            self._rates = [copied_rate(group) for group in self._groups]
            set_rates(self._groups, [rate * scale for rate in self._rates])
        return args, kwargs

    def _look(self, optimizer: Optimizer) -> None:
        """Make gradients 0 that aren't finite; those that a scaler has found it leaves out."""
        if getattr(optimizer, "found_inf", None) is None:
            params = (p for group in optimizer.param_groups for p in group["params"])
            self.broken = _either(self.broken, zero_unsound(params))

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._groups:  # empty after a step that has called another one of its class
            self._steps[id(optimizer)] += 1
        self._restore()

    def _saved(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """The rates of between steps, in a state that is saved within one that may be over."""
        if optimizer.param_groups is self._groups:
            for group, rate in zip(state["param_groups"], self._rates, strict=False):
                group["lr"] = rate

    def _restore(self) -> None:
        set_rates(self._groups, self._rates)
        self._groups, self._rates = [], []


def _either(one: Number, other: Number) -> Number:
    """Whether one of two flags isn't 0; nothing waits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.to(other.device) > 0) | (other > 0)
    plain, rest = (other, one) if isinstance(one, Tensor) else (one, other)
    return plain or rest

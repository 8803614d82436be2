"""What ``Rewind`` does in an optimizer's steps: hooks, so that nothing is wrapped."""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossguard.torch.rates import Group, copied_rate, set_rates
from lossguard.torch.rewind.gradients import Gate, gated
from lossguard.torch.tensors import Number

JUDGED = 16
"""Calls that are compared with the steps between them, after as many that aren't."""


class Steps:
    """Steps at a part of the rate, of gradients that have passed a gate.

    Between steps the rates are those that the user and the schedulers set, so that schedulers of
    every kind go on from their own numbers. Once nobody has the ``Rewind`` the hooks do nothing.

    Attributes:
        gates: of each optimizer.
        begun: whether there was a step.
        scale: what its rates are multiplied by.
        clips: whether gradients are clipped to their usual norm.
        in_use: whether the hooks are there, for a ``Rewind`` that somebody has.

    It warns if in the second ``JUDGED`` calls of ``take`` there are half as many steps or fewer, or
    twice as many or more. In the first a GradScaler may leave some out.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rewind: Any, *, acts: bool) -> None:
        """``rewind.begin`` is called before the first step. If it doesn't act, gradients stay."""
        for hook in [h for one in optimizers for h in one._optimizer_step_pre_hooks.values()]:
            if isinstance(other := getattr(hook, "__self__", None), Steps):
                other.remove()  # or both would multiply the rates
        self.gates = [Gate() for _ in optimizers]
        self.scale, self.clips = 1.0, False
        self._rewind = weakref.ref(rewind)
        self._acts = acts
        self._closed = False
        self.begun = False
        self._calls = 0
        self._taken = [0] * len(optimizers)
        self._seen: list[tuple[Number, Number]] = [(0.0, False)] * len(optimizers)
        """Of the last step of each: the norm, and whether its gradients were left out."""
        self._numbers = {id(one): k for k, one in enumerate(optimizers)}
        self._groups: list[Group] = []
        """Of the optimizer whose step is under way."""
        self._rates: list[float | Tensor] = []
        """Their rates between steps, while they are multiplied."""
        self._hooks = []
        for one in optimizers:
            before = one.register_step_pre_hook(self._before)
            after = one.register_step_post_hook(self._after)
            hooks: Any = one._optimizer_step_post_hooks
            hooks.move_to_end(after.id, last=False)  # before others, which may step a scheduler
            self._hooks += [before, after, one.register_state_dict_post_hook(self._saved)]

    @property
    def in_use(self) -> bool:
        return not self._closed and self._rewind() is not None

    def take(self) -> list[Number]:
        """For each optimizer the norm of its last gradients, and whether they were left out."""
        if self._closed:
            raise ValueError("Rewind must be open, got one that close() or another one has closed")
        self._calls += 1
        if not self.begun and self._calls == JUDGED:  # a GradScaler may leave out the first
            raise ValueError(f"Rewind.observe must follow steps, got {JUDGED} calls and no step")
        if self._calls == JUDGED:
            self._taken = [0] * len(self._taken)
        elif self._calls == 2 * JUDGED:
            self._compare()
        seen = [number for pair in self._seen for number in pair]
        self._seen = [(0.0, False)] * len(self._seen)
        return seen

    def hear(self, norms: Sequence[Sequence[float]]) -> None:
        """Of each call, the norms of the optimizers' gradients."""
        for k, gate in enumerate(self.gates):
            gate.hear([row[k] for row in norms])

    def go_on(self, scale: float, *, clips: bool) -> None:
        self.scale, self.clips = scale, clips

    def become(self, gates: list[Gate], *, begun: bool) -> None:
        """``begun``: or the next step is the first, before which there is a copy."""
        self.gates, self.begun = gates, begun

    def remove(self) -> None:
        self._closed = True
        self._restore()
        for hook in self._hooks:
            hook.remove()

    def _compare(self) -> None:
        most, least = max(self._taken), min(self._taken)
        if 2 * most <= JUDGED or least >= 2 * JUDGED:
            warnings.warn(
                "Rewind.observe must be called once after each optimizer step, got "
                f"{JUDGED} calls for {most} steps",
                RuntimeWarning,
                stacklevel=4,
            )

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        self._restore()  # if the last step raised an error half-way, or calls this one
        rewind = self._rewind()
        if rewind is None:  # a hook that is removed in a step would end PyTorch's loop over them
            return None
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "optimizer.step must be called outside of a CUDA graph for Rewind, got a step in "
                "its capture: no hooks run where it is replayed (capture only forward and backward)"
            )
        if not self.begun:
            self.begun = True
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
        self._groups = optimizer.param_groups
        if self.scale != 1:
            self._rates = [copied_rate(group) for group in self._groups]
            set_rates(self._groups, [rate * self.scale for rate in self._rates])
        return args, kwargs

    def _look(self, optimizer: Optimizer) -> None:
        """At gradients, unless a GradScaler has found some that it leaves out."""
        if self._acts and getattr(optimizer, "found_inf", None) is None:
            number = self._numbers[id(optimizer)]
            gate = self.gates[number]
            params = (p for group in optimizer.param_groups for p in group["params"])
            clip = gate.usual if self.clips else float("inf")
            self._seen[number] = gated(params, gate.limit, clip)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if self._groups:  # empty after a step that has called another one of its class
            self._taken[self._numbers[id(optimizer)]] += 1
        self._restore()

    def _saved(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """The rates of between steps, in a state that is saved within one that may be over."""
        if optimizer.param_groups is self._groups:
            for group, rate in zip(state["param_groups"], self._rates, strict=False):
                group["lr"] = rate

    def _restore(self) -> None:
        set_rates(self._groups, self._rates)
        self._groups, self._rates = [], []

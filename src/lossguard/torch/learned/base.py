"""What the learned optimizers share: weights on every device, memory in float32, no autocast."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lossguard.learned.weights_file import ARCHITECTURES, path_of, read_weights
from lossguard.validation import check_kind


class Learned(Optimizer):
    """A learned optimizer of one architecture; a class below says how it updates parameters.

    Attributes:
        architecture: as files of weights call it.
        wide: the name of a tensor of the weights whose last axis has the hidden units.
        options: what its groups have.
        layers: of hidden units.
    """

    architecture: str
    wide: str
    options: tuple[str, ...]

    def __init__(
        self, params: ParamsT, weights: Mapping[str, Tensor], defaults: dict[str, Any]
    ) -> None:
        check_kind("weights", weights, Mapping, "a dictionary of tensors, or use pretrained()")
        shapes, self.layers = ARCHITECTURES[self.architecture].shapes, 1
        while shapes(1, self.layers + 1).keys() <= weights.keys():
            self.layers += 1
        needed = shapes(1, self.layers)
        if missing := [name for name in needed if name not in weights]:
            raise ValueError(f"weights must hold {', '.join(needed)}, got none of {missing}")
        hidden = weights[self.wide].shape[-1]
        for name, shape in shapes(hidden, self.layers).items():
            if (given := list(weights[name].shape)) != shape:
                raise ValueError(f"weights must have {name} of shape {shape}, got {given}")
        tensors = {name: torch.as_tensor(tensor, device="cpu") for name, tensor in weights.items()}
        self.weights = {name: tensor.detach().float() for name, tensor in tensors.items()}
        self._on: dict[torch.device, dict[str, Tensor]] = {}
        """The weights on each device that has parameters."""
        lr = defaults["lr"]
        plain = lr if isinstance(lr, Tensor) else float(lr)  # NumPy's are not loaded safely
        super().__init__(params, defaults | {"lr": plain})

    @classmethod
    def pretrained(cls, params: ParamsT, name: str | os.PathLike[str]) -> Self:
        """With weights that the package ships, or your own, and the scale of their training.

        Args:
            params: what it is to optimize.
            name: one that ``lossguard list`` shows, or the path of what meta-training left, which
                ends in ``.safetensors``.

        Raises:
            ValueError: if there are none of that name, the file is damaged, or its weights are
                those of another architecture.
            OSError: if it can't be read.
        """
        file = read_weights(path_of(name))
        if file.architecture != cls.architecture:
            raise ValueError(
                f"weights must be an {cls.architecture.upper()}'s for {cls.__name__}, got those of "
                f"an {file.architecture.upper()} (use {file.architecture.upper()}Optimizer)"
            )
        weights = {name: torch.from_numpy(tensor) for name, tensor in file.tensors.items()}
        return cls(params, weights, **file.numbers)  # pyright: ignore - of a class below

    def __getstate__(self) -> dict[str, Any]:
        ours = {"weights": self.weights, "layers": self.layers, "_on": {}}
        return {**super().__getstate__(), **ours}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose own numbers must be in range as well."""
        if isinstance(param_group, dict):  # else torch refuses it
            self._check_numbers(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned: the memory stays in float32.

        Raises:
            ValueError: if it is another optimizer's, or one's with other weights or parameters.
        """
        memory: list[tuple[Tensor, dict[str, Tensor]]] = []
        hook = self.register_load_state_dict_pre_hook(  # after all others, which may change it
            lambda _, given: memory.extend(self._found(given))
        )
        try:
            super().load_state_dict(state_dict)  # which casts it to the dtype of the parameters
        finally:
            hook.remove()
        for p, found in memory:
            self.state[p] = {k: v.to(p.device, copy=True) for k, v in found.items()}

    def _found(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """What a state has of each parameter that it has a memory of."""
        groups, memory = state_dict["param_groups"], []
        given = [index for group in groups for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        if any({*self.options} - group.keys() for group in groups):
            raise ValueError(f"state must be one of {type(self).__name__}, got another optimizer's")
        for index, p in zip(given, params, strict=False):  # torch refuses other numbers of them
            if found := state_dict["state"].get(index):
                self.check_memory(p, found)
                memory.append((p, found))
        return memory

    def check_memory(self, p: Tensor, found: dict[str, Any]) -> None:
        """Refuse a memory of a parameter that isn't of this optimizer with these weights."""
        needed = {name: [*shape] for name, shape in sorted(self._shapes(p).items())}
        got = {name: [*getattr(one, "shape", ())] for name, one in sorted(found.items())}
        if needed != got:
            raise ValueError(
                f"state must be one of {type(self).__name__} with these weights, which "
                f"remembers {needed} of a parameter of shape {list(p.shape)}, got {got}"
            )

    def _memory(self, p: Tensor) -> dict[str, Tensor]:
        """What is remembered of a parameter: zeros on its device at first."""
        if not (state := self.state[p]):
            for name, shape in self._shapes(p).items():
                state[name] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        return state

    def _shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """Those of what is remembered of a parameter."""
        raise NotImplementedError

    def _check_numbers(self, group: dict[str, Any]) -> None:
        """Refuse numbers of a group that are out of range."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step.

        Args:
            closure: evaluates the loss, calls ``backward`` and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        for gradient in [p.grad for p in params if p.grad is not None]:
            self._check(gradient)  # all of them before any parameter is moved
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_device.setdefault(param.device, []).append(param)
            for device, params in by_device.items():
                if device not in self._on:
                    self._on[device] = {k: t.to(device) for k, t in self.weights.items()}
                # Matrix products keep their dtype inside; some kinds of device have no autocast.
                available = torch.amp.is_autocast_available(device.type)
                with torch.autocast(device.type, enabled=False) if available else nullcontext():
                    self._update(params, self._on[device], group)
            if "clock" in group:
                group["clock"] += 1
        return loss

    def _update(
        self, params: list[Tensor], weights: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """Step parameters of one device, which all have gradients."""
        raise NotImplementedError

    def _check(self, gradient: Tensor) -> None:
        if gradient.is_sparse or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else "sparse"
            raise ValueError(
                f"gradients must be real and dense for {type(self).__name__}, got a {kind} one"
            )

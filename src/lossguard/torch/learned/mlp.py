"""The MLP optimizer of Metz et al. (2022) as a ``torch.optim.Optimizer``."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lossguard.learned.mlp_features import AGES, LEAKS, TIMES
from lossguard.learned.weights_file import ARCHITECTURES, path_of, read_weights
from lossguard.torch.learned.stacks import move, new_memory
from lossguard.validation import check_kind, check_positive

SHAPES = ARCHITECTURES["mlp"].shapes


class MLPOptimizer(Optimizer):
    """A small learned optimizer: one tiny network, run on every coordinate alike.

    For each coordinate, from the features and steps t of ``lossguard.mlp_optimizer``, which
    computes the same of tensors in the same layout (of a square matrix, rows and columns are told
    apart by their place, so 100 steps of one and its transpose differ, in sum by 12 to 15 %):

        direction, magnitude = MLP(features, tanh(t / TIMES - 1))
        p <- p - lr 0.001 scale direction exp(0.001 magnitude)
        scale = exp(scaling . (size_features(p.shape), ln(1 + t / AGES)) + output . units)

    The computation and its memory are in float32, also where the step is under autocast. The memory
    takes 16 bytes a coordinate. A matrix of r rows and c columns takes 12 (r + c) more, a vector of
    n 12 n; and each parameter 32. A step needs 4 bytes a coordinate of all parameters while it
    runs, 8 in bfloat16, and 28 of the largest matrix, or 68 of the largest vector or matrix of few
    columns. t is the ``clock`` of a parameter group, which guards set to the time of the whole run.

    Args:
        params: parameters, or groups of them.
        weights: what meta-training made: ``mlp.0.weight`` [H, 39], ``mlp.0.bias`` [H], the same of
            further layers, the last with 2 outputs; ``momentum_decays`` [3],
            ``second_moment_decay`` [1], ``factored_decays`` [3], each the log(1 - decay) / 10;
            ``scaling`` [7], two factors, and powers of size and time; ``scheduler.input`` [8, 15],
            ``scheduler.hidden`` [8, 8], ``scheduler.bias`` [8], ``scheduler.output`` [8].
        lr: factor of the steps, 1 in training; schedulers act on it.

    Raises:
        ValueError: if a tensor of the weights is missing or of another shape, or lr isn't positive
            and finite; in ``step``, if a gradient is complex, sparse or sharded.

    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> optimizer = MLPOptimizer.pretrained([w], "mlp-small")
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> round(w.item(), 2)
    3.97

    Source: Metz et al., "Practical tradeoffs between memory, compute, and performance in learned
    optimizers", 2022 (small_fc_lopt), which has no scale.
    """

    def __init__(self, params: ParamsT, weights: Mapping[str, Tensor], *, lr: float = 1.0) -> None:
        check_positive(lr=lr)
        check_kind("weights", weights, Mapping, "a dictionary of tensors, or use pretrained()")
        self.layers = 1
        while SHAPES(1, self.layers + 1).keys() <= weights.keys():
            self.layers += 1
        needed = [*SHAPES(1, self.layers)]
        if missing := [name for name in needed if name not in weights]:
            raise ValueError(f"weights must hold {', '.join(needed)}, got none of {missing}")
        for name, shape in SHAPES(len(weights["mlp.0.bias"]), self.layers).items():
            if (given := list(weights[name].shape)) != shape:
                raise ValueError(f"weights must have {name} of shape {shape}, got {given}")
        tensors = {name: torch.as_tensor(tensor, device="cpu") for name, tensor in weights.items()}
        self.weights = {k: t.detach().to(torch.float32, copy=True) for k, t in tensors.items()}
        for name, numbers in (("times", TIMES), ("ages", AGES), ("leaks", LEAKS)):
            self.weights[name] = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        for name, decays in (
            ("momentum_rests", "momentum_decays"),
            ("second_moment_rests", "second_moment_decay"),
            ("factored_rests", "factored_decays"),
        ):  # 1 - decay
            self.weights[name] = torch.exp(10 * self.weights[decays].clamp(max=0))
        self._on: dict[torch.device, dict[str, Tensor]] = {}
        """The weights on each device that has parameters."""
        super().__init__(params, {"lr": _plain(lr), "clock": 0})

    @classmethod
    def pretrained(cls, params: ParamsT, name: str | os.PathLike[str]) -> Self:
        """With weights that the package ships, or your own.

        Args:
            params: what it is to optimize.
            name: "mlp-small", or the path of what meta-training left, which ends in
                ``.safetensors``.

        Raises:
            ValueError: if there are none of that name, the file is damaged, or its weights are an
                LSTM's.
            OSError: if it can't be read.
        """
        file = read_weights(path_of(name))
        if file.architecture != "mlp":
            raise ValueError(
                "weights must be an MLP's for MLPOptimizer, got those of an LSTM (which is for "
                "JAX: lossguard.pretrained)"
            )
        return cls(params, {name: torch.from_numpy(one) for name, one in file.tensors.items()})

    def __getstate__(self) -> dict[str, Any]:
        ours = {"weights": self.weights, "layers": self.layers, "_on": {}}
        return {**super().__getstate__(), **ours}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose rate must be in range as well."""
        if isinstance(param_group, dict) and "lr" in param_group:  # torch refuses what is no dict
            check_positive(lr=param_group["lr"] or 1.0)  # 0 as before a warm-up
            param_group["lr"] = _plain(param_group["lr"])
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned: the memory stays in float32.

        Raises:
            ValueError: if it is another optimizer's.
        """
        if any("clock" not in group for group in state_dict["param_groups"]):
            raise ValueError("state must be one of MLPOptimizer, got another optimizer's")
        given: list[dict[str, Any]] = []
        hook = self.register_load_state_dict_pre_hook(  # after all others, which may change it
            lambda _, state: given.append(state)
        )
        try:
            super().load_state_dict(state_dict)  # which casts it to the dtype of the parameters
        finally:
            hook.remove()
        keys = [key for group in given[0]["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            if found := given[0]["state"].get(key):
                self.state[p] = {name: t.to(p.device, copy=True) for name, t in found.items()}

    def _memory(self, p: Tensor) -> dict[str, Tensor]:
        """What is remembered of a parameter: zeros on its device at first."""
        if not (state := self.state[p]):
            state.update(new_memory(p))
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step.

        Args:
            closure: evaluates the loss, calls ``backward`` and returns the loss.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "optimizer.step must be called outside of a CUDA graph for MLPOptimizer, got a "
                "step in its capture: its time would stand still where it is replayed"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them before any parameter is moved
            for p in group["params"]:
                if p.grad is not None:
                    _check(p.grad)
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    by_device.setdefault(p.device, []).append(p)
            for device, params in by_device.items():
                if device not in self._on:
                    self._on[device] = {k: t.to(device) for k, t in self.weights.items()}
                states = [self._memory(p) for p in params]
                # Matrix products keep their dtype inside; some kinds of device have no autocast.
                available = torch.amp.is_autocast_available(device.type)
                with torch.autocast(device.type, enabled=False) if available else nullcontext():
                    lr, t = group["lr"], group["clock"]
                    move(params, states, self._on[device], self.layers, lr, t)
            group["clock"] += 1
        return loss


def _plain(rate: Any) -> float | Tensor:
    """A rate that can be loaded safely, as NumPy's can't."""
    return rate if isinstance(rate, Tensor) else float(rate)


def _check(gradient: Tensor) -> None:
    """Refuse what it can't compute with: it normalizes over all of a tensor."""
    for is_so, kind in (
        (gradient.is_sparse, "sparse"),
        (gradient.is_complex(), "complex"),
        (hasattr(gradient, "to_local"), "sharded"),
    ):
        if is_so:
            raise ValueError(
                f"gradients must be real, dense and whole for MLPOptimizer, got a {kind} one"
            )

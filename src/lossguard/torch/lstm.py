"""The LSTM optimizer of Andrychowicz et al. (2016) as a ``torch.optim.Optimizer``.

n   coordinates of a parameter
H   hidden cells
p   scale of the input logarithm
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lossguard.learned.weights_file import layer_names, path_of, read_weights
from lossguard.torch.memory import undo_casts
from lossguard.validation import check_positive


class LSTMOptimizer(Optimizer):
    """A learned optimizer: one small LSTM, run on every coordinate alike.

    For each coordinate, with gradient g and memory m:

        o, m <- LSTM(log_and_sign(g), m);   update = scale * (linear.weight o + linear.bias)

    The computation and its memory are in float32, 8 H bytes per layer and coordinate, also where
    the step is under autocast.

    Args:
        params: parameters, or groups of them.
        weights: what meta-training made, under the names of ``torch.nn.LSTM`` and ``Linear``:
            ``lstm.weight_ih_l0`` [4H, 2], ``lstm.weight_hh_l0`` [4H, H], ``lstm.bias_ih_l0``,
            ``lstm.bias_hh_l0`` [4H], the same of further layers with inputs H, ``linear.weight``
            [1, H], ``linear.bias`` [1].
        scale: factor of the output; it belongs to the weights. It is the group's ``lr``, so that
            schedulers act on it.
        p: scale of the input logarithm, which belongs to the weights too.

    Raises:
        ValueError: if a tensor of the weights is missing, or scale or p isn't positive and finite.

    >>> cells = {f"lstm.{kind}_l0": torch.zeros(4, *shape) for kind, shape in
    ...          {"weight_ih": [2], "weight_hh": [1], "bias_ih": [], "bias_hh": []}.items()}
    >>> weights = {**cells, "linear.weight": torch.zeros(1, 1), "linear.bias": torch.tensor([-1.0])}
    >>> w = torch.tensor([4.0], requires_grad=True)
    >>> optimizer = LSTMOptimizer([w], weights, scale=0.5)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> w.item()
    3.5

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016.
    """

    def __init__(
        self,
        params: ParamsT,
        weights: Mapping[str, Tensor],
        *,
        scale: float = 0.1,
        p: float = 10.0,
    ) -> None:
        check_positive(scale=scale, p=p)
        self.weights = {name: tensor.detach().float() for name, tensor in weights.items()}
        self.layers = sum(name.startswith("lstm.weight_ih_l") for name in weights)
        needed = [*(n for k in range(max(self.layers, 1)) for n in layer_names(k)), *OUTPUT]
        missing = [name for name in needed if name not in weights]
        if missing:
            raise ValueError(f"weights must hold {', '.join(needed)}, got none of {missing}")
        self._on: dict[torch.device, dict[str, Tensor]] = {}
        super().__init__(params, {"lr": scale, "p": p})

    @classmethod
    def pretrained(cls, params: ParamsT, name: str | os.PathLike[str]) -> "LSTMOptimizer":
        """With weights that the package ships, or your own, and the scale of their training.

        Args:
            params: what it is to optimize.
            name: one that ``lossguard list`` shows, or the path of what meta-training left, which
                ends in ``.safetensors``.

        Raises:
            ValueError: if there are none of that name, or the file is damaged.
            OSError: if it can't be read.
        """
        file = read_weights(path_of(name))
        weights = {name: torch.from_numpy(tensor) for name, tensor in file.tensors.items()}
        return cls(params, weights, scale=file.scale, p=file.p)

    def __getstate__(self) -> dict[str, Any]:
        ours = {"weights": self.weights, "layers": self.layers, "_on": {}}
        return {**super().__getstate__(), **ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned: the memory stays in float32."""
        super().load_state_dict(state_dict)
        undo_casts(self, state_dict)

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
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    with _without_autocast(param.device.type):
                        self._update(param, group["lr"], group["p"])
        return loss

    def _weights_on(self, device: torch.device) -> dict[str, Tensor]:
        """The weights on a parameter's device; each device gets them once."""
        if device not in self._on:
            self._on[device] = {name: tensor.to(device) for name, tensor in self.weights.items()}
        return self._on[device]

    def _update(self, param: Tensor, scale: float, p: float) -> None:
        gradient = param.grad
        if gradient is None or gradient.is_sparse or gradient.is_complex():
            kind = "complex" if gradient is not None and gradient.is_complex() else "sparse"
            raise ValueError(
                f"gradients must be real and dense for LSTMOptimizer, got a {kind} one"
            )
        weights = self._weights_on(param.device)
        x = log_and_sign(gradient.float().flatten(), p)
        state = self.state[param]
        if not state:
            hidden = weights["linear.weight"].shape[1]
            for name in ("h", "c"):
                state[name] = x.new_zeros(self.layers, hidden, x.shape[1])
        for k in range(self.layers):
            layer = [weights[name] for name in layer_names(k)]
            x, c = _cell(layer, x, state["h"][k], state["c"][k])
            state["h"][k].copy_(x)
            state["c"][k].copy_(c)
        output = weights["linear.weight"] @ x + weights["linear.bias"][:, None]
        param.add_((scale * output).reshape(param.shape).to(param.dtype))


OUTPUT = ("linear.weight", "linear.bias")


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Matrix products keep their dtype inside; some kinds of device have no autocast."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def log_and_sign(gradient: Tensor, p: float = 10.0) -> Tensor:
    """The two inputs for each coordinate g of a gradient, [2, n].

        (log|g| / p, sign g)   where |g| >= exp(-p)
        (-1, exp(p) g)         elsewhere

    >>> log_and_sign(torch.tensor([1.0, -1.0, 0.0]))
    tensor([[ 0.,  0., -1.],
            [ 1., -1.,  0.]])
    """
    floor = math.exp(-p)
    magnitude = gradient.abs()
    log = magnitude.clamp(min=floor).log() / p
    sign = torch.where(magnitude >= floor, gradient.sign(), gradient * math.exp(p))
    return torch.stack([log, sign])


def _cell(layer: list[Tensor], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of one layer, coordinates last: twice as fast on a CPU as ``torch.nn.LSTM``."""
    weight_ih, weight_hh, bias_ih, bias_hh = layer
    gates = torch.addmm((bias_ih + bias_hh)[:, None], weight_ih, x).addmm_(weight_hh, h)
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c

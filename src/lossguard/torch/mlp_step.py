"""The arithmetic of a step of ``MLPOptimizer``, of all parameters of one device at once.

g   gradient of a parameter p
m   momenta: three running means of g
v   second moment: a running mean of g^2
V   second moments of the rows and of the columns: running means of means of g^2
n   coordinates of a parameter
H   hidden units
N   parameters
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lossguard.learned.mlp_features import (
    AGES,
    FEATURES,
    LARGEST,
    SCALE,
    TINY,
    UNITS,
    factored_axes,
    size_features,
)
from lossguard.learned.weights_file import mlp_names

DECAYS = ("momentum_decays", "second_moment_decay", "factored_decays")


def shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    """Those of what is remembered of a parameter."""
    means = _means(torch.empty(p.shape, device="meta"))
    made = {"momenta": (3, *p.shape), "second_moment": (*p.shape,)}
    return made | {name: (3, *mean.shape) for name, mean in means.items()} | {"units": (UNITS,)}


def move(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    weights: dict[str, Tensor],
    rests: list[list[float]],
    layers: int,
    lr: float,
    t: int,
) -> None:
    """Move the parameters, and what is remembered of them; t steps are behind them.

    ``rests`` are 1 - decay, of ``DECAYS``.
    """
    gradients = [p.grad.float().contiguous() for p in params if p.grad is not None]
    before = _before(states, gradients)
    _remember(rests, states, gradients)
    sizes = torch.stack([_sizes(weights, p) for p in params])
    signals = _signals(before, states, gradients, params, sizes, t)
    scales = _scales(weights, [state["units"] for state in states], signals, sizes, t)
    times = torch.tanh(t / weights["times"] - 1)
    for p, g, state, scale in zip(params, gradients, states, scales, strict=True):
        x = _first_layer(weights, times, p, g, state)
        for k in range(1, layers + 1):
            weight, bias = (weights[name] for name in mlp_names(k))
            x = torch.addmm(bias[:, None], weight, x.relu_())
        direction, magnitude = x
        moved = magnitude.mul_(SCALE).exp_().mul_(direction)
        moved.mul_(lr * SCALE * scale)
        p.sub_(moved.reshape(p.shape).to(p.dtype))


def _remember(
    rests: list[list[float]], states: list[dict[str, Tensor]], gradients: list[Tensor]
) -> None:
    """The running means, each of all tensors at once."""
    momentum, second_moment, factored = rests
    for k, rest in enumerate(momentum):
        torch._foreach_lerp_([s["momenta"][k] for s in states], gradients, rest)  # pyright: ignore
    squares = torch._foreach_mul(gradients, gradients)  # pyright: ignore
    torch._foreach_lerp_([s["second_moment"] for s in states], squares, *second_moment)  # pyright: ignore
    torch._foreach_add_(squares, 1e-30)  # pyright: ignore
    old, new = [], []
    for state, square in zip(states, squares, strict=True):
        for name, mean in _means(square).items():
            old.append(state[name])
            new.append(mean)
    for k, rest in enumerate(factored):
        torch._foreach_lerp_([mean[k] for mean in old], new, rest)  # pyright: ignore


def _means(squares: Tensor) -> dict[str, Tensor]:
    """Over the longest and over the second longest axis; the squares themselves of vectors."""
    axes = factored_axes(tuple(squares.shape))
    if axes is None:
        return {"rows": squares}
    shorter, longer = axes
    return {
        "rows": squares.mean(longer, keepdim=True),
        "columns": squares.mean(shorter, keepdim=True),
    }


def _before(states: list[dict[str, Tensor]], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Products of the momenta and g, and the momenta's squared norms, [N, 3]."""
    momenta = [state["momenta"].reshape(3, -1) for state in states]
    products = [m @ g.reshape(-1) for m, g in zip(momenta, gradients, strict=True)]
    return torch.stack(products), _squares(momenta)


def _squares(tensors: list[Tensor]) -> Tensor:
    """Squared norms of rows, [N, rows]."""
    return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in tensors]).square()


def _sizes(weights: dict[str, Tensor], p: Tensor) -> Tensor:
    """The features of its size, and n: from the host once for each shape, then beside the weights.

    To copy from the host is to wait for the device.
    """
    name = f"sizes of {tuple(p.shape)}"
    if name not in weights:
        numbers = [*size_features(tuple(p.shape)), p.numel()]
        weights[name] = torch.tensor(numbers, dtype=torch.float32, device=p.device)
    return weights[name]


def _columns(like: Tensor, numbers: Sequence[float]) -> list[Tensor]:
    """Each number in a column as long as another tensor, [N, 1], not copied from the host."""
    return [like.new_full((len(like), 1), number) for number in numbers]


def _signals(
    before: tuple[Tensor, Tensor],
    states: list[dict[str, Tensor]],
    gradients: list[Tensor],
    params: list[Tensor],
    sizes: Tensor,
    t: int,
) -> Tensor:
    """What the scheduler sees, [N, 15], in the order of ``lossguard.learned.mlp``."""
    m = [state["momenta"].reshape(3, -1) for state in states]
    flat = [p.float().reshape(1, -1) for p in params]
    of_g, of_p, of_m = _squares([g.reshape(1, -1) for g in gradients]), _squares(flat), _squares(m)
    sizes, counts = sizes[:, :-1], sizes[:, -1:]
    times = math.log1p(t / 10) / 3 - 1, math.log1p(t / 1000) - 1, math.tanh(t / 30)

    def shrink(squares: Tensor) -> Tensor:
        return (squares + 1e-24).rsqrt()

    def log(squares: Tensor) -> Tensor:
        return (squares / counts + TINY).log() / 2

    products, of_old = before
    along_p = torch.stack([m[1:2] @ p[0] for m, p in zip(m, flat, strict=True)])
    level = log(torch.stack([state["second_moment"].sum() for state in states])[:, None])
    signals = (
        3 * products * shrink(of_g) * shrink(of_old),
        3 * along_p * shrink(of_m[:, 1:2]) * shrink(of_p),
        log(of_m) - level,
        *(log(one) / 3 for one in (of_g, of_p, of_m[:, 1:2])),
        *((sizes[:, 1:2] + sizes[:, 3:]) / 3, sizes[:, :1]),
        *_columns(of_g, times),
    )
    return torch.cat(signals, dim=1).clamp(-LARGEST, LARGEST)


def _scales(
    weights: dict[str, Tensor], units: list[Tensor], signals: Tensor, sizes: Tensor, t: int
) -> Tensor:
    """The scales of steps, [N]; the scheduler's units take a step."""
    into, back, bias, output = (
        weights[f"scheduler.{name}"] for name in ("input", "hidden", "bias", "output")
    )
    old = torch.stack(units)
    towards = torch.tanh(signals @ into.T + old @ back.T + bias)
    now = old + weights["leaks"] * (towards - old)
    torch._foreach_copy_(units, list(now))  # pyright: ignore
    ages = _columns(now, [math.log1p(t / age) for age in AGES])
    features = torch.cat([sizes[:, :-1], *ages], dim=1)
    return torch.exp(features @ weights["scaling"] + (now @ output).clamp(-LARGEST, LARGEST))


def _first_layer(
    weights: dict[str, Tensor], times: Tensor, p: Tensor, g: Tensor, state: dict[str, Tensor]
) -> Tensor:
    """Weight times features, [H, n], a few features at a time: never all of them in memory.

    The order of the features is that of ``lossguard.learned.mlp``. Products go into one buffer:
    fresh memory costs more than the arithmetic.
    """
    weight, bias = (weights[name] for name in mlp_names(0))
    m, v, rows = state["momenta"], state["second_moment"], state["rows"]
    if "columns" in state:
        columns = state["columns"]
        shorter, _ = factored_axes(tuple(g.shape)) or (0, 0)
        share = rows / (rows.mean(shorter + 1, keepdim=True) + 1e-9)
        of_g = of_m = (share.clamp_(min=1e-9).rsqrt_(), columns.clamp(min=1e-9).rsqrt_())
    else:
        columns = rows
        of_g, of_m = ((rows + 1e-9).rsqrt_(),), ((rows + 1e-6).rsqrt_(),)
    by_v = (v + 1e-6).rsqrt_()
    buffer = torch.empty_like(m)

    x = g.new_empty(len(weight), *g.shape)
    x.copy_((weight[:, FEATURES:] @ times + bias).reshape(-1, *[1] * g.dim()))
    for means, first in ((rows, 13), (columns, 16)):
        for features, at in ((means, first), ((means + 1e-8).rsqrt_(), first + 6)):
            flat = features.reshape(3, -1)
            x += (_normalized(weight, at, flat) @ flat).view(-1, *means.shape[1:])
    x = x.view(len(weight), -1)

    def add(first: int, features: Tensor) -> None:
        flat = features.reshape(-1, g.numel())
        x.addmm_(_normalized(weight, first, flat), flat)

    for first, features in ((0, g), (1, p.float()), (2, m), (5, v), (9, by_v)):
        add(first, features)
    for first, left, factors in ((6, m, (by_v,)), (10, g, of_g), (25, m, of_m)):
        torch.mul(left, factors[0], out=buffer)
        for factor in factors[1:]:
            buffer.mul_(factor)
        add(first, buffer)
    return x


def _normalized(weight: Tensor, first: int, features: Tensor) -> Tensor:
    """The columns of ``weight`` for features, [F, n], over the roots of their mean squares."""
    norms = torch.linalg.vector_norm(features, dim=1)
    scales = (norms.square() / features.shape[1] + 1e-5).rsqrt()
    return weight[:, first : first + len(features)] * scales

"""The arithmetic of a step of ``MLPOptimizer``, a few rows at a time.

K   tensors of one shape, stacked. Each is a batch of B matrices of R rows and C columns: C is its
    longest axis, R the second longest. A vector has B = C = 1.
n   coordinates of a tensor, B R C
H   hidden units
g   gradients, [K, B, R, C]
p   parameters, [K, B, R, C]
m   momenta: three running means of g, [K, 3, B, R, C]
v   second moment: a running mean of g^2, [K, B, R, C]
rows, columns   running means of means of g^2, [K, 3, B, R, 1] and [K, 3, B, 1, C]; of a vector only
    rows, means of its g^2 itself, [K, 3, 1, R, 1]
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lossguard.learned.mlp_features import FEATURES, LARGEST, SCALE, TINY
from lossguard.learned.weights_file import mlp_names

BLOCK = 65_536
"""Coordinates that are worked on at a time: what is made of them stays in a cache of megabytes."""


class Memory(NamedTuple):
    """What is remembered of K tensors, for each coordinate; of vectors there are no columns."""

    momenta: Tensor
    second_moment: Tensor
    rows: Tensor
    columns: Tensor | None


class Block(NamedTuple):
    """Some rows of all K tensors: views, through which the whole is changed."""

    g: Tensor
    p: Tensor
    m: Tensor
    v: Tensor
    rows: Tensor


class Sums(NamedTuple):
    """Over all coordinates of each tensor: what the scheduler sees."""

    products: Tensor
    """g . m with the old m, and m_1 . p, [K, 4]."""
    squares: Tensor
    """Of the old m, and of g, p and m, [K, 8]."""
    level: Tensor
    """Of v, [K, 1]."""


def blocks_of(g: Tensor, p: Tensor, memory: Memory) -> list[Block]:
    """Of as many rows as ``BLOCK`` holds, at least one."""
    whole = Block(g, p, memory.momenta, memory.second_moment, memory.rows)
    rows = max(1, BLOCK // (g.shape[0] * g.shape[1] * g.shape[3]))
    parts = (one.split(rows, dim=-2) for one in whole)
    return [Block(*part) for part in zip(*parts, strict=True)]


def remember(weights: dict[str, Tensor], blocks: list[Block], memory: Memory) -> Sums:
    """Bring the running means up to date, in place."""
    columns = memory.columns
    totals = [_remember(weights, block) for block in blocks]
    products, squares, level, of_columns = map(_added, zip(*totals, strict=True))
    if columns is not None:
        means = of_columns[:, None] / memory.rows.shape[3]
        _average(columns, means + 1e-30, weights["factored_rests"])
    return Sums(products, squares, level)


def scales(
    weights: dict[str, Tensor], units: Tensor, sums: Sums, sizes: Tensor, t: Tensor
) -> Tensor:
    """The scales of the steps of N tensors, [N]; the scheduler's units, [N, 8], take a step.

    ``sizes`` are ``size_features`` and the number of coordinates, [N, 5]. t steps are behind them.
    """
    into, back, bias, output = (
        weights[f"scheduler.{name}"] for name in ("input", "hidden", "bias", "output")
    )
    signals = _signals(sums, sizes, t)
    towards = torch.tanh(signals @ into.T + units @ back.T + bias)
    units.add_(weights["leaks"] * (towards - units))
    ages = torch.log1p(t / weights["ages"]).expand(len(units), -1)
    power = torch.cat([sizes[:, :4], ages], dim=1) @ weights["scaling"]
    return torch.exp(power + (units @ output).clamp(-LARGEST, LARGEST))


def advance(
    weights: dict[str, Tensor],
    layers: int,
    blocks: list[Block],
    memory: Memory,
    steps: Tensor,
    t: Tensor,
) -> None:
    """Move p in place by the network's direction and magnitude, times ``steps``, [K]."""
    n = memory.second_moment[0].numel()
    rows, columns = memory.rows, memory.columns
    mean_row = None if columns is None else rows.mean(3, keepdim=True)
    alone = _seen(blocks[0], columns, mean_row) if len(blocks) == 1 else None
    squares = _added(
        _squares(_seen(one, columns, mean_row) if alone is None else alone) for one in blocks
    )
    first, bias = (weights[name] for name in mlp_names(0))
    weight = torch.cat([first[:, :13], first[:, 25:FEATURES]], dim=1)
    weight = weight * torch.rsqrt(squares / n + 1e-5)[:, None]
    bias = bias + first[:, FEATURES:] @ torch.tanh(t / weights["times"] - 1)
    of_rows = _of_means(first[:, 13:16], first[:, 19:22], rows)
    of_columns = _of_means(first[:, 16:19], first[:, 22:25], rows if columns is None else columns)
    if columns is None:
        of_rows, of_columns = of_rows + of_columns, 0
    of_columns = of_columns + bias[:, None, None, None]
    start = 0
    for block in blocks:
        end = start + block.g.shape[2]
        seen = _seen(block, columns, mean_row) if alone is None else alone
        x = torch.baddbmm(
            (of_rows[:, :, :, start:end] + of_columns).flatten(2), weight, seen.flatten(2)
        )
        for k in range(1, layers + 1):
            matrix, added = (weights[name] for name in mlp_names(k))
            x = torch.baddbmm(added[:, None], matrix.expand(len(x), -1, -1), x.relu_())
        direction, magnitude = x.unbind(1)
        moved = magnitude.mul_(SCALE).exp_().mul_(direction).mul_(steps[:, None])
        block.p.sub_(moved.view(block.p.shape))
        start = end


def _average(old: Tensor, new: Tensor, rest: Tensor) -> None:
    """The running mean of each ``rest``, 1 - decay."""
    old.lerp_(new, rest.view(-1, 1, 1, 1))


def _added(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _total(x: Tensor) -> Tensor:
    """Over all coordinates."""
    return x.sum((-3, -2, -1))


def _remember(weights: dict[str, Tensor], block: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring all running means up to date but the columns'.

    Returns ``Sums``, and those of g^2 over the rows, [K, B, 1, C].
    """
    g, p, m, v, rows = block
    products = _total(g[:, None] * m)
    of_old = _total(m * m)
    _average(m, g[:, None], weights["momentum_rests"])
    squares = g * g
    v.lerp_(squares, weights["second_moment_rests"])
    means = squares.mean(3, keepdim=True)
    _average(rows, means[:, None] + 1e-30, weights["factored_rests"])
    products = torch.cat([products, _total(m[:, 1] * p)[:, None]], dim=1)
    of_both = torch.stack([_total(squares), _total(p * p)], dim=1)
    of_all = torch.cat([of_old, of_both, _total(m * m)], dim=1)
    return products, of_all, _total(v)[:, None], squares.sum(2, keepdim=True)


def _signals(sums: Sums, sizes: Tensor, t: Tensor) -> Tensor:
    """What the scheduler sees, [N, 15], in the order of ``lossguard.learned.mlp``."""
    products, squares, level = sums
    n = sizes[:, 4:]
    of_old, of_g, of_p, of_m = torch.rsqrt(squares + 1e-24).split([3, 1, 1, 3], dim=1)
    logs = torch.log(squares / n + TINY) / 2
    times = [torch.log1p(t / 10) / 3 - 1, torch.log1p(t / 1000) - 1, torch.tanh(t / 30)]
    signals = (
        3 * products[:, :3] * of_g * of_old,
        3 * products[:, 3:] * of_m[:, 1:2] * of_p,
        logs[:, 5:] - torch.log(level / n + TINY) / 2,
        logs[:, 3:5] / 3,
        logs[:, 6:7] / 3,
        (sizes[:, 1:2] + sizes[:, 3:4]) / 3,
        sizes[:, :1],
        torch.stack(times).expand(len(products), -1),
    )
    return torch.cat(signals, dim=1).clamp(-LARGEST, LARGEST)


def _seen(block: Block, columns: Tensor | None, mean_row: Tensor | None) -> Tensor:
    """What the network sees of each coordinate, [K, 16, B, R, C]: the first 13 and the last 3."""
    g, p, m, v, rows = block
    if columns is not None and mean_row is not None:
        of_rows = torch.rsqrt((rows / (mean_row + 1e-9)).clamp_(min=1e-9))
        of_g = of_m = of_rows * torch.rsqrt(columns.clamp(min=1e-9))
    else:
        of_g, of_m = torch.rsqrt(rows + 1e-9), torch.rsqrt(rows + 1e-6)
    by_v = torch.rsqrt(v + 1e-6)[:, None]
    g = g[:, None]
    features = [g, p[:, None], m, v[:, None], m * by_v, by_v, g * of_g, m * of_m]
    return torch.cat(features, dim=1)


def _squares(features: Tensor) -> Tensor:
    """Of each, summed over the coordinates, [K, 16]."""
    return torch.linalg.vector_norm(features, dim=(-3, -2, -1)).square()


def _of_means(weight: Tensor, of_roots: Tensor, means: Tensor) -> Tensor:
    """Weights times rows or columns and times their roots, each normalized, as long as these."""
    parts = []
    for matrix, features in ((weight, means), (of_roots, torch.rsqrt(means + 1e-8))):
        count = features[0, 0].numel()
        scaled = matrix * torch.rsqrt(_total(features * features) / count + 1e-5)[:, None]
        parts.append(scaled @ features.flatten(2))
    return _added(parts).view(len(means), -1, *means.shape[2:])

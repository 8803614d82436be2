"""The MLP optimizer as its equations, in NumPy and float64: one table of features a tensor."""

from typing import NamedTuple

import numpy as np

from lossguard.learned.mlp import MLPWeights

TIMES = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])


class Memory(NamedTuple):
    """Last axis: the decays."""

    step: int
    m: np.ndarray
    v: np.ndarray
    rows: np.ndarray
    """Of the tensor's shape, constant along its longest axis."""
    columns: np.ndarray
    units: np.ndarray
    """Of the scheduler."""


def start(p: np.ndarray) -> Memory:
    def zeros(decays: int) -> np.ndarray:
        return np.zeros((*p.shape, decays))

    return Memory(0, zeros(3), zeros(1), zeros(3), zeros(3), np.zeros(8))


def step(
    weights: MLPWeights, memory: Memory, g: np.ndarray, p: np.ndarray
) -> tuple[np.ndarray, Memory]:
    """What is added to p, and the memory after it."""
    g, p = g.astype(np.float64), p.astype(np.float64)

    def decays(stored: np.ndarray) -> np.ndarray:
        return 1 - np.exp(10 * np.asarray(stored, np.float64))

    def mean(old: np.ndarray, new: np.ndarray, stored: np.ndarray) -> np.ndarray:
        return decays(stored) * old + (1 - decays(stored)) * new[..., None]

    squares = g**2 + 1e-30
    rows = columns = squares
    shorter = longer = None
    if g.ndim >= 2:
        *_, shorter, longer = np.argsort(g.shape, kind="stable")
        rows = np.broadcast_to(squares.mean(longer, keepdims=True), g.shape)
        columns = np.broadcast_to(squares.mean(shorter, keepdims=True), g.shape)
    old, memory = (
        memory.m,
        Memory(
            memory.step + 1,
            mean(memory.m, g, weights.momentum_decays),
            mean(memory.v, g**2, weights.second_moment_decay),
            mean(memory.rows, rows, weights.factored_decays),
            mean(memory.columns, columns, weights.factored_decays),
            memory.units,
        ),
    )
    units, factor = schedule(weights, memory, old, g, p)
    memory = memory._replace(units=units)
    table = features(memory, g, p, shorter)
    table /= np.sqrt((table**2).mean(0) + 1e-5)
    times = np.tanh((memory.step - 1) / TIMES - 1)
    x = np.concatenate([table, np.tile(times, (len(table), 1))], axis=1)
    for k, (weight, bias) in enumerate(weights.layers):
        x = np.maximum(x, 0) if k else x
        x = x @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    direction, magnitude = x.T
    scale = factor * scale_of(np.asarray(weights.scaling, np.float64), g, memory.step - 1)
    return (-0.001 * scale * direction * np.exp(0.001 * magnitude)).reshape(g.shape), memory


def scale_of(s: np.ndarray, g: np.ndarray, t: int) -> float:
    """Powers of n and t."""
    of_size = np.exp(s[0]) * (g.size / 1e3) ** s[1]
    if g.ndim < 2:
        of_size = np.exp(s[2]) * (g.size / 30) ** s[3]
    return of_size * (1 + t / 1e2) ** s[4] * (1 + t / 1e3) ** s[5] * (1 + t / 1e4) ** s[6]


def schedule(
    weights: MLPWeights, memory: Memory, old: np.ndarray, g: np.ndarray, p: np.ndarray
) -> tuple[np.ndarray, float]:
    """The scheduler's units after a step, and its factor; ``old`` are the momenta before."""
    into, back, bias, output = (np.asarray(one, np.float64) for one in weights.scheduler)
    m, t = memory.m, memory.step - 1

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        return float((a * b).sum() / lengths) if lengths else 0.0

    def log(a: np.ndarray) -> float:
        return 0.5 * np.log((a**2).mean() + 1e-20)

    signals = [3 * cosine(g, old[..., k]) for k in range(3)]
    signals += [3 * cosine(m[..., 1], p)]
    signals += [log(m[..., k]) - log(np.sqrt(memory.v)) for k in range(3)]
    signals += [log(g) / 3, log(p) / 3, log(m[..., 1]) / 3]
    signals += [np.log(g.size / (1000 if g.ndim > 1 else 30)) / 3, float(g.ndim > 1)]
    signals += [np.log(1 + t / 10) / 3 - 1, np.log(1 + t / 1000) - 1, np.tanh(t / 30)]
    leaks = np.array([0.1, 0.1, 0.03, 0.03, 0.01, 0.01, 0.003, 0.001])
    towards = np.tanh(into @ np.clip(signals, -4, 4) + back @ memory.units + bias)
    units = memory.units + leaks * (towards - memory.units)
    return units, np.exp(np.clip(output @ units, -4, 4))


def features(memory: Memory, g: np.ndarray, p: np.ndarray, shorter: int | None) -> np.ndarray:
    """[coordinates, 28]"""
    _, m, v, rows, columns, _ = memory
    if shorter is None:
        by_g, by_m = (rows + 1e-9) ** -0.5, (rows + 1e-6) ** -0.5
    else:
        share = rows / (rows.mean(shorter, keepdims=True) + 1e-9)
        by_g = by_m = (np.maximum(share, 1e-9) * np.maximum(columns, 1e-9)) ** -0.5
    by_v = (v + 1e-6) ** -0.5
    parts = [
        g[..., None],
        p[..., None],
        m,
        v,
        m * by_v,
        by_v,
        g[..., None] * by_g,
        rows,
        columns,
        (rows + 1e-8) ** -0.5,
        (columns + 1e-8) ** -0.5,
        m * by_m,
    ]
    return np.concatenate(parts, axis=-1).reshape(g.size, 28)

"""The guards again, in float64 NumPy and plain loops: what they must equal.

Nothing here is shared with the package. An optimizer is an object with a learning-rate schedule
that counts its steps, and a memory that it can forget without the schedule.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np


class Objective:
    """F(w, i) = 1/2 sum_j a_j (w_j - m_j)^2 + <xi_i, w>: the noise xi_i is row i of a table."""

    def __init__(self, seed: int, minibatches: int, n: int = 4, noise: float = 0.3):
        rng = np.random.default_rng(seed)
        self.a = np.geomspace(0.1, 1.0, n)
        self.m = rng.standard_normal(n)
        self.xi = noise * rng.standard_normal((minibatches, n))
        self.start = 3 * rng.standard_normal(n)

    def loss(self, w: np.ndarray, i: int) -> float:
        return 0.5 * np.sum(self.a * (w - self.m) ** 2) + self.xi[i] @ w

    def gradient(self, w: np.ndarray, i: int) -> np.ndarray:
        return self.a * (w - self.m) + self.xi[i]


class Momentum:
    """SGD with heavy-ball momentum; without, at momentum = 0."""

    def __init__(self, rate: Callable[[int], float], momentum: float = 0.0):
        self.rate, self.momentum = rate, momentum
        self.schedule_steps = 0
        self.forget()

    def forget(self) -> None:
        self.memory = [np.zeros(4)]

    def step(self, w: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        v = gradient + self.momentum * self.memory[0]
        w = w - self.rate(self.schedule_steps) * v
        self.memory = [v]
        self.schedule_steps += 1
        return w


class Breaks(Momentum):
    """Its step number ``at`` is NaN, and so is what it remembers of it."""

    def __init__(self, rate: Callable[[int], float], momentum: float, at: int):
        super().__init__(rate, momentum)
        self.at = at

    def step(self, w: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return super().step(w, gradient * (np.nan if self.schedule_steps == self.at else 1.0))


class Adam:
    """Kingma and Ba 2015, with bias correction."""

    def __init__(self, rate: Callable[[int], float], b1: float = 0.9, b2: float = 0.999):
        self.rate, self.b1, self.b2 = rate, b1, b2
        self.schedule_steps = 0
        self.forget()

    def forget(self) -> None:
        self.memory = [np.zeros(4), np.zeros(4), 0]

    def step(self, w: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        mean, square, count = self.memory
        count += 1
        mean = self.b1 * mean + (1 - self.b1) * gradient
        square = self.b2 * square + (1 - self.b2) * gradient**2
        direction = mean / (1 - self.b1**count)
        direction /= np.sqrt(square / (1 - self.b2**count)) + 1e-8
        w = w - self.rate(self.schedule_steps) * direction
        self.memory = [mean, square, count]
        self.schedule_steps += 1
        return w


def loss_guard(objective, learned, fallback, *, nt: int, nc: int, loser: str, cycles: int):
    """Algorithm 2: yields after every cycle what a guard has to report."""
    x, i = objective.start, 0
    for _ in range(cycles):
        y, z, losses_y, losses_z = x, x, [], []
        for t in range(nt):
            losses_y.append(objective.loss(y, i + t))
            losses_z.append(objective.loss(z, i + t))
            y = learned.step(y, objective.gradient(y, i + t))
            z = fallback.step(z, objective.gradient(z, i + t))
        check = range(i + nt, i + nt + nc)
        learned_loss, fallback_loss = (
            np.mean([objective.loss(w, j) for j in check]) for w in (y, z)
        )
        won = learned_loss < fallback_loss
        x = y if won else z
        i += nt + nc
        if loser == "reset":
            (fallback if won else learned).forget()
        yield {
            "x": x,
            "used_learned": [won] * nt,
            "losses": losses_y if won else losses_z,
            "learned_loss": learned_loss,
            "fallback_loss": fallback_loss,
            "winner": 0 if won else 1,
        }


def residual_guard(
    objective, learned, fallback, *, alpha, theta, residual: str, every: bool, nt: int, cycles: int
):
    """GL2O: yields after every nt steps what a guard has to report; mu may follow every step."""
    x, i, mu = objective.start, 0, None

    def s(w: np.ndarray) -> np.ndarray:
        gradient = objective.gradient(w, i)
        return gradient if residual == "gradient" else w - deepcopy(fallback).step(w, gradient)

    for _ in range(cycles):
        losses, used = [], []
        for _ in range(nt):
            if mu is None:
                mu = np.linalg.norm(s(x))
            losses.append(objective.loss(x, i))
            y = learned.step(x, objective.gradient(x, i))
            own, r = np.linalg.norm(s(x)), np.linalg.norm(s(y))
            ok = r <= alpha * mu
            z = fallback.step(x, objective.gradient(x, i))
            x = y if ok else z
            if ok or every:
                mu = theta * (r if ok else own) + (1 - theta) * mu
            used.append(ok)
            i += 1
        yield {"x": x, "used_learned": used, "losses": losses}

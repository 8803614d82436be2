"""What an update of each learned optimizer costs, against one of Adam.

100,000 parameters, those of an MLP on MNIST, as in a training loop: steps in one compiled scan in
JAX, one after the other in PyTorch, with one thread there. Off by default; ``make bench`` runs it.
"""

from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from conftest import milliseconds
from jaxtyping import PyTree

import lossguard

SHAPES = [(784, 126), (126,), (126, 10), (10,)]
STEPS = 10
TARGET = "at most 0.15 of the LSTM's time (in JAX), 5 times Adam's"


def random_tensors(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.1, shape).astype(np.float32) for shape in SHAPES]


def ratios(times: dict[str, float]) -> dict[str, float]:
    per_step = {f"{name} ms": round(value / STEPS, 3) for name, value in times.items()}
    of = {f"of_{name}": round(times["mlp"] / t, 3) for name, t in times.items() if name != "mlp"}
    return of | per_step


def test_update_in_jax(report: Callable[..., None]) -> None:
    key = jax.random.key(0)
    optimizers = {
        "adam": optax.adam(1e-3),
        "lstm": lossguard.lstm_optimizer(lossguard.init_lstm_weights(key)),
        "mlp": lossguard.mlp_optimizer(lossguard.init_mlp_weights(key)),
    }
    params, gradients = jax.tree.map(jax.numpy.asarray, (random_tensors(0), random_tensors(1)))

    def steps_of(optimizer: optax.GradientTransformation) -> Callable[[], PyTree]:
        @jax.jit
        def run(params: PyTree, state: PyTree) -> PyTree:
            def step(carry: tuple[PyTree, PyTree], _: None) -> tuple[PyTree, None]:
                params, state = carry
                updates, state = optimizer.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), length=STEPS)[0]

        state = optimizer.init(params)
        return lambda: jax.block_until_ready(run(params, state))

    runs = {name: steps_of(optimizer) for name, optimizer in optimizers.items()}
    report(runs["mlp"], TARGET, **ratios(milliseconds(runs, rounds=15)))


def test_step_in_torch(report: Callable[..., None], tmp_path) -> None:
    torch = pytest.importorskip("torch")
    from lossguard.torch import MLPOptimizer

    path = tmp_path / "mlp.safetensors"
    lossguard.save_weights(path, lossguard.init_mlp_weights(jax.random.key(0)), made={})

    def parameters() -> list:
        made = [torch.nn.Parameter(torch.from_numpy(array)) for array in random_tensors(0)]
        for param, array in zip(made, random_tensors(1), strict=True):
            param.grad = torch.from_numpy(array)
        return made

    optimizers = {
        "adam": torch.optim.Adam(parameters(), foreach=True),
        "mlp": MLPOptimizer.pretrained(parameters(), path),
    }

    def steps_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STEPS):
                optimizer.step()

        return run

    torch.set_num_threads(1)
    runs = {name: steps_of(optimizer) for name, optimizer in optimizers.items()}
    report(runs["mlp"], TARGET, **ratios(milliseconds(runs, rounds=15)))

"""Meta-training of the LSTM optimizer by truncated back-propagation, on one task."""

from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..learned.lstm import LSTMWeights, init_lstm_weights, lstm_optimizer
from ..learned.pretrained import save_weights
from ..tasks.datasets import load_dataset
from ..tasks.models import MLP, ConvNet
from ..tasks.task import Task
from ..validation import MOST_SEEDS, check_count, check_lstm
from .loop import MetaTraining, Method
from .truncated import Optimizees, meta_gradient, restart_finished, start, unroll

COUNTS = ("optimizees", "validation_optimizees")
"""What must be at least 1."""


@dataclass(frozen=True)
class LSTMTraining(MetaTraining):
    """A meta-training of the LSTM optimizer on one task."""

    dataset: str = "mnist"
    scaling: str = "unit"
    """Of the inputs, as the data set's loader takes it."""
    model: MLP | ConvNet = MLP()
    batch_size: int = 128
    optimizees: int = 2
    """K, optimizees under way side by side."""
    scale: float = 0.1
    """Of the learned optimizer's steps."""
    p: float = 10.0
    """The scale of the logarithm in its inputs."""
    validation_optimizees: int = 4

    def check(self) -> None:
        """Refuse what is out of range."""
        super().check()
        check_count("batch_size", self.batch_size)
        for name in COUNTS:
            check_count(name, getattr(self, name), most=MOST_SEEDS)
        check_lstm(self.scale, self.p)

    def method(self) -> "Backpropagation":
        """The method, with its task loaded."""
        data = load_dataset(self.dataset, scaling=self.scaling)
        return Backpropagation(self, Task(data, self.model, self.batch_size))

    def optimizer(self, weights: LSTMWeights) -> optax.GradientTransformation:
        """The learned optimizer that these weights make."""
        return lstm_optimizer(weights, scale=self.scale, p=self.p)


class Backpropagation(Method):
    """Truncated back-propagation through K optimizees side by side."""

    config: LSTMTraining = eqx.field(static=True)
    task: Task

    @property
    def tasks(self) -> dict[str, Task]:
        """By the names of their data in messages."""
        return {"the data": self.task}

    def start(self, key: PRNGKeyArray) -> tuple[LSTMWeights, Optimizees]:
        """Fresh weights, and fresh optimizees."""
        weights_key, first_key = jax.random.split(key)
        hidden, layers = self.config.hidden, self.config.layers
        weights = init_lstm_weights(weights_key, hidden=hidden, layers=layers)
        return weights, self.fresh(self.config.optimizer(weights), first_key, 0)

    def fresh(
        self, optimizer: optax.GradientTransformation, key: PRNGKeyArray, done: Array | int
    ) -> Optimizees:
        """Optimizees at the start of rollouts of random lengths."""
        length_key, key = jax.random.split(key)
        count = self.config.optimizees
        length = self.config.lengths(length_key, count, done)
        return start(self.task, optimizer, jax.random.split(key, count), length)

    def gradient(
        self, weights: LSTMWeights, inner: Optimizees, key: PRNGKeyArray, done: Array
    ) -> tuple[Float[Array, ""], LSTMWeights, Optimizees]:
        """The mean loss of the next pieces, its gradient, and the optimizees after them."""
        config = self.config
        losses, gradient, after = meta_gradient(
            config.optimizer, self.task, weights, inner, config.truncation
        )
        fresh = self.fresh(config.optimizer(weights), key, done)
        lost = ~jnp.isfinite(losses[-1])
        return losses.mean(), gradient, restart_finished(after, fresh, lost)

    def validate(self, weights: LSTMWeights, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """``validation`` on the task."""
        return {"validation": np.asarray(_validate(self.config, self.task, weights, key))}

    def save(self, path: Path, weights: LSTMWeights, made: dict[str, str]) -> None:
        """Write the weights, and what they were trained on."""
        config, made = self.config, made | {"dataset": self.config.dataset}
        save_weights(path, weights, p=config.p, scale=config.scale, made=made)


@eqx.filter_jit
def _validate(
    config: LSTMTraining, task: Task, weights: LSTMWeights, key: PRNGKeyArray
) -> Float[Array, " validation_steps"]:
    """Mean training losses a step, on initializations and minibatches that training never draws."""
    keys = jax.random.split(key, config.validation_optimizees)
    optimizer = config.optimizer(weights)
    optimizees = start(task, optimizer, keys, jnp.zeros(config.validation_optimizees, jnp.int32))
    losses, _ = unroll(task, optimizer, optimizees, config.validation_steps)
    return losses.mean(axis=1)

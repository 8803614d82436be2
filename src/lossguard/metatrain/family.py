"""A family of small tasks, and pieces of the rollouts of a learned optimizer on them.

Letters: c the factor of a tensor. A rollout trains w / c in place of w, with c drawn anew for every
tensor, which makes many tasks of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from ..tasks.dataset import Dataset
from ..tasks.datasets import load_dataset
from ..tasks.goals import CLASSIFICATION, RECONSTRUCTION
from ..tasks.models import MLP, ReluMLP
from ..tasks.published import resized
from ..tasks.task import Task

WORST = 2.0
"""A loss above so many times its reference counts as this, as does one that isn't finite."""
FLOOR = 0.01
"""Losses that are small against so many times their reference count as equal: on few data they get
as small as chance has it."""
EXAMPLES = 1000
"""Of a data set, on which the reference is computed."""


@dataclass(frozen=True)
class Member:
    """One shape of tasks: they differ in initialization, minibatches and the factors c."""

    dataset: str
    """A name of ``DATASETS``."""
    model: MLP | ReluMLP
    size: int | None = None
    """Height and width to which images are resized, in pixels; None: as they are."""
    reconstruct: bool = False
    """An autoencoder instead of a classifier."""
    batch_size: int = 64
    pairs: int = 4
    """N, pairs of rollouts under way in meta-training."""

    @property
    def title(self) -> str:
        """As in ``mnist8-relumlp-32x32``; ``-auto`` is an autoencoder."""
        hidden = "x".join(str(units) for units in self.model.hidden)
        end = "-auto" if self.reconstruct else ""
        return f"{self.dataset}{self.size or ''}-{type(self.model).__name__.lower()}-{hidden}{end}"

    def task(self, load: Callable[[str], Dataset] = load_dataset) -> Task:
        """The task, with its data from ``load``."""
        data = load(self.dataset)
        if data.shape[:2] == (self.size, self.size):  # of one task there would be two titles
            raise ValueError(f"size must be None for {self.dataset}, whose images are as large")
        data = data if self.size is None else resized(data, self.size)
        if self.reconstruct and len(data.shape) != 3:
            raise ValueError(f"what is reconstructed must be images, got {self.dataset}")
        goal = RECONSTRUCTION if self.reconstruct else CLASSIFICATION
        return Task(data, self.model, self.batch_size, goal)


class Rollout(NamedTuple):
    """Where the rollout of one optimizee stands."""

    params: PyTree[Float[Array, "..."]]
    """w / c."""
    factors: PyTree[Float[Array, ""]]
    """c, one number a tensor."""
    memory: PyTree
    """The learned optimizer's."""
    key: Key[Array, ""]
    """Shuffles the minibatches."""
    step: Int[Array, ""]
    """Optimizer steps taken, which is also the number of the next minibatch."""
    length: Int[Array, ""]
    """Optimizer steps after which the rollout is over."""
    lost: Bool[Array, ""]
    """Whether the last loss was not finite: then it is over as well."""


def begin(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    length: Int[Array, ""],
    *,
    rescaling: float = 1.0,
) -> Rollout:
    """A rollout of ``length`` steps; c is log-uniform between 1 / rescaling and rescaling."""
    init_key, factor_key, order_key = jax.random.split(key, 3)
    params = task.init(init_key)
    leaves, structure = jax.tree.flatten(params)
    most = jnp.log(rescaling)
    logs = jax.random.uniform(factor_key, (len(leaves),), minval=-most, maxval=most)
    factors = structure.unflatten(list(jnp.exp(logs)))
    params = jax.tree.map(jnp.divide, params, factors)
    zero = jnp.zeros_like(length)
    return Rollout(params, factors, optimizer.init(params), order_key, zero, length, zero > 0)


def go_on(
    task: Task, optimizer: optax.GradientTransformation, rollout: Rollout, steps: int
) -> tuple[Float[Array, " steps"], Rollout]:
    """The training losses of the next ``steps`` steps, and the rollout after them."""

    def loss(params: PyTree, i: Array) -> Array:
        weights = jax.tree.map(jnp.multiply, params, rollout.factors)
        return task.objective(rollout.key)(weights, i)

    def step(at: Rollout, _: None) -> tuple[Rollout, Array]:
        value, gradient = jax.value_and_grad(loss)(at.params, at.step)
        updates, memory = optimizer.update(gradient, at.memory, at.params)
        params = optax.apply_updates(at.params, updates)
        return at._replace(params=params, memory=memory, step=at.step + 1), value

    after, losses = jax.lax.scan(step, rollout, length=steps)
    return losses, after._replace(lost=~jnp.isfinite(losses[-1]))


def reference(task: Task) -> Float[Array, ""]:
    """The loss where all outputs are zero, over which losses of different tasks are comparable."""
    train = task.dataset.train
    inputs, labels = train.inputs[:EXAMPLES], train.labels[:EXAMPLES]
    zeros = jnp.zeros((len(labels), task.goal.outputs(task.dataset)))
    return task.goal.scores(zeros, task.dataset.normalize(inputs), labels)["loss"].mean()


def relative(losses: Float[Array, "..."], reference: Float[Array, ""]) -> Float[Array, "..."]:
    """Losses over their reference, at most ``WORST``."""
    return jnp.where(jnp.isfinite(losses), jnp.minimum(losses / reference, WORST), WORST)


def meta_loss(losses: Float[Array, " steps"], reference: Float[Array, ""]) -> Float[Array, ""]:
    """Of a piece: the logarithm of its mean loss over the reference, plus ``FLOOR``.

    The logarithm gives the end of a rollout, where losses are small, as much weight as its start.
    """
    return jnp.log(relative(losses, reference).mean() + FLOOR)

"""Meta-training of the MLP optimizer by persistent evolution strategies, on a family of tasks."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, PRNGKeyArray

from ..learned.mlp import (
    SCALE,
    MLPLayer,
    MLPWeights,
    SchedulerWeights,
    init_mlp_weights,
    mlp_optimizer,
)
from ..learned.pretrained import load_weights, save_weights
from ..learned.weights_file import path_of
from ..tasks.datasets import load_dataset
from ..tasks.task import Task
from ..validation import MOST_SEEDS, check_choice, check_count, check_positive
from .family import Member, Rollout, begin, go_on, meta_loss, reference, relative
from .loop import MetaTraining, Method
from .pes import Pairs, pes_gradient, restart_pairs, start_pairs

FEATURE = 2
"""The MLP optimizer's input m of decay 0.9."""
BEGIN_SCALING = (0.0, -0.25, 0.0, 0.0, 0.0, -0.5, -0.5)
"""Its ``scaling`` at the start. Steps of matrices of n coordinates shrink by n^(-1/4), all of them
by t^(-1/2) from 1,000 on and by 1 / t from 10,000 on."""
RESCALING = 2.0
"""Each tensor of a rollout that is trained on is rescaled by a factor from 1/2 to 2."""
VALIDATION_ROLLOUTS = 2
"""On each held-out member."""


@dataclass(frozen=True)
class MLPTraining(MetaTraining):
    """A meta-training of the MLP optimizer on a family of tasks."""

    hidden: int = 4
    """Units of a layer, at least 2; ``start_from`` has its own, layers too."""
    start_from: str | None = None
    """What to go on from: the name of a shipped MLP optimizer, or a file of weights."""
    stage: Literal["rule", "scheduler"] = "rule"
    """What is trained: all but the scheduler, or the scheduler alone."""
    family: Annotated[tuple[Member, ...], tyro.conf.Suppress] = ()
    """What is trained on."""
    held_out: Annotated[tuple[Member, ...], tyro.conf.Suppress] = ()
    """What is validated on."""
    sigma: float = 0.03
    """Deviation of the perturbations."""

    def check(self) -> None:
        """Refuse what is out of range."""
        super().check()
        for name in ("family", "held_out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have members, got none")
        for member in self.family:
            check_count("pairs", member.pairs, most=MOST_SEEDS)
        check_count("hidden", self.hidden, least=2)  # of ``like_momentum``
        check_choice("stage", self.stage, ("rule", "scheduler"))
        check_positive(sigma=self.sigma)
        titles = [member.title for member in (*self.family, *self.held_out)]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise ValueError(
                f"family and held_out must have members of different titles, got {twice[0]} twice"
            )

    def method(self) -> "Evolution":
        """The method, with its tasks loaded."""
        load = cache(load_dataset)
        members, held_out = (
            {member.title: member.task(load) for member in members}
            for members in (self.family, self.held_out)
        )
        weights = (
            None if self.start_from is None else load_weights(path_of(self.start_from)).weights
        )
        if not isinstance(weights, MLPWeights | None):
            raise ValueError(f"start_from must be an MLP optimizer, got {self.start_from}, an LSTM")
        return Evolution(self, weights, members, held_out)


class Evolution(Method):
    """Persistent evolution strategies, with N pairs of rollouts on each member of a family."""

    config: MLPTraining = eqx.field(static=True)
    first: MLPWeights | None
    """What to go on from."""
    family: dict[str, Task]
    held_out: dict[str, Task]

    @property
    def tasks(self) -> dict[str, Task]:
        """By the names of their data in messages."""
        every = self.family | self.held_out
        return {f"the data of {name}": task for name, task in every.items()}

    def start(self, key: PRNGKeyArray) -> tuple[MLPWeights, dict[str, Pairs]]:
        """What to go on from, or a momentum method; and pairs at the start of their rollouts."""
        weights_key, first_key = jax.random.split(key)
        weights = self.first or like_momentum(
            weights_key, hidden=self.config.hidden, layers=self.config.layers
        )
        return weights, self._fresh(weights, first_key, jnp.int32(0))

    @eqx.filter_jit
    def _fresh(self, weights: MLPWeights, key: PRNGKeyArray, done: Array) -> dict[str, Pairs]:
        keys = jax.random.split(key, len(self.family))
        return {
            name: self._fresh_pairs(name, weights, k, done)
            for k, name in zip(keys, self.family, strict=True)
        }

    def _fresh_pairs(self, name: str, weights: MLPWeights, key: PRNGKeyArray, done: Array) -> Pairs:
        """At the start of rollouts of random lengths."""
        config, task, optimizer = self.config, self.family[name], mlp_optimizer(weights)
        count = next(member.pairs for member in config.family if member.title == name)
        length_key, key = jax.random.split(key)
        lengths = config.lengths(length_key, count, done)
        fresh = partial(begin, task, optimizer, rescaling=RESCALING)
        inner = jax.vmap(fresh)(jax.random.split(key, count), lengths)
        return start_pairs(self._trained(weights), inner)

    def _trained(self, weights: MLPWeights) -> SchedulerWeights | MLPWeights:
        """The part of weights that the stage trains."""
        if self.config.stage == "scheduler":
            return weights.scheduler
        return weights._replace(scheduler=None)  # pyright: ignore - a pytree without leaves

    def _whole(self, weights: MLPWeights, trained: Any) -> MLPWeights:
        """Weights with that part in its place."""
        if self.config.stage == "scheduler":
            return weights._replace(scheduler=trained)
        return trained._replace(scheduler=weights.scheduler)

    def gradient(
        self, weights: MLPWeights, inner: dict[str, Pairs], key: PRNGKeyArray, done: Array
    ) -> tuple[Float[Array, ""], MLPWeights, dict[str, Pairs]]:
        """The mean over the family of losses and estimated gradients, and the pairs after them."""
        losses, gradients, after = [], [], {}
        keys = jax.random.split(key, len(self.family))
        for k, name in zip(keys, self.family, strict=True):
            loss, gradient, after[name] = self._on_member(name, weights, inner[name], k, done)
            losses.append(loss)
            gradients.append(gradient)
        mean = jax.tree.map(lambda *each: sum(each) / len(each), *gradients)
        return jnp.stack(losses).mean(), mean, after

    def _on_member(
        self, name: str, weights: MLPWeights, pairs: Pairs, key: PRNGKeyArray, done: Array
    ) -> tuple[Float[Array, ""], MLPWeights, Pairs]:
        config, task = self.config, self.family[name]
        draw_key, fresh_key = jax.random.split(key)
        base = reference(task)

        def piece(trained: Any, rollout: Rollout) -> tuple[Array, Rollout]:
            optimizer = mlp_optimizer(self._whole(weights, trained))
            losses, after = go_on(task, optimizer, rollout, config.truncation)
            return meta_loss(losses, base), after

        losses, gradient, pairs = pes_gradient(
            piece, self._trained(weights), pairs, draw_key, sigma=config.sigma
        )
        gradient = self._whole(jax.tree.map(jnp.zeros_like, weights), gradient)
        over = (pairs.plus.step >= pairs.plus.length) | pairs.plus.lost | pairs.minus.lost
        fresh = self._fresh_pairs(name, weights, fresh_key, done)
        return losses.mean(), gradient, restart_pairs(pairs, fresh, over)

    def validate(self, weights: MLPWeights, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """``validation_NAME``: mean losses over their reference on each held-out member;
        ``validation``: the geometric mean of these."""
        each = {
            f"validation_{name}": np.asarray(_validate(self.config, task, weights, key))
            for name, task in self.held_out.items()
        }
        logs = np.mean([np.log(losses) for losses in each.values()], axis=0)
        return {"validation": np.exp(logs).astype(np.float32)} | each

    def save(self, path: Path, weights: MLPWeights, made: dict[str, str]) -> None:
        """Write the weights, and what they were trained on."""
        save_weights(path, weights, made=made | {"family": ", ".join(self.family)})


@eqx.filter_jit
def _validate(
    config: MLPTraining, task: Task, weights: MLPWeights, key: PRNGKeyArray
) -> Float[Array, " validation_steps"]:
    """On initializations and minibatches that training never draws."""
    optimizer, length = mlp_optimizer(weights), jnp.int32(config.validation_steps)

    def one(key: PRNGKeyArray) -> Array:
        rollout = begin(task, optimizer, key, length)
        return go_on(task, optimizer, rollout, config.validation_steps)[0]

    losses = jax.vmap(one)(jax.random.split(key, VALIDATION_ROLLOUTS))
    return relative(losses, reference(task)).mean(axis=0)


def like_momentum(
    key: PRNGKeyArray, *, hidden: int = 4, layers: int = 2, rate: float = 0.005, noise: float = 0.1
) -> MLPWeights:
    """Weights that make about the momentum method from which meta-training sets out:

        update = -rate scale m / sqrt(mean(m^2) + 1e-5), m of decay 0.9, the mean over the tensor

    with the scale of ``mlp_optimizer`` for ``BEGIN_SCALING``.

    Two hidden units carry the feature and its negative through the ReLUs. The others are as
    ``init_mlp_weights`` draws them, times ``noise``, and so is what they add.

    >>> weights = like_momentum(jax.random.key(0), noise=0.0)
    >>> optimizer, w = mlp_optimizer(weights), jnp.zeros(2)
    >>> update, _ = optimizer.update(jnp.array([1.0, -1.0]), optimizer.init(w), w)
    >>> [round(float(one), 4) for one in update]
    [-0.005, 0.005]
    """
    drawn = init_mlp_weights(key, hidden=hidden, layers=layers)
    made = [MLPLayer(noise * layer.weight, layer.bias) for layer in drawn.layers]
    carried = jnp.array([1.0, -1.0], jnp.float32)
    for k, (weight, bias) in enumerate(made[:-1]):
        rows = jnp.zeros((2, weight.shape[1]), jnp.float32)
        rows = rows.at[:, FEATURE].set(carried) if k == 0 else rows.at[:, :2].set(jnp.eye(2))
        made[k] = MLPLayer(weight.at[:2].set(rows), bias)
    weight, bias = made[-1]
    made[-1] = MLPLayer(weight.at[0, :2].set(rate / SCALE * carried), bias)
    return drawn._replace(layers=tuple(made), scaling=jnp.array(BEGIN_SCALING, jnp.float32))

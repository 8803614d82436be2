"""A lane: an optimizer's run. Guards run several, and compare their losses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .protocol import Objective, Params
from .soundness import all_finite, is_sound

Optimizer = optax.GradientTransformationExtraArgs


class Lane(NamedTuple):
    """Where an optimizer is, and what it remembers."""

    params: Params
    state: PyTree


def propose(
    optimizer: Optimizer,
    lane: Lane,
    objective: Objective,
    i: Int[Array, ""],
    loss: Float[Array, ""],
    gradient: Params,
) -> Lane:
    """One optimizer step, from the loss and its gradient on minibatch number i.

    Optimizers that want more than the gradient find it under optax's names: ``value``, ``grad``,
    ``value_fn(params)`` and ``grad_fn(params, _)``, all on this minibatch.
    """
    updates, state = optimizer.update(
        gradient,
        lane.state,
        lane.params,
        value=loss,
        grad=gradient,
        value_fn=lambda params: objective(params, i),
        grad_fn=lambda params, _: jax.grad(objective)(params, i),
    )
    # Some optimizers return a wider dtype than they began with, which a compiled loop can't carry.
    state = jax.tree.map(_as_before, state, lane.state)
    return Lane(optax.apply_updates(lane.params, updates), state)


def train(
    optimizers: Sequence[Optimizer],
    lanes: Sequence[Lane],
    objective: Objective,
    i: Int[Array, ""],
    *,
    nt: int,
    dtype: jnp.dtype,
) -> tuple[tuple[Lane, ...], Float[Array, "lanes nt"]]:
    """nt steps of every lane on minibatches i .. i+nt-1, and the losses before each step."""

    def step(lanes: tuple[Lane, ...], t: Any) -> tuple[tuple[Lane, ...], Array]:
        after, losses = [], []
        for optimizer, lane in zip(optimizers, lanes, strict=True):
            loss, gradient = jax.value_and_grad(objective)(lane.params, i + t)
            after.append(propose(optimizer, lane, objective, i + t, loss, gradient))
            losses.append(jnp.asarray(loss, dtype))
        return tuple(after), jnp.stack(losses)

    lanes, losses = jax.lax.scan(step, tuple(lanes), jnp.arange(nt))
    return lanes, losses.T


def train_if(
    runs: Bool[Array, ""],
    optimizer: Optimizer,
    lane: Lane,
    objective: Objective,
    i: Int[Array, ""],
    *,
    nt: int,
    dtype: jnp.dtype,
) -> tuple[Lane, Float[Array, " nt"]]:
    """nt steps of a lane and its losses; where it doesn't run: nothing is computed, NaN."""

    def run(lane: Lane) -> tuple[Lane, Array]:
        (lane,), losses = train([optimizer], [lane], objective, i, nt=nt, dtype=dtype)
        return lane, losses[0]

    return jax.lax.cond(runs, run, lambda lane: (lane, jnp.full(nt, jnp.nan, dtype)), lane)


def mean_losses(
    points: Sequence[Params], objective: Objective, i: Int[Array, ""], *, nc: int, dtype: jnp.dtype
) -> Float[Array, " points"]:
    """The mean loss of each point on minibatches i .. i+nc-1: forward passes only."""

    def add(j: Any, sums: Array) -> Array:
        return sums + jnp.stack([jnp.asarray(objective(w, i + j), dtype) for w in points])

    return jax.lax.fori_loop(0, nc, add, jnp.zeros(len(points), dtype)) / nc


def is_fine(lane: Lane, losses: Float[Array, "..."], before: Params) -> Bool[Array, ""]:
    """Whether a lane that ran has finite parameters (but for infinities of before) and losses."""
    return is_sound(lane.params, before) & all_finite(losses)


def _as_before(new: Array, old: Array) -> Array:
    new = jnp.asarray(new)  # some optimizers keep Python's numbers
    return new if new.dtype == old.dtype else new.astype(old.dtype)

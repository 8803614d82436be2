"""A branch: where an optimizer is, and what it remembers. Guards train several and compare them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .protocol import Objective, Params


class Branch(NamedTuple):
    """Where an optimizer is, and what it remembers."""

    params: Params
    state: PyTree


def propose(
    optimizer: optax.GradientTransformationExtraArgs,
    branch: Branch,
    objective: Objective,
    i: Int[Array, ""],
    loss: Float[Array, ""],
    gradient: Params,
) -> Branch:
    """One optimizer step, given the loss and its gradient on minibatch number i.

    Optimizers that want more than the gradient find it under optax's names: ``value``, ``grad``,
    ``value_fn(params)`` and ``grad_fn(params, _)``, all on this minibatch.
    """
    updates, state = optimizer.update(
        gradient,
        branch.state,
        branch.params,
        value=loss,
        grad=gradient,
        value_fn=lambda params: objective(params, i),
        grad_fn=lambda params, _: jax.grad(objective)(params, i),
    )
    # Some optimizers return a wider dtype than they began with, which a compiled loop can't carry.
    state = jax.tree.map(_as_before, state, branch.state)
    return Branch(optax.apply_updates(branch.params, updates), state)


def optimizer_step(
    optimizer: optax.GradientTransformationExtraArgs,
    branch: Branch,
    objective: Objective,
    i: Int[Array, ""],
) -> tuple[Branch, Float[Array, ""]]:
    """One optimizer step on minibatch number i, and the loss there before it."""
    loss, gradient = jax.value_and_grad(objective)(branch.params, i)
    return propose(optimizer, branch, objective, i, loss, gradient), loss


def train(
    optimizers: Sequence[optax.GradientTransformationExtraArgs],
    branches: Sequence[Branch],
    objective: Objective,
    i: Int[Array, ""],
    *,
    steps: Int[Array, ""] | int,
    most: int,
    dtype: jnp.dtype,
) -> tuple[tuple[Branch, ...], Float[Array, "lanes most"]]:
    """``steps`` steps of every lane, all on minibatches i, i+1, ..., and their losses before each.

    The lanes of a step don't depend on each other: a compiler may run them side by side, and draws
    the minibatch once. Losses are NaN from ``steps`` on.
    """

    def step(t: Any, carry: tuple[tuple[Branch, ...], Array]) -> tuple[tuple[Branch, ...], Array]:
        branches, losses = carry
        stepped = [
            optimizer_step(optimizer, branch, objective, i + t)
            for optimizer, branch in zip(optimizers, branches, strict=True)
        ]
        now = jnp.stack([jnp.asarray(loss, dtype) for _, loss in stepped])
        return tuple(branch for branch, _ in stepped), losses.at[:, t].set(now)

    losses = jnp.full((len(branches), most), jnp.nan, dtype)
    return jax.lax.fori_loop(0, steps, step, (tuple(branches), losses))


def check(
    lanes: Sequence[Params],
    objective: Objective,
    i: Int[Array, ""],
    *,
    stride: int,
    looks: Sequence[Int[Array, ""] | int],
    most: int,
    settled: Callable[[Float[Array, "lanes most"], Int[Array, ""]], Bool[Array, ""]] | None = None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "lanes most"], Int[Array, ""]]:
    """The losses of every lane on minibatches i, i+stride, ..., and how many of them were drawn.

    ``looks`` are the numbers of minibatches after which ``settled`` is asked whether that is
    enough; after the last it is, and without ``settled`` after the first.
    """

    def draw(j: Any, losses: Array) -> Array:
        return losses.at[:, j].set(
            jnp.stack([jnp.asarray(objective(params, i + stride * j), dtype) for params in lanes])
        )

    losses = jnp.zeros((len(lanes), most), dtype)
    if most == 0:
        return losses, jnp.int32(0)
    if settled is None or len(looks) == 1:
        return jax.lax.fori_loop(0, looks[0], draw, losses), jnp.asarray(looks[0], jnp.int32)

    bounds = jnp.array([0, *looks], jnp.int32)

    def undecided(carry: tuple[Array, Array, Array]) -> Array:
        look, _, enough = carry
        return (look < len(looks)) & ~enough

    def look_again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        look, losses, _ = carry
        losses = jax.lax.fori_loop(bounds[look], bounds[look + 1], draw, losses)
        return look + 1, losses, settled(losses, bounds[look + 1])

    start = (jnp.int32(0), losses, jnp.array(False))
    look, losses, _ = jax.lax.while_loop(undecided, look_again, start)
    return losses, bounds[look]


def _as_before(new: Array, old: Array) -> Array:
    new = jnp.asarray(new)  # some optimizers keep Python's numbers
    return new if new.dtype == old.dtype else new.astype(old.dtype)

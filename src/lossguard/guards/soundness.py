"""Which parameters, states and gradients are finite, and what replaces those that aren't."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .protocol import Objective, Params
from .stacked import stacked


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in a pytree is finite."""
    return jnp.array(
        [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    ).all()


def is_sound(tree: PyTree, start: PyTree) -> Bool[Array, ""]:
    """Whether a pytree is finite, save for infinities that it starts with by design.

    States have such, and masks among the parameters.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(start), strict=True)
    return jnp.array(
        [(jnp.isfinite(now) | (now == then)).all() for now, then in pairs if _is_float(now)]
    ).all()


def with_sound_gradients(objective: Objective) -> Objective:
    """The objective, whose gradient is 0 where any number of it isn't finite.

    One broken minibatch must not ruin a lane. The loss stays as it is, so a guard still sees it.

    >>> root = with_sound_gradients(lambda params, i: jnp.sqrt(params).sum())
    >>> jax.grad(root)(jnp.array([0.0, 4.0]), 0).tolist()
    [0.0, 0.0]
    >>> jax.grad(root)(jnp.array([4.0]), 0).tolist()
    [0.25]
    """
    if isinstance(objective, stacked):
        return dataclasses.replace(objective, loss=with_sound_gradients(objective.loss))

    @jax.custom_jvp
    def sound(params: Params, i: Any) -> Array:
        return objective(params, i)

    @sound.defjvp
    def derivative(at: tuple, direction: tuple) -> tuple[Array, Array]:
        loss, gradient = jax.value_and_grad(objective)(*at)
        gradient = select(all_finite(gradient), gradient, jax.tree.map(jnp.zeros_like, gradient))
        slopes = jax.tree.map(lambda g, u: (g * u).sum().astype(loss.dtype), gradient, direction[0])
        return loss, jax.tree.reduce(jnp.add, slopes)

    return sound


def keep_schedules(state: PyTree, advanced: PyTree) -> PyTree:
    """``state`` with the step counts of its schedules taken from ``advanced``.

    In Algorithm 2 the fallback's rate lambda depends on k alone, whoever won the cycles before. In
    optax a schedule, of the rate or of weight decay, has a state that is nothing but a ``count``.
    """
    injected = optax.schedules.InjectStatefulHyperparamsState

    def is_count(state: PyTree) -> bool:
        return getattr(state, "_fields", ()) == ("count",)

    def keep(old: PyTree, new: PyTree) -> PyTree:
        if isinstance(old, injected):
            return new._replace(inner_state=keep_schedules(old.inner_state, new.inner_state))
        return new if is_count(old) else old

    return jax.tree.map(
        keep, state, advanced, is_leaf=lambda s: isinstance(s, injected) or is_count(s)
    )


def advance_schedules(state: PyTree, steps: int) -> PyTree:
    """``state`` with the step counts of its schedules ``steps`` later: it was idle meanwhile."""
    later = jax.tree.map(lambda leaf: leaf + steps if _is_count(leaf) else leaf, state)
    return keep_schedules(state, later)


def renew(optimizer: optax.GradientTransformation, params: Params, state: PyTree) -> PyTree:
    """A fresh state at the parameters, which has the schedules of the old one."""
    return keep_schedules(optimizer.init(params), state)


def renew_if_unsound(
    optimizer: optax.GradientTransformationExtraArgs, params: Params, state: PyTree
) -> PyTree:
    """The state, or a renewed one if it is no longer finite."""
    fresh = optimizer.init(params)
    return select(is_sound(state, fresh), state, keep_schedules(fresh, state))


def select(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """``yes`` where the condition holds, else ``no``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_count(leaf: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and jnp.ndim(leaf) == 0

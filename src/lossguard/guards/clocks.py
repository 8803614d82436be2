"""The clocks of schedules: they go on where an optimizer begins anew, and while it is idle."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from .protocol import Params, advance
from .soundness import is_sound


def keep_schedules(state: PyTree, advanced: PyTree) -> PyTree:
    """``state`` with the step counts of its schedules taken from ``advanced``.

    In Algorithm 2 the fallback's rate lambda depends on k alone, whoever won the cycles before. In
    optax a schedule, of the rate or of weight decay, has a state that is nothing but a ``count``.
    Parts of a guard's state name in ``GOES_ON`` what else is taken from there.
    """

    def keep(old: PyTree, new: PyTree) -> PyTree:
        if not (names := _go_on(old)):
            return old
        fields = zip(old._fields, old, new, strict=True)
        return old._make(b if n in names else keep_schedules(a, b) for n, a, b in fields)

    return jax.tree.map(keep, state, advanced, is_leaf=lambda part: bool(_go_on(part)))


def advance_schedules(state: PyTree, steps: Int[Array, ""] | int) -> PyTree:
    """``state`` with the step counts of its schedules ``steps`` later: it was idle meanwhile."""

    def later(part: PyTree) -> PyTree:
        return jax.tree.map(lambda n: advance(n, steps), part) if _is_count(part) else part

    return jax.tree.map(later, state, is_leaf=_is_count)


def check_schedules(name: str, state: PyTree) -> None:
    """Refuse a schedule whose steps aren't the run's: it can't be told how many there were."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optax.MultiStepsState))
    inner = [node.inner_opt_state for node in nodes if isinstance(node, optax.MultiStepsState)]
    if any(map(_is_count, jax.tree.leaves(inner, is_leaf=_is_count))):
        raise ValueError(
            f"{name} must have its schedules outside of optax.MultiSteps, as a guard advances them "
            "by minibatches, got one inside (chain MultiSteps with optax.scale_by_schedule; don't "
            "put a learned optimizer into it: its clock is one)"
        )


def renew(optimizer: optax.GradientTransformation, params: Params, state: PyTree) -> PyTree:
    """A fresh state at the parameters, which has the schedules of the old one."""
    return typed_as(state, keep_schedules(optimizer.init(params), state))


def renew_if_unsound(
    optimizer: optax.GradientTransformation, params: Params, state: PyTree
) -> PyTree:
    """The state, or a renewed one if it is no longer finite."""
    sound = is_sound(state, partial(optimizer.init, params))
    return jax.lax.cond(sound, lambda: state, partial(renew, optimizer, params, state))


def typed_as(before: PyTree, state: PyTree) -> PyTree:
    """A state in the types of another, as a compiled loop carries it.

    Some optimizers begin with or return Python's numbers, or a wider dtype.
    """
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), before, state)


def _is_count(state: PyTree) -> bool:
    """Whether it is a schedule's. What remembers a parameter called so is no integer."""
    named = getattr(state, "_fields", ()) == ("count",)
    dtype = getattr(state.count, "dtype", None) if named else None
    return dtype is not None and jnp.issubdtype(dtype, jnp.integer)


def _go_on(state: Any) -> Sequence[str]:
    """The fields of a state that go on where it begins again."""
    if isinstance(state, optax.schedules.InjectStatefulHyperparamsState):
        return "count", "hyperparams", "hyperparams_states"
    return state._fields if _is_count(state) else getattr(state, "GOES_ON", ())

"""Which parameters, states and gradients are finite, and what replaces those that aren't."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .protocol import Guard, Objective, Params, advance, wide
from .stacked import stacked

select = optax.tree.where
"""``select(condition, yes, no)``: one tree or the other, leaf by leaf."""


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in a pytree is finite."""
    return is_sound(tree, lambda: jax.tree.map(lambda _: 0.0, tree))


def is_sound(tree: PyTree, like: Callable[[], PyTree]) -> Bool[Array, ""]:
    """Whether each number of a pytree is finite that is finite in ``like()``, where it began.

    Others may be anything: a state's best loss so far begins at infinity, what it doesn't know yet
    is NaN, and among parameters there are masks. ``like`` is computed if need be.
    """

    def exactly() -> Array:
        rows = zip(jax.tree.leaves(tree), jax.tree.leaves(like()), strict=True)
        fine = [(jnp.isfinite(a) | ~jnp.isfinite(b)).all() for a, b in rows if _is_float(a)]
        return jnp.array(fine).all()

    # By sums, in a third of the time. One of which a part isn't finite isn't either; it may also
    # have overflown.
    leaves = filter(_is_float, jax.tree.leaves(tree))
    sums = [leaf.sum(dtype=wide(leaf.dtype)) for leaf in leaves]
    finite = jnp.isfinite(jnp.array(sums)).all()
    return jax.lax.cond(finite, lambda: finite, exactly)


@dataclass(frozen=True)
class sound:
    """The objective, whose gradient ``evaluate`` takes for 0 where a number of it isn't finite.

    One broken minibatch must not ruin a lane. The loss stays as it is, so a guard still sees it;
    and so does a gradient beyond the end of ``stacked`` minibatches, where no lane may go on.
    """

    objective: Objective

    def __call__(self, params: Params, i: Int[Array, ""] | int) -> Array:
        return jnp.asarray(self.objective(params, i))  # some return Python's numbers


def plain(objective: Objective) -> Objective:
    """The objective as it was given."""
    while isinstance(objective, sound):
        objective = objective.objective
    return objective


def evaluate(
    objective: Objective, params: Params, i: Int[Array, ""] | int
) -> tuple[Float[Array, ""], Params]:
    """The loss and its gradient."""
    loss, gradient = jax.value_and_grad(objective)(params, i)
    if isinstance(objective, sound):
        given, zero = plain(objective), jax.tree.map(jnp.zeros_like, gradient)
        beyond = isinstance(given, stacked) and ~given.holds(i)
        gradient = select(all_finite(gradient) | beyond, gradient, zero)
    return loss, gradient


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


def renew(optimizer: optax.GradientTransformation | Guard, params: Params, state: PyTree) -> PyTree:
    """A fresh state at the parameters, which has the schedules and counts of the old one."""
    return typed_as(state, keep_schedules(optimizer.init(params), state))


def typed_as(before: PyTree, state: PyTree) -> PyTree:
    """A state in the types of another, as a compiled loop carries it.

    Some optimizers begin with or return Python's numbers, or a wider dtype.
    """
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), before, state)


def renew_if_unsound(
    optimizer: optax.GradientTransformationExtraArgs, params: Params, state: PyTree
) -> PyTree:
    """The state, or a renewed one if it is no longer finite."""
    sound = is_sound(state, partial(optimizer.init, params))
    return jax.lax.cond(sound, lambda: state, partial(renew, optimizer, params, state))


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_count(state: PyTree) -> bool:
    """Whether it is a schedule's. What remembers a parameter called so is no integer."""
    named = getattr(state, "_fields", ()) == ("count",)
    dtype = getattr(state.count, "dtype", None) if named else None
    return dtype is not None and jnp.issubdtype(dtype, jnp.integer)


def _go_on(state: PyTree) -> Sequence[str]:
    """The fields of a state that go on where it begins again."""
    if isinstance(state, optax.schedules.InjectStatefulHyperparamsState):
        return "count", "hyperparams", "hyperparams_states"
    return state._fields if _is_count(state) else getattr(state, "GOES_ON", ())

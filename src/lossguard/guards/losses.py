"""The loss as a guard evaluates it: at a point, on a minibatch, with its gradient."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..validation import check_function
from .protocol import Loss, Params
from .soundness import all_finite, is_sound, select


class Point(NamedTuple):
    """Where a lane is: the parameters, and the model state that goes with them."""

    params: Params
    extra: PyTree
    """What forward passes change; None: there is none."""


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Float[Array, ""]
    extra: PyTree
    """The model state after it."""
    aux: PyTree
    """What the loss reports; None if nothing."""


@dataclass(frozen=True)
class sound:
    """The loss; ``evaluate`` takes its gradient for 0 where a number of it isn't finite.

    One broken minibatch must not ruin a lane: model state stays as it was, too. The loss itself is
    as it is, so a guard still sees it.
    """

    loss: Loss

    def __call__(self, *args: Any) -> Any:
        return self.loss(*args)


def plain(loss: Loss) -> Loss:
    """The loss as it was given."""
    while isinstance(loss, sound):
        loss = loss.loss
    return loss


def forward(loss: Loss, x: Point, minibatch: Any, *, name: str = "loss") -> Forward:
    """The loss at x on a minibatch, whichever of its four forms it has."""
    value, extra, aux = _parts(loss(*_arguments(x), minibatch), x, name)
    # In the types of before, as a compiled loop carries it: some return Python's numbers.
    extra = jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), x.extra, extra)
    return Forward(jnp.asarray(value), extra, aux)


def evaluate(loss: Loss, x: Point, minibatch: Any) -> tuple[Forward, Params]:
    """The loss and what comes with it, and its gradient by the parameters."""

    def of(params: Params) -> tuple[Array, Forward]:
        seen = forward(loss, Point(params, x.extra), minibatch)
        return seen.loss, seen

    (_, seen), gradient = jax.value_and_grad(of, has_aux=True)(x.params)
    if isinstance(loss, sound):
        fine = all_finite(gradient)
        gradient = select(fine, gradient, jax.tree.map(jnp.zeros_like, gradient))
        if x.extra is not None:
            fine &= is_sound(seen.extra, lambda: x.extra)
            seen = seen._replace(extra=select(fine, seen.extra, x.extra))
    return seen, gradient


def check_loss(loss: Any, x: Point, minibatch: Any, *, name: str = "loss") -> PyTree:
    """The shapes of what it reports; refuse what is no function, or returns none of the forms."""
    arguments = ", ".join(["params", "extra", "minibatch"][:: 2 if x.extra is None else 1])
    check_function(name, plain(loss), f"{name}({arguments})")
    # Of the function as it was given, which JAX knows again, and so traces once for all of a guard.
    returned = jax.eval_shape(plain(loss), *_arguments(x), minibatch)
    return _parts(returned, x, name)[2]


def _arguments(x: Point) -> tuple[PyTree, ...]:
    return (x.params,) if x.extra is None else (x.params, x.extra)


def _parts(returned: Any, x: Point, name: str) -> tuple[Any, PyTree, PyTree]:
    """Value, model state and report of what a loss returned, or of the shapes of that."""
    if x.extra is None:
        forms, least = "a scalar, or (scalar, aux)", 1
    else:
        forms, least = "(scalar, extra), or (scalar, extra, aux)", 2
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not least <= len(parts) <= least + 1:
        raise ValueError(f"{name} must return {forms}, got {_kind(returned)}")
    value, *rest = parts
    is_number = isinstance(value, float) or hasattr(value, "dtype")
    if not (is_number and jnp.issubdtype(jnp.result_type(value), jnp.floating)) or jnp.shape(value):
        first = " first" * bool(rest)
        raise ValueError(f"{name} must return a floating-point scalar{first}, got {_kind(value)}")
    extra = None
    if x.extra is not None:
        extra = rest.pop(0)
        before, after = jax.tree.structure(x.extra), jax.tree.structure(extra)
        shapes = [[*map(jnp.shape, jax.tree.leaves(tree))] for tree in (x.extra, extra)]
        if before != after or shapes[0] != shapes[1]:
            told = [
                f"{kept.unflatten(of)}" for kept, of in zip((before, after), shapes, strict=True)
            ]
            raise ValueError(
                f"{name} must return extra in the structure and shapes that it got, {told[0]}, got "
                f"{told[1]}"
            )
    return value, extra, rest[0] if rest else None


def _kind(value: Any) -> str:
    """What it is, in a message: arrays by type and shape."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{[*value.shape]}"
    return repr(value)

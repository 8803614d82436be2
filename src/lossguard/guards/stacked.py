"""Host-fed minibatches as an objective."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Shaped

from ..validation import check_function, told
from .protocol import Objective, Params, check_loss


class stacked(eqx.Module):
    """``objective(params, i) = loss(params, batches[i - start])``: minibatches stacked on axis 0.

    For training loops whose minibatches come from the host: stack those of one cycle (nt + nc for a
    loss guard, nt for the others), with ``start`` the number of the first, which is
    ``state.minibatches``. It is a pytree, so that a compiled step takes new minibatches without
    recompiling, and holds a copy of ``start``, so that the step may donate the state. On a
    minibatch that is not in the stack the loss is NaN.

    Args:
        loss: ``loss(params, batch) -> scalar``.
        batches: a pytree of arrays that share the length of axis 0.
        start: the number of the first minibatch.

    Raises:
        ValueError: if loss is no function, start no integer, or ``batches`` holds no arrays, or
            arrays of different lengths; in a guard's step, if they are fewer than a cycle may take,
            or the loss is no scalar.

    >>> import jax.numpy as jnp
    >>> batches = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    >>> objective = stacked(lambda w, x: jnp.mean((x - w) ** 2), batches, start=20)
    >>> float(objective(jnp.array(6.0), 21))
    1.0
    """

    loss: Callable[[Any, Any], Array] = eqx.field(static=True)
    batches: PyTree[Shaped[ArrayLike, "count ..."]]
    start: Int[Array, ""] = eqx.field(converter=jnp.array)

    def __check_init__(self) -> None:
        check_function("loss", self.loss, "loss(params, batch)")
        if not jnp.issubdtype(self.start.dtype, jnp.integer):
            raise ValueError(f"start must be an integer, got {told(self.start)}")
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(self.batches)}
        if len(lengths) != 1 or () in lengths:
            found = sorted(str(*length) or "none" for length in lengths) or "no arrays"
            raise ValueError(f"batches must be arrays that share the length of axis 0, got {found}")

    @property
    def count(self) -> int:
        """How many minibatches there are."""
        return len(jax.tree.leaves(self.batches)[0])

    def holds(self, i: Int[Array, ""] | int) -> Bool[Array, ""]:
        """Whether minibatch number i is in the stack."""
        row = i - self.start.astype(jnp.int32)
        return (row >= 0) & (row < self.count)

    def __call__(self, params: Params, i: Int[Array, ""] | int) -> Array:
        row = i - self.start.astype(jnp.int32)
        loss = self.loss(params, jax.tree.map(lambda leaf: jnp.asarray(leaf)[row], self.batches))
        check_loss("loss", loss)
        known = jnp.where(self.holds(i), 1, jnp.nan)  # where it isn't the gradient is NaN too
        return loss * known.astype(loss.dtype)


def check_stacked(objective: Objective, needed: int) -> None:
    """Refuse stacked minibatches that are fewer than a cycle may take, or begin at several."""
    if not isinstance(objective, stacked):
        return
    if objective.start.shape != ():
        raise ValueError(f"start must be an integer, got {told(objective.start)}")
    if objective.count < needed:
        raise ValueError(
            f"stacked minibatches must be at least {needed}, which a cycle may take, got "
            f"{objective.count}"
        )

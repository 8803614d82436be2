"""What every guard is: two pure functions, the state between them, and what a step reports."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..validation import MOST

Params = PyTree[Shaped[ArrayLike, "..."]]
Loss = Callable[..., Any]
"""``loss(params, minibatch)``, or with model state ``loss(params, extra, minibatch)``; see
``Guard``."""


LEARNED, FALLBACK, OWN, NEITHER = map(np.int32, (0, 1, 2, -1))
"""``Decision.winner``: the learned optimizer's lane, the fallback's from x, the fallback's own; or
x stayed, or went back."""


class GuardState(NamedTuple):
    """Where a guard stands between two cycles."""

    params: Params
    """The parameters to evaluate and to save. What is put here from outside the leader goes on
    from; other runs, of guards that have some, are where they were."""
    steps: Int[Array, ""]
    """k, optimizer steps taken so far (int32; it stays at 2^31 - 1)."""
    minibatches: Int[Array, ""]
    """The number of the next minibatch (int32; near 2^31 - 1 it begins at 0 again)."""
    inner: PyTree
    """What the guard itself keeps: optimizer states and the like."""
    extra: PyTree = None
    """The model state that belongs to ``params``, such as BatchNorm's statistics; None: there is
    none."""
    GOES_ON = ("steps", "minibatches")
    """Fields that go on where the guard begins again; parts of ``inner`` name theirs likewise."""


class Decision(NamedTuple):
    """What happened in one cycle."""

    used_learned: Bool[Array, " nt"]
    """Whether each step of the lane that ``losses`` are of was the learned optimizer's."""
    losses: Float[Array, " nt"]
    """Training loss before each step. Of which lane, the guard says: of the leader before the
    cycle, or, with hindsight, of the branch that was kept. Infinite where all steps were undone."""
    winner: Int[Array, ""]
    """The lane that ``params`` are of after the cycle: 0 learned, 1 fallback, 2 the fallback by
    itself, -1 where x stayed or went back; with ``best_of`` the number of the guard. Of
    ``recommended`` and ``hedged`` it is never -1."""
    gradients: Int[Array, ""]
    """Gradient evaluations spent, but for those that an optimizer makes by itself, as a line search
    does."""
    learned_loss: Float[Array, ""] | float = math.nan
    """Mean loss by which the learned lane was compared, if one was."""
    fallback_loss: Float[Array, ""] | float = math.nan
    """That of the fallback's on the same minibatches."""
    forwards: Int[Array, ""] | np.int32 = np.int32(0)
    """Forward passes spent beside the gradients."""
    learned_updates: Int[Array, ""] | np.int32 = np.int32(0)
    """Updates computed by learned optimizers, kept or not."""
    aux: PyTree = None
    """What the loss reports beside itself, if anything: leaves have an axis of nt, as ``losses``,
    and are of the same lane."""

    def price(self, u: float = 0.0) -> Array | np.ndarray:
        """Gradients + forward passes / 3 + learned updates times u: what was spent, in gradients.

        u is the measured cost of one learned update in gradients of the task; 0: not counted.
        """
        # Quotients are floats: strict promotion adds no integers to these.
        return self.gradients / 1 + self.forwards / 3 + u * (self.learned_updates / 1)


class Guard(NamedTuple):
    """``init(params, extra=None) -> state``, ``step(state, loss, minibatches) -> state, decision``.

    Both are pure, and one step is one cycle; jit, vmap and scan work on it.

    - ``minibatches``: a pytree of arrays whose first axis are the minibatches of the cycle, in
      their order. None: they are their numbers, from ``state.minibatches`` on, for a loss that
      draws its data by number, or needs none.
    - ``loss(params, minibatch)``: a scalar, or a tuple of the scalar and what to report of it,
      which is then in ``decision.aux``.
    - ``extra``: what a forward pass changes and the optimizer doesn't: BatchNorm's statistics, a
      hidden state, a random key; any pytree of arrays. With it the loss is ``loss(params, extra,
      minibatch)``, and returns ``(scalar, extra)`` or ``(scalar, extra, aux)``. Each lane has its
      own, ``state.extra`` is that of ``state.params``.
    """

    init: Callable[..., GuardState]
    step: Callable[..., tuple[GuardState, Decision]]
    per_cycle: int
    """Minibatches that a cycle takes."""


def advance(
    count: Int[Array, "..."], by: Int[Array, ""] | Bool[Array, ""] | int
) -> Int[Array, "..."]:
    """Counts after ``by`` more, one more where it is true; they stay at the largest number."""
    dtype = jnp.result_type(count)
    by, most = jnp.asarray(by).astype(dtype), min(MOST, jnp.iinfo(dtype).max)
    return jnp.where(count > most - by, most, count + by).astype(dtype)


def following(i: Int[Array, ""], by: int) -> Int[Array, ""]:
    """The number of the minibatch ``by`` later; 0 if a cycle from there would pass the largest."""
    return jnp.where(i > MOST - 2 * by, 0, i + by).astype(jnp.int32)


def wide(*dtypes: Any) -> jnp.dtype:
    """The widest of these, float32 at least; under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)

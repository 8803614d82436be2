"""When does x go back to its best? A rule over training losses, at longer intervals than a cycle.

A check can't see what each of many cycles spoils a little, late in a run, where a few hard examples
make up the loss. Over a hundred cycles' training losses it shows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..validation import check_count, check_tolerance
from .branch import Branch
from .protocol import Objective
from .soundness import keep_schedules, select


class RatchetState(NamedTuple):
    """b, and how x has done against it."""

    best: Branch
    """b, the best x so far, and the state of lane z there."""
    cycles: Int[Array, ""]
    """Since they were last compared."""
    kept: Float[Array, ""]
    """X, the sum of x's training losses since."""
    held: Float[Array, ""]
    """B, that of b on the same minibatches."""
    anew: Bool[Array, ""]
    """Whether x went back, and the learned optimizers are to begin anew when they run next."""


def init_ratchet(start: Branch, zero: Float[Array, ""]) -> RatchetState:
    """The state before the first cycle. ``zero`` has the dtype of the sums."""
    return RatchetState(start, jnp.int32(0), zero, zero, jnp.array(False))


class Ratchet(NamedTuple):
    """How x is compared with its best."""

    cycles: int
    tolerance: float

    def compare(self, state: RatchetState) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether x is the new best, and whether it goes back to the old one."""
        due = state.cycles >= self.cycles
        bound = state.held + self.tolerance * jnp.abs(state.held)
        return due & (state.kept <= state.held), due & ~(state.kept <= bound)

    def update(
        self,
        state: RatchetState,
        x: Branch,
        losses: Float[Array, " most"],
        objective: Objective,
        i: Int[Array, ""],
        steps: Int[Array, ""] | int,
        *,
        was_own: Bool[Array, ""],
        is_own: Bool[Array, ""],
        stayed: Bool[Array, ""],
    ) -> tuple[RatchetState, Branch, Bool[Array, ""], Int[Array, ""]]:
        """After a cycle: x and lane z's state, whether x went back, and forward passes of b.

        Args:
            state: before it.
            x: after it, with lane z's state.
            losses: of the kept branch, before each step.
            objective: whose ``steps`` minibatches from i on were trained on.
            was_own: whether x was on the fallback's own path before the cycle.
            is_own: whether it is now.
            stayed: whether no branch was kept, so that nothing is known of x.
        """
        counted = jnp.where(was_own, 0, steps)

        def add(t: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            kept, held = sums
            now = jnp.asarray(objective(state.best.params, i + t), held.dtype)
            known = jnp.isfinite(now) & ~stayed
            return (
                kept + jnp.where(known, losses[t].astype(kept.dtype), 0),
                held + jnp.where(known, now, 0),
            )

        kept, held = jax.lax.fori_loop(0, counted, add, (state.kept, state.held))
        seen = state._replace(cycles=state.cycles + 1, kept=kept, held=held)
        better, back = self.compare(seen)
        with_x = was_own | is_own  # b goes with x on the fallback's own path
        back &= ~with_x
        best = Branch(state.best.params, keep_schedules(state.best.state, x.state))
        x = select(back, best, x)
        best = select(with_x | better, x, state.best)
        over = with_x | (seen.cycles >= self.cycles)
        cycles, kept, held = (jnp.where(over, 0, n) for n in (seen.cycles, kept, held))
        return RatchetState(best, cycles, kept, held, state.anew | back), x, back, counted


def ratchet(*, cycles: int = 100, tolerance: float = 0.1) -> Ratchet:
    """Go back to the best x where the losses since are higher than its own would have been.

    Every ``cycles`` cycles, with b the best x so far:

        X <- sum F(x's branch, i+t);  B <- sum F(b, i+t)    over all steps with a finite F(b, i+t)
        b <- x   if X <= B;     x <- b   if X > B + tolerance |B|

    b's losses are on the same minibatches, before each step, so that the two are compared without
    the noise that they share. b is x where this is on the fallback's own path.

    Args:
        cycles: between two comparisons.
        tolerance: by how much x's losses may be higher, relative to those of its best.

    Raises:
        ValueError: if cycles is not an integer of at least 1, or tolerance is not at least 0 and
            finite.

    >>> import optax
    >>> from lossguard import loss_guard
    >>> guard = loss_guard(optax.sgd(3.0), optax.sgd(0.1), ratchet=ratchet(cycles=100))
    """
    return Ratchet(check_count("cycles", cycles), check_tolerance(tolerance))

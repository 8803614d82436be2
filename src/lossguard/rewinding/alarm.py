"""When a run has become worse than it was: a bounded count of losses above a robust threshold.

A block is B losses of steps that were taken. Letters: m and q the median and the 0.95 quantile of a
block; a the level at the start, the median of the first B // 8 losses; r the reference, the lowest
m + 2 (q - m) of all blocks that ended in calm. Losses fall so fast in the first block that its last
quarter counts as a block as well, until another block has ended in calm. The threshold is

    r + rise * max(0, a - r)

so a loss counts if it is above the noise of the best block and has given back a share ``rise`` of
the progress since the start. The score goes up by 1 with every loss that counts, and down by 1,
never below 0, with every other one. At B // 2 there is an alarm. One outlier, however large, moves
the score by 1; so does a loss that isn't finite, or a step that can't be taken.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Alarm(NamedTuple):
    """What the alarm remembers."""

    losses: Float[Array, " block"]
    """Losses of the present block."""
    filled: Int[Array, ""]
    """How many of them are there."""
    start: Float[Array, ""]
    """a, the level at the start; NaN before the end of the first block."""
    reference: Float[Array, ""]
    """r; infinite before the end of the first block, and after ``forget``."""
    early: Float[Array, ""]
    """That of the first block's last quarter, while it counts; else infinite."""
    score: Int[Array, ""]
    """Losses above the threshold, less those below it; 0 at least."""

    @property
    def block(self) -> int:
        """B, losses a block."""
        return self.losses.shape[-1]

    @property
    def rings(self) -> Bool[Array, ""]:
        """Whether there is an alarm."""
        return self.score >= self.block // 2

    @property
    def is_calm(self) -> Bool[Array, ""]:
        """Whether so few losses count that the block may serve as a reference."""
        return self.score <= self.block // 8


def silent(block: int) -> Alarm:
    """An alarm that has heard nothing."""
    none, unknown, highest = jnp.int32(0), jnp.array(jnp.nan, float), jnp.array(jnp.inf, float)
    return Alarm(jnp.zeros(block), none, unknown, highest, highest, none)


def hear(
    alarm: Alarm, loss: Float[Array, ""], sound: Bool[Array, ""], rise: float | Float[Array, ""]
) -> Alarm:
    """Count one loss. It counts if it is high, or ``sound`` is false."""
    reference = jnp.minimum(alarm.reference, alarm.early)
    progress = alarm.start - reference
    margin = jnp.where(progress > 0, rise * progress, 0)  # of NaN and -inf: 0
    counts = ~sound | ~(loss <= reference + margin)
    return alarm._replace(score=jnp.maximum(alarm.score + jnp.where(counts, 1, -1), 0))


def keep(alarm: Alarm, loss: Float[Array, ""]) -> Alarm:
    """Write the loss of a step that is taken down in the present block."""
    return alarm._replace(losses=alarm.losses.at[alarm.filled].set(loss), filled=alarm.filled + 1)


def end_block(alarm: Alarm) -> Alarm:
    """Begin a block. The one that ends becomes the reference if it ended in calm and is lower."""
    size, is_first = alarm.block, jnp.isnan(alarm.start)
    level = jnp.sort(alarm.losses[: size // 8])[(size // 8 - 1) // 2]
    lowest = jnp.minimum(_edge(alarm.losses), alarm.reference)
    early = jnp.where(is_first, _edge(alarm.losses[-(size // 4) :]), jnp.inf)
    return alarm._replace(
        filled=jnp.int32(0),
        start=jnp.where(is_first, level, alarm.start),
        reference=jnp.where(alarm.is_calm, lowest, alarm.reference),
        early=jnp.where(alarm.is_calm, early, alarm.early),
    )


def _edge(losses: Float[Array, " n"]) -> Float[Array, ""]:
    """m + 2 (q - m)."""
    size, ordered = len(losses), jnp.sort(losses)
    median, high = ordered[-(-size // 2) - 1], ordered[-(-19 * size // 20) - 1]
    return median + 2 * (high - median)


def quiet(alarm: Alarm, *, forget: Bool[Array, ""]) -> Alarm:
    """After an alarm: begin a block at score 0; ``forget`` the reference, or keep it."""
    return alarm._replace(
        filled=jnp.int32(0),
        reference=jnp.where(forget, jnp.inf, alarm.reference),
        early=jnp.where(forget, jnp.inf, alarm.early),
        score=jnp.int32(0),
    )

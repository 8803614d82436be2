"""Optimizers that do the guards the worst that an optimizer can do, and unusual parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

FAULTS = ("parameters", "losses", "state")


class Faulty(NamedTuple):
    clock: optax.ScaleByScheduleState
    """Steps so far; a schedule's, so that it goes on whatever becomes of the state."""
    memory: Array
    """A number that later updates depend on."""


def constant(update: float) -> optax.GradientTransformation:
    """Adds the same number to every parameter, whatever the gradient."""

    def step(updates, state, params=None):
        return jax.tree.map(lambda g: jnp.full_like(g, update), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), step)


def faulty(rate: float, *, at: Array | int, fault: Array | str, value: Array | float):
    """SGD, but for step number ``at``, which has a fault.

    Fault "parameters" adds ``value`` to them, "losses" leaps 1,000 away to where the loss may not
    be finite, "state" makes the memory ``value``, which spoils all updates after.
    """
    number = FAULTS.index(fault) if isinstance(fault, str) else fault

    def step(updates, state, params=None):
        now = state.clock.count == at
        bad = jnp.where(number == 0, value, 1_000.0)
        extra = jnp.where(now & (number < 2), bad, 0.0)
        stepped = jax.tree.map(
            lambda g: (-rate * g + extra + state.memory).astype(g.dtype), updates
        )
        memory = jnp.where(now & (number == 2), value, state.memory).astype(state.memory.dtype)
        return stepped, Faulty(optax.ScaleByScheduleState(state.clock.count + 1), memory)

    def init(params: PyTree) -> Faulty:
        return Faulty(optax.ScaleByScheduleState(jnp.int32(0)), jnp.float32(0))

    return optax.GradientTransformation(init, step)


HOSTILE = ("ascends", "wanders", "turns", "overflows", "dawdles", "creeps", "breaks", "idles")


def hostile(
    which: Array | int, rate: Array | float = 0.5, turn: int = 100
) -> optax.GradientTransformation:
    """One of ``HOSTILE``; all of them in one, so that one compiled loop plays them all.

    "ascends": up the gradient; "wanders": anywhere; "turns": descends at ``rate`` for ``turn``
    steps, then leaps up; "overflows": ever farther, to infinity and NaN; "dawdles": lowers the loss
    a tiny bit for ever; "creeps": descends likewise, then slowly climbs; "breaks": likewise, then
    its memory is NaN; "idles": does nothing.
    """

    def init(params: PyTree) -> tuple[Array, Array]:
        return jnp.int32(0), jnp.float32(0)

    def step(updates, state, params=None):
        steps, memory = state
        descends = steps < turn

        def one(g: Array) -> Array:
            # From a table: to draw inside takes long to compile.
            table = np.random.default_rng(0).standard_normal((1000, *g.shape))
            noise = jnp.asarray(table, g.dtype)[steps % len(table)]
            growth = 10.0 ** (20.0 * steps)
            choices = (
                0.1 * g,
                noise,
                jnp.where(descends, -rate, 1e3) * g,
                growth * (growth - g),
                -1e-9 * g,
                jnp.where(descends, -rate, rate / 20) * g,
                -rate * g + memory,
                jnp.zeros_like(g),
            )
            return jnp.select([which == j for j in range(len(choices))], choices).astype(g.dtype)

        broken = ~descends & (which == HOSTILE.index("breaks"))
        memory = jnp.where(broken, jnp.nan, 0).astype(memory.dtype)
        return jax.tree.map(one, updates), (steps + 1, memory)

    return optax.GradientTransformation(init, step)


@jax.tree_util.register_pytree_node_class
class Weights:
    """Parameters of a class that compares by identity."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

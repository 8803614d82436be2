"""How much of a loss at a mark is chance: Adam, and Adam from weights a rounding error away.

    lossguard run examples/twins.py:of_adam --dataset spirals
    lossguard run examples/twins.py:of_adam --dataset circles

No guard that leaves its fallback's path can be held to more than this: a twin of the fallback is
neither better nor worse than it, and differs by as much.
"""

import jax
import optax

from lossguard import Guard, unguarded
from lossguard.experiments import Experiment
from lossguard.guards.protocol import Params

TWINS = 4
APART = 1e-6
"""By how much of itself each weight is moved."""


def moved(guard: Guard, number: int) -> Guard:
    """The same guard from weights that are moved up or down, each twin's in its own way."""

    def twin(leaf: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(jax.random.key(number), leaf.shape, leaf.dtype)
        return leaf * (1 + APART * signs)

    def init(params: Params):
        return guard.init(jax.tree.map(twin, params))

    return Guard(init, guard.step)


def methods(e: Experiment):
    """Adam, and its twins."""
    adam = unguarded(optax.adam(e.adam_rate), nt=e.nt, trusted=True)
    twins = {f"twin {n}": lambda n=n: moved(adam, n) for n in range(1, 1 + TWINS)}
    return {"Adam": lambda: adam} | twins


def of_adam() -> Experiment:
    """At the rate of figures 4 and 5."""
    names = ("Adam", *(f"twin {n}" for n in range(1, 1 + TWINS)))
    return Experiment("twins", adam_rate=0.1, steps=100_000, methods=names, make_methods=methods)

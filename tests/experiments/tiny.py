"""A user's own recipe, with a task and an optimizer of its own, and small enough for tests."""

from collections.abc import Callable, Mapping
from functools import cache

import jax
import optax

import lossguard
from lossguard.experiments.experiment import Experiment
from lossguard.guards.loss_guard import Loser
from lossguard.tasks import MLP, moons

CHUNK = 4
"""Cycles: each method takes three chunks."""


def next_mark(step: int) -> int:
    """Iterates are evaluated at the end of each chunk."""
    return (step // 20 + 1) * 20


def recipe() -> Experiment:
    """Three methods on 400 points."""
    return Experiment(
        name="tiny",
        steps=60,
        seeds=2,
        nt=5,
        nc=3,
        batch_size=32,
        methods=("Signs", "L2O", "LGL2O"),
        make_task=make_task,
        make_methods=make_methods,
    )


def number() -> int:
    """No experiment."""
    return 3


def make_task(experiment: Experiment) -> lossguard.Task:
    return lossguard.Task(moons(samples=400), MLP(hidden=(5,)), experiment.batch_size)


def make_methods(experiment: Experiment) -> Mapping[str, Callable[[], lossguard.Guard]]:
    e = experiment
    return {name: lambda guard=guard: guard for name, guard in guards(e.nt, e.nc, e.loser).items()}


@cache
def guards(nt: int, nc: int, loser: Loser) -> dict[str, lossguard.Guard]:
    """Made once, so that what one run compiled is compiled for others in its process too."""
    signs = optax.chain(
        optax.stateless(lambda updates, _: jax.tree.map(jax.numpy.sign, updates)),
        optax.scale(-0.01),
    )
    weights = lossguard.init_lstm_weights(jax.random.key(0), hidden=4, layers=1)
    learned = lossguard.lstm_optimizer(weights)
    return {
        "Signs": lossguard.unguarded(signs, nt=nt),
        "Signs [/-] :x:": lossguard.unguarded(optax.sgd(0.2), nt=nt),
        "L2O": lossguard.unguarded(learned, nt=nt),
        "LGL2O": lossguard.loss_guard(learned, signs, nt=nt, nc=nc, loser=loser),
    }

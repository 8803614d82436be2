"""The paper's experiments, one function each; ``lossguard run NAME`` runs them.

The settings are those of the paper's appendix E; lengths are those of its figures.
"""

from collections.abc import Callable, Mapping

import optax

from ..guards.protocol import Guard
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from .experiment import Experiment

EARLY_AND_LATE = ("SGDnm", "Adam", "L2O", "GL2O", "LGL2O")


def demo() -> Experiment:
    """The shipped learned optimizer on Spirals: the paper's methods, and ours."""
    return Experiment(
        name="demo",
        title="Learned on MNIST + MLP, tested on Spirals + MLP",
        methods=(*EARLY_AND_LATE, "LGL2O over Adam", "Recommended"),
        vectorize=False,
    )


def fig03() -> Experiment:
    """MNIST + MLP: in distribution, data and optimizee."""
    return Experiment(
        name="fig03",
        title="Learned on MNIST + MLP, tested on MNIST + MLP",
        dataset="mnist",
        scaling="unit",
        steps=200_000,
        adam_rate=0.001,
        methods=EARLY_AND_LATE,
    )


def fig04() -> Experiment:
    """Circles + MLP: out of distribution, the data."""
    return Experiment(
        name="fig04",
        title="Learned on MNIST + MLP, tested on Circles + MLP",
        dataset="circles",
        steps=1_000_000,
        methods=EARLY_AND_LATE,
    )


def fig05() -> Experiment:
    """Spirals + MLP: out of distribution, the data, with a plateau that SGD stays on."""
    return Experiment(
        name="fig05",
        title="Learned on MNIST + MLP, tested on Spirals + MLP",
        dataset="spirals",
        steps=1_000_000,
        methods=EARLY_AND_LATE,
    )


def first_steps() -> Experiment:
    """MNIST + MLP: the shipped learned optimizer against grids of SGDnm and Adam, seeds unseen."""
    return Experiment(
        name="first_steps",
        title="The first steps on MNIST + MLP",
        dataset="mnist",
        scaling="unit",
        steps=1_000,
        seed=1_000,
        methods=tuple(first_steps_methods(Experiment("first_steps"))),
        make_methods=first_steps_methods,
    )


def first_steps_methods(experiment: Experiment) -> Mapping[str, Callable[[], Guard]]:
    """SGDnm and Adam at constant rates (Adam's are those of appendix E), and the learned one."""
    nt = experiment.nt
    sgd = {f"SGDnm {rate:g}": optax.sgd(rate) for rate in (0.1, 0.3, 1.0, 3.0)}
    adam = {f"Adam {rate:g}": optax.adam(rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1)}
    made = {
        name: lambda optimizer=optimizer: unguarded(optimizer, nt=nt)
        for name, optimizer in (sgd | adam).items()
    }
    return made | {"L2O": lambda: unguarded(pretrained(experiment.learned), nt=nt)}


RECIPES: Mapping[str, Callable[[], Experiment]] = {
    recipe.__name__: recipe for recipe in (demo, fig03, fig04, fig05, first_steps)
}

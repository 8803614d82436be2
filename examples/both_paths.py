"""The recommended guard beside its fallback alone: the better is followed, and neither is given up.

    lossguard run examples/both_paths.py:spirals        # or circles, mnist, fashion, convnet

When the recommended guard goes back to the fallback's path it forfeits what it had won, so that it
waits until its losses have been higher for a while. ``best_of`` needs no such patience: it follows
the fallback for as long as that is ahead, and the guard goes on meanwhile. It costs one gradient a
step more.
"""

from collections.abc import Callable, Mapping
from functools import partial

import optax

from lossguard import Guard, best_of, pretrained, recommended, unguarded
from lossguard.experiments import Experiment
from lossguard.experiments.beyond import fashion as fashion_mnist
from lossguard.experiments.experiment import Methods, sgd_fallback, with_methods
from lossguard.experiments.recipes import fig03, fig04, fig05, fig06

FALLBACKS: Mapping[str, Callable[[Experiment], optax.GradientTransformation]] = {
    "SGDnm": sgd_fallback,
    "Adam": lambda e: optax.adam(e.adam_rate),
}


def methods(e: Experiment) -> Methods:
    """Each fallback alone, and both paths over it."""

    def alone(name: str) -> Guard:
        return unguarded(FALLBACKS[name](e), nt=e.nt, trusted=True)

    def both(name: str) -> Guard:
        guard = recommended(pretrained(e.learned), FALLBACKS[name](e), nt=e.nt, nc=e.nc)
        return best_of([guard, alone(name)], decay=0.7)

    return {name: partial(alone, name) for name in FALLBACKS} | {
        f"Both over {name}": partial(both, name) for name in FALLBACKS
    }


def on(e: Experiment, steps: int) -> Experiment:
    """An experiment with these methods."""
    name, title = f"both-paths-{e.name}", f"Both paths on {e.tested_on}"
    return with_methods(methods, e, name=name, title=title, steps=steps)


def spirals() -> Experiment:
    """Figure 5's."""
    return on(fig05(), 100_000)


def circles() -> Experiment:
    """Figure 4's."""
    return on(fig04(), 10_000)


def mnist() -> Experiment:
    """Figure 3's."""
    return on(fig03(), 10_000)


def fashion() -> Experiment:
    """The same on Fashion-MNIST."""
    return on(fashion_mnist(), 5_000)


def convnet() -> Experiment:
    """Figure 6's."""
    return on(fig06(), 5_000)

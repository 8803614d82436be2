"""Methods of single experiments: figure 9's fallbacks, and grids of SGDnm and Adam.

Each function is an experiment's ``make_methods``: guards by the names that its records give them.
"""

from collections.abc import Mapping

import optax

from ..guards.loss_guard import loss_guard
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from ..schedules import paper_decay
from .experiment import Experiment, Methods

TAUS = (2_000, 5_000, 10_000, 20_000, 50_000)
"""Time scales of SGDnm's decay in appendix E's grid, in steps."""
ADAM_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Adam's learning rates in appendix E's grid."""
CONV_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""SGDnm's learning rates in figure 10's grid."""


def fallbacks(experiment: Experiment) -> Methods:
    """Figure 9: LGL2O over SGDnm, over SGD with momentum 0.9, and over Adam at several rates."""
    e = experiment
    decay = paper_decay(e.sgd_rate, e.guard_tau)
    optimizers = {
        f"SGDnm {e.sgd_rate:g}": optax.sgd(decay),
        f"SGD {e.sgd_rate:g}": optax.sgd(decay, momentum=0.9),
    } | {f"Adam {rate:g}": optax.adam(rate) for rate in ADAM_RATES}
    return {
        f"LGL2O over {name}": lambda fallback=fallback: loss_guard(
            pretrained(e.learned), fallback, nt=e.nt, nc=e.nc, loser=e.loser
        )
        for name, fallback in optimizers.items()
    }


def appendix_e(experiment: Experiment) -> Methods:
    """Appendix E's grids: SGDnm's time scale of decay at the experiment's rate, and Adam's rate."""
    sgd = {f"SGDnm tau {tau:g}": optax.sgd(paper_decay(experiment.sgd_rate, tau)) for tau in TAUS}
    return _alone(sgd | _adam(), experiment.nt)


def rate_and_decay(experiment: Experiment) -> Methods:
    """Figure 10's grid: SGDnm's learning rate and its time scale of decay."""
    sgd = {
        f"SGDnm {rate:g} tau {tau:g}": optax.sgd(paper_decay(rate, tau))
        for rate in CONV_RATES
        for tau in TAUS
    }
    return _alone(sgd, experiment.nt)


def first_steps(experiment: Experiment) -> Methods:
    """SGDnm at constant rates, Adam at those of appendix E, and the learned optimizer."""
    sgd = {f"SGDnm {rate:g}": optax.sgd(rate) for rate in (0.1, 0.3, 1.0, 3.0)}
    return {
        **_alone(sgd | _adam(), experiment.nt),
        "L2O": lambda: unguarded(pretrained(experiment.learned), nt=experiment.nt),
    }


def _adam() -> dict[str, optax.GradientTransformation]:
    return {f"Adam {rate:g}": optax.adam(rate) for rate in ADAM_RATES}


def _alone(optimizers: Mapping[str, optax.GradientTransformation], nt: int) -> Methods:
    return {
        name: lambda optimizer=optimizer: unguarded(optimizer, nt=nt, trusted=True)
        for name, optimizer in optimizers.items()
    }

"""Celo, a learned optimizer with a schedule of its own, guarded, on the paper's tasks.

Celo (Moudgil et al., TMLR 2025) was meta-trained on four image tasks, with up to 2,000 steps, and
is told how many are planned. Its weights are in its repository:

    git clone https://github.com/amoudgl/celo
    git clone https://github.com/google/learned_optimization
    pip install chex dm-haiku flax gin-config tensorflow
    PYTHONPATH=celo:learned_optimization lossguard run examples/guarded_celo.py:spirals
"""

from dataclasses import dataclass, fields

import jax
import optax
from celo.optimizers.celo import Celo
from celo.utils import init_lopt_from_ckpt
from learned_optimization.optimizers.base import Optimizer
from learned_optimization.optimizers.opt_to_optax import opt_to_optax_opt

from lossguard import best_of, hedged, loss_guard, recommended, unguarded
from lossguard.experiments import Experiment, recipes
from lossguard.experiments.experiment import Methods, sgd_fallback


@dataclass(frozen=True)
class OnCelo(Experiment):
    """An experiment whose learned optimizer is Celo."""

    weights: str = "celo/algoperf/submissions/celo/theta.state"
    """Celo's, as its repository has them."""
    horizon: int = 0
    """Steps that it is told; 0: as many as are taken."""


def for_optax(optimizer: Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the library learned_optimization; VeLO is one too.

    Args:
        optimizer: it.
        steps: how many are planned.
    """
    learned = opt_to_optax_opt(optimizer, num_steps=steps)
    key = jax.random.key(0)  # VeLO asks for one, and draws nothing

    def update(gradients, state, params, *, value, **_):
        return learned.update(gradients, state, params, extra_args={"loss": value, "key": key})

    return optax.GradientTransformationExtraArgs(learned.init, update)


def published(weights: str) -> Optimizer:
    """Celo with these weights, and the settings that they were trained with.

    Args:
        weights: a file; Celo's repository has one.
    """
    architecture = Celo(
        lstm_hidden_size=64,
        initial_momentum_decays=(0.9, 0.99, 0.999),
        initial_rms_decays=(0.999,),
        initial_adafactor_decays=(0.9, 0.99, 0.999),
        param_inits=1,
        train_phase=2,
        summarize_each_layer=False,
    )
    return init_lopt_from_ckpt(architecture, weights)


def methods(e: OnCelo) -> Methods:
    """SGDnm, Adam and Celo alone, and guards of Celo over the other two."""
    celo = for_optax(published(e.weights), e.horizon or e.steps)
    sgd, adam = sgd_fallback(e), optax.adam(e.adam_rate)

    def alone(optimizer):
        return lambda: unguarded(optimizer, nt=e.nt, trusted=optimizer is not celo)

    made = {"SGDnm": alone(sgd), "Adam": alone(adam), "Celo": alone(celo)}
    for over, fallback in {"": sgd, " over Adam": adam}.items():
        made |= {
            f"LGL2O{over}": lambda f=fallback: loss_guard(celo, f, nt=e.nt, nc=e.nc),
            f"Recommended{over}": lambda f=fallback: recommended(celo, f, nt=e.nt),
            f"Hedged{over}": lambda f=fallback: hedged(celo, f, nt=e.nt),
            f"Best of{over}": lambda f=fallback: best_of([alone(celo)(), alone(f)()]),
        }
    return made


def _with_celo(name: str, e: Experiment) -> OnCelo:
    """An experiment of the paper with Celo in the LSTM's place."""
    alone = ("SGDnm", "Adam", "Celo")
    guarded = ("LGL2O", "Recommended", "Hedged", "Best of")
    changes = {
        "name": f"celo-{name}",
        "title": "",
        "scaling": "none" if e.scaling == "none" else "unit",
        "steps": 10_000,
        "methods": (*alone, *guarded, *(f"{method} over Adam" for method in guarded)),
        "make_methods": methods,
    }
    return OnCelo(**{f.name: getattr(e, f.name) for f in fields(e)} | changes)


def mnist() -> OnCelo:
    return _with_celo("mnist", recipes.fig03())


def circles() -> OnCelo:
    return _with_celo("circles", recipes.fig04())


def spirals() -> OnCelo:
    return _with_celo("spirals", recipes.fig05())


def convnet() -> OnCelo:
    return _with_celo("convnet", recipes.fig06())

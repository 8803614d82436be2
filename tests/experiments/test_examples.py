"""The examples of experiments are what they say."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lossguard.command_line import find_recipe
from lossguard.experiments import Experiment

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str):
    """The experiment of a recipe in examples/, as the command line makes it."""
    _, e = find_recipe(f"{EXAMPLES}/{name}", {}, "run", Experiment)
    return e


@pytest.fixture
def without_celo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages' names, so that the example is imported: neither is needed for the tests."""

    def opt_to_optax_opt(rate: float, num_steps: int) -> optax.GradientTransformationExtraArgs:
        """A step of this rate times the loss over the planned steps, as only the stand-in takes."""

        def update(gradients, state, params, *, extra_args):
            size = rate * extra_args["loss"] / num_steps
            return jax.tree.map(lambda g: -size * g, gradients), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    names = {
        "celo.optimizers.celo": {"Celo": lambda **options: None},
        "celo.utils": {"init_lopt_from_ckpt": lambda architecture, path: 0.5},
        "learned_optimization.optimizers.base": {"Optimizer": object},
        "learned_optimization.optimizers.opt_to_optax": {"opt_to_optax_opt": opt_to_optax_opt},
    }
    for name, content in names.items():
        for parent in (name.split(".")[0], name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)


@pytest.mark.usefixtures("without_celo")
def test_celo_gets_the_loss_and_the_planned_steps() -> None:
    e = example("guarded_celo.py:circles")
    assert e.dataset == "circles" and e.steps == 10_000
    guard = replace(e, nt=2, steps=4, methods=("Celo",)).guards()["Celo"]
    state, decision = guard.step(guard.init(jnp.ones(2)), lambda w, i: jnp.sum(w**2))
    w = np.ones(2)
    for loss in np.asarray(decision.losses):
        assert loss == pytest.approx((w**2).sum())
        w -= 0.5 * loss / 4 * 2 * w
    np.testing.assert_allclose(state.params, w, rtol=1e-6)


@pytest.mark.usefixtures("without_celo")
@pytest.mark.parametrize("name", ["mnist", "circles", "spirals", "convnet"])
def test_every_guard_of_celo_is_made(name) -> None:
    assert len(example(f"guarded_celo.py:{name}").guards()) == 11

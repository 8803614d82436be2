"""The examples of experiments are what they say."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lossguard import backoff, loss_guard
from lossguard.command_line import find_recipe
from lossguard.experiments import Experiment
from lossguard.experiments.experiment import paper_methods

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *options: str):
    """The experiment of a recipe in examples/, as the command line makes it."""
    _, e = find_recipe([f"{EXAMPLES}/{name}", *options], {}, "run", Experiment)
    return e


@pytest.mark.parametrize(
    ("reading", "activation", "padding", "features"),
    [
        ("sigmoid", jax.nn.sigmoid, (0, 0, 0), 128),
        ("tanh", jax.numpy.tanh, (0, 0, 0), 128),
        ("padded", jax.nn.relu, (2, 1, 1), 512),
    ],
)
def test_readings_of_the_convnet(reading, activation, padding, features) -> None:
    """Against XLA's own convolutions."""
    e = example(f"convnet_readings.py:{reading}")
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    *layers, head = params = e.model.init((28, 28, 1), 10, jax.random.key(1))
    expected = x
    for layer, p in zip(layers, padding, strict=True):
        expected = jax.lax.conv_general_dilated(
            expected,
            layer.weight,
            (2, 2),
            ((p, p), (p, p)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        expected = activation(expected + layer.bias[:, 0, 0])
    expected = expected.reshape(2, features) @ head.weight.T + head.bias
    np.testing.assert_allclose(e.model.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_arms_with_turns_and_a_radius_of_ones_choice() -> None:
    e = example("spirals_readings.py:arms")
    data = e.make_task(replace(e, turns=2.0, radius=3.0, noise=0.0)).dataset
    radius, angle = polar(data.normalize(data.train.inputs)[data.train.labels == 0])
    assert 2.9 < radius.max() <= 3
    np.testing.assert_allclose(np.cos(angle), np.cos(2 * np.pi * 2 * radius / 3), rtol=0, atol=1e-4)


def test_unscaled_arms() -> None:
    """Their radius is their angle, up to 780 degrees."""
    e = example("spirals_readings.py:unscaled")
    data = e.make_task(replace(e, noise=0.0)).dataset
    radius, angle = polar(data.normalize(data.train.inputs)[data.train.labels == 0])
    assert 13.5 < radius.max() <= np.radians(780)
    np.testing.assert_allclose(np.cos(angle), np.cos(radius), rtol=0, atol=1e-3)


def test_circles_of_ones_choice() -> None:
    e = example("circles_readings.py:first_steps")
    data = e.make_task(replace(e, factor=0.3, noise=0.0)).dataset
    radius, _ = polar(data.normalize(data.train.inputs))
    np.testing.assert_allclose(radius, np.where(data.train.labels == 0, 1, 0.3), rtol=1e-6)


def test_readings_of_the_residual_guard() -> None:
    """Each takes two gradients a step."""
    e = example("residual_readings.py:mnist")
    guards = [guard for name, guard in e.guards().items() if name not in ("SGDnm", "L2O")]
    assert len(guards) == len(e.methods) - 2 == 7
    for guard in guards:
        state = guard.init(jnp.ones(3))
        _, decision = guard.step(state, lambda x, i: jnp.sum((x - 0.1 * i) ** 2))
        assert int(decision.gradients) == 20


def test_twins_begin_a_rounding_error_apart() -> None:
    guards = example("twins.py:of_adam").guards()
    start = np.random.default_rng(0).normal(size=100).astype(np.float32)
    begins = [np.asarray(guard.init(start).params) for guard in guards.values()]
    np.testing.assert_array_equal(begins[0], start)
    np.testing.assert_allclose(begins, [start] * 5, rtol=1.1e-6)
    assert len({begin.tobytes() for begin in begins}) == 5


def test_a_probe_is_warmed_up_with_the_gradients_of_the_cycle_before() -> None:
    """A learned optimizer whose state is the sum of what it has seen, and which always loses."""
    nt, rate = 2, 0.25

    def remember(gradient, total, params, **_):
        return 100 * gradient, total + gradient

    def objective(x, i):
        return jnp.sum((x - i) ** 2)

    learned = optax.GradientTransformationExtraArgs(jnp.zeros_like, remember)
    fallback = optax.with_extra_args_support(optax.sgd(rate))
    guard = loss_guard(
        learned,
        fallback,
        nt=nt,
        nc=1,
        loser="rollback",
        hedge=True,
        probing=backoff(patience=1, start="keep"),
        checks="apart",
    )
    warmed_up = runpy.run_path(str(EXAMPLES / "warming_up.py"))["warmed_up"]
    guard = warmed_up(guard, learned, fallback, nt)
    state, step = guard.init(jnp.zeros(1)), jax.jit(lambda state: guard.step(state, objective))
    probed, began = [], []
    for _ in range(6):
        state, decision = step(state)
        probed.append(bool(decision.learned_updates))
        began.append(float(state.inner[1].lanes.learned[0][0]))
    x, gradients = 0.0, []
    for i in range(12):
        gradients.append(2 * (x - i))
        x -= rate * gradients[-1]
    assert probed == [True, False, True, False, False, True]
    before = [sum(gradients[nt * (cycle - 1) : nt * cycle]) for cycle in range(6)]
    assert began == pytest.approx([0, 0, before[2], before[2], before[2], before[5]])


def test_losses_of_the_iterate_on_the_whole_set() -> None:
    e = replace(example("whole_set.py:circles"), methods=("Recommended",))
    task = e.make_task(e)
    x, objective = task.init(jax.random.key(0)), task.objective(jax.random.key(1))
    guard, plain = e.guards()["Recommended"], paper_methods(e)["Recommended"]()
    state, decision = guard.step(guard.init(x), objective)
    same, reported = plain.step(plain.init(x), objective)
    train = task.dataset.train
    loss = task.loss(state.params, train.inputs, train.labels)
    np.testing.assert_allclose(decision.losses, np.full(10, loss), rtol=1e-5)
    assert not np.allclose(reported.losses, loss, rtol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, state, same)


def polar(points):
    """The radius and the angle of points [n, 2]."""
    return np.linalg.norm(points, axis=1), np.arctan2(points[:, 1], points[:, 0])


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

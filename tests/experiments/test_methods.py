"""Each method is made of the optimizers that its name says, with the experiment's settings."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lossguard
from lossguard import paper_decay
from lossguard.experiments import benchmark_tasks, price, recipes
from lossguard.experiments import experiment as experiments
from lossguard.experiments.experiment import Experiment, Methods, named_task, paper_methods
from lossguard.tasks import MLP

pytestmark = pytest.mark.usefixtures("eager")
E = Experiment(
    "any", nt=3, nc=2, loser="reset", learned="mine", sgd_rate=0.5, sgd_tau=4.0, adam_rate=0.25
)
GUARD = {"nt": 3, "nc": 2, "loser": "reset"}
TRUSTED = {"nt": 3, "trusted": True}
LEARNED = optax.sgd(7.0)
ADAM = optax.adam(0.25)
FALLBACK = optax.sgd(paper_decay(0.5, 4.0))


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards are what they are made of: their optimizers, and their options."""
    for name in ("unguarded", "loss_guard", "residual_guard", "recommended"):
        made = lambda *optimizers, **options: (optimizers, options)  # noqa: E731
        monkeypatch.setattr(experiments, name, made)
    monkeypatch.setattr(experiments, "pretrained", {"mine": LEARNED}.__getitem__)
    monkeypatch.setattr(experiments, "ema", lambda theta: theta)
    monkeypatch.setattr(experiments, "every_step", lambda sequence: (sequence, "every"))


def steps_of(optimizer: optax.GradientTransformation) -> list[float]:
    """Two of them, where the gradient is 1 and then -1."""
    state, w = optimizer.init(jnp.zeros(1)), jnp.zeros(1)
    steps = []
    for gradient in (1.0, -1.0):
        update, state = optimizer.update(jnp.full(1, gradient), state, w)
        steps.append(float(update[0]))
    return steps


def check(made: Methods, name: str, options: Any, *optimizers: Any) -> None:
    found, given = made[name]()  # pyright: ignore
    assert given == options, name
    for ours, expected in zip(found, optimizers, strict=True):
        np.testing.assert_allclose(steps_of(ours), steps_of(expected), rtol=1e-6, err_msg=name)


def test_the_papers() -> None:
    made = paper_methods(E)
    check(made, "SGDnm", TRUSTED, FALLBACK)
    check(made, "Adam", TRUSTED, ADAM)
    check(made, "L2O", {"nt": 3}, LEARNED)
    check(made, "GL2O", {"nt": 3, "sequence": 0.9}, LEARNED, FALLBACK)
    check(made, "GL2O (theta as decay)", {"nt": 3, "sequence": 0.1}, LEARNED, FALLBACK)
    check(made, "GL2O (every step)", {"nt": 3, "sequence": (0.9, "every")}, LEARNED, FALLBACK)
    check(made, "LGL2O", GUARD, LEARNED, FALLBACK)
    check(made, "LGL2O over Adam", GUARD, LEARNED, ADAM)
    check(made, "Recommended", {"nt": 3}, LEARNED, FALLBACK)
    check(made, "Recommended over Adam", {"nt": 3}, LEARNED, ADAM)


@pytest.mark.parametrize(
    ("loser", "after"), [("keep", [-6, -21, -45]), ("reset in every cycle", [-6, -12, -18])]
)
def test_the_memory_of_the_learned_optimizer(loser, after, monkeypatch) -> None:
    """Its steps are its number since it began, three a cycle, which always wins."""
    counting = optax.GradientTransformation(
        lambda params: jnp.int32(0),
        lambda g, n, params=None: (jax.tree.map(lambda w: 0 * w - 1 - n, g), n + 1),
    )
    monkeypatch.setattr(experiments, "pretrained", {"mine": counting}.__getitem__)
    monkeypatch.setattr(experiments, "loss_guard", lossguard.loss_guard)
    guard = experiments.guarded(replace(E, loser=loser), optax.sgd(0.1))()
    state, reached = guard.init(jnp.zeros(1)), []
    for _ in after:
        state, _ = guard.step(state, lambda w, i: w.sum())
        reached.append(float(state.params[0]))
    assert reached == after


def test_what_becomes_of_memory_is_checked() -> None:
    e = replace(E, loser="kept")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="loser must be one of keep, reset, reset in every cycle"):
        experiments.guarded(e, FALLBACK)()


def test_figure_9s() -> None:
    made = recipes.fallback_methods(E)
    check(made, "LGL2O over SGDnm 0.5", GUARD, LEARNED, FALLBACK)
    momentum = optax.sgd(paper_decay(0.5, 4.0), momentum=0.9)
    check(made, "LGL2O over SGD 0.5", GUARD, LEARNED, momentum)
    for rate in (1e-4, 1e-3, 1e-2, 1e-1):
        check(made, f"LGL2O over Adam {rate:g}", GUARD, LEARNED, optax.adam(rate))


@pytest.mark.parametrize(("over", "fallback"), [("sgdnm", FALLBACK), ("adam", ADAM)])
def test_those_compared_at_equal_price(over, fallback, monkeypatch) -> None:
    for module, name in ((price, "hedged"), (experiments, "best_of")):
        monkeypatch.setattr(module, name, lambda *optimizers, **options: (optimizers, options))
    monkeypatch.setattr(price, "pretrained", {"mine": LEARNED}.__getitem__)
    made = price.price_methods(over, E)
    check(made, "Fallback", TRUSTED, fallback)
    check(made, "Learned", {"nt": 3}, LEARNED)
    check(made, "Recommended", {"nt": 3}, LEARNED, fallback)
    check(made, "Hedged", {"nt": 3}, LEARNED, fallback)
    check(made, "LGL2O", GUARD, LEARNED, fallback)
    ((both,), options) = made.pop("Best of both")()  # pyright: ignore
    assert options == {"share": 0.05} and [given for _, given in both] == [TRUSTED, {"nt": 3}]
    for ((ours,), _), expected in zip(both, (fallback, LEARNED), strict=True):
        np.testing.assert_allclose(steps_of(ours), steps_of(expected), rtol=1e-6)
    assert made.keys() == {"Fallback", "Learned", "Recommended", "Hedged", "LGL2O"}


def test_those_of_the_published_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"lstm-mnist-mlp": LEARNED, "mlp-small": optax.sgd(9.0)}
    for module in (experiments, benchmark_tasks):
        monkeypatch.setattr(module, "pretrained", weights.__getitem__)
    monkeypatch.setattr(
        benchmark_tasks, "unguarded", lambda *optimizers, **given: (optimizers, given)
    )
    monkeypatch.setattr(experiments, "best_of", lambda *guards, **given: (guards, given))
    monkeypatch.setattr(
        benchmark_tasks, "rewind", lambda learned: optax.chain(learned, optax.scale(2.0))
    )
    monkeypatch.setattr(benchmark_tasks, "watched", lambda made: made)
    made = benchmark_tasks.task_methods(replace(E, name="ImageMLP_FashionMnist8_Relu32"))
    adam = {rate: optax.adam(rate) for rate in (0.01, 0.03, 0.25)}
    check(made, "Adam 0.01", TRUSTED, adam[0.01])
    check(made, "Adam 0.03", TRUSTED, adam[0.03])
    for name, learned in {"LSTM": LEARNED, "MLP": weights["mlp-small"]}.items():
        check(made, name, {"nt": 3}, learned)
        check(made, f"{name}, guarded", {"nt": 3}, learned, adam[0.25])
    learned = weights["mlp-small"]
    check(made, "MLP, rewind", {"nt": 3}, optax.chain(learned, optax.scale(2.0)))
    ((both,), options) = made["MLP, best of"]()  # pyright: ignore
    assert options == {"share": 0.05}
    for ((ours,), _), expected in zip(both, (learned, adam[0.25]), strict=True):
        np.testing.assert_allclose(steps_of(ours), steps_of(expected), rtol=1e-6)
    assert len(made) == 8


def test_grids() -> None:
    for tau in (2_000, 50_000):
        name = f"tau {tau}"
        check(recipes.grid_methods(E), f"SGDnm {name}", TRUSTED, optax.sgd(paper_decay(0.5, tau)))
        for rate in (1e-4, 1.0):
            sgd = optax.sgd(paper_decay(rate, tau))
            check(recipes.rate_methods(E), f"SGDnm {rate:g} {name}", TRUSTED, sgd)
    for rate in (1e-4, 1e-1):
        check(recipes.grid_methods(E), f"Adam {rate:g}", TRUSTED, optax.adam(rate))


def test_the_task_has_the_experiments_settings() -> None:
    model = MLP((3,))
    e = replace(E, dataset="moons", scaling="standardized", model=model, batch_size=16)
    task = named_task(e)
    assert (task.dataset.name, task.model, task.batch_size) == ("moons", model, 16)
    scaled = task.dataset.normalize(task.dataset.train.inputs)
    np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-4)

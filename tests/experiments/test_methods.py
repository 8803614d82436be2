"""Each method is made of the optimizers that its name says, with the experiment's settings."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lossguard.experiments.beyond import ABLATION, ablation_methods, candidates_methods

from lossguard import Guard, paper_decay, track_record, unguarded
from lossguard.experiments import beyond, recipes
from lossguard.experiments import experiment as experiments
from lossguard.experiments.experiment import Experiment, Methods, named_task, paper_methods
from lossguard.tasks import MLP

guarding = import_module("lossguard.guards.recommended")

E = Experiment(
    "any",
    nt=3,
    nc=2,
    loser="rollback",
    learned="mine",
    sgd_rate=0.5,
    sgd_tau=4.0,
    guard_tau=9.0,
    adam_rate=0.25,
)
WINDOW = {"nt": 3, "nc": 2}
GUARD = WINDOW | {"loser": "rollback"}
TRUSTED = {"nt": 3, "trusted": True}
LEARNED = optax.sgd(7.0)
ADAM = optax.adam(0.25)
ALONE, FALLBACK = (optax.sgd(paper_decay(0.5, tau)) for tau in (4.0, 9.0))


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards are what they are made of: their optimizers, and their options."""
    for module in (experiments, recipes, beyond):
        for name in ("unguarded", "loss_guard", "residual_guard", "recommended"):
            made = lambda *optimizers, **options: (optimizers, options)  # noqa: E731
            monkeypatch.setattr(module, name, made, raising=False)
        monkeypatch.setattr(module, "pretrained", {"mine": LEARNED}.__getitem__)
    monkeypatch.setattr(experiments, "ema", lambda theta: theta)


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
        several = isinstance(expected, list)
        pairs = zip(ours, expected, strict=True) if several else [(ours, expected)]
        for one, other in pairs:
            np.testing.assert_allclose(steps_of(one), steps_of(other), rtol=1e-6, err_msg=name)


@pytest.mark.usefixtures("eager")
def test_the_papers() -> None:
    made = paper_methods(E)
    check(made, "SGDnm", TRUSTED, ALONE)
    check(made, "Adam", TRUSTED, ADAM)
    check(made, "L2O", {"nt": 3}, LEARNED)
    check(made, "GL2O", {"nt": 3, "sequence": 0.9}, LEARNED, FALLBACK)
    check(made, "GL2O (theta as decay)", {"nt": 3, "sequence": 0.1}, LEARNED, FALLBACK)
    check(made, "LGL2O", GUARD | {"hedge": False}, LEARNED, FALLBACK)
    check(made, "LGL2O over Adam", GUARD | {"hedge": False}, LEARNED, ADAM)
    check(made, "Hedged over Adam", GUARD | {"hedge": True}, LEARNED, ADAM)
    check(made, "Recommended", WINDOW, LEARNED, FALLBACK)
    check(made, "Recommended over Adam", WINDOW, LEARNED, ADAM)


@pytest.mark.usefixtures("eager")
def test_figure_9s() -> None:
    made = recipes.fallback_methods(E)
    check(made, "LGL2O over SGDnm 0.5", GUARD, LEARNED, FALLBACK)
    momentum = optax.sgd(paper_decay(0.5, 9.0), momentum=0.9)
    check(made, "LGL2O over SGD 0.5", GUARD, LEARNED, momentum)
    for rate in (1e-4, 1e-3, 1e-2, 1e-1):
        check(made, f"LGL2O over Adam {rate:g}", GUARD, LEARNED, optax.adam(rate))


@pytest.mark.usefixtures("eager")
def test_grids() -> None:
    for tau in (2_000, 50_000):
        name = f"tau {tau}"
        check(recipes.grid_methods(E), f"SGDnm {name}", TRUSTED, optax.sgd(paper_decay(0.5, tau)))
        for rate in (1e-4, 1.0):
            sgd = optax.sgd(paper_decay(rate, tau))
            check(recipes.rate_methods(E), f"SGDnm {rate:g} {name}", TRUSTED, sgd)
    for make in (recipes.grid_methods, recipes.first_step_methods):
        for rate in (1e-4, 1e-1):
            check(make(E), f"Adam {rate:g}", TRUSTED, optax.adam(rate))
    check(recipes.first_step_methods(E), "SGDnm 0.3", TRUSTED, optax.sgd(0.3))
    check(recipes.first_step_methods(E), "L2O", {"nt": 3}, LEARNED)


@pytest.mark.usefixtures("eager")
def test_options_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an option says goes before what the experiment does."""
    monkeypatch.setattr(beyond, "best_of", lambda guards: ((), {"best of": guards}))
    made = ablation_methods(E)
    for name, options in ABLATION.items():
        check(made, name, GUARD | options, LEARNED, FALLBACK)
    check(made, "Recommended", WINDOW, LEARNED, FALLBACK)
    check(made, "SGDnm", TRUSTED, ALONE)
    _, two = made["Best of two"]()  # pyright: ignore
    assert [options for _, options in two["best of"]] == [WINDOW, GUARD | {"hedge": True}]
    _, parts = made["Best of its parts"]()  # pyright: ignore
    assert [options for _, options in parts["best of"]] == [{"nt": 3}, TRUSTED]


def test_options_are_those_of_their_names() -> None:
    assert ABLATION["the paper's"] == {}
    for loser in ("rollback", "reset"):
        assert ABLATION[f"loser {loser}"] == {"loser": loser}
        assert ABLATION[f"hedge, {loser}"] == {"hedge": True, "loser": loser}
        assert ABLATION[f"record, {loser}"] == {"hedge": beyond.RECORD, "loser": loser}
    assert (ABLATION["hedge"], ABLATION["hedge only"]) == ({"hedge": True}, {"hedge": "only"})
    assert ABLATION["record"] == {"hedge": beyond.RECORD}
    assert track_record(decay=0.9, share=0) == beyond.RECORD
    clear = jnp.array([[1.0, 1.5]]), jnp.int32(2)  # at 94 %
    assert ABLATION["paired"]["criterion"].test(*clear)[0].tolist() == [False]  # pyright: ignore


def test_options_without_one_of_the_recommended_guards() -> None:
    """Each differs from what ``recommended`` gives to ``loss_guard`` in what its name says."""
    given: dict[str, Any] = {}

    def made(*_: Any, **options: Any) -> Guard:
        given.update(options)
        return unguarded(ADAM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarding, "loss_guard", made)
        guarding.recommended(LEARNED, FALLBACK, nt=3, nc=10)

    def plain(options: Any) -> dict[str, Any]:
        """Functions are made anew each time."""
        criterion, probing = options["criterion"], options["probing"]
        return {**options, "criterion": criterion.looks, "probing": (probing.start, len(probing))}

    right = plain(given)
    for name, changes in {
        "nc 10 at most": {"criterion": None},
        "nc 80 at most": {"criterion": (10, 20, 40, 80)},
        "decay 0.9": {"hedge": track_record(decay=0.9, share=0)},
        "no ratchet": {"ratchet": None},
        "share 0": {"hedge": track_record(decay=0.7, share=0)},
        "checks next": {"checks": "next"},
        "patience 10": {},
        "patience 10, keep": {"probing": ("keep", len(given["probing"]))},
    }.items():
        assert plain(ABLATION[f"recommended, {name}"] | WINDOW | {"nc": 10}) == right | changes, (
            name
        )


@pytest.mark.usefixtures("eager")
def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "settings", lambda *given: {"settings": given})
    made = candidates_methods(E)
    several = [LEARNED, optax.adam(25.0), optax.sign_sgd(0.01)]
    names = ("L2O", "Adam, rate too high", "signSGD")
    for name, one in zip(names, several, strict=True):
        check(made, f"{name} guarded", WINDOW, [one], FALLBACK)
    check(made, "All three guarded", WINDOW, several, FALLBACK)
    competing = WINDOW | {"settings": (3, 2, 32)}
    check(made, "All three competing", competing, several, FALLBACK)


def test_the_task_has_the_experiments_settings() -> None:
    model = MLP((3,))
    e = replace(E, dataset="moons", scaling="standardized", model=model, batch_size=16)
    task = named_task(e)
    assert (task.dataset.name, task.model, task.batch_size) == ("moons", model, 16)
    scaled = task.dataset.normalize(task.dataset.train.inputs)
    np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-4)

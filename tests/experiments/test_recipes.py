"""The paper's experiments: each builds and runs, with the settings of the paper's text."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import numpy as np
import pytest

from lossguard.experiments import RECIPES, Experiment
from lossguard.experiments import experiment as experiments
from lossguard.experiments.recipes import PAPERS, SETS
from lossguard.experiments.run import check, run
from lossguard.guards.protocol import Decision, Guard
from lossguard.learned.weights_file import pretrained_names
from lossguard.runs import records
from lossguard.runs.curves import mark_loss, over_seeds
from lossguard.tasks import MLP, ConvNet, Dataset, load_dataset, parquet

GENERATED = ("spirals", "circles", "moons")

# Adam's rate by our grids of appendix E (docs/deviations.md says why).
TABLE = {
    "mnist": {"MLP": 0.01, "Conv": 0.01},
    "circles": {"MLP": 0.1},
    "spirals": {"MLP": 0.1},
    "cifar10": {"Conv": 0.001},
}
# Tables 1 and 2: data set and optimizee.
BOTH = {(name, "MLP") for name in ("mnist", "spirals", "circles")}
BOTH |= {("mnist", "Conv"), ("cifar10", "Conv")}
TABLES = {"table1": {*BOTH, ("tiny_imagenet50_32px", "Conv")}, "table2": BOTH}


def kind(model: MLP | ConvNet) -> str:
    return "MLP" if isinstance(model, MLP) else "Conv"


@pytest.fixture(scope="module", autouse=True)
def first_examples() -> Iterator[None]:
    """Each data set is read once for all recipes, and cut to as many examples as they need.

    The images after those are not decoded but repeated: test_images has all of them.
    """
    decode = parquet._decode

    def first(encoded: list[bytes], source: parquet.ImageSource) -> tuple[np.ndarray, str]:
        pixels, note = decode(encoded[:256], source)
        return np.resize(pixels, (len(encoded), *source.shape)), note

    @cache
    def load(name: str, **options: Any) -> Dataset:
        dataset = load_dataset(name, **options)
        cut = jax.tree.map(lambda array: array[:256], (dataset.train, dataset.test))
        return eqx.tree_at(lambda data: (data.train, data.test), dataset, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_decode", first)
        patch.setattr(parquet, "digest", lambda images: mock.ANY)
        patch.setattr(experiments, "load_dataset", load)
        yield


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_what_it_names(name: str) -> None:
    e = RECIPES[name]()
    assert e.name == name and e.learned in pretrained_names()
    assert tuple(e.guards()) == e.names()


def recipe_here(name: str) -> Experiment:
    """If its data are here."""
    e = RECIPES[name]()
    here = e.dataset in GENERATED
    if not here and not (Path(os.environ.get("LOSSGUARD_DATA", "")) / e.dataset).is_dir():
        pytest.skip(f"LOSSGUARD_DATA names no folder with {e.dataset}")
    return e


@pytest.mark.parametrize("name", PAPERS)
def test_its_methods_fit_its_task(name: str) -> None:
    """One of each kind, as far as shapes and types tell: to compile all would take minutes."""
    e = recipe_here(name)
    check(e)
    task = e.make_task(e)
    kinds = {re.sub(r"[\d.]+", "", method): guard for method, guard in e.guards().items()}
    for guard in kinds.values():

        def cycle(key: jax.Array, guard: Guard = guard) -> Decision:
            return guard.step(guard.init(task.init(key)), task.objective(key))[1]

        assert jax.eval_shape(cycle, jax.random.key(0)).losses.shape == (e.nt,)
    if e.dataset != "cifar10":  # which may be the original or not
        assert bool(task.dataset.note) == (e.dataset == "tiny_imagenet50_32px")
    assert ("resized to 64 x 64" in task.dataset.note) == (name == "fig08")


@pytest.mark.parametrize("name", ["fig05", "fig07", "price-circles-mnist-sgdnm"])
def test_recipe_runs(name: str, tmp_path: Path) -> None:
    """Two cycles of its first method, by its settings and on its data; at equal price of three."""
    e = recipe_here(name)
    methods = e.names()[: 3 if name.startswith("price") else 1]
    short = replace(e, methods=methods, steps=20, seeds=2, batch_size=8)
    config, made, curves = records.read_run(run(short, tmp_path / "run"))
    assert config["name"] == name and tuple(made["seconds"]) == methods
    assert curves["step"].max() == 20 and curves["seed"].n_unique() == 2
    assert curves["loss"].is_finite().all()


@pytest.mark.parametrize("name", [*SETS["table1"], *SETS["table2"]])
def test_settings_of_appendix_e(name: str) -> None:
    e = RECIPES[name]()
    conv = kind(e.model) == "Conv"
    slow = 100 if name in ("fig13", "fig16") else 1  # footnote 5
    assert e.sgd_rate == ((0.0001 if slow == 100 else 0.01) if conv else 3.0)
    assert e.sgd_tau == 50_000 * slow
    if name != "fig08":
        assert e.adam_rate == TABLE[e.dataset][kind(e.model)]
    assert (e.nt, e.nc, e.batch_size, e.seeds, e.seed) == (10, 10, 128, 5, 0)
    assert e.learned == ("lstm-mnist-mlp" if name in SETS["table1"] else "lstm-cifar10-conv")


def test_lengths_are_those_of_the_figures() -> None:
    thousands = {3: 200, 4: 1_000, 5: 1_000, 6: 100, 7: 100, 8: 50, 9: 120, 10: 1}
    thousands |= {12: 200, 13: 100, 14: 1_000, 15: 1_000, 16: 100}
    for number, length in thousands.items():
        assert RECIPES[f"fig{number:02}"]().steps == 1_000 * length
    assert all(RECIPES[name]().steps == 100 for name in SETS["fig02"])


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str) -> None:
    recipes = [RECIPES[name]() for name in SETS[table]]
    assert {(e.dataset, kind(e.model)) for e in recipes} == TABLES[table]
    assert len(recipes) == len(TABLES[table])


def test_grids_are_whole() -> None:
    """All values of appendix E, and the whole rectangle of figure 10."""
    taus = [f"SGDnm tau {tau}" for tau in (2_000, 5_000, 10_000, 20_000, 50_000)]
    adams = [f"Adam {rate}" for rate in ("0.0001", "0.001", "0.01", "0.1")]
    for name in SETS["grids"]:
        e = RECIPES[name]()
        assert e.steps == 300 and e.names() == (*taus, *adams)
    assert len(set(RECIPES["fig10"]().names())) == 5 * 5
    assert "SGDnm 0.01 tau 50000" in RECIPES["fig10"]().names()


def test_the_demo_compares_a_guard_with_its_parts_alone() -> None:
    guards = RECIPES["demo"]().guards()
    assert [*guards] == ["Guarded", "Learned alone", "SGD alone"]


def test_the_guard_of_the_demo_guards(tmp_path: Path) -> None:
    """The learned optimizer fails alone, and the guarded run ends near the lowest loss."""
    run(replace(RECIPES["demo"](), seeds=1, steps=2_000), tmp_path / "run")
    curves = records.read_run(tmp_path / "run").curves
    early, late = (over_seeds(mark_loss(curves, step), "loss") for step in (400, 2_000))
    assert early["Guarded"] < 0.1 * early["SGD alone"]
    assert late["Learned alone"] > 1e3 and late["Guarded"] < 0.02

"""What may be in a meta-training's recipe, and what is refused."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import open_folder
from tiny_training import TINY, same

from lossguard import init_lstm_weights, load_weights, lstm_optimizer
from lossguard.learned.weights_file import pretrained_names
from lossguard.metatrain import bptt, loop
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.metatrain.evolution import MLPTraining
from lossguard.metatrain.family import Member
from lossguard.metatrain.loop import metatrain
from lossguard.metatrain.trainings import RECIPES
from lossguard.runs import records
from lossguard.runs.config import as_config
from lossguard.tasks import MLP
from lossguard.tasks.models import ReluMLP


@pytest.mark.usefixtures("eager")
def test_settings_reach_the_task_and_the_optimizer() -> None:
    config = dataclasses.replace(TINY, scaling="symmetric", scale=0.02, p=7.0)
    task = config.method().task
    assert (float(task.dataset.offset), task.batch_size, task.model) == (8, 16, TINY.model)
    weights, gradient = init_lstm_weights(jax.random.key(0), hidden=4), jnp.array([1e-4, -3.0])
    updates = [
        optimizer.update(gradient, optimizer.init(gradient))[0]
        for optimizer in (config.optimizer(weights), lstm_optimizer(weights, scale=0.02, p=7.0))
    ]
    np.testing.assert_array_equal(*updates)


def without_kinds(config: Any) -> Any:
    """Older records don't have the kinds of models."""
    if isinstance(config, list):
        return [without_kinds(one) for one in config]
    if isinstance(config, dict):
        return {name: without_kinds(one) for name, one in config.items() if name != "kind"}
    return config


CONSTANT = "rescaling", "begin_rate", "validation_rollouts"
"""Fields of records that are constants now."""


def test_shipped_recipes_are_those_of_the_records() -> None:
    results = Path(__file__).parents[2] / "results"
    if not results.is_dir():
        pytest.skip("there are no records here")
    for name, recipe in RECIPES.items():
        if recipe().name not in pretrained_names():
            continue
        folder = results / f"metatrain-{name}"
        config = json.loads((folder / records.CONFIG).read_text())
        ours, config = (without_kinds(one) for one in (as_config(recipe()), config))
        config = {field: value for field, value in config.items() if field not in CONSTANT}
        assert {field: ours[field] for field in config} == config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(
            ({name: 0}, f"^{name} must be an integer of at least 1, got 0$")
            for name in (*loop.COUNTS, *bptt.COUNTS, "batch_size", "hidden", "layers")
        ),
        *(
            ({name: value}, f"^{name} must be positive and finite, got {value}$")
            for name in ("rate", "clip", "scale")
            for value in (0.0, np.inf)
        ),
        *(
            ({name: 1}, f"^{name} must be an integer of at least 2, got 1$")
            for name in loop.LENGTHS
        ),
        ({"longest": 10**11}, "^longest must be at most 1000000000, got 100000000000$"),
        ({"hidden": 10_001}, "^hidden must be at most 10000, got 10001$"),
        ({"layers": 101}, "^layers must be at most 100, got 101$"),
        ({"optimizees": 10_001}, "^optimizees must be at most 10000, got 10001$"),
        ({"b2": 1.0}, "^b2 must be at least 0 and below 1, got 1.0$"),
        ({"b2": -0.1}, "^b2 must be at least 0 and below 1, got -0.1$"),
        ({"curriculum": -1}, "^curriculum must be an integer of at least 0, got -1$"),
        ({"seed": 2**32}, "^seed must be at most 4294967295, got 4294967296$"),
        ({"seed": -1}, "^seed must be an integer of at least 0, got -1$"),
        ({"shortest": 13}, "^longest must be at least shortest, which is 13, got 12$"),
        ({"batch_size": 2000}, "^batch_size must be between 1 and samples = 1[0-9]*, got 2000"),
        ({"dataset": "digit"}, "did you mean digits"),
        ({"scaling": "none"}, "^scaling must be one of "),
    ],
)
def test_bad_fields_leave_no_folder(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        metatrain(dataclasses.replace(TINY, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unchecked")
def test_lists_are_as_good_as_tuples() -> None:
    member = Member("digits", ReluMLP([16, 8]))
    one = MLPTraining("mine", family=[member], held_out=[member])
    member = Member("digits", ReluMLP((16, 8)))
    other = MLPTraining("mine", family=(member,), held_out=(member,))
    assert one == other and hash(one) == hash(other)


@dataclass(frozen=True)
class Wider(MLP):
    """Another model with the same fields."""


def test_another_model_is_refused(whole: Path) -> None:
    wider = dataclasses.replace(TINY, model=Wider(hidden=TINY.model.hidden))
    reason = r"holds another, which differs in model \(.*'MLP'.*, not .*'Wider'"
    with pytest.raises(ValueError, match=reason):
        metatrain(wider, whole, resume=True)


@dataclass(frozen=True)
class OfAFile(LSTMTraining):
    """A user's own, with a field of its own."""

    file: Any = None


def test_fields_of_ones_own(whole: Path, tmp_path: Path) -> None:
    """A path is told, and goes on; what JSON can't hold leaves no folder."""
    given = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    mine = OfAFile(**given, file=Path("words.txt"))
    open_folder(tmp_path / "run", as_config(mine))
    file = metatrain(mine, tmp_path / "run", resume=True)
    assert records.read_run(file.parent).config["file"] == "words.txt"
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)
    with pytest.raises(ValueError, match=r"^a run must be of numbers, .*, but holds b'words'$"):
        metatrain(dataclasses.replace(mine, file=b"words"), tmp_path / "other")
    assert not (tmp_path / "other").exists()

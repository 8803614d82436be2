"""Configs of runs: plain JSON that tells apart what is not the same."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lossguard.experiments.experiment import Experiment
from lossguard.metatrain.bptt import LSTMTraining
from lossguard.runs.config import as_config
from lossguard.tasks import MLP, ConvNet, Task, moons


def make_task(experiment: Experiment, *, hidden: int = 5) -> Task:
    return Task(moons(samples=400), MLP(hidden=(hidden,)), experiment.batch_size)


def test_config_is_plain_and_tells_models_apart() -> None:
    for run in (Experiment("mine", steps=60), LSTMTraining("mine", meta_steps=60)):
        config = as_config(replace(run, model=ConvNet()))
        assert config["model"]["kind"] == "ConvNet"
        assert 60 in config.values() and "kind" not in config


def test_what_json_has_no_names_for_is_refused() -> None:
    given = functools.partial(make_task, {(1, 2): 3})
    with pytest.raises(ValueError, match=r"^names in a mapping must be strings or numbers, got "):
        as_config(Experiment("mine", make_task=given))


def test_config_has_functions_by_their_names() -> None:
    config = as_config(Experiment("mine", make_task=make_task))
    assert config["make_task"] == f"{__name__}:make_task"
    config = as_config(Experiment("mine", make_task=functools.partial(make_task, hidden=3)))
    assert config["make_task"] == f"{__name__}:make_task(hidden=3)"
    nested = functools.partial(make_task, make_task, "a", of=functools.partial(make_task, 1))
    config = as_config(Experiment("mine", make_task=nested))
    inner = f"'{__name__}:make_task'", "'a'", f"of='{__name__}:make_task(1)'"
    assert config["make_task"] == f"{__name__}:make_task({', '.join(inner)})"


def test_config_has_paths_and_arrays_as_json_does() -> None:
    e = Experiment("mine", learned=Path("a/b.safetensors"), steps=np.int64(60))
    config = as_config(replace(e, sgd_rate=jnp.ones(2)))
    assert config["learned"] == str(Path("a/b.safetensors"))
    assert config["steps"] == 60 and config["sgd_rate"] == [1.0, 1.0]
    assert json.loads(json.dumps(config)) == config

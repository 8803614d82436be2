"""A meta-training that is stopped or killed, and goes on."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import TINY, same, stopping

from lossguard import load_weights
from lossguard.metatrain import loop
from lossguard.metatrain.bptt import Backpropagation
from lossguard.metatrain.loop import metatrain
from lossguard.runs import folder as run_folder
from lossguard.runs import records
from lossguard.tasks import Dataset

VALIDATE = Backpropagation.validate


@pytest.mark.parametrize(
    ("at", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (3, signal.SIGINT)]
)
def test_stopped_it_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch, at, number) -> None:
    """Between two validations, and at one; no meta-step is lost."""
    monkeypatch.setattr(loop.Progress, "seconds", 10.0)  # of each part
    done = stopping(monkeypatch, at, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        metatrain(TINY, tmp_path / "run")
    started = json.loads((tmp_path / "run" / run_folder.STARTED).read_text())
    with pytest.raises(ValueError, match=r"add --resume to go on with it$"):
        metatrain(TINY, tmp_path / "run")
    file = metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 4, 5]
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)
    found, expected = (records.read_run(folder)[2] for folder in (file.parent, whole))
    assert found.equals(expected) and found.schema == expected.schema

    _, made, _ = records.read_run(file.parent)
    assert made["seconds"] == 20
    assert made == {**made, **started} and [*made["resumed"][0]] == ["time", "commit"]
    assert load_weights(file).made["time"] == started["time"]
    assert not (file.parent / run_folder.STARTED).exists()


@pytest.mark.parametrize("look", [2, 3, 4])
def test_a_signal_between_two_looks_at_it_loses_nothing(tmp_path, monkeypatch, look) -> None:
    looks: list[int] = []

    @contextmanager
    def stopping_at_a_look() -> Iterator[Callable[[], bool]]:
        yield lambda: bool(looks.append(1)) or len(looks) >= look

    done = stopping(monkeypatch, -1, lambda: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "stopping_at_interrupt", stopping_at_a_look)
        metatrain(TINY, tmp_path / "run")
    metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 4, 5]


def test_what_was_saved_a_minute_ago_is_not_done_again(whole, tmp_path, monkeypatch) -> None:
    def lost() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    done = stopping(monkeypatch, 4, lost)
    with pytest.raises(OSError, match="the disk is gone"):
        metatrain(TINY, tmp_path / "run")
    file = metatrain(TINY, tmp_path / "run", resume=True)
    assert done == [0, 1, 2, 3, 3, 4, 5]
    assert same(load_weights(file).weights, load_weights(whole / loop.WEIGHTS).weights)


def test_killed_while_it_validates_it_has_saved(whole, tmp_path, monkeypatch) -> None:
    done = stopping(monkeypatch, -1, lambda: None)
    for lost in range(1, 4):  # its first validation, its second one, ...
        validations = []

        def validate(*arguments: Any, so_far: list = validations, lost: int = lost) -> Any:
            so_far.append(1)
            if len(so_far) == lost:
                raise OSError("killed")
            return VALIDATE(*arguments)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
            patch.setattr(Backpropagation, "validate", validate)
            metatrain(TINY, tmp_path / str(lost))
        file = metatrain(TINY, tmp_path / str(lost), resume=True)
        assert done == [0, 1, 2, 3, 4, 5]
        done.clear()
        found, expected = (records.read_run(folder)[2] for folder in (file.parent, whole))
        assert found.equals(expected)


def test_its_progress_moves_with_every_meta_step(tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(
        loop.Progress, "advance", lambda _, steps, **now: told.append((steps, now["meta-loss"]))
    )
    metatrain(TINY, tmp_path / "run")
    assert [steps for steps, _ in told] == [1] * 6
    assert np.isfinite([loss for _, loss in told]).all()


def test_other_data_than_it_was_started_with_is_refused(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopping(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        metatrain(TINY, tmp_path / "run")
    monkeypatch.setattr(Dataset, "checksum", lambda _: "of other data")
    with pytest.raises(
        ValueError,
        match=r"^a run must go on with what it was started with, but the data changed since .*run "
        r"was started: choose another --out, or put back what there was$",
    ):
        metatrain(TINY, tmp_path / "run", resume=True)


def test_finished_it_is_left_as_it_is(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert metatrain(TINY, whole, resume=True) == whole / loop.WEIGHTS
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before

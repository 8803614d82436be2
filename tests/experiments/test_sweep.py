"""Sweeps: what is skipped, resumed and recorded as failed; kill -9 for real; a cluster of two."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny_run import open_folder, same_curves

from lossguard import Task
from lossguard.experiments import Experiment, recipes
from lossguard.experiments import run as running
from lossguard.experiments import sweep as sweeping
from lossguard.experiments.run import run
from lossguard.experiments.sweep import Outcome, sweep
from lossguard.runs import records
from lossguard.runs.locks import locked

MODULE = Path(tiny.__file__)
FIRST = dataclasses.replace(tiny.recipe(), seeds=1, methods=("Signs",))
SECOND = dataclasses.replace(FIRST, seed=7)


def test_each_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, both = tmp_path / "runs", {"one": FIRST, "two": SECOND}
    assert list(sweep({"one": FIRST}, out)) == [Outcome("one", out / "one", "complete")]
    second = Outcome("two", out / "two", "complete")
    assert list(sweep(both, out)) == [Outcome("one", out / "one", "skipped"), second]
    for name, experiment in both.items():
        same_curves(out / name, run(experiment, tmp_path / "alone" / name))
    assert not list(out.rglob(records.FAILED))
    monkeypatch.setattr(sweeping, "run", None)
    assert [outcome.state for outcome in sweep(both, out)] == ["skipped", "skipped"]


def test_a_failure_is_recorded_until_it_is_mended(tmp_path: Path) -> None:
    def broken(experiment: Experiment) -> Task:
        raise KeyError("no\nsuch data")

    broken.__module__, broken.__qualname__ = "tiny", "make_task"  # the same config
    failing = {"bad": dataclasses.replace(FIRST, make_task=broken), "good": SECOND}
    bad, good = sweep(failing, tmp_path)
    assert (bad.state, good.state, good.reason) == ("failed", "complete", "")
    assert bad.reason == r"KeyError: 'no\nsuch data'"
    record = json.loads((tmp_path / "bad" / "failed.json").read_text())
    assert record["reason"] == bad.reason
    assert "in broken" in record["traceback"] and record["traceback"].startswith("Traceback")

    assert [o.state for o in sweep({"bad": FIRST}, tmp_path)] == ["complete"]
    assert not (tmp_path / "bad" / "failed.json").exists()


def test_a_failure_that_cannot_be_recorded_is_told(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lossguard.experiments.sweep.write_json", full)
    broken = {"a": dataclasses.replace(tiny.recipe(), methods=("nobody",))}
    (outcome,) = sweep(broken, tmp_path)
    assert outcome.state == "failed" and "each of methods must be one of" in outcome.reason


def test_a_folder_in_use_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with locked(tmp_path / "one"):
        (outcome,) = sweep({"one": FIRST}, tmp_path)
        assert outcome.state == "failed"
        assert "one is in use by another process" in outcome.reason
        left = sorted(entry.name for entry in (tmp_path / "one").iterdir())
        assert left == [".lock"]


def test_a_folder_of_another_run_stops_all_before_the_start(tmp_path: Path) -> None:
    open_folder(tmp_path / "two", {"name": "another"})
    with pytest.raises(ValueError, match=r"holds another, .* in name \(another, not tiny\)"):
        list(sweep({"one": FIRST, "two": SECOND}, tmp_path))
    assert not (tmp_path / "one").exists()


def test_settings_that_failed_may_be_corrected(tmp_path: Path) -> None:
    (bad,) = sweep({"one": dataclasses.replace(FIRST, methods=("Sgins",))}, tmp_path)
    assert bad.state == "failed" and "must be one of" in bad.reason
    reason = r"one is not finished: ValueError: each of methods must be one of"
    for read, place in ((records.read_runs, [tmp_path]), (records.read_run, tmp_path / "one")):
        with pytest.raises(ValueError, match=reason):
            read(place)
    (good,) = sweep({"one": FIRST}, tmp_path)
    assert good.state == "complete" and records.read_run(tmp_path / "one").config["steps"] > 0


def test_numbers_out_of_range_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    bad = {"one": FIRST, "two": dataclasses.replace(SECOND, steps=0)}
    with pytest.raises(ValueError, match=r"^steps must be an integer of at least 1, got 0$"):
        next(sweep(bad, tmp_path))
    assert not list(tmp_path.iterdir())


def test_command_runs_sets_with_the_same_options(main, tmp_path, monkeypatch, capsys) -> None:
    made = {"one": lambda: FIRST, "two": lambda: SECOND, "three": lambda: SECOND}
    monkeypatch.setattr("lossguard.experiments.RECIPES", made)
    monkeypatch.setattr(recipes, "SETS", {"both": ("one", "two")})
    mine = f"{MODULE}:recipe"
    arguments = ("sweep", "both", "one", mine, mine, "--out", tmp_path, "--steps", 10)
    main(*arguments, "--methods", "Signs")
    out = capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "recipe", "two"]
    for name, seeds in (("one", 1), ("two", 1), ("recipe", 2)):
        config, _, curves = records.read_run(tmp_path / name)
        assert (config["steps"], config["methods"]) == (10, ["Signs"])
        assert curves["step"].max() == 10 and curves["seed"].n_unique() == seeds
        assert f"records: {tmp_path / name}\n" in out
    main(*arguments, "--methods", "Signs")
    assert capsys.readouterr().out.count("complete already") == 3


def test_command_tells_of_failures_by_its_status(main, tmp_path, monkeypatch, capsys) -> None:
    wrong = dataclasses.replace(FIRST, methods=("SGD",))
    made = {"wrong": lambda: wrong, "right": lambda: SECOND}
    monkeypatch.setattr("lossguard.experiments.RECIPES", made)
    with pytest.raises(SystemExit) as caught:
        main("sweep", "wrong", "right", "--out", tmp_path)
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert f"records: {tmp_path / 'right'}\n" in out
    assert "wrong: ValueError: each of methods must be one of Signs" in err
    assert err.endswith("lossguard: 1 of 2 runs failed\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "sweep needs a recipe, one that lossguard list shows or path/to/module.py:function"),
        (("table3",), "got 'table3' (did you mean table"),
        (("mine.py:recipe", "theirs.py:recipe"), "different names, but two are called recipe"),
        (("OURS", "--ray", "local"), "ray needs a package: pip install 'lossguard[ray]'"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, refused, arguments, reason) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("mine", "theirs"):
        Path(f"{name}.py").write_text(
            "from lossguard.experiments import Experiment\n"
            f"def recipe(): return Experiment({name!r})\n"
        )
    named = (one.replace("OURS", f"{MODULE}:recipe") for one in arguments)
    refused(("sweep", *named), reason)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left <= {"mine.py", "theirs.py", "__pycache__"}


DYING = """
import os, signal, sys

sys.path.insert(0, {folder!r})
import tiny
from lossguard.runs import checkpoints
from lossguard.experiments import run

def recipe():
    run.CHUNK, run.SAVE_SECONDS, run.next_mark = tiny.CHUNK, 0.0, tiny.next_mark
    write = checkpoints.write_whole

    def die(path, *content, **options):
        if path.parent.name == "1" and path.stem == str(3 * tiny.CHUNK):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *content, **options)

    checkpoints.write_whole = die
    return tiny.recipe()
"""


def test_a_killed_sweep_goes_on_from_the_last_checkpoint_that_is_whole(
    main, tmp_path, monkeypatch, capfd
) -> None:
    """Killed at the end of the second method; the newer of its two checkpoints is then damaged."""
    (tmp_path / "dying.py").write_text(DYING.format(folder=str(MODULE.parent)))
    program = [sys.executable, "-c", "from lossguard.cli.main import main; main()", "sweep"]
    arguments = (f"{tmp_path / 'dying.py'}:recipe", "--out", str(tmp_path / "runs"))
    killed = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = tmp_path / "runs" / "recipe" / "checkpoints" / "1"
    checkpoints = {int(entry.stem): entry for entry in left.iterdir()}
    assert sorted(checkpoints) == [tiny.CHUNK, 2 * tiny.CHUNK]
    newer = checkpoints[2 * tiny.CHUNK]
    newer.write_bytes(newer.read_bytes()[: newer.stat().st_size // 2])

    monkeypatch.setattr(running, "CHUNK", tiny.CHUNK)
    monkeypatch.setattr(running, "next_mark", tiny.next_mark)
    main("sweep", f"{MODULE}:recipe", "--out", tmp_path / "runs")
    assert "checkpoint 8 is damaged and was passed over" in capfd.readouterr().err
    same_curves(tmp_path / "runs" / "recipe", run(tiny.recipe(), tmp_path / "whole"))


MINE = """
from dataclasses import replace

import tiny

def one():
    return replace(tiny.recipe(), seeds=1, methods=("LGL2O",))

def two():
    return replace(tiny.recipe(), methods=("LGL2O",))

def wrong():
    return replace(tiny.recipe(), methods=("SGD",))
"""


@pytest.mark.weekly
@pytest.mark.filterwarnings("default", "ignore:os.fork")  # Ray starts its own by it
def test_two_workers_of_a_cluster_leave_the_same_records(
    main, tmp_path, monkeypatch, capsys
) -> None:
    """With a module of the user's that isn't installed, and a run that fails."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    init = ray.init
    monkeypatch.setattr(ray, "init", lambda **given: init(**given, num_cpus=2, num_gpus=0))
    folder = tmp_path / "elsewhere"  # Ray's workers find what is in the current one
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    names = [f"{folder / 'mine.py'}:{name}" for name in ("one", "wrong", "two")]
    arguments = ["sweep", *names, "--steps", "40", "--out", str(tmp_path / "there")]
    with pytest.raises(SystemExit) as caught:
        main(*arguments, "--ray", "local")
    assert caught.value.code == 1
    assert not ray.is_initialized()
    assert "wrong: ValueError: each of methods must be one of Signs" in capsys.readouterr().err
    failure = json.loads((tmp_path / "there" / "wrong" / "failed.json").read_text())
    assert "in guards" in failure["traceback"]

    for name, seeds in (("one", 1), ("two", 2)):
        alone = dataclasses.replace(tiny.recipe(), seeds=seeds, steps=40, methods=("LGL2O",))
        here = run(alone, tmp_path / "here" / name)
        same_curves(tmp_path / "there" / name, here)
        (config, made, _), (right, _, _) = map(records.read_run, (tmp_path / "there" / name, here))
        assert config == right
        assert made["command"] == ["lossguard", *arguments, "--ray", "local"]

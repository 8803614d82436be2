"""Experiments end to end: their records, and what survives Ctrl-C and kill."""

import dataclasses
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import polars as pl
import pytest
import tiny
from tiny_run import same_curves

import lossguard
from lossguard import rollout
from lossguard.experiments import run as running
from lossguard.experiments.experiment import Experiment, paper_methods
from lossguard.experiments.run import run
from lossguard.runs import curves, records
from lossguard.runs import folder as run_folder
from lossguard.runs.config import as_config
from lossguard.runs.curves import COUNTERS
from lossguard.tasks.dataset import Split
from lossguard.tasks.models import MLP
from lossguard.tasks.task import TaskObjective

NEXT_MARK = running.next_mark
MODULE = Path(tiny.__file__)
STEPS = list(range(1, 61))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CHUNK", tiny.CHUNK)
    monkeypatch.setattr(running, "next_mark", tiny.next_mark)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "CHUNK", tiny.CHUNK)
        patch.setattr(running, "next_mark", tiny.next_mark)
        return run(tiny.recipe(), tmp_path_factory.mktemp("whole") / "run")


def test_progress_is_of_the_steps_that_were_taken(monkeypatch, tmp_path) -> None:
    told = []
    monkeypatch.setattr(
        running.Progress, "advance", lambda _, steps, **now: told.append((steps, now))
    )
    run(dataclasses.replace(tiny.recipe(), methods=("L2O",)), tmp_path / "run")
    assert [steps for steps, _ in told] == 3 * [20]
    assert np.isfinite([now["loss"] for _, now in told]).all()
    assert {(now["leader"], now["price"]) for _, now in told} == {("learned", 1)}


def test_records_of_a_run(whole: Path) -> None:
    config, made, curves = records.read_run(whole)
    assert config == as_config(tiny.recipe()) | {"methods": ["Signs", "L2O", "LGL2O"]}
    assert config["make_methods"] == "tiny:make_methods"
    assert config["model"] == {"kind": "MLP", "hidden": [20]}
    assert list(made["seconds"]) == config["methods"] and min(made["seconds"].values()) > 0
    assert curves["method"].unique(maintain_order=True).to_list() == config["methods"]
    for _, rows in curves.group_by("method", "seed"):
        assert rows["step"].to_list() == STEPS
    spent = {*curves.filter(step=60).select("method", *COUNTERS).iter_rows()}
    assert spent == {("Signs", 60, 0, 60), ("L2O", 60, 0, 60), ("LGL2O", 120, 2 * 3 * 12, 60)}
    assert curves.filter(method="LGL2O")["learned_loss"].is_finite().all()
    assert curves.filter(method="Signs")["learned_loss"].is_nan().all()


def test_curves_are_those_of_a_plain_rollout(whole: Path) -> None:
    """Seed 1 of the run, on its own and in one piece."""
    e = tiny.recipe()
    init_key, order_key = jax.random.split(jax.random.key(1))
    task, guard = e.make_task(e), e.guards()["LGL2O"]
    state = guard.init(task.init(init_key))
    state, decisions = rollout(guard, state, TaskObjective(task, order_key), cycles=12)
    _, _, curves = records.read_run(whole)
    rows = curves.filter(pl.col("method") == "LGL2O", pl.col("seed") == 1)
    np.testing.assert_allclose(rows["loss"], decisions.losses.ravel(), rtol=1e-4)
    np.testing.assert_array_equal(rows["used_learned"], decisions.used_learned.ravel())
    np.testing.assert_allclose(rows["learned_loss"][::5], decisions.learned_loss, rtol=1e-4)

    evaluations = records.read_parquet(whole / records.EVALUATIONS)
    assert evaluations.filter(method="LGL2O")["step"].to_list() == [20, 20, 40, 40, 60, 60]
    assert evaluations.filter(method="LGL2O", step=60)["test_loss"].n_unique() == 2
    (last,) = evaluations.filter(method="LGL2O", seed=1, step=60).rows(named=True)
    logits = task.model.apply(state.params, task.dataset.normalize(task.dataset.test.inputs))
    labels = np.asarray(task.dataset.test.labels)
    assert last["test_accuracy"] == pytest.approx((np.argmax(logits, 1) == labels).mean())
    log_p = np.asarray(logits) - np.log(np.exp(logits).sum(1, keepdims=True))
    assert last["test_loss"] == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), 1e-4)


@pytest.mark.parametrize(
    ("changes", "seeds"), [({"seed": 1, "seeds": 1}, [1]), ({"vectorize": True}, [0, 1])]
)
def test_seeds_alone_or_side_by_side_are_those_after_another(
    whole, tmp_path, changes, seeds
) -> None:
    """Seed 1 alone is the second of seeds 0 and 1."""
    e = dataclasses.replace(tiny.recipe(), methods=("Signs",), **changes)
    found, both = (records.read_run(folder).curves for folder in (run(e, tmp_path / "run"), whole))
    expected = both.filter(pl.col("seed").is_in(seeds), method="Signs")
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


def test_it_is_evaluated_at_marks_and_at_the_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(running, "CHUNK", 100)
    monkeypatch.setattr(running, "next_mark", NEXT_MARK)
    changes = {"nt": 1, "steps": 1_510, "seeds": 1, "methods": ("Signs",)}
    folder = run(dataclasses.replace(tiny.recipe(), **changes), tmp_path / "run")
    evaluations = records.read_parquet(folder / records.EVALUATIONS)
    marks = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250]
    marks += [300, 400, 500, 600, 800, 1_000, 1_200, 1_500, 1_510]
    assert evaluations["step"].to_list() == marks
    assert evaluations["gradients"].to_list() == marks


def test_what_was_evaluated_after_the_last_checkpoint_is_there_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(running, "CHUNK", 2)
    monkeypatch.setattr(running, "next_mark", lambda step: step // 10 * 10 + 10)
    monkeypatch.setattr(running, "SAVE_SECONDS", 0.0)
    save, saved = running.Checkpoints.save, []

    def save_once(*given: Any) -> None:
        if saved:
            raise OSError("full")
        saved.append(given)
        save(*given)

    e = dataclasses.replace(tiny.recipe(), seeds=1, methods=("Signs",))
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"^full$"):
        patch.setattr(running.Checkpoints, "save", save_once)
        run(e, tmp_path / "run")
    folder = run(e, tmp_path / "run", resume=True)
    evaluations = records.read_parquet(folder / records.EVALUATIONS)
    assert evaluations["step"].to_list() == [10, 20, 30, 40, 50, 60]
    files = {path.name for path in folder.iterdir()}
    assert files == {records.CONFIG, records.MANIFEST, records.CURVES, records.EVALUATIONS}


@pytest.mark.parametrize("stopped", [False, True])
def test_seconds_are_of_the_cycles_alone(tmp_path, monkeypatch, stopped) -> None:
    """A chunk takes a second, whatever is compiled before it."""

    class Clock(running.Progress):
        seconds = 7.0

    def chunk(*given: Any) -> pl.DataFrame:
        calls.append(given)
        if len(calls) == 2 and stopped:
            os.kill(os.getpid(), signal.SIGINT)
        Clock.seconds += 1.0
        return thin(*given)

    calls, thin = [], curves.thin
    monkeypatch.setattr(running, "Progress", Clock)
    monkeypatch.setattr(curves, "thin", chunk)
    e = dataclasses.replace(tiny.recipe(), methods=("Signs",))
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run(e, tmp_path / "run")
    _, made, _ = records.read_run(run(e, tmp_path / "run", resume=stopped))
    assert made["seconds"] == {"Signs": 3.0}  # of three chunks


def stopped_at_once(monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> Experiment:
    """The experiment of a run that is stopped in its first chunk."""
    e = dataclasses.replace(tiny.recipe(), **{"seeds": 1, "methods": ("Signs",)} | changes)
    thin = curves.thin
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            curves, "thin", lambda *given: signal.raise_signal(signal.SIGINT) or thin(*given)
        )
        run(e, folder)
    return e


def test_other_data_than_a_run_was_started_with_is_refused(tmp_path, monkeypatch) -> None:
    def other(experiment: Experiment) -> lossguard.Task:
        task = make(experiment)
        inputs = task.dataset.train.inputs.at[7, 0].add(1e-3)
        train = Split(inputs, task.dataset.train.labels)
        return dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, train=train))

    e, make = stopped_at_once(monkeypatch, tmp_path / "run"), tiny.make_task
    other.__module__, other.__qualname__ = "tiny", "make_task"  # the same config
    with pytest.raises(ValueError, match=r"^a run must go on with .*, but the data changed since"):
        run(dataclasses.replace(e, make_task=other), tmp_path / "run", resume=True)
    run(e, tmp_path / "run", resume=True)


def with_weights_of_its_own(experiment: Experiment) -> dict[str, Any]:
    """A method whose weights no field of the experiment names."""
    file = Path(experiment.title)
    return {"Signs": lambda: lossguard.unguarded(lossguard.pretrained(file), nt=experiment.nt)}


@pytest.mark.parametrize("named", [True, False])
def test_other_weights_than_a_run_was_started_with_are_refused(
    tmp_path, monkeypatch, named
) -> None:
    file = tmp_path / "mine.safetensors"
    weights = [lossguard.init_lstm_weights(jax.random.key(k), hidden=4) for k in range(2)]
    lossguard.save_weights(file, weights[0], p=10, scale=0.1, made={})
    own = {"learned": str(file), "make_methods": paper_methods, "methods": ("L2O",)}
    own = own if named else {"title": str(file), "make_methods": with_weights_of_its_own}
    e = stopped_at_once(monkeypatch, tmp_path / "run", **own)
    reason = r"^a run must go on with .*, but the file mine\.safetensors changed since"
    for changed in ({"p": 10, "scale": 0.2}, {"p": 10, "scale": 0.1}):
        lossguard.save_weights(file, weights[changed["scale"] == 0.1], **changed, made={})
        with pytest.raises(ValueError, match=reason):
            run(e, tmp_path / "run", resume=True)
    lossguard.save_weights(file, weights[0], p=10, scale=0.1, made={"another": "note"})
    _, made, _ = records.read_run(run(e, tmp_path / "run", resume=True))
    assert {*made["inputs_sha256"]} == {"the data", "the file mine.safetensors"}
    assert {*made["sha256"]} == {*records.TABLES, records.CONFIG, records.MANIFEST}


def went_on(folder: Path, whole: Path) -> None:
    """To the same curves, and with nothing left over."""
    same_curves(folder, whole)
    assert not (folder / run_folder.CHECKPOINTS).exists()


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert run(tiny.recipe(), whole, resume=True) == whole
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("chunk", "number"),
    [(2, signal.SIGINT), (3, signal.SIGINT), (2, signal.SIGTERM)],
    ids=["in the middle", "at the end of a method", "by kill"],
)
def test_stopped_it_leaves_what_was_done_and_goes_on(
    whole, tmp_path, main, monkeypatch, capfd, chunk, number
) -> None:
    arguments = ("run", f"{MODULE}:recipe", "--out", tmp_path / "run")
    thin, calls = curves.thin, []

    def interrupted(*given: Any) -> pl.DataFrame:
        calls.append(given)
        if len(calls) == 3 + chunk:  # of the second method
            os.kill(os.getpid(), number)
        return thin(*given)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(curves, "thin", interrupted)
        patch.setattr(os, "_exit", sys.exit)
        main(*arguments)
    assert caught.value.code == 130
    assert signal.getsignal(number) is before
    goes_on = f"lossguard run {MODULE}:recipe --out {tmp_path}/run --resume\n"
    message = f"lossguard: stopped; to go on: {goes_on}"
    assert capfd.readouterr().err.endswith(message)
    left = sorted((tmp_path / "run" / run_folder.CHECKPOINTS).rglob("*.safetensors"))
    assert [f"{path.parent.name}/{path.stem}" for path in left] == ["0/12", f"1/{4 * chunk}"]

    with monkeypatch.context() as patch:
        patch.setattr(curves, "thin", lambda *given: calls.append(given) or thin(*given))
        main(*arguments, "--resume")
    went_on(tmp_path / "run", whole)
    assert len(calls) == 9  # no chunk was done twice


def test_ctrl_c_is_heard_while_the_task_is_made(tmp_path: Path) -> None:
    """What is raised while garbage is collected is lost, and imports make much of it."""

    def interrupt(phase: str, _: Any) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    def make_task(experiment: Experiment) -> lossguard.Task:
        gc.callbacks.append(interrupt)
        gc.collect()
        gc.callbacks.remove(interrupt)
        return tiny.make_task(experiment)

    e = dataclasses.replace(tiny.recipe(), methods=("Signs",), make_task=make_task)
    with pytest.raises(KeyboardInterrupt):
        run(e, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_disk_is_told_and_the_run_goes_on_later(
    whole, tmp_path, main, monkeypatch, capsys
) -> None:
    arguments = ("run", f"{MODULE}:recipe", "--out", tmp_path / "run")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "can't write a record: No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        write = records._write
        patch.setattr(
            records, "_write", lambda p, c: (full if p.name == "curves.parquet" else write)(p, c)
        )
        main(*arguments)
    assert caught.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "No space left on device" in last and "curves.parquet" in last
    main(*arguments, "--resume")
    went_on(tmp_path / "run", whole)


def test_a_run_in_another_thread(tmp_path: Path) -> None:
    e = dataclasses.replace(tiny.recipe(), steps=3, seeds=1, methods=("Signs",))
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(run(e, tmp_path / "run")))
    thread.start()
    thread.join()
    assert records.read_run(done[0])[2]["step"].to_list() == [1, 2, 3, 4, 5]  # a whole cycle


class OtherMLP:
    """A model that is no dataclass."""

    init, apply = MLP().init, MLP().apply


def mine(made: Any) -> dict[str, Any]:
    """Fields of an experiment of one method."""
    return {"methods": ("mine",), "make_methods": lambda e: {"mine": made}}


def narrower(experiment: Experiment) -> lossguard.Task:
    """The test split has a coordinate less."""
    task = tiny.make_task(experiment)
    test = Split(task.dataset.test.inputs[:, :1], task.dataset.test.labels)
    return dataclasses.replace(task, dataset=dataclasses.replace(task.dataset, test=test))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(
            ({name: 0, "methods": ("Signs",)}, f"^{name} must be an integer of at least 1, got 0$")
            for name in ("steps", "seeds", "batch_size", "nt", "nc")
        ),
        *(
            ({name: value}, f"^{name} must be positive and finite, got {value}$")
            for name in ("adam_rate", "sgd_rate", "sgd_tau")
            for value in (0.0, np.nan)
        ),
        *(
            ({"seed": value}, f"^seed must be an integer of at least 0, got {value!r}$")
            for value in (-1, 1.5, "0")
        ),
        ({"seed": 2**32 - 1}, "^seed must be at most 4294967294, got 4294967295$"),
        ({"seed": 2**63}, f"^seed must be at most 4294967294, got {2**63}$"),
        ({"seeds": 10**12}, f"^seeds must be at most 10000, got {10**12}$"),
        ({"steps": 2**31}, f"^steps must be at most {2**30}, got {2**31}$"),
        ({"batch_size": 401}, "^batch_size must be between 1 and samples = [0-9]*, got 401"),
        ({"methods": ("SGD",)}, "^each of methods must be one of Signs, .*, got 'SGD'"),
        (
            {"methods": (), "make_methods": lambda e: {}},
            "^methods must be one or more, .* got none$",
        ),
        ({"loser": "zz", "methods": ("Signs",)}, "^loser must be one of keep, reset, .*, got 'zz'"),
        ({"make_task": narrower}, r"^inputs of test must be of shape \(2,\), got \(1,\)$"),
        (  # it would take other steps than the others, and be evaluated at others
            {"nt": 3, **mine(lossguard.unguarded(optax.sgd(0.1)))},
            "^method mine must have nt = 3, as .*, got 10$",
        ),
        *(
            (mine(made), "^method mine must be a Guard such as unguarded")
            for made in (optax.sgd(0.1), 3, lambda: 3)
        ),
        *(
            (changes, "^a run must be of numbers, .*, but holds ")
            for changes in ({"model": OtherMLP()}, {"methods": {"Signs"}})
        ),
    ],
)
def test_bad_fields_leave_no_folder(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(dataclasses.replace(tiny.recipe(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_fails_in_its_first_step_leaves_no_folder(tmp_path: Path) -> None:
    def methods(e: Experiment) -> dict[str, Any]:
        broken = optax.stateless(lambda updates, _: updates["no such leaf"])
        return {
            "SGD": lambda: lossguard.unguarded(optax.sgd(0.1), nt=e.nt),
            "broken": lambda: lossguard.unguarded(broken, nt=e.nt),
        }

    broken = {"methods": ("SGD", "broken"), "make_methods": methods}
    for changes in (broken, {"make_task": lambda e: None}):
        with pytest.raises((TypeError, AttributeError)):
            run(dataclasses.replace(tiny.recipe(), **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

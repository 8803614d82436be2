"""The folder of a run under way is the run's alone, and says how the run was made."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import CONFIG, SECONDS, TABLE, open_folder

from lossguard.runs import folder as run_folder
from lossguard.runs import records
from lossguard.runs.locks import locked


@pytest.mark.parametrize("changed", [{"the data": "2"}, {"the data": "2", "the file a": "2"}])
def test_what_a_run_was_started_with_must_be_as_it_was(tmp_path, changed) -> None:
    inputs = {"the data": "1", "the file a": "1"}
    made = run_folder.start(tmp_path, inputs=inputs)
    assert made["inputs_sha256"] == inputs
    run_folder.start(tmp_path, inputs=inputs | {"what another version noted": "3"})
    with pytest.raises(
        ValueError,
        match=rf"^a run must go on with what it was started with, but {' and '.join(changed)} "
        r"changed since .* was started: choose another --out, or put back what there was$",
    ):
        run_folder.start(tmp_path, inputs=inputs | changed)


def test_a_finished_run_needs_no_lock(finished: Path) -> None:
    """Its folder may be one that can't be written to."""
    before = sorted(finished.iterdir())
    with (
        run_folder.hold_folder(finished, CONFIG, resume=True) as one,
        run_folder.hold_folder(finished, CONFIG, resume=True) as two,
    ):
        assert one and two and sorted(finished.iterdir()) == before


def test_what_a_kill_at_the_end_of_a_run_left_is_deleted(finished: Path) -> None:
    before = sorted(finished.iterdir())
    for name in run_folder.PASSING:
        (finished / name).write_text("{}")
    (finished / run_folder.CHECKPOINTS).mkdir()
    with run_folder.hold_folder(finished, CONFIG, resume=True) as found:
        assert found
    assert sorted(finished.iterdir()) == before


def test_the_commit_of_a_repository_around_it_is_not_its_own(tmp_path, monkeypatch) -> None:
    """Such as one whose virtual environment it is installed in."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    package = tmp_path / "environment" / "lossguard"
    package.mkdir(parents=True)
    (package / "run_folder.py").touch()
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    assert run_folder._commit() is None
    subprocess.run([*git, "add", "."], check=True)
    assert (run_folder._commit() or "").endswith("-dirty")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9V74\nflags\t: fpu\n", "AMD EPYC 9V74"),
        ("processor\t: 0\nBogoMIPS\t: 50\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_manifest_names_the_processor(tmp_path, monkeypatch, content, name) -> None:
    """The same code rounds otherwise on one of another kind."""
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(run_folder, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(platform="cpu")])
    assert run_folder.manifest()["device"] == f"{name} (2 cores)"


def test_manifest_has_the_commit_of_every_part(tmp_path, monkeypatch) -> None:
    open_folder(tmp_path, CONFIG)
    for commit in "abc":
        monkeypatch.setattr(run_folder, "_commit", lambda commit=commit: commit)
        made = run_folder.start(tmp_path, inputs={}, data=commit)
        open_folder(tmp_path, CONFIG, resume=True)
        assert not run_folder.is_finished(tmp_path)
    records.write_parquet(tmp_path / records.CURVES, TABLE)
    assert not run_folder.is_finished(tmp_path)
    run_folder.finish(tmp_path, made | {"seconds": SECONDS})
    assert run_folder.is_finished(tmp_path)
    assert not (tmp_path / run_folder.STARTED).exists()
    _, found, _ = records.read_run(tmp_path)
    assert (found["commit"], found["data"], found["seconds"]) == ("a", "a", SECONDS)
    assert [part["commit"] for part in found["resumed"]] == ["b", "c"]


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"^folder must be .*, but .* holds other files$"):
        open_folder(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"^folder must be .*thesis\.tex is a file$"):
        open_folder(tmp_path / "thesis.tex", CONFIG)
    (tmp_path / "link").symlink_to("thesis.tex")
    with pytest.raises(ValueError, match=r"^folder must be .*, but .* holds other files$"):
        open_folder(tmp_path, CONFIG)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "thesis.tex"]


def test_a_run_that_failed_before_it_computed_anything_is_none(tmp_path: Path) -> None:
    open_folder(tmp_path, CONFIG)
    run_folder.start(tmp_path, inputs={"the data": "a"})
    other = {**CONFIG, "rate": 0.3, "methods": ["a"]}
    with pytest.raises(ValueError, match="holds another"):
        open_folder(tmp_path, other)
    (tmp_path / records.FAILED).write_text("{}")
    open_folder(tmp_path, other)
    assert "resumed" not in run_folder.start(tmp_path, inputs={"the data": "b"})
    assert records.read_json(tmp_path / records.CONFIG) == other


def test_folder_of_a_run_killed_at_its_first_write_is_used(tmp_path: Path) -> None:
    for name in (".0123456789abcdef.part", ".lock", ".DS_Store"):
        (tmp_path / name).write_text("{")
    with run_folder.hold_folder(tmp_path, CONFIG, resume=True) as finished:
        assert not finished
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == [".DS_Store", ".lock", records.CONFIG]


@pytest.mark.parametrize("opened", ["before", "after"])
def test_who_waits_for_the_lock_of_a_run_that_ends_finds_it_finished(
    finished, monkeypatch, opened
) -> None:
    """Whether the lock was opened before the run's end deletes it, or after."""
    made = records.read_json(finished / records.MANIFEST)
    (finished / records.MANIFEST).unlink()

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        if opened == "after":
            run_folder.finish(finished, made)
        with locked(folder):
            if opened == "before":
                run_folder.finish(finished, made)
            yield

    monkeypatch.setattr(run_folder, "locked", late)
    with run_folder.hold_folder(finished, CONFIG, resume=True) as found:
        assert found

"""What becomes of folders and files that are not whole."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_run import CONFIG, SECONDS, TABLE, leave, open_folder

from lossguard.runs import folder as run_folder
from lossguard.runs import records


def test_round_trip(finished: Path) -> None:
    config, made, curves = records.read_run(finished)
    assert config == {**CONFIG, "methods": ["a", "b"]}
    assert curves.equals(TABLE)
    assert made["seconds"] == SECONDS and made["command"][0] == "lossguard"
    assert set(made["versions"]) >= {"jax", "optax", "lossguard"}
    assert made["commit"] is None or len(made["commit"].removesuffix("-dirty")) == 40
    files = {entry.name for entry in finished.iterdir()}
    assert files == {"config.json", "curves.parquet", "manifest.json"}


@pytest.fixture
def verified(tmp_path: Path) -> Path:
    """The same with evaluations."""
    return leave(tmp_path / "run", evaluations=pl.DataFrame({"method": ["a"]}))


def test_manifest_has_the_checksums_of_the_tables(verified: Path) -> None:
    found = json.loads((verified / records.MANIFEST).read_text())["sha256"]
    tables = ("curves.parquet", "evaluations.parquet")
    assert {name: found[name] for name in tables} == {
        name: hashlib.sha256((verified / name).read_bytes()).hexdigest() for name in tables
    }
    assert {*found} == {*tables, "config.json", "manifest.json"}
    records.read_run(verified)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_bit_that_flipped_changes_no_field(verified: Path, name: str) -> None:
    """It is noticed but where it changes no value: in space, or in the name of a checksum."""
    content, right, refused = (verified / name).read_bytes(), records.read_run(verified), 0
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (verified / name).write_bytes(flipped)
        try:
            found = records.read_run(verified)
        except ValueError as error:
            refused += "\n" not in str(error)
            continue
        assert found.config == right.config
        assert all(
            found.manifest[key] == one for key, one in right.manifest.items() if key[0] != "s"
        )
        assert found.manifest["seconds"] == right.manifest["seconds"]
    assert refused > len(content) / 6


@pytest.mark.parametrize("name", ["curves.parquet", "evaluations.parquet"])
def test_a_bit_that_flipped_is_noticed_wherever_it_is(verified: Path, name: str) -> None:
    content = (verified / name).read_bytes()
    for place in (*range(0, len(content), 89), len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (verified / name).write_bytes(flipped)
        reason = rf"{name} is damaged: its SHA-256 is not the one in manifest\.json$"
        with pytest.raises(ValueError, match=reason):
            records.read_run(verified)


def test_a_table_that_a_manifest_has_must_be_there(verified: Path) -> None:
    (verified / records.EVALUATIONS).unlink()
    with pytest.raises(ValueError, match=r"no finished run: evaluations\.parquet is missing$"):
        records.read_run(verified)


def test_a_table_that_a_manifest_has_not_is_refused(verified: Path) -> None:
    (verified / records.MANIFEST).unlink()
    evaluations = (verified / records.EVALUATIONS).rename(verified / "aside")
    run_folder.finish(verified, run_folder.manifest(seconds=SECONDS, data=""))
    evaluations.rename(verified / records.EVALUATIONS)
    with pytest.raises(ValueError, match=r"evaluations\.parquet is damaged: its SHA-256 is not"):
        records.read_run(verified)


@pytest.mark.parametrize("sums", [{}, {"sha256": ["curves.parquet"]}, {"sha256": None}])
def test_a_manifest_without_checksums_is_refused(finished: Path, sums: dict[str, Any]) -> None:
    made = run_folder.manifest(seconds=SECONDS, data="") | sums
    records.write_json(finished / records.MANIFEST, made)
    with pytest.raises(ValueError, match=r"manifest\.json is not of a run: it has no checksums$"):
        records.read_run(finished)
    assert run_folder.is_finished(finished)  # so that it isn't run again, but refused


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "curves.parquet"])
def test_unfinished_run_is_refused(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(ValueError, match=rf"run holds no finished run: {name} is missing$"):
        records.read_run(finished)


def test_folders_without_a_run_that_can_be_read_are_refused(tmp_path: Path) -> None:
    open_folder(tmp_path / "half", CONFIG)
    told = r"half holds no finished run: manifest\.json is missing$"
    with pytest.raises(ValueError, match=told):
        records.read_runs([tmp_path / "half"])
    with pytest.raises(ValueError, match=f"^no run in .* can be read; .*{told}"):
        records.read_runs([tmp_path])


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "curves.parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]\n", b"\xff\xfe\x00", b"PAR1 and PAR1", b"[" * 100_000, b"9" * 5_000]
)
def test_damaged_file_is_named(finished: Path, name: str, content: bytes) -> None:
    (finished / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is not|is damaged|must hold)") as caught:
        records.read_run(finished)
    assert "\n" not in str(caught.value)
    if name == records.CONFIG:
        with pytest.raises(ValueError, match=r"config\.json (is not|must hold)"):
            open_folder(finished, CONFIG, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_folder_whose_name_is_no_text(tmp_path) -> None:
    folder = leave(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")), CONFIG, TABLE)
    assert records.read_run(folder).curves.equals(TABLE)


def test_truncated_parquet_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "curves.parquet"
    records.write_parquet(path, pl.DataFrame({"step": np.arange(1000), "loss": np.ones(1000)}))
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"curves\.parquet is not a readable Parquet file: "):
            records.read_parquet(path)


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_full_disk_leaves_the_old_file_and_no_half(finished, monkeypatch, failing) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, full)
    curves, new = finished / records.CURVES, finished / "new" / "x.json"
    message = r"can't write a record: No space left on device: .*"
    with pytest.raises(OSError, match=message + r"curves\.parquet'$") as caught:
        records.write_parquet(curves, pl.DataFrame({"step": range(100)}))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=message + r"x\.json'$"):
        records.write_json(new, {"a": 1})
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before
    assert not list(new.parent.iterdir())


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't write a record: .*file/x\.json'"):
        records.write_json(tmp_path / "file" / "x.json", {})
    assert not (tmp_path / "file").read_bytes()

"""What a run leaves on disk: a folder that says what was run, on what, and what came of it.

    config.json          everything to run it again
    manifest.json        commit, versions, device, wall time, each time that it was resumed, and
                         the SHA-256 of the two tables, of the config and of the manifest without
                         its own, in ``sha256`` by their names
    curves.parquet       what happened, thinned to three significant digits of the step
    evaluations.parquet  loss and accuracy on both whole splits, and what was spent by then

A folder may be put together from several runs, whose methods then differ in seeds and length; its
manifest has ``runs``, each with its methods, seeds, steps, command, commit and device. While a run
is under way its folder holds more (``runs/folder.py``).

Nothing that looks whole is half written: each file is written beside its name and then renamed.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from . import checksums
from .files import write_whole

CONFIG, MANIFEST, CURVES = "config.json", "manifest.json", "curves.parquet"
EVALUATIONS, FAILED = "evaluations.parquet", "failed.json"
TABLES = (CURVES, EVALUATIONS)
INPUTS = "inputs_sha256"
"""The field of a manifest for checksums of what a run reads."""


class Record(NamedTuple):
    """What a finished run left."""

    config: dict[str, Any]
    manifest: dict[str, Any]
    curves: pl.DataFrame

    @property
    def is_meta(self) -> bool:
        """Whether it is of a meta-training."""
        return "meta_step" in self.curves.columns


def read_run(folder: Path) -> Record:
    """The record of a finished run.

    Raises:
        ValueError: if the folder holds no finished run, or a file of it is not the one of which the
            manifest has the checksum.
    """
    for name in (CONFIG, MANIFEST, CURVES):
        if not (folder / name).is_file():
            if (folder / FAILED).is_file():
                reason = read_json(folder / FAILED).get("reason", "it failed")
                raise ValueError(f"{folder} is not finished: {reason}")
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
    config, made = read_json(folder / CONFIG), read_json(folder / MANIFEST)
    _verify(folder, config, made)
    return Record(config, made, read_parquet(folder / CURVES))


def of_seeds(curves: pl.DataFrame) -> dict[int, pl.DataFrame]:
    """Curves of meta-training by meta-seed, where there is a column ``seed``; else all, as 0's."""
    if "seed" not in curves.columns:
        return {0: curves}
    return {int(seed): own for (seed,), own in curves.group_by("seed", maintain_order=True)}


def read_runs(folders: Sequence[Path]) -> tuple[dict[Path, Record], list[str]]:
    """The records of finished runs, each named or in a named folder of runs.

    Returns:
        Records, by the folder of the run; and why others in a folder of runs have none: a sentence
        for each that is not finished, damaged, or a link, in whose place nothing is drawn.

    Raises:
        ValueError: if there is none, or a named folder doesn't exist, or holds neither a finished
            run nor folders of runs, or a file of it is damaged, or no run can be read.
    """
    if not folders:
        raise ValueError("name the folder of a run, or several")
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"there is no folder {folder}")
    found, others = {}, []
    for folder in folders:
        own = (folder / CONFIG).exists()
        left = (file.parent for name in (CONFIG, FAILED) for file in folder.glob(f"*/{name}"))
        runs = [] if own else sorted({*left})
        if not runs:
            found[folder] = read_run(folder)
        for run in runs:
            try:
                if run.is_symlink():
                    raise ValueError(f"{run} is a link: name the folder that it leads to")
                found[run] = read_run(run)
            except ValueError as error:
                others.append(str(error))
    if not found:
        told = "; ".join([f"no run in {', '.join(map(str, folders))} can be read", *others])
        raise ValueError(told)
    return found, others


def _verify(folder: Path, config: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse files that aren't those whose checksums a manifest has."""
    expected = made.get(checksums.NAME)
    if not isinstance(expected, dict):
        raise ValueError(f"{folder / MANIFEST} is not of a run: it has no checksums")
    others = {name: value for name, value in expected.items() if name != MANIFEST}
    found = {CONFIG: config, MANIFEST: {**made, checksums.NAME: others}}
    found = {name: checksums.of_json(content) for name, content in found.items()}
    found |= {n: checksums.of_file(folder / n) for n in TABLES if (folder / n).is_file()}
    for name in found | expected:
        if name not in found:
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
        if found[name] != expected.get(name):
            raise ValueError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
            )


def read_parquet(path: Path) -> pl.DataFrame:
    """A table from disk. ``read_run`` verifies those of a run.

    Raises:
        ValueError: if the file is damaged.
        OSError: if there is none.
    """
    _check_is_file(path)
    content = path.read_bytes()  # as Polars opens no paths that aren't UTF-8
    try:
        return pl.read_parquet(io.BytesIO(content))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable Parquet file: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        ValueError: if the file is damaged or holds something else.
        OSError: if there is none.
    """
    _check_is_file(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # of brackets in brackets
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {type(content).__name__}")
    return content


def _check_is_file(path: Path) -> None:
    """Refuse what can't be read to its end, such as a pipe."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not readable: it must be a file")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    _write(path, (json.dumps(content, indent=2) + "\n").encode())


def write_parquet(path: Path, table: pl.DataFrame) -> None:
    """A table, whole or not at all."""
    buffer = io.BytesIO()  # Polars reports a full disk as a damaged file
    table.write_parquet(buffer, compression="zstd", compression_level=9)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    write_whole(path, content, "a record", make_folder=True)

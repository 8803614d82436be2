"""What a run leaves on disk: a folder that says what was run, on what, and what came of it.

    config.json          everything to run it again
    manifest.json        commit, versions, device, wall time, each time that it was resumed, and
                         the SHA-256 of the two tables, of the config and of the manifest without
                         its own, in ``sha256`` by their names
    curves.parquet       what happened, thinned to three significant digits of the step
    evaluations.parquet  loss and accuracy on both whole splits, and what was spent by then

A folder may be put together from several runs, whose methods then differ in seeds and length; its
manifest has ``runs``, each with its methods, seeds, steps, command, commit and device. While a run
is under way its folder holds more (``run_folder``).

Nothing that looks whole is half written: each file is written beside its name and then renamed.
Tables hold a checksum of their content as well, so that those of a run under way are verified too.
Records without checksums, as older versions left them, are read as they are.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from . import checksums
from .curves import COUNTERS
from .files import write_whole
from .validation import MOST_SEEDS

CONFIG, MANIFEST, CURVES = "config.json", "manifest.json", "curves.parquet"
EVALUATIONS, FAILED = "evaluations.parquet", "failed.json"
TABLES = (CURVES, EVALUATIONS)
INPUTS = "inputs_sha256"
"""The field of a manifest for checksums of what a run reads."""
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "title", "data", "time"), (str,)),
    **dict.fromkeys(("seeds", "seed"), (int,)),
    **dict.fromkeys(("versions", INPUTS, "sha256"), (dict,)),
    **dict.fromkeys(("methods", "command"), (list, str)),
    "resumed": (list, dict),
}
"""Types of the fields of configs and manifests that are read, and of what lists hold."""
LARGEST: Mapping[str, int] = {"seed": 2**32 - 1, "seeds": MOST_SEEDS}
"""What they can be, from 0 on."""
EXPERIMENT: Mapping[str, Sequence[str]] = {
    CONFIG: ("name", "title", "methods", "seeds", "seed"),
    MANIFEST: ("data", "seconds"),
    CURVES: ("method", "seed", "step", "loss", "used_learned", *COUNTERS),
}
META_TRAINING: Mapping[str, Sequence[str]] = {
    CONFIG: ("name",),
    MANIFEST: (),
    CURVES: ("meta_step", "meta_loss", "validation"),
}
"""What figures, tables and claims need of the records of either."""
WHOLE = ("seed", "step", "meta_step")
"""Columns of curves that count."""


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

    Files whose checksums the manifest has are verified; older manifests have none.

    Raises:
        ValueError: if the folder holds no finished run, or a file of it is damaged or lacks what
            figures and tables need.
    """
    for name in (CONFIG, MANIFEST, CURVES):
        if not (folder / name).is_file():
            if (folder / FAILED).is_file():
                reason = read_json(folder / FAILED).get("reason", "it failed")
                raise ValueError(f"{folder} is not finished: {reason}")
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
    config, made = read_json(folder / CONFIG), read_json(folder / MANIFEST)
    for name, found in {CONFIG: config, MANIFEST: made}.items():
        check_fields(folder / name, found)
    _verify(folder, config, made)
    record = Record(config, made, read_parquet(folder / CURVES))
    needed = META_TRAINING if record.is_meta else EXPERIMENT
    for name, found in {CONFIG: config, MANIFEST: made, CURVES: record.curves.columns}.items():
        if missing := [field for field in needed[name] if field not in found]:
            raise ValueError(f"{folder / name} is not of a run: it lacks {', '.join(missing)}")
    for name, lack in _lacks(record, needed[CURVES]):
        raise ValueError(f"{folder / name} is not of this run: it lacks {lack}")
    return record


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
                found[run] = _read(run)
            except ValueError as error:
                others.append(str(error))
    if not found:
        told = "; ".join([f"no run in {', '.join(map(str, folders))} can be read", *others])
        raise ValueError(told)
    return found, others


def _read(run: Path) -> Record:
    if run.is_symlink():
        raise ValueError(f"{run} is a link: name the folder that it leads to")
    if (run / MANIFEST).exists() or (run / FAILED).exists():
        return read_run(run)
    raise ValueError(f"{run} is not finished")


def _verify(folder: Path, config: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Refuse files that aren't those whose checksums a manifest has."""
    expected = made.get(checksums.NAME, {})
    others = {name: value for name, value in expected.items() if name != MANIFEST}
    contents = {CONFIG: config, MANIFEST: {**made, checksums.NAME: others}}
    for name in (*contents, *TABLES):
        if name not in expected:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
        found = contents.get(name)
        found = checksums.of_file(folder / name) if found is None else checksums.of_json(found)
        if found != expected[name]:
            raise ValueError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
            )


def check_fields(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse fields of a config or a manifest whose values can't be."""
    for field, (kind, *items) in KINDS.items():
        if field not in content:
            continue
        value, most = content[field], LARGEST.get(field)
        checked = [(field, kind, value)]
        if items and isinstance(value, kind):
            checked = [(f"each of {field}", items[0], one) for one in value]
        for told, right, one in checked:
            if not isinstance(one, right):
                reason = f"{told} must be of type {right.__name__}, got {one!r}"
                raise ValueError(f"{path} is not of a run: {reason}")
        if most is not None and not 0 <= value <= most:
            reason = f"{field} must be between 0 and {most}, got {value}"
            raise ValueError(f"{path} is not of a run: {reason}")


def _lacks(record: Record, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a record lacks whose fields are all there, and in which file."""
    config, made, curves = record
    if curves.is_empty():
        yield CURVES, "rows"
    validations = (name for name in curves.columns if name.startswith("validation_"))
    for name in (*columns, *validations):
        if curves[name].null_count():
            yield CURVES, f"values in column {name}"
        if told := _unlike(name, curves.schema[name]):
            yield CURVES, f"{told} in column {name}"
    if record.is_meta:
        return
    methods, spent = config["methods"], made["seconds"]
    if not isinstance(spent, dict) or not all(_is_real(n) for n in spent.values()):
        yield MANIFEST, "seconds of each method"
    if not methods:
        yield CONFIG, "methods"
    for name, found in {CURVES: {*curves["method"]}, MANIFEST: spent}.items():
        if missing := [method for method in methods if method not in found]:
            yield name, f"the methods {', '.join(missing)}"


def _unlike(column: str, dtype: pl.DataType) -> str:
    """What a column should hold, if its type can't hold it."""
    if column == "method":
        return "" if dtype == pl.String else "names"
    if column in WHOLE:
        return "" if dtype.is_integer() else "whole numbers"
    if column.startswith("validation"):
        rows = isinstance(dtype, pl.Array) and dtype.inner.is_numeric()
        return "" if rows else "rows of numbers"
    return "" if dtype.is_numeric() else "numbers"


def _is_real(number: Any) -> bool:
    """Whether JSON held a number, and one that a float can be."""
    return isinstance(number, float) or (isinstance(number, int) and abs(number) < 2**63)


def read_parquet(path: Path) -> pl.DataFrame:
    """A table from disk; its checksum is verified if it has one, as those of ``write_parquet`` do.

    Raises:
        ValueError: if the file is damaged.
        OSError: if there is none.
    """
    _check_is_file(path)
    try:
        expected = pl.read_parquet_metadata(path).get(checksums.NAME)
        table = pl.read_parquet(path)
        if expected in (None, _checksum(table)):
            return table
        reason = "its content is not that of its SHA-256"
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = " ".join(str(error).split())
    raise ValueError(f"{path} is not a readable Parquet file: {reason}")


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
    """A table and its checksum, whole or not at all."""
    buffer = io.BytesIO()  # Polars reports a full disk as a damaged file
    about = {checksums.NAME: _checksum(table)}
    table.write_parquet(buffer, compression="zstd", compression_level=9, metadata=about)
    _write(path, buffer.getvalue())


def _checksum(table: pl.DataFrame) -> str:
    return checksums.of_arrays({name: table[name].to_numpy() for name in table.columns})


def _write(path: Path, content: bytes) -> None:
    write_whole(path, content, "a record", make_folder=True)

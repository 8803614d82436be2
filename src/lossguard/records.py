"""What a run leaves on disk: a folder that says what was run, on what, and what came of it.

    config.json          everything to run it again
    started.json         until it is finished: the manifest so far
    .lock                while a process writes to the folder
    failed.json          why the last attempt of a sweep failed, if it did
    manifest.json        commit, versions, device, wall time, each time that it was resumed, and
                         the SHA-256 of the two tables, in ``sha256`` by their names
    curves.parquet       what happened, thinned to three significant digits of the step
    evaluations.parquet  loss and accuracy on both whole splits, and what was spent by then

A folder may be put together from several runs, whose methods then differ in seeds and length; its
manifest has ``runs``, each with its methods, seeds, steps, command, commit and device.

Nothing that looks whole is half written: each file is written beside its name and then renamed.
Tables hold a checksum of their content as well, so that those of a run under way are verified too.
Records without checksums, as older versions left them, are read as they are.
"""

import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import polars as pl

from . import checksums
from .curves import COUNTERS
from .files import is_part, write_whole
from .locks import LOCK, locked
from .validation import MOST_SEEDS

CONFIG, MANIFEST, CURVES = "config.json", "manifest.json", "curves.parquet"
STARTED, FAILED = "started.json", "failed.json"
INPUTS = "inputs_sha256"
"""The field of a manifest for checksums of what a run reads."""
EVALUATIONS = "evaluations.parquet"
TABLES = (CURVES, EVALUATIONS)
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
KINDS: Mapping[str, type] = {
    "name": str,
    "title": str,
    "methods": list,
    "seeds": int,
    "seed": int,
    "data": str,
    "time": str,
    "command": list,
    "resumed": list,
    "versions": dict,
    INPUTS: dict,
    "sha256": dict,
}
ITEMS: Mapping[str, type] = {"methods": str, "command": str, "resumed": dict}
"""Types of those fields of configs and manifests that are read, and of what lists hold."""
WHOLE = ("seed", "step", "meta_step")
"""Columns of curves that count."""
LARGEST: Mapping[str, int] = {"seed": 2**32 - 1, "seeds": MOST_SEEDS}
"""What they can be, from 0 on."""
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("lossguard", "jax", "jaxlib", "optax", "equinox", "numpy", "polars")


@contextlib.contextmanager
def hold_folder(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> Iterator[bool]:
    """``open_folder``, locked against other processes; yields whether the run is finished.

    The folder of a finished run is neither locked nor written to.

    Raises:
        ValueError, OSError: as ``open_folder``, or if another process holds the folder.
    """
    _check_folder(folder, config, resume=resume)
    if is_finished(folder):
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        open_folder(folder, config, resume=resume)
        for part in filter(is_part, folder.rglob(".*.part")):
            part.unlink()
        yield is_finished(folder)


def open_folder(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
    """Make the folder of a run and put its config there, or go on with the same run's.

    Raises:
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or its
            config is damaged, or the run isn't finished and a link is in it: it might lead out of
            the folder.
        OSError: if it can't be made.
    """
    if not _check_folder(folder, config, resume=resume):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, config)


def _check_folder(folder: Path, config: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether the folder holds this run; refuse it as ``open_folder`` says."""
    path, is_open = folder / CONFIG, not is_finished(folder)
    if is_open and (link := next(_links(folder), None)):
        raise ValueError(f"folder must hold no links, but {link} is one")
    if path.exists():
        if differ := _differing(read_json(path), json.loads(json.dumps(config))):
            raise ValueError(
                f"folder must be empty or hold the same run, but {folder} holds another, which "
                f"differs in {differ}: choose another --out"
            )
        if not resume:
            raise ValueError(
                f"folder {folder} holds this run already: add --resume to go on with it"
            )
        return True
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be empty or hold the same run, but {folder} is a file")
    if folder.exists() and any(_is_other(entry) for entry in folder.iterdir()):
        raise ValueError(
            f"folder must be empty or hold the same run, but {folder} holds other files"
        )
    return False


def _links(folder: Path) -> Iterator[Path]:
    """The links in a folder and in those in it."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in folders + files if Path(place, name).is_symlink())


def _is_other(entry: Path) -> bool:
    """Whether it isn't what a run leaves that is killed before its config is written."""
    return entry.name != LOCK and not is_part(entry)


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The fields in which two configs differ, and both values of each."""
    told = {name: (there.get(name, "absent"), here.get(name, "absent")) for name in there | here}
    return " and ".join(f"{name} ({a}, not {b})" for name, (a, b) in told.items() if a != b)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the records of a whole run: the manifest is written last."""
    return all((folder / name).is_file() for name in (CURVES, MANIFEST))


def start(folder: Path, *, inputs: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The manifest of a run that starts here and now, when its code is that of the commit.

    Of one that goes on it is the first one's, and ``resumed`` has the ``time`` and ``commit`` of
    each part but the first.

    Args:
        folder: of the run.
        inputs: the checksums of what the run reads, by what it is: they must be those with which
            the run was started, as far as it noted them.
        more: fields of the manifest.

    Raises:
        ValueError: if an input has changed since, or ``started.json`` is damaged.
    """
    made = manifest(**more, **{INPUTS: dict(inputs)})
    if (folder / STARTED).exists():
        first = read_json(folder / STARTED)
        _check_fields(folder / STARTED, first)
        before = first.get(INPUTS, inputs)
        if changed := [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]:
            raise ValueError(
                f"a run must go on with what it was started with, but {' and '.join(changed)} "
                f"changed since {folder} was started: choose another --out, or put back what "
                "there was"
            )
        part = {name: made[name] for name in ("time", "commit")}
        made = first | {"resumed": [*first.get("resumed", ()), part]}
    write_json(folder / STARTED, made)
    return made


def finish(folder: Path, made: Mapping[str, Any]) -> None:
    """Write the manifest, once all else is written, with the checksums of the tables."""
    write_json(folder / MANIFEST, {**made, checksums.NAME: checksums_in(folder)})
    (folder / STARTED).unlink(missing_ok=True)


def checksums_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each table that a manifest answers for, by its name."""
    return {name: checksums.of_file(folder / name) for name in TABLES if (folder / name).exists()}


def manifest(**more: Any) -> dict[str, Any]:
    """Where and with what a run was made: time, command, commit, versions, device."""
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["lossguard", *sys.argv[1:]],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": platform.platform(),
        **more,
    }


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

    Tables whose checksums the manifest has are verified; older manifests have none.

    Raises:
        ValueError: if the folder holds no finished run, or a file of it is damaged or lacks what
            figures and tables need.
    """
    for name in (CONFIG, MANIFEST, CURVES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
    config, made = read_json(folder / CONFIG), read_json(folder / MANIFEST)
    for name, found in {CONFIG: config, MANIFEST: made}.items():
        _check_fields(folder / name, found)
    _verify(folder, made.get(checksums.NAME, {}))
    record = Record(config, made, read_parquet(folder / CURVES))
    needed = META_TRAINING if record.is_meta else EXPERIMENT
    for name, found in {CONFIG: config, MANIFEST: made, CURVES: record.curves.columns}.items():
        if missing := [field for field in needed[name] if field not in found]:
            raise ValueError(f"{folder / name} is not of a run: it lacks {', '.join(missing)}")
    name, lack = _lack(record, needed[CURVES])
    if lack:
        raise ValueError(f"{folder / name} is not of this run: it lacks {lack}")
    return record


def _verify(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse tables that aren't those whose checksums a manifest has."""
    for name in TABLES:
        if name not in expected:
            continue
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no finished run: {name} is missing")
        if checksums.of_file(folder / name) != expected[name]:
            raise ValueError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
            )


def _check_fields(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse fields of a config or a manifest whose values can't be."""
    for field in KINDS:
        if field in content and (wrong := _wrong(field, content[field])):
            raise ValueError(f"{path} is not of a run: {wrong}")


def _wrong(field: str, value: Any) -> str:
    """What a field must be and is not, or ""."""
    told, kind, values = field, KINDS[field], [value]
    if isinstance(value, kind) and field in ITEMS:
        told, kind, values = f"each of {field}", ITEMS[field], value
    bad = [one for one in values if not isinstance(one, kind)]
    if bad:
        return f"{told} must be of type {kind.__name__}, got {bad[0]!r}"
    most = LARGEST.get(field)
    if most is not None and not 0 <= value <= most:
        return f"{field} must be between 0 and {most}, got {value}"
    return ""


def _lack(record: Record, columns: Sequence[str]) -> tuple[str, str]:
    """The file of a record that lacks values, and which, or "" twice: all fields are there."""
    config, made, curves = record
    if curves.is_empty():
        return CURVES, "rows"
    if not record.is_meta and curves["method"].dtype != pl.String:
        return CURVES, "names in column method"
    numbers = [name for name in columns if name != "method"]
    numbers += [name for name in curves.columns if name.startswith("validation_")]
    for name in numbers:
        values, many = curves[name].to_numpy(), name.startswith("validation")
        if curves[name].null_count():
            return CURVES, f"values in column {name}"
        if values.dtype.kind not in "iuf" or values.ndim != 1 + many:
            return CURVES, f"{'rows of ' * many}numbers in column {name}"
        if name in WHOLE and values.dtype.kind == "f":
            return CURVES, f"whole numbers in column {name}"
    if not record.is_meta:
        spent = made["seconds"]
        if not isinstance(spent, dict) or not all(_is_real(n) for n in spent.values()):
            return MANIFEST, "seconds of each method"
        for name, found in {CURVES: {*curves["method"]}, MANIFEST: spent}.items():
            if missing := [method for method in config["methods"] if method not in found]:
                return name, f"the methods {', '.join(missing)}"
        if not config["methods"]:
            return CONFIG, "methods"
        if "runs" in made:
            whole = _have_all_steps(curves, same_last=False)
            return ("", "") if whole else (CURVES, "steps from 1, each once, for every curve")
        many = dict(curves.group_by("method").agg(pl.col("seed").n_unique()).iter_rows())
        if few := [method for method in config["methods"] if many[method] < config["seeds"]]:
            return CURVES, f"seeds of the methods {', '.join(few)}"
        if any(many[method] > config["seeds"] for method in config["methods"]):
            return CONFIG, "seeds that the curves have"
        if not _have_all_steps(curves):
            return CURVES, "steps from 1 to the same last one, each once, for every method and seed"
    return "", ""


def _is_real(number: Any) -> bool:
    """Whether JSON held a number, and one that a float can be."""
    return isinstance(number, float) or (isinstance(number, int) and abs(number) < 2**63)


def _have_all_steps(curves: pl.DataFrame, *, same_last: bool = True) -> bool:
    """Whether all methods and seeds go from step 1 to the same last one, and have none twice."""
    step = pl.col("step")
    each = curves.group_by("method", "seed").agg(
        first=step.min(), once=step.is_unique().all(), last=step.max()
    )
    found = each.drop("method", "seed").unique()
    whole = found.select("first", "once").unique().rows() == [(1, True)]
    return whole and (len(found) == 1 or not same_last)


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


def _processor() -> str:
    """The model of the processor, since another one rounds otherwise, and its number of cores."""
    with contextlib.suppress(OSError):  # only Linux has it
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _commit() -> str | None:
    """The commit that the package runs from, marked if the tree differs; None if unknown."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # not of a repository around it
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    where = Path(__file__).parent
    done = subprocess.run(
        ["git", *arguments], cwd=where, capture_output=True, text=True, check=True
    )
    return done.stdout

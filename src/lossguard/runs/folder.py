"""The folder of a run under way: who may write to it, and where and with what the run is made.

Beside its records (``records``) it holds

    started.json   until it is finished: the manifest so far
    checkpoints    until it is finished: all that is computed so far
    .lock          until it is finished: locked while a process writes to the folder
    failed.json    why the last attempt of a sweep failed, if it did
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from . import checksums
from .files import PARTS
from .locks import LOCK, locked
from .records import CONFIG, FAILED, INPUTS, MANIFEST, TABLES, read_json, write_json

STARTED = "started.json"
PASSING = (STARTED, FAILED, LOCK)
"""What is there until a run is finished. The lock is the last to go: from then on another process
can hold the folder, and sees that it is finished."""
CHECKPOINTS = "checkpoints"
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("lossguard", "jax", "jaxlib", "optax", "equinox", "numpy", "polars")


@contextlib.contextmanager
def hold_folder(folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> Iterator[bool]:
    """Make the folder of a run and put its config there, or go on with the same run's.

    It is locked against other processes; yields whether the run is finished. The folder of a
    finished one is neither locked nor written to, but rid of what a kill at its end has left.

    Raises:
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or its
            config is damaged, or another process holds it, or the run isn't finished and a link is
            in it: it might lead out of the folder.
        OSError: if it can't be made.
    """
    check_folder(folder, config, resume=resume)
    if is_finished(folder):
        _tidy(folder)
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not check_folder(folder, config, resume=resume):
            (folder / STARTED).unlink(missing_ok=True)
            write_json(folder / CONFIG, config)
        for part in folder.rglob(PARTS):
            part.unlink()
        yield is_finished(folder)


def check_folder(folder: Path, config: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether the folder holds this run; refuse it as ``hold_folder`` says.

    What a run left that failed before it computed anything counts as nothing, as do hidden files,
    such as those of one that is killed before its config is written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be empty or hold the same run, but {folder} is a file")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    entries = {name for name in names if not name.startswith(".")}
    failed = FAILED in entries and entries <= {CONFIG, FAILED, STARTED}
    is_new = failed or not entries
    if not is_new and CONFIG not in entries:
        raise ValueError(
            f"folder must be empty or hold the same run, but {folder} holds other files"
        )
    is_open = not is_finished(folder)
    links = (entry for entry in folder.rglob("*") if entry.is_symlink())
    if is_open and (link := next(links, None)):
        raise ValueError(f"folder must hold no links, but {link} is one")
    if is_new:
        return False
    if differ := _differing(read_json(folder / CONFIG), json.loads(json.dumps(config))):
        raise ValueError(
            f"folder must be empty or hold the same run, but {folder} holds another, which "
            f"differs in {differ}: choose another --out"
        )
    if not resume:
        how = "add --resume to go on with it" if is_open else "lossguard plot shows it"
        raise ValueError(f"folder {folder} holds this run already: {how}")
    return True


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The fields in which two configs differ, and both values of each."""
    told = {name: (there.get(name, "absent"), here.get(name, "absent")) for name in there | here}
    return " and ".join(f"{name} ({a}, not {b})" for name, (a, b) in told.items() if a != b)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the records of a whole run: the manifest is written last."""
    return (folder / MANIFEST).is_file()


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
        ValueError: if an input has changed since, or ``started.json`` is none.
    """
    made = manifest(**more, **{INPUTS: dict(inputs)})
    if (folder / STARTED).exists():
        first = read_json(folder / STARTED)
        before, resumed = first.get(INPUTS), first.get("resumed", [])
        whole = made.keys() <= first.keys() and isinstance(resumed, list)
        if not (isinstance(before, dict) and whole):
            raise ValueError(f"{folder / STARTED} is not of a run")
        if changed := [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]:
            raise ValueError(
                f"a run must go on with what it was started with, but {' and '.join(changed)} "
                f"changed since {folder} was started: choose another --out, or put back what "
                "there was"
            )
        part = {name: made[name] for name in ("time", "commit")}
        made = first | {"resumed": [*resumed, part]}
    write_json(folder / STARTED, made)
    return made


def finish(folder: Path, made: Mapping[str, Any]) -> None:
    """Write the manifest, once all else is written, with the checksums of all that is read."""
    tables = [name for name in TABLES if (folder / name).exists()]
    sums = {name: checksums.of_file(folder / name) for name in tables}
    sums[CONFIG] = checksums.of_json(read_json(folder / CONFIG))
    own = {MANIFEST: checksums.of_json({**made, checksums.NAME: sums})}
    write_json(folder / MANIFEST, {**made, checksums.NAME: sums | own})
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Delete what is there until a run is finished, as far as it can be deleted."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in PASSING:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


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

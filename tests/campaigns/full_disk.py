"""A disk that is full from a write on, each in turn: of a run, a sweep, a meta-training, readers.

Held: one sentence that names the reason, nothing that looks whole and isn't, and the same end to
the bit once there is room again.
"""

import contextlib
import errno
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import tiny

from lossguard.cli import main as cli
from lossguard.metatrain.trainings import RECIPES

from .killed import META, content, go

COMMANDS = {"plot": 4, "report": 5, "metatrain": 54, "run": 65, "sweep": 67}
"""And how many writes each has, and one more, at which the disk is not full."""
WRITES = [(kind, at) for kind, many in COMMANDS.items() for at in range(many)]
RECIPE = f"{tiny.__file__}:recipe"


class Full:
    """Fails at write number ``at`` and at all later ones; a file that was begun is cut in half."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left, self.on = str(folder), at, True

    def check(self, path: object) -> None:
        """Count a write."""
        if self.on and str(path).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        """Opened to be written, renamed, made."""
        writes = event == "open" and given[2] is not None and given[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir"):
            self.check(given[0])

    def fsync(self, file: int) -> None:
        """When the system finds that there is no room."""
        path = Path(f"/proc/self/fd/{file}").resolve()
        try:
            self.check(path)
        except OSError:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and stderr of ``lossguard`` with these arguments."""
    argv, err = ["lossguard", *map(str, arguments)], io.StringIO()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()):
        try:
            with contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            return int(end.code or 0), err.getvalue()
    return 0, err.getvalue()


@cache
def whole(kind: str) -> Path:
    """One that had room; what it compiles the attempts reuse."""
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    folder = Path(tempfile.mkdtemp()) / kind
    go(kind, folder)
    return folder


def attempt(seed: int, folder: Path) -> Counter[str]:
    """One command, on a disk that is full from a write on; then again."""
    kind, at = WRITES[seed % len(WRITES)]
    disk = Full(folder, at)
    place = folder / "out"
    finished = whole("run")
    arguments = {
        "run": ("run", RECIPE, "--out", place),
        "sweep": ("sweep", RECIPE, "--out", place),
        "metatrain": ("metatrain", "tiny", "--out", place),
        "plot": ("plot", place),
        "report": ("report", finished, "--out", place),
    }
    if kind == "plot":
        shutil.copytree(finished, place)

    def do() -> tuple[int, str]:
        goes_on = kind in ("run", "metatrain") and (place / "config.json").exists()
        return command(*arguments[kind], *["--resume"] * goes_on)

    sys.addaudithook(disk.hook)
    with (
        mock.patch.dict(RECIPES, {"tiny": lambda: META}),
        mock.patch.object(os, "fsync", disk.fsync),
    ):
        status, err = do()
        failed, disk.on = disk.left < 0, False
        assert failed != (at == COMMANDS[kind] - 1), f"{kind}: {at - disk.left} writes"
        assert failed == (status != 0), (
            f"{kind}: exit status {status}, and the disk was full: {failed}"
        )
        last = (err.splitlines() or [""])[-1]
        assert not failed or "No space left on device" in err, f"{kind}: {err}"
        assert "Traceback" not in err and len(last) < 1000, f"{kind}: {err}"
        assert not [*folder.rglob(".*.part")], f"{kind}: {[*folder.rglob('.*.part')]} is left"
        status, err = do()
    assert status == 0, f"{kind}, with room again: {err}"
    if kind in ("run", "sweep"):
        inside = "recipe" if kind == "sweep" else "."
        assert content(place / inside) == content(finished), f"{kind}: another end"
    return Counter({f"{kind}{', full' if failed else ', enough room'}": 1})

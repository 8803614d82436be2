"""kill -9 at random moments of a run, a sweep and a meta-training, once or several times.

Held: with ``--resume`` they end bit by bit like those that nothing stopped, and leave the same
files. Half of the kills are at a random access to a file of the folder, the others at any time.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import tiny
from test_loop import TINY as META

from lossguard.experiments import run as running
from lossguard.experiments.sweep import sweep
from lossguard.learned.weights_file import read_weights
from lossguard.metatrain import loop
from lossguard.runs import checksums, records

KINDS = ("run", "sweep", "metatrain")
ACCESSES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir")
LONGEST = {"run": 74, "sweep": 76, "metatrain": 63}
"""Accesses in the whole of it, about."""


def go(kind: str, folder: Path) -> None:
    """All of it, or what is left; a checkpoint after each chunk, and each meta-step."""
    running.CHUNK, running.SAVE_SECONDS, running.next_mark = tiny.CHUNK, 0.0, tiny.next_mark
    loop.SAVE_SECONDS = 0.0
    there = (folder / records.CONFIG).exists()
    if kind == "run":
        running.run(tiny.recipe(), folder, resume=there)
    elif kind == "sweep":
        outcomes = list(sweep({"recipe": tiny.recipe()}, folder))
        assert {one.state for one in outcomes} <= {"complete", "skipped"}, outcomes
    else:
        loop.metatrain(META, folder, resume=there)


def serve() -> None:
    """For each line of stdin a child, killed at an access or after so many seconds, if at all.

    It prints their exit statuses. What they import is imported once, here.
    """
    for line in sys.stdin:
        kind, folder, access, seconds = line.split()
        child = os.fork()
        if child == 0:
            sys.addaudithook(Killer(folder, int(access)))
            status = 1
            try:
                go(kind, Path(folder))
                status = 0
            finally:
                os._exit(status)
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Killer:
    """Ends the process at its n-th access to a folder; 0: never."""

    def __init__(self, folder: str, left: int) -> None:
        self.folder, self.left = folder, left

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if event in ACCESSES and given and str(given[0]).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks the children; what one compiles the others reuse."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    code = "from tests.campaigns.__main__ import prepare; prepare()\n"
    code += "from tests.campaigns.killed import serve; serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


def child(kind: str, folder: Path, access: int, seconds: float) -> int:
    """The exit status of a child of the server."""
    at = server()
    assert at.stdin is not None and at.stdout is not None
    try:
        print(kind, folder, access, seconds, file=at.stdin, flush=True)
        return int(at.stdout.readline())
    except BaseException:
        at.kill()  # or the next one would read what it answers to this
        server.cache_clear()
        raise


@cache
def whole(kind: str) -> Path:
    """The folder of one that nothing stopped."""
    folder = Path(tempfile.mkdtemp()) / "whole"
    assert child(kind, folder, 0, 0) == 0
    return folder


def attempt(seed: int, folder: Path) -> Counter[str]:
    """One computation, killed one to three times, then resumed here."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    expected, place, killed = whole(kind), folder / kind, 0
    for _ in range(rng.randint(1, 3)):
        access, seconds = rng.randint(1, LONGEST[kind]), 0.0
        if rng.random() < 0.5:
            access, seconds = 0, rng.uniform(0.01, 6.0)
        killed += child(kind, place, access, seconds) == -signal.SIGKILL
    go(kind, place)
    names = [sorted(str(f.relative_to(at)) for f in at.rglob("*")) for at in (place, expected)]
    assert names[0] == names[1], f"{kind}: {names[0]} instead of {names[1]}"
    inside = "recipe" if kind == "sweep" else "."
    assert content(place / inside) == content(expected / inside), f"{kind}: another end"
    return Counter({f"kills of a {kind}": killed})


def content(folder: Path) -> dict[str, Any]:
    """All that readers get from a folder, by what it is."""
    if not (folder / records.MANIFEST).exists():
        return {k: v for f in sorted(folder.iterdir()) for k, v in weights(f).items()}
    config, made, curves = records.read_run(folder)
    found = {f"config {name}": value for name, value in config.items()}
    if (folder / records.EVALUATIONS).exists():
        found |= {"evaluations": table(records.read_parquet(folder / records.EVALUATIONS))}
        found |= {f"seconds of {name}": True for name in made["seconds"]}
    else:
        found |= weights(folder / loop.WEIGHTS)
    return {**found, "curves": table(curves), "data": made["data"]}


def weights(file: Path) -> Mapping[str, Any]:
    """Those of a file."""
    read = read_weights(file)
    tensors = {name: tensor.tobytes() for name, tensor in read.tensors.items()}
    return {f"{file.name} {name}": one for name, one in {**tensors, **read.numbers}.items()}


def table(one: pl.DataFrame) -> str:
    """A table, in which NaN equals NaN."""
    return checksums.of_arrays({name: one[name].to_numpy() for name in one.columns})

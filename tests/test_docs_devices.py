"""The programs of docs/devices.md, in one process and in several."""

import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import lossguard

PAGE = Path(__file__).parents[1] / "docs/devices.md"
PAIR = "(optax.adam(0.05), optax.sgd(0.01))"
SHOWN = f"lossguard.recommended{PAIR}"
OTHERS = f"lossguard.best_of([lossguard.hedged{PAIR}, lossguard.loss_guard{PAIR}])"


def train(count: int, folder: Path, guard: str, *, seeds: bool = False) -> list[str]:
    """What each of so many processes prints; they share a folder."""
    program, more = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert SHOWN in program
    program = program.replace(SHOWN, guard)
    (folder / "train.py").write_text(program + (more if seeds else ""))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "train.py", address, str(count), str(rank)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=240) for process in running]
    assert not any(process.returncode for process in running), said
    return [re.sub(r"\[Gloo\].*\n", "", out) for out, _ in said]


def assert_close(one: str, other: str) -> None:
    """The same words and, but for rounding, the same numbers."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(number, "", one).split() == re.sub(number, "", other).split()
    numbers = [[float(found) for found in re.findall(number, said)] for said in (one, other)]
    np.testing.assert_allclose(*numbers, rtol=1e-3, atol=2e-4)


def saved(folder: Path, guard: str) -> lossguard.GuardState:
    like = {"a": np.zeros((8, 8), np.float32), "b": np.zeros((8, 4), np.float32)}
    made = eval(guard, {"lossguard": lossguard, "optax": optax})
    return eqx.tree_deserialise_leaves(folder / "state.eqx", made.init(like))


@pytest.mark.parametrize(("guard", "counts"), [(SHOWN, (2, 4)), (OTHERS, (2,))])
def test_processes_do_what_one_does(tmp_path: Path, guard: str, counts: tuple[int, ...]) -> None:
    """Two begin, four go on from where they ended."""
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    for count in counts:
        seeds = guard == SHOWN and count == 2
        (expected,) = train(1, one, guard, seeds=seeds)
        for said in train(count, several, guard, seeds=seeds):
            assert_close(said, expected)
        assert "after" in expected
        close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, saved(one, guard), saved(several, guard))

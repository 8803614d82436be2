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
SHOWN = "lossguard.recommended(optax.adam(0.05), optax.sgd(0.01))"


def program(*, seeds: bool) -> str:
    """The page's, with or without the seeds side by side."""
    begin, more = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert SHOWN in begin
    return begin + (more if seeds else "")


def train(count: int, folder: Path, *, seeds: bool) -> list[str]:
    """What each of so many processes prints; they share a folder."""
    (folder / "train.py").write_text(program(seeds=seeds))
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
    said = [process.communicate(timeout=1800) for process in running]
    assert not any(process.returncode for process in running), said
    return [re.sub(r"\[Gloo\].*\n", "", out) for out, _ in said]


def assert_close(one: str, other: str) -> None:
    """The same words and, but for rounding, the same numbers."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(number, "", one).split() == re.sub(number, "", other).split()
    numbers = [[float(found) for found in re.findall(number, said)] for said in (one, other)]
    np.testing.assert_allclose(*numbers, rtol=1e-3, atol=2e-4)


def saved(folder: Path) -> lossguard.GuardState:
    like = {"a": np.zeros((8, 8), np.float32), "b": np.zeros((8, 4), np.float32)}
    made = eval(SHOWN, {"lossguard": lossguard, "optax": optax})
    return eqx.tree_deserialise_leaves(folder / "state.eqx", made.init(like))


def test_processes_do_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two begin, four go on from where they ended; this one does both alone."""
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "not used by one", "1", "0"])
    for count in (2, 4):
        with monkeypatch.context() as there:
            there.chdir(one)
            exec(program(seeds=count == 2), {})
        expected = capsys.readouterr().out
        for said in train(count, several, seeds=count == 2):
            assert_close(said, expected)
        assert "after" in expected
        close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, saved(one), saved(several))

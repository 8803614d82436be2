"""Campaigns keep up with what they attack: one attempt of each that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["interrupts", "jax_guards"])
def test_one_attempt(name: str) -> None:
    command = [sys.executable, "-m", "tests.campaigns", name, "--once", "--seed", "1"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stderr

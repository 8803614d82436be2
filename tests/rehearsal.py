"""A release, rehearsed: built from a clean checkout, checked, and installed by name.

``make rehearsal PYTHON=python3.12`` builds what is committed, and installs the wheel by its name
with each extra into an empty environment of that Python; what it needs comes from the index that
pip uses. Then it times the import and runs a little of each. Packages for CPUs alone are enough:
``PIP_EXTRA_INDEX_URL`` may name where PyTorch has them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = """
from lossguard import pretrained_names
from lossguard.learned.weights_file import path_of, read_weights
assert all(read_weights(path_of(name)) for name in pretrained_names())
"""
TORCH = """
import sys, torch
from lossguard.torch import MLPOptimizer, Rewind
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rewind = Rewind(model, optimizer)
for _ in range(100):
    x = torch.randn(64, 3)
    loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    rewind.observe(loss)
assert loss < 1 and not rewind.events and "jax" not in sys.modules
"""
JAX = """
import sys, jax.numpy as jnp, lossguard, optax
learned, fallback = lossguard.pretrained("lstm-mnist-mlp"), optax.sgd(0.1)
rewind = lossguard.rewind(optax.adam(0.1))
state, x = rewind.init(jnp.ones(3)), jnp.ones(3)
updates, state = rewind.update(x, state, x, value=jnp.sum(x**2))
assert jnp.isfinite(updates).all()
assert lossguard.recommended(learned, fallback).init(x) and "torch" not in sys.modules
"""
EXPERIMENTS = """
import subprocess, sys
run = [sys.executable, "-m", "lossguard"]
subprocess.run([*run, "list"], check=True, stdout=subprocess.DEVNULL)
subprocess.run([*run, "demo", "--steps", "40", "--seeds", "1", "--out", "out"], check=True)
subprocess.run([*run, "report", "out"], check=True)
"""
SMOKE: Mapping[str, str] = {"": BASE, "torch": TORCH, "jax": JAX, "experiments": EXPERIMENTS}
"""What has to run with each extra."""


def main() -> None:
    """Rehearse with this Python."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        for extra in sys.argv[1:] or SMOKE:
            print(installed(wheel, extra.removeprefix("base"), Path(folder)), flush=True)


def build(folder: Path) -> Path:
    """The wheel of what is committed, by way of the sdist; both are checked."""
    checkout, dist = folder / "checkout", folder / "dist"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist, checkout], check=True)
    (wheel,) = dist.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()], check=True
    )
    subprocess.run([sys.executable, "-m", "check_wheel_contents", wheel], check=True)
    return wheel


def installed(wheel: Path, extra: str, folder: Path) -> str:
    """What became of an installation by name, in a line."""
    environment = folder / (extra or "base")
    subprocess.run([sys._base_executable, "-m", "venv", environment], check=True)
    python = str(environment / "bin" / "python")
    version = wheel.name.split("-")[1]
    name = f"lossguard[{extra}]=={version}" if extra else f"lossguard=={version}"
    install = ["-m", "pip", "install", "--quiet", "--find-links", str(wheel.parent), name]
    began = time.perf_counter()
    subprocess.run([python, *install], check=True)
    seconds = time.perf_counter() - began
    subprocess.run([python, "-c", SMOKE[extra]], check=True, cwd=environment)
    size = sum(file.stat().st_size for file in environment.rglob("*") if file.is_file())
    module = "lossguard.torch" if extra == "torch" else "lossguard"
    return (
        f"Python {sys.version_info.major}.{sys.version_info.minor}, {extra or 'base'}: "
        f"{size / 1e6:.0f} MB, installed in {seconds:.0f} s, import {module} "
        f"{import_seconds(python, module):.2f} s more than Python alone, smoke run passed"
    )


def import_seconds(python: str, module: str) -> float:
    """The median of five, without what the interpreter takes to start."""

    def seconds(program: str) -> float:
        began = time.perf_counter()
        subprocess.run([python, "-c", program], check=True, env={"PATH": os.environ["PATH"]})
        return time.perf_counter() - began

    pairs = [(seconds(f"import {module}"), seconds("pass")) for _ in range(5)]
    return statistics.median(loaded - alone for loaded, alone in pairs)


if __name__ == "__main__":
    main()

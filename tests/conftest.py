"""Shapes and types in the package's signatures are checked at run time in every test."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# What is given arrays. The rest has no shapes to check, save for tasks.task: vmap's axes are a
# TaskObjective that holds None and 0.
CHECKED = (
    "lossguard.guards",
    "lossguard.learned.lstm",
    "lossguard.metatrain.bptt",
    "lossguard.metatrain.evolution",
    "lossguard.metatrain.family",
    "lossguard.metatrain.loop",
    "lossguard.metatrain.pes",
    "lossguard.metatrain.truncated",
    "lossguard.rewinding",
    "lossguard.rollout",
    "lossguard.schedules",
    "lossguard.tasks.dataset",
    "lossguard.tasks.goals",
    "lossguard.tasks.models",
    "lossguard.tasks.parquet",
    "lossguard.tasks.shuffle",
)
install_import_hook(CHECKED, "typechecker.checked")

# Compiling is most of what the tests do: a third of it is left with these. XLA_FLAGS= in front of a
# command has everything compiled as users have it. XLA ends a process over a flag that it doesn't
# know, so that another one tries them first.
FLAGS = (
    "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"  # splitting costs more than programs so small gain
)
if "XLA_FLAGS" not in os.environ:  # it is in the environment of what this process starts
    trial = [sys.executable, "-c", "import jax; jax.devices()"]
    knows = subprocess.run(trial, env={**os.environ, "XLA_FLAGS": FLAGS}, capture_output=True)
    os.environ["XLA_FLAGS"] = FLAGS if knows.returncode == 0 else ""

# A shell has what it runs in the background ignore Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

# They have no doctests, and of two that are named on one command line only one could be imported.
collect_ignore_glob = ["*conftest.py", "campaigns/*"]

# The first example of a property compiles, which takes its time. No example depends on chance.
hypothesis.settings.register_profile("lossguard", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lossguard")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users have it: types are not checked at run time, and wrong ones reach our own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def eager() -> Iterator[None]:
    """Operation by operation: faster than to compile what runs once."""
    with jax.disable_jit():
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision, for comparisons that are exact but for rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    from tiny_run import leave  # imports the package, which the hook must precede

    return leave(tmp_path / "run")


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python files of a test's folder are imported by this test alone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_modules: None) -> Callable[..., None]:
    """Runs ``lossguard``, which is on the path, with arguments in an empty folder."""
    from lossguard.cli import main as cli  # the hook must precede these too
    from lossguard.cli import run_commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_commands, "which", lambda name: name)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["lossguard", *map(str, arguments)])
        cli.main()

    return run


@pytest.fixture
def refused(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Bad arguments: one sentence on stderr that names some parts, status 2, and nothing else."""

    def run(arguments: tuple[object, ...], *parts: str) -> None:
        with pytest.raises(SystemExit) as caught:
            main(*arguments)
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert err.startswith("lossguard: ") and err.count("\n") == 1 and err.endswith("\n")
        assert not out
        for part in parts:
            assert part in err

    return run

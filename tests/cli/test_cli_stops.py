"""What the command leaves and says when it is stopped, or nobody reads it any more."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import RUN

from lossguard.cli import main as cli
from lossguard.experiments import run, sweep
from lossguard.metatrain import loop
from lossguard.runs import records


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [
        (RUN, (*RUN, "--resume")),
        (("run", "fig05"), ("run", "fig05", "--out", "runs/fig05", "--resume")),
        (("demo",), ("demo", "--out", "lossguard-demo-aa", "--resume")),
        (
            ("metatrain", "mnist-mlp", "--resume"),
            ("metatrain", "mnist-mlp", "--resume", "--out", "runs/mnist-mlp"),
        ),
        (("sweep", "fig05", "fig09"), ("sweep", "fig05", "fig09")),
        (("plot", "runs"), None),
    ],
)
def test_stopped_it_tells_the_command_that_goes_on(
    main, capsys, monkeypatch, arguments, goes_on, begun
) -> None:
    """If there is anything to go on with."""

    def stop(_: Any, folder: Path, **__: Any) -> None:
        if begun:
            folder.mkdir(parents=True)
            (folder / records.CONFIG).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(run, "run", stop)
    monkeypatch.setattr(sweep, "sweep", stop)
    monkeypatch.setattr(loop, "metatrain", stop)
    monkeypatch.setattr(records, "read_runs", lambda _: stop(_, Path("unused")))
    monkeypatch.setattr("tempfile.tempdir", ".")
    monkeypatch.setattr("secrets.token_hex", lambda _: "aa")
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 130
    if not begun and arguments[0] != "sweep":
        goes_on = None
    command = goes_on and f"; to go on: lossguard {' '.join(goes_on)}"
    told = capsys.readouterr().err.splitlines()
    if arguments[-1] == "--resume":  # a folder that isn't there may be a mistyped one
        assert told.pop(0) == "lossguard: runs/mnist-mlp holds no run to go on with: it begins"
    assert told == [f"lossguard: stopped{command or ''}"]


def in_a_shell(command: str) -> subprocess.CompletedProcess[str]:
    """With output that is buffered, as of a pipe."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = f"set -o pipefail; {sys.executable} -m lossguard {command}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=buffered)


@pytest.mark.parametrize("command", ["list | head -1", "list | true", "--version | true"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    ended = in_a_shell(command)
    assert (ended.stderr, ended.returncode) == ("", 0)
    assert ended.stdout.count("\n") == command.count("head")


def test_a_reader_that_leaves_a_computation_is_told_by_the_status(monkeypatch) -> None:
    """It may not have done all of it."""

    def reads_no_more(arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setitem(cli.WITH_RECIPES, "sweep", reads_no_more)
    monkeypatch.setattr(sys, "argv", ["lossguard", "sweep", "table1"])
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["list", "--help"])
def test_output_that_can_not_be_written_is_told_in_a_sentence(command: str) -> None:
    ended = in_a_shell(f"{command} > /dev/full")
    assert (ended.stderr, ended.returncode) == ("lossguard: No space left on device\n", 2)


def test_ctrl_c_is_told_when_the_reader_has_gone(monkeypatch, capfd) -> None:
    """As with ``| tee``, which the same Ctrl-C stops."""
    reading, writing = os.pipe()
    os.close(reading)

    def stopped() -> None:
        print("what is not flushed yet")
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", stopped)
    monkeypatch.setattr(sys, "argv", ["lossguard", "list"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 130
    assert capfd.readouterr().err == "lossguard: stopped\n"

"""The command line as a user runs it: what it prints, what it leaves, how it refuses."""

import contextlib
import errno
import io
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from tiny_run import leave

import lossguard
from lossguard import cli, records, run_commands, run_folder, terminal
from lossguard.experiments import price, run, sweep
from lossguard.learned import weights_file
from lossguard.metatrain import loop

TINY = str(Path(__file__).parent / "experiments" / "tiny.py")
RUN = ("run", f"{TINY}:recipe", "--out", "out")


def test_list(main, capsys: pytest.CaptureFixture[str]) -> None:
    main("list")
    out = capsys.readouterr().out
    names = "demo", "fig05", "table1", "mnist-mlp", "spirals", "tiny_imagenet", "lstm-mnist-mlp"
    for name in names:
        assert f"\n  {name} " in out or f"\n  {name}\n" in out


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help(main, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    main(*arguments)
    out = capsys.readouterr().out
    assert all(f"lossguard {name} " in out for name in cli.COMMANDS)


def test_version(main, capsys: pytest.CaptureFixture[str]) -> None:
    main("--version")
    assert capsys.readouterr().out == f"lossguard {metadata.version('lossguard')}\n"


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (("run",), ("usage: lossguard run RECIPE", "one that lossguard list shows")),
        (("sweep",), ("usage: lossguard sweep RECIPE... [OPTIONS]", "path/to/module.py:fun")),
        (("metatrain",), ("usage: lossguard metatrain RECIPE", "lists its options")),
        (("list",), ("usage: lossguard list",)),
        (("demo",), ("--steps", "--methods", "--out", "--resume", "--model.hidden")),
        (("run", "fig03"), ("--dataset", "--sgd-rate", "--loser {keep,reset,reset in every")),
        (("run", f"{TINY}:recipe"), ("--steps", "--nt", "--nc")),
        (("metatrain", "mnist-mlp"), ("--meta-steps", "--truncation", "--validate-every")),
        (("plot",), ("usage: lossguard plot", "Folders of runs", "--over {price,seconds,steps}")),
        (("benchmark",), ("usage: lossguard benchmark", "--out", "--ray", "--steps", "--seeds")),
        (("claims",), ("usage: lossguard claims", "Folders of runs")),
        (("report",), ("usage: lossguard report", "Folders of runs", "--out")),
    ],
)
def test_help_of_options(main, capsys, tmp_path, monkeypatch, arguments, fields) -> None:
    """For which no folder is made, as there is one for the demo."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(*arguments, "--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(field in out for field in fields)
    assert ">>>" not in out and "pyright" not in out  # from docstrings and comments
    assert not list(tmp_path.iterdir())


def test_names_are_shown_as_they_are(main, capsys: pytest.CaptureFixture[str]) -> None:
    main(*RUN, "--steps", "5", "--seeds", "1", "--methods", "Signs [/-] :x:")
    out, err = capsys.readouterr()
    assert "Signs [/-] :x:" in out and err == "Signs [/-] :x:: compiling\n"


def test_letters_that_a_terminal_lacks_stop_nothing(main, monkeypatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    main(*RUN[:-1], "ü", "--steps", "5", "--seeds", "1", "--methods", "Signs")
    stdout.seek(0)
    assert stdout.read().endswith("figure: \\xfc/figure.png\nrecords: \\xfc\n")


@pytest.mark.parametrize(("width", "parts"), [(160, 1), (80, 2)])
def test_numbers_are_whole_in_a_narrow_terminal(capsys, monkeypatch, width, parts) -> None:
    monkeypatch.setattr(terminal, "console", lambda: Console(width=width))
    losses = {f"loss at {10**k:,}": ["0.0001234"] for k in range(2, 7)}
    costs = {"seconds": ["1,234"], "gradients": ["2,000,000"]}
    terminal.print_summary("title", {"method": ["GL2O (theta as decay)"], **losses, **costs})
    told = capsys.readouterr().out
    assert "…" not in told and told.count("GL2O (theta as decay)") == parts
    assert told.count("0.0001234") == 5 and "1,234" in told and "2,000,000" in told


def test_run_with_overrides_then_plot(refused, main, capsys, tmp_path) -> None:
    main(*RUN, "--steps", "12", "--seeds", "1", "--methods", "Signs", "LGL2O", "--nc", "2")
    out, err = capsys.readouterr()
    assert err == "Signs: compiling\nLGL2O: compiling\n"
    folder = tmp_path / "out"
    config, made, curves = records.read_run(folder)
    assert (config["steps"], config["seeds"], config["nc"]) == (12, 1, 2)
    assert config["methods"] == ["Signs", "LGL2O"]
    assert made["command"][:5] == ["lossguard", *RUN]
    assert curves["step"].max() == 15  # three whole cycles
    assert "figure: out/figure.png\nrecords: out\n" in out
    assert "loss at 15" in out and "LGL2O" in out
    drawn = (folder / "figure.png").read_bytes()

    (folder / "figure.png").unlink()
    main("plot", "out")
    assert capsys.readouterr().out == out
    assert (folder / "figure.png").read_bytes() == drawn

    refused(
        RUN,
        "folder must be empty or hold the same run, but out holds another, which differs in steps "
        "(12, not 60) and seeds (1, not 2) and methods (['Signs', 'LGL2O'], not ['Signs', 'L2O', "
        "'LGL2O']) and nc (2, not 3): choose another --out",
    )
    refused((*RUN, "--resume"), "out holds another")
    same = made["command"][1:]
    refused(tuple(same), "out holds this run already: lossguard plot shows it")
    main(*same, "--resume")
    assert capsys.readouterr().out == out


def test_demo_in_short(main, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    methods = ("SGDnm", "L2O")
    main("demo", "--steps", "20", "--seeds", "2", "--methods", *methods, "--out", "here")
    out = capsys.readouterr().out
    assert out.startswith("SGDnm is SGD without momentum, the fallback; L2O the learned optimizer")
    assert "mlp-small, meta-trained on small images, tested on Circles + MLP" in out
    table = records.read_parquet(tmp_path / "here" / records.EVALUATIONS)
    sgd, l2o = (price.at(price.curves(table, name).mean(), 20.0) for name in methods)
    told = f"After a price of 20 gradients, loss over that of SGDnm: L2O {l2o / sgd:.2g}\n"
    assert told in out and out.endswith("lossguard report here\n")
    assert (tmp_path / "here" / "figure.png").is_file()


def test_what_a_loss_of_zero_is_over_another_is_told(tmp_path: Path) -> None:
    spent = {"step": [10, 15, 20], "gradients": [10, 15, 20], "forwards": [0] * 3, "seed": [0] * 3}
    runs = [
        pl.DataFrame({"method": [name] * 3, **spent, "train_loss": [1.0, end, end]})
        for name, end in (("a", 0.0), ("b", 0.5))
    ]
    records.write_parquet(tmp_path / records.EVALUATIONS, pl.concat(runs))
    assert "loss over that of a: b inf\n" in price.at_equal_price("a", tmp_path)
    assert "loss over that of b: a 0\n" in price.at_equal_price("b", tmp_path)


def test_plot_of_meta_training(main, capsys, tmp_path) -> None:
    table = {"meta_step": [1, 2], "meta_loss": [2.0, 0.5], "validation": np.ones((2, 60))}
    folder = leave(tmp_path / "meta", {"name": "lstm-cifar10-conv"}, pl.DataFrame(table), {})
    main("plot", str(folder))
    assert f"figure: {folder}/figure.png" in capsys.readouterr().out
    assert (folder / "figure.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("rn",), ("command must be one of demo, run", "got 'rn' (did you mean run?)")),
        (("plot",), ("name the folder of a run, or several",)),
        (("plot", "nowhere"), ("there is no folder nowhere",)),
        (("run",), ("run needs a recipe, one that lossguard list shows or path/to/", "got none")),
        (("run", "mlp-small"), ("mlp-small is run by lossguard metatrain mlp-small",)),
        (("metatrain", "fig05"), ("fig05 is run by lossguard run fig05",)),
        (("run", "fgi03"), ("got 'fgi03' (did you mean fig03?)",)),
        (("run", "fig02"), ("fig02 is run by lossguard sweep fig02, and its outer loop by",)),
        (("run", "fig11"), ("fig11 is run by lossguard metatrain cifar10-conv",)),
        (("sweep", "fig11"), ("fig11 is run by lossguard metatrain cifar10-conv",)),
        (("metatrain", "mnist"), ("got 'mnist' (did you mean mnist-mlp?)",)),
        (("run", "no.py:recipe"), ("recipe no.py:recipe can't be read", "no such Python file")),
        (("run", ".py:"), ("can't be read",)),
        (("run", TINY), ("tiny.py: name it, as in ", "tiny.py:my_recipe\n")),
        (("run", f"{TINY}:recipes"), ("tiny.py:recipes can't be read", "no such function")),
        (("run", f"{TINY}:CHUNK"), ("no such function",)),
        (("run", f"{TINY}:number"), ("must return the Experiment that run takes, got int",)),
        (("run", f"{TINY}:make_task"), ("tiny.py:make_task must take no arguments", "experiment")),
        (("metatrain", f"{TINY}:recipe"), ("the MetaTraining that metatrain", "got Experiment")),
        (("run", "fig05", "--dataset", "spiral"), ("got 'spiral'", "(did you mean spirals?)")),
        (("run", "fig05", "--scaling", "unit"), ("scaling must be one of none, standardized",)),
        (("run", "fig5"), ("got 'fig5' (did you mean fig05?)",)),
        (
            ("run", "fig05", "--methods", "SGDnm", "Adm"),
            ("methods must each be one of SGDnm", "got 'Adm' (did you mean Adam?)"),
        ),
        (("run", "fig05", "--methods", "sgdnm"), ("got 'sgdnm' (did you mean SGDnm?)",)),
        (("run", "fig09", "--methods", "LGL2O over adam .01"), ("mean LGL2O over Adam 0.01?)",)),
        (("run", "fig05", "--methods"), ("methods must be one or more, each once, got none",)),
        (("run", "fig05", "--methods", "Adam", "Adam"), ("each once, got Adam Adam",)),
        (
            ("run", "fig05", "--learned", "lstm"),
            ("must be one of lstm-cifar10-conv, lstm-mnist-mlp", "got 'lstm'"),
        ),
        (("metatrain", "mnist-mlp", "--seed", str(2**63)), ("seed must be at most 4294967295",)),
        (
            ("run", "fig05", "--model.hidden", "9" * 4_000),
            ("each of hidden must be at most 1000000, got one of many digits",),
        ),
        (
            ("run", "fig05", "--model.hidden", "-1"),
            ("each of hidden must be an integer of at least 1, got -1",),
        ),
        (("metatrain", "mnist-mlp", "--dataset", "mnits"), ("(did you mean mnist?",)),
        (("metatrain", "mnist-mlp", "--meta-steps", "0"), ("meta_steps must be an integer of",)),
        (("metatrain", "mnist-mlp", "--validate-every", "0"), ("validate_every must be an",)),
        (("metatrain", "mnist-mlp", "--longest", "50"), ("longest must be at least shortest",)),
    ],
    ids=lambda value: " ".join(value).replace(TINY, "tiny.py") if value[0].islower() else "",
)
def test_bad_input(refused, tmp_path, arguments, parts) -> None:
    refused(arguments, *parts)
    assert not list(tmp_path.iterdir())


def test_an_error_in_ones_own_module_is_told_with_its_place(refused, tmp_path) -> None:
    module = tmp_path / "of_my_own.py"
    module.write_text("def recipe():\n    a, b = (1, 2, 3)\n")
    place = f"too many values to unpack (expected 2) ({module}, line 2)"
    refused(("run", f"{module}:recipe"), place)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "fig05", "--stesp", "3"),
        ("run", "fig05", "--steps", "many"),
        ("run", "fig05", "--loser", "kept"),
        ("metatrain", "mnist-mlp", "surplus"),
        ("claims", "results", "--steps", "3"),
        ("list", "all"),
    ],
)
def test_bad_options(main, capsys, tmp_path, arguments) -> None:
    with pytest.raises(SystemExit) as caught:
        main(*arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert arguments[-1] in err and "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_damaged_weights(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped" / "lstm-mnist-mlp.safetensors"
    shipped.parent.mkdir()
    shutil.copy(weights_file.pretrained_path("lstm-mnist-mlp"), shipped)
    shipped.write_bytes(shipped.read_bytes()[:-100])
    monkeypatch.setattr(weights_file, "SHIPPED", shipped.parent)
    refused(("run", "fig05"), "weights must be a complete .safetensors file")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["plot", "claims"])
def test_folder_of_runs(main, capsys, tmp_path, command) -> None:
    """Stands for the finished runs in it; the others are named."""
    for name in ("a", "b"):
        main(*RUN[:-1], f"runs/{name}", "--steps", "1", "--seeds", "1", "--methods", "Signs")
    drawn = [tmp_path / "runs" / name / "figure.png" for name in ("a", "b")]
    for file in drawn:
        file.unlink()
    run_folder.open_folder(tmp_path / "runs" / "half", {})
    run_folder.open_folder(tmp_path / "runs" / "lost", {})
    records.write_json(tmp_path / "runs" / "lost" / "failed.json", {"reason": "no luck"})
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "torn")
    (tmp_path / "runs" / "torn" / "curves.parquet").write_bytes(b"PAR1")
    capsys.readouterr()
    main(command, "runs")
    assert [file.exists() for file in drawn] == [command == "plot"] * 2
    half, lost, torn, *_ = capsys.readouterr().err.splitlines()
    assert half == "runs/half is not finished"
    assert lost == "runs/lost is not finished: no luck"
    assert torn.startswith("runs/torn/curves.parquet is damaged: its SHA-256 is not the one ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "runs/lost/failed.json is not readable JSON: "),
        ("[]", "runs/lost/failed.json must hold a JSON object, but holds list"),
        ("{}", "runs/lost is not finished: it failed"),
    ],
)
def test_damaged_reason_of_a_failure_is_named(main, capsys, finished, content, told) -> None:
    shutil.copytree(finished, "runs/whole")
    run_folder.open_folder(Path("runs/lost"), {})
    Path("runs/lost/failed.json").write_text(content)
    main("plot", "runs")
    assert capsys.readouterr().err.splitlines()[0].startswith(told)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_cannot_be_made(refused, tmp_path, monkeypatch, code) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    refused(RUN, f"lossguard: {os.strerror(code)}: out")
    assert not list(tmp_path.iterdir())


def test_error_of_the_system_without_a_path(refused, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "open_folder", full)
    refused(RUN, "lossguard: No space left on device\n")


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


@pytest.mark.parametrize(
    "program", [(Path(sys.executable).with_name("lossguard"),), (sys.executable, "-m", "lossguard")]
)
def test_installed_command(tmp_path: Path, program: tuple[str, ...]) -> None:
    done = subprocess.run([*program, "rum"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("lossguard: command must be one of ")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


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


def test_what_is_told_to_type_runs_where_the_command_is_not_on_the_path(monkeypatch) -> None:
    monkeypatch.setattr(run_commands, "which", lambda _: None)
    told = [*shlex.split(run_commands.program()), "--version"]
    assert subprocess.check_output(told, text=True) == f"lossguard {lossguard.__version__}\n"

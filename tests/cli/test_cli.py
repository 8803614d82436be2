"""The command line as a user runs it: what it prints, and what it leaves."""

import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from tiny_run import RUN, TINY, leave, open_folder

import lossguard
from lossguard.cli import main as cli
from lossguard.cli import run_commands, terminal
from lossguard.experiments import price
from lossguard.experiments.recipes import fig05
from lossguard.metatrain import loop
from lossguard.runs import records


def test_list(main, capsys: pytest.CaptureFixture[str]) -> None:
    main("list")
    out = capsys.readouterr().out
    names = "demo", "fig05", "table1", "mnist-mlp", "spirals", "fashion_mnist", "lstm-mnist-mlp"
    for name in names:
        assert f"\n  {name} " in out or f"\n  {name}\n" in out


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help(main, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    main(*arguments)
    out = capsys.readouterr().out
    assert all(f"lossguard {name} " in out for name in cli.COMMANDS)


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
    methods = ("Learned alone", "SGD alone")
    main("demo", "--steps", "20", "--seeds", "2", "--methods", *methods, "--out", "here")
    out = capsys.readouterr().out
    assert out.startswith("A learned optimizer trains a network that it was not made for")
    assert "digits, two hidden layers" in out
    table = records.read_parquet(tmp_path / "here" / records.EVALUATIONS)
    learned, sgd = (price.at(price.curves(table, name).mean(), 20.0) for name in methods)
    told = "After a price of 20 gradients, loss over that of SGD alone: "
    told += f"Learned alone {learned / sgd:.2g}\n"
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
    below = pl.concat(runs).with_columns(pl.col("train_loss") - 2)
    records.write_parquet(tmp_path / records.EVALUATIONS, below)
    assert price.at_equal_price("a", tmp_path).startswith("Losses below 0 have no ratios: ")
    one = price.curves(below, "a").mean()
    assert price.slowdown(one, one, 20.0) <= 1
    lost = pl.when(pl.col("method") == "a").then(np.nan).otherwise("train_loss")
    runs = pl.concat(runs).with_columns(train_loss=lost)
    records.write_parquet(tmp_path / records.EVALUATIONS, runs)
    assert price.at_equal_price("a", tmp_path).startswith("a diverges at once: ")
    assert "loss over that of b: a inf\n" in price.at_equal_price("b", tmp_path)


def test_plot_of_meta_training(main, capsys, tmp_path) -> None:
    table = {"meta_step": [1, 2], "meta_loss": [2.0, 0.5], "validation": np.ones((2, 60))}
    folder = leave(tmp_path / "meta", {"name": "lstm-cifar10-conv"}, pl.DataFrame(table), {})
    main("plot", str(folder))
    assert f"figure: {folder}/figure.png" in capsys.readouterr().out
    assert (folder / "figure.png").is_file()


@pytest.mark.parametrize("command", ["plot", "claims"])
def test_folder_of_runs(main, capsys, tmp_path, command) -> None:
    """Stands for the finished runs in it; the others are named."""
    for name in ("a", "b"):
        main(*RUN[:-1], f"runs/{name}", "--steps", "1", "--seeds", "1", "--methods", "Signs")
    drawn = [tmp_path / "runs" / name / "figure.png" for name in ("a", "b")]
    for file in drawn:
        file.unlink()
    open_folder(tmp_path / "runs" / "half", {})
    open_folder(tmp_path / "runs" / "lost", {})
    records.write_json(tmp_path / "runs" / "lost" / "failed.json", {"reason": "no luck"})
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "torn")
    (tmp_path / "runs" / "torn" / "curves.parquet").write_bytes(b"PAR1")
    capsys.readouterr()
    main(command, "runs")
    assert [file.exists() for file in drawn] == [command == "plot"] * 2
    half, lost, torn, *_ = capsys.readouterr().err.splitlines()
    assert half == "runs/half holds no finished run: manifest.json is missing"
    assert lost == "runs/lost is not finished: no luck"
    assert torn.startswith("runs/torn/curves.parquet is damaged: its SHA-256 is not the one ")


@pytest.mark.parametrize(
    "program", [(Path(sys.executable).with_name("lossguard"),), (sys.executable, "-m", "lossguard")]
)
def test_installed_command(tmp_path: Path, program: tuple[str, ...]) -> None:
    done = subprocess.run([*program, "rum"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("lossguard: command must be one of ")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_what_is_told_to_type_runs_where_the_command_is_not_on_the_path(monkeypatch) -> None:
    monkeypatch.setattr(run_commands, "which", lambda _: None)
    told = [*shlex.split(run_commands.program()), "--version"]
    assert subprocess.check_output(told, text=True) == f"lossguard {lossguard.__version__}\n"


def test_a_title_tells_what_options_have_changed(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(run_commands, "_run", lambda where, experiment: made.append(experiment))
    run_commands.run(["fig05", "--dataset", "circles", "--steps", "10", "--model.hidden", "3"])
    run_commands.run(["fig05", "--dataset", "circles", "--title", "Mine"])
    run_commands.run(["fig05", "--steps", "10"])
    plain = fig05().title
    titles = [f"{plain}; here dataset circles, another model", "Mine", plain]
    assert [one.title for one in made] == titles


def test_a_run_with_other_settings_is_of_no_figure(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(run_commands, "_run", lambda where, experiment: made.append(experiment))
    monkeypatch.setattr(loop, "metatrain", lambda config, *_, **__: made.append(config))
    monkeypatch.setattr(run_commands, "show", lambda folder: None)
    kept = "--steps 10 --seeds 2 --seed 3 --nc 100 --adam-rate 0.01 --title a --vectorize"
    run_commands.run(["fig05", *kept.split(), "--methods", "SGDnm"])
    run_commands.metatrain(["cifar10-conv-plain", "--seed", "3", "--meta-steps", "10"])
    assert [one.figure for one in made] == ["fig05", "fig11"]
    made.clear()
    for changed in ("--batch-size 64", "--loser reset", "--scaling standardized", "--sgd-tau 2e4"):
        run_commands.run(["fig05", *changed.split()])
    run_commands.run(["fig05", "--model.hidden", "3"])
    run_commands.metatrain(["cifar10-conv-plain", "--hidden", "10"])
    run_commands.metatrain(["mnist-mlp-paper", "--dataset", "digits"])
    assert [one.figure for one in made] == [""] * 7


def test_methods_whose_names_tell_an_option_go_with_it(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(run_commands, "_run", lambda where, experiment: made.append(experiment))
    run_commands.run(["fig09", "--sgd-rate", "1"])
    assert made[0].names()[0] == "LGL2O over SGDnm 1" and len(made[0].names()) == 6

"""The commands that read records, and what is shown of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from .command_line import Folders, Map, Plot, Report, wants_help
from .terminal import console, print_summary, shown, tell


def plot(arguments: Sequence[str]) -> None:
    """Figures and tables from the records of runs."""
    about = "Draw a figure of each run into its folder."
    parsed = _folders(Plot, arguments, "plot", about)
    for folder in _records(parsed.folders):
        show(folder, parsed.over)


def claims(arguments: Sequence[str]) -> None:
    """The paper's claims, judged by the records of runs."""
    about = "Judge the paper's claims by these runs."
    records = _records(_folders(Folders, arguments, "claims", about).folders)
    from .experiments.claims import judge_claims

    columns = ("claim", "figure", "the paper says", "measured", "seeds", "to step", "verdict")
    table = Table(*columns, show_lines=True)
    for one in judge_claims(records):
        mark = f"{one.mark:,}" if one.mark else ""
        table.add_row(one.id, one.figure, one.says, one.numbers, one.seeds, mark, one.verdict)
    console().print(table)


def readings(arguments: Sequence[str]) -> None:
    """How many of the paper's claims each joint reading of it reproduces: a list and a map."""
    about = "Judge joint readings of the paper by their runs."
    parsed = _folders(Map, arguments, "readings", about)
    from .experiments.readings import draw_readings, judge_readings

    judged = judge_readings(_records(parsed.folders))
    draw_readings(judged).savefig(parsed.out, dpi=100)
    for one in judged:
        print(one)
    print(shown(f"figure: {parsed.out}"))


def report(arguments: Sequence[str]) -> None:
    """One page from the records of runs: claims, interactive figures and tables."""
    about = "Write a page of claims, interactive figures and tables."
    parsed = _folders(Report, arguments, "report", about)
    from .experiments.report import report

    print(shown(f"report: {report(parsed.folders, parsed.out)}"))


def list_all(arguments: Sequence[str]) -> None:
    """What there is to name."""
    if wants_help(arguments):
        print("usage: lossguard list")
        return
    if arguments:
        raise ValueError(f"list takes no arguments, got {' '.join(arguments)}")
    from .experiments import RECIPES as EXPERIMENTS
    from .experiments.recipes import SETS
    from .learned.weights_file import pretrained_names
    from .metatrain.recipes import RECIPES as META
    from .tasks.datasets import DATASETS

    for title, entries in {
        "experiments (lossguard run)": {n: f().title for n, f in EXPERIMENTS.items()},
        "sets of experiments": {name: ", ".join(members) for name, members in SETS.items()},
        "meta-training (lossguard metatrain)": {n: _first_line(f) for n, f in META.items()},
        "data sets (--dataset)": {n: _first_line(f) for n, f in DATASETS.items()},
        "learned optimizers (--learned)": dict.fromkeys(pretrained_names(), ""),
    }.items():
        print(title)
        for name, line in entries.items():
            print(f"  {name:<28}{line}".rstrip())


def show(folder: Path, over: Literal["price", "seconds", "steps"] = "price") -> None:
    """A finished run's figure and its table."""
    from .experiments import figures
    from .metatrain import figure
    from .records import read_run

    record = read_run(folder)
    if record.is_meta:
        drawn = figure.plot(folder, record)
    else:
        drawn = figures.plot(folder, record, over=over)
        print_summary(figures.summary(record))
    print(shown(f"figure: {drawn}\nrecords: {folder}"))


def _folders(kind: Any, arguments: Sequence[str], command: str, about: str) -> Any:
    """The folders that a command is given, and its options."""
    parsed = tyro.cli(kind, args=arguments, prog=f"lossguard {command}", description=about)
    if not parsed.folders:
        raise ValueError(f"{command} needs the folder of a run, or several")
    return parsed


def _records(folders: Sequence[Path]) -> dict[Path, Any]:
    """Of the finished runs in these folders; what is left out is told on stderr."""
    from .experiments.folders import read_runs

    found, others = read_runs(folders)
    for reason in others:
        tell(reason)
    return found


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0].replace("`", "")

"""The commands that read records, and what is shown of a run."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .terminal import console, print_summary, shown, table, tell

Folders = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FOLDER...", help="Folders of runs, or folders that hold such folders."),
]
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Over = Literal["price", "seconds", "steps"]


def plot(folders: Folders, over: Over = "price") -> None:
    """Draw a figure of each run into its folder, in place of its figure.png, and print its table.

    Args:
        over: The axis of both: what was spent, in gradients, or its time; or optimizer steps.
    """
    found = [_is_shown(folder, over, record) for folder, record in _records(folders).items()]
    if not any(found):
        raise ValueError("none of these runs can be shown")


def claims(folders: Folders) -> None:
    """Judge the paper's claims by these runs."""
    records = _records(folders)
    from ..experiments.claims import judge_claims

    columns = ("claim", "figure", "the paper says", "measured", "seeds", "to step", "verdict")
    rows, rest = [], []
    for one in judge_claims(records):
        if one.verdict == "not run" and re.search("(^|: )no ", one.numbers):
            rest.append(one.id)
        else:
            rows.append(one._replace(mark=f"{one.mark:,}" if one.mark else ""))
    if rows:
        console().print(table(columns, rows, show_lines=True))
    if rest:
        print(f"not run: {', '.join(rest)}")


def report(folders: Folders, out: Out = Path("report.html")) -> None:
    """Write a page of claims, figures and tables.

    Args:
        out: The page.
    """
    from ..experiments.report import report

    print(shown(f"report: {report(folders, out)}"))


def list_all() -> None:
    """List recipes, data sets and learned optimizers: what there is to name."""
    from ..experiments import benchmark_tasks, price
    from ..experiments.recipes import PAPERS, SETS
    from ..learned.weights_file import pretrained_names
    from ..metatrain.trainings import RECIPES as META
    from ..tasks.datasets import DATASETS

    for title, entries in {
        "experiments (lossguard run)": {n: f().title for n, f in PAPERS.items()},
        "sets of experiments (lossguard sweep)": {n: ", ".join(of) for n, of in SETS.items()},
        "lossguard benchmark price": {n: f().title for n, f in price.RECIPES.items()},
        "lossguard benchmark tasks": {n: f().title for n, f in benchmark_tasks.RECIPES.items()},
        "meta-training (lossguard metatrain)": {n: _first_line(f) for n, f in META.items()},
        "data sets (--dataset)": {n: _first_line(f) for n, f in DATASETS.items()},
        "learned optimizers (--learned)": dict.fromkeys(pretrained_names(), ""),
    }.items():
        print(title)
        width = max(map(len, entries)) + 2
        for name, line in entries.items():
            print(f"  {name:<{width}}{line}".rstrip())


def _is_shown(folder: Path, over: Over, record: Any) -> bool:
    """Show a run; or tell why that can't be done: whatever a strange record makes fail."""
    try:
        show(folder, over, record)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        tell(f"{folder} can't be shown: {type(error).__name__}: {error}")
        return False
    return True


def show(folder: Path, over: Over = "price", record: Any = None) -> None:
    """A finished run's figure and its table, over the same axis."""
    from ..experiments import figures
    from ..metatrain import figure
    from ..runs.drawing import save
    from ..runs.records import read_run

    record = record or read_run(folder)
    drawn = figure.draw(record) if record.is_meta else figures.draw_run(record, over)
    file = save(drawn, folder)
    if not record.is_meta:
        title = record.config["title"] or record.config["name"]
        print_summary(title, figures.summary(record, over).to_dict(as_series=False))
    print(shown(f"figure: {file}\nrecords: {folder}"))


def _records(folders: Sequence[Path]) -> dict[Path, Any]:
    """Of the finished runs in these folders; what is left out is told on stderr."""
    from ..runs.records import read_runs

    found, others = read_runs(folders)
    for reason in others:
        tell(reason)
    return found


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0].replace("`", "")

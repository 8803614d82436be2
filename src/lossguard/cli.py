"""The command line.

lossguard demo                  a learned optimizer alone and guarded, in a minute
lossguard run RECIPE            an experiment of the paper, or path/to/module.py:recipe
lossguard sweep SET...          sets of recipes, or recipes, one after another or on a cluster
lossguard benchmark price       what every guard costs and is worth, on five tasks
lossguard benchmark tasks       learned optimizers against published baselines, on five tasks
lossguard metatrain RECIPE      meta-train a learned optimizer
lossguard plot DIR...           figures and tables from records alone
lossguard claims DIR...         the paper's claims, judged by records
lossguard readings DIR...       joint readings of the paper, by how many claims each reproduces
lossguard report DIR...         one page of claims, interactive figures and tables
lossguard list                  recipes, data sets, learned optimizers
lossguard --version             which release this is
"""

import io
import itertools
import os
import secrets
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from . import __version__
from .command_line import check_beside, find_recipe, override, usage
from .terminal import PlainConsole, shown
from .validation import one_of


def main() -> None:
    """The ``lossguard`` command: bad input is one sentence on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # of letters that a terminal doesn't have
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print((__doc__ or "").strip() + "\n\nlossguard COMMAND --help tells more.")
        return
    if name == "--version":
        print(f"lossguard {__version__}")
        return
    try:
        if name not in COMMANDS:
            raise ValueError(f"command must be {one_of(COMMANDS, name)}")
        COMMANDS[name](arguments)
    except (ValueError, OSError) as error:
        _tell(f"lossguard: {_sentence(error)}{_place(error, arguments)}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        how = f"; to go on from the last checkpoint: {stop}" if stop.args else ""
        sys.stdout.flush()
        print(f"lossguard: stopped{how}", file=sys.stderr, flush=True)
        os._exit(130)  # torn out of a compilation, JAX may crash where the interpreter ends


@dataclass(frozen=True)
class Where:
    """Where a run leaves its folder."""

    out: Path
    """Folder of the run, empty or absent; with --resume the one to go on with."""
    resume: bool = False
    """Go on from the last checkpoint."""


@dataclass(frozen=True)
class Sweep:
    """Where a sweep leaves its folders and where it runs."""

    out: Path = Path("runs")
    """Folder of the folders of its runs. What is complete there is skipped, the rest resumed."""
    ray: str | None = None
    """Address of a Ray cluster to spread the runs over, or "auto" or "local"."""


@dataclass(frozen=True)
class Benchmark(Sweep):
    """What is made shorter than its recipes say."""

    steps: int | None = None
    """Optimizer steps of each method, instead of the recipes'."""
    seeds: int | None = None
    """Seeds, likewise."""


@dataclass(frozen=True)
class Folders:
    """Where records are."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs, or folders that hold such folders."""


@dataclass(frozen=True)
class Plot(Folders):
    """What is drawn, and against what."""

    over: Literal["price", "seconds", "steps"] = "price"
    """The axis: what was spent, in gradients, or its time; or optimizer steps."""


@dataclass(frozen=True)
class Map(Folders):
    """Where a map is drawn."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("readings.png")
    """The map."""


@dataclass(frozen=True)
class Report(Folders):
    """What a page is about and where it goes."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""


def demo(arguments: Sequence[str]) -> None:
    """The paper's methods and ours on Circles: a table and a figure."""
    from .experiments.recipes import demo as recipe

    out = Path(tempfile.gettempdir(), f"lossguard-demo-{secrets.token_hex(4)}")
    where, experiment = override(recipe(), Where(out), arguments, "demo")
    _run(where, experiment)
    print(shown(_at_equal_price(experiment.methods[0], where.out)))


def run(arguments: Sequence[str]) -> None:
    """One experiment of the paper, or of the user's own module."""
    from .experiments import RECIPES, Experiment
    from .experiments.recipes import ELSEWHERE

    if _wants_help(arguments):
        print(usage("run", RECIPES))
        return
    name, recipe = find_recipe(arguments, RECIPES, "run", Experiment, ELSEWHERE)
    _run(*override(recipe, Where(Path("runs") / name), arguments[1:], f"run {name}"))


def sweep(arguments: Sequence[str]) -> None:
    """Experiments one after another, or over a cluster: the options apply to each."""
    from .experiments import RECIPES, Experiment
    from .experiments.recipes import ELSEWHERE, SETS

    known = {**SETS, **RECIPES}
    if _wants_help(arguments):
        print(usage("sweep", known, several=True))
        return
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = arguments[len(names) :]
    where, experiments = Sweep(), {}
    for given in [recipe for name in names or [""] for recipe in SETS.get(name, (name,))]:
        name, recipe = find_recipe([given], known, "sweep", Experiment, ELSEWHERE)
        where, experiment = override(recipe, where, options, f"sweep {name}")
        if experiments.setdefault(name, experiment) != experiment:
            raise ValueError(f"recipes must have different names, but two are called {name}")
    check_beside(names)

    _sweep(experiments, where)


def benchmark(arguments: Sequence[str]) -> None:
    """Guards and their parts alone on several tasks, compared at equal price and steps."""
    if not arguments or _wants_help(arguments):
        print(f"usage: lossguard benchmark {{{','.join(BENCHMARKS)}}} [RECIPE...] [OPTIONS]")
        return
    kind, *rest = arguments
    if kind not in BENCHMARKS:
        raise ValueError(f"benchmark must be {one_of(BENCHMARKS, kind)}")
    from .experiments import price, tasks

    module = {"price": price, "tasks": tasks}[kind]
    names = list(itertools.takewhile(lambda one: not one.startswith("-"), rest))
    for name in names:
        if name not in module.RECIPES:
            raise ValueError(f"recipes must each be {one_of(module.RECIPES, name)}")
    where = tyro.cli(
        Benchmark,
        args=rest[len(names) :],
        prog=f"lossguard benchmark {kind}",
        description=BENCHMARKS[kind],
        default=Benchmark(Path("runs") / kind),
    )
    given = {name: n for name in ("steps", "seeds") if (n := getattr(where, name)) is not None}
    experiments = {
        name: replace(module.RECIPES[name](), **given) for name in names or module.RECIPES
    }
    for name in experiments if kind == "tasks" else ():
        tasks.envelope(name)  # refuses a missing file before hours of computation
    _sweep(experiments, where)
    shown, numbers = module.table({name: where.out / name for name in experiments})
    _console().print(shown)
    file = where.out / f"{kind}.csv"
    numbers.write_csv(file)
    print(f"numbers: {file}")


BENCHMARKS: Mapping[str, str] = {
    "price": "All guards at equal price.",
    "tasks": "Learned optimizers, alone and guarded, on published tasks with published baselines.",
}


def _sweep(experiments: Mapping[str, Any], where: Sweep) -> None:
    """Run what isn't complete, and show what is; exit status 1 if one fails."""
    from .experiments.sweep import sweep

    failed = 0
    with _resumable():
        for outcome in sweep(experiments, where.out, ray=where.ray):
            if outcome.state == "complete":
                _show(outcome.folder)
            elif outcome.state == "skipped":
                print(shown(f"{outcome.name}: complete already\nrecords: {outcome.folder}"))
            else:
                failed += 1
                _tell(f"{outcome.name}: {outcome.reason}\nrecords: {outcome.folder}")
    if failed:
        _tell(f"lossguard: {failed} of {len(experiments)} runs failed")
        sys.exit(1)


def metatrain(arguments: Sequence[str]) -> None:
    """Meta-train a learned optimizer."""
    from .metatrain import loop
    from .metatrain.recipes import RECIPES

    if _wants_help(arguments):
        print(usage("metatrain", RECIPES))
        return
    name, recipe = find_recipe(arguments, RECIPES, "metatrain", loop.MetaTraining)
    where = Where(Path("runs") / name)
    where, config = override(recipe, where, arguments[1:], f"metatrain {name}")
    with _resumable(where):
        weights = loop.metatrain(config, where.out, resume=where.resume)
    print(shown(f"weights: {weights}"))
    _show(where.out)


def plot(arguments: Sequence[str]) -> None:
    """Figures and tables from the records of runs."""
    about = "Draw a figure of each run into its folder."
    parsed = _folders(Plot, arguments, "plot", about)
    for folder in _records(parsed.folders):
        _show(folder, parsed.over)


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
    _console().print(table)


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
    if _wants_help(arguments):
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


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "demo": demo,
    "run": run,
    "sweep": sweep,
    "benchmark": benchmark,
    "metatrain": metatrain,
    "plot": plot,
    "claims": claims,
    "readings": readings,
    "report": report,
    "list": list_all,
}


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
        _tell(reason)
    return found


def _run(where: Where, experiment: Any) -> None:
    from .experiments.run import run

    with _resumable(where):
        run(experiment, where.out, resume=where.resume)
    _show(where.out)


@contextmanager
def _resumable(where: Where | None = None) -> Iterator[None]:
    """Ctrl-C inside comes out with the command that goes on, if anything was saved."""
    try:
        yield
    except KeyboardInterrupt:
        if where and not _has_begun(where.out):
            raise KeyboardInterrupt from None
        given, more = sys.argv[1:], []
        if where and not any(argument.startswith("--out") for argument in given):
            more += ["--out", str(where.out)]
        if where and not where.resume:
            more += ["--resume"]
        raise KeyboardInterrupt(shlex.join(["lossguard", *given, *more])) from None


def _has_begun(folder: Path) -> bool:
    """Whether a run left there what can be gone on with."""
    return any(any((folder / name).glob("*")) for name in ("methods", "checkpoints"))


def _show(folder: Path, over: Literal["price", "seconds", "steps"] = "price") -> None:
    """A finished run's figure and its table."""
    from .experiments import figures
    from .metatrain import figure
    from .records import read_run

    record = read_run(folder)
    if record.is_meta:
        drawn = figure.plot(folder, record)
    else:
        drawn = figures.plot(folder, record, over=over)
        _print(figures.summary(record))
    print(shown(f"figure: {drawn}\nrecords: {folder}"))


def _print(table: Table) -> None:
    """A summary; in two parts, losses and costs, where the terminal has no room for its numbers."""
    console = _console()
    with console.capture() as whole:
        console.print(table)
    if "…" not in whole.get():
        console.print(table)
        return
    losses = 1 + sum(str(column.header).startswith("loss") for column in table.columns)
    for columns in (table.columns[:losses], [table.columns[0], *table.columns[losses:]]):
        part = Table(*(column.copy() for column in columns), title=table.title, padding=0)
        for row in zip(*(column.cells for column in columns), strict=True):
            part.add_row(*row)
        console.print(part)


def _console() -> PlainConsole:
    return PlainConsole(width=None if sys.stdout.isatty() else 160)


def _tell(text: str) -> None:
    """On stderr, with names as they are."""
    print(shown(text), file=sys.stderr)


def _at_equal_price(reference: str, folder: Path) -> str:
    """What each method of a run is worth beside the first, when both have spent the same."""
    from .curves import divided
    from .experiments.price import at, curve, slowdown
    from .records import EVALUATIONS, read_parquet

    evaluations = read_parquet(folder / EVALUATIONS)
    methods = evaluations["method"].unique(maintain_order=True).to_list()
    curves = {method: curve(evaluations, method) for method in methods}
    base = curves[reference]
    end = float(min(one.price[-1] for one in curves.values()))
    half = end / 2
    others = [method for method in methods if method != reference]
    losses = (f"{m} {divided(at(curves[m], end), at(base, end)):.2g}" for m in others)
    times = (f"{m} {slowdown(curves[m], base, half):.2g}" for m in others)
    return (
        f"After a price of {end:,.0f} gradients, loss over that of {reference}: "
        f"{', '.join(losses)}\n"
        f"Price at which the loss of {reference} after {half:,.0f} is reached, over that price: "
        f"{', '.join(times)}\n"
        "Next: put a guard into a loop of your own (README.md), or see it all: "
        f"lossguard report {folder}"
    )


def _wants_help(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in ("-h", "--help")


def _sentence(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split())


def _place(error: Exception, arguments: Sequence[str]) -> str:
    """The line of the user's own module that raised it, or called what did, if one did."""
    own = {Path(given.rpartition(":")[0]).resolve() for given in arguments if ".py:" in given}
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{one.filename}, line {one.lineno}" for one in frames if Path(one.filename) in own]
    return f" ({places[-1]})" if places else ""


def _first_line(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0].replace("`", "")

"""The commands that run something, and how they stop and go on."""

import itertools
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Annotated, Any

import tyro

from ..runs.files import write_whole
from ..validation import check_choice
from .command_line import Sweep, Where, find_recipe, override
from .read_commands import show
from .terminal import console, shown, tell

Recipes = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE...]")]
LEGEND = """\
A learned optimizer trains a network that it was not made for, beside SGD: it is far ahead, and
then fails. The guard follows it while it is ahead, and goes back to where it was good. Lines are
means of the seeds, bands reach from the least to the largest. A price of 1 is a gradient, or three
forward passes. This is one case: docs/costs.md has twenty. JAX compiles for some seconds first.
"""
"""What the demo shows."""


def demo(arguments: Sequence[str]) -> None:
    """A learned optimizer that fails alone, and guarded: a table and a figure."""
    from ..experiments.recipes import demo as recipe

    out = Path(tempfile.gettempdir(), f"lossguard-demo-{secrets.token_hex(4)}")
    where, experiment = _changed(recipe(), Where(out), arguments, "demo")
    print(LEGEND, end="")
    _run(where, experiment)
    from ..experiments.price import at_equal_price

    told = at_equal_price(experiment.names()[-1], where.out)
    more = f"{program()} report {shlex.quote(str(where.out))}"
    print(shown(f"{told}\nNext: a loop as in the README; or all of this on a page: {more}"))


def run(arguments: Sequence[str]) -> None:
    """One experiment of the paper, or of the user's own module."""
    from ..experiments import RECIPES, Experiment

    given = next(iter(arguments), "")
    name, recipe = find_recipe(given, RECIPES, "run", Experiment)
    _run(*_changed(recipe, Where(Path("runs") / name), arguments[1:], f"run {given}"))


def sweep(arguments: Sequence[str]) -> None:
    """Experiments one after another, or over a cluster: the options apply to each."""
    from ..experiments import RECIPES, Experiment
    from ..experiments.recipes import SETS

    known = {**SETS, **RECIPES}
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    options = arguments[len(names) :]
    folders = {Path(name.rpartition(":")[0]).resolve().parent for name in names if ".py:" in name}
    if len(folders) > 1:  # the modules beside them may have one name
        told = " and ".join(sorted(map(str, folders)))
        raise ValueError(f"recipes of a sweep must be in files of one folder, got {told}")
    where, experiments = Sweep(), {}
    for given in [
        recipe
        for name in dict.fromkeys(names or arguments[:1] or [""])
        for recipe in SETS.get(name, (name,))
    ]:
        name, recipe = find_recipe(given, known, "sweep", Experiment)
        where, experiment = _changed(recipe, where, options, f"sweep {' '.join(names)}")
        if experiments.setdefault(name, experiment) != experiment:
            raise ValueError(f"recipes must have different names, but two are called {name}")
    _sweep(experiments, where)


def _changed(recipe: Any, where: Any, arguments: Sequence[str], program: str) -> tuple[Any, Any]:
    """``override``; where options change what the title is about, it says so."""
    where, experiment = override(recipe, where, arguments, program)
    told = []
    for name in ("dataset", "learned", "model", "scaling"):
        now = getattr(experiment, name)
        if now != getattr(recipe, name):
            told.append(f"{name} {now}" if isinstance(now, str) else f"another {name}")
    if told and experiment.title == recipe.title:
        title = f"{experiment.title or experiment.name}; here {', '.join(told)}"
        experiment = replace(experiment, title=title)
    return where, experiment


def benchmark(
    kind: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="price|tasks")],
    recipes: Recipes = (),
    out: Path | None = None,
    ray: str | None = None,
    steps: int | None = None,
    seeds: int | None = None,
) -> None:
    """Compare guards and their parts alone on several tasks.

    Args:
        kind: "price": four guards, at equal price. "tasks": learned optimizers, alone and guarded,
            on published tasks with published baselines.
        recipes: Some of its experiments, all by default.
        out: Folder of the folders of its runs, runs/price or runs/tasks. What is complete there is
            skipped, the rest resumed.
        ray: Address of a Ray cluster to spread the runs over, or "auto" or "local".
        steps: Optimizer steps of each method, instead of the recipes'.
        seeds: Seeds, likewise.
    """
    from ..experiments import benchmark_tasks, price

    modules = {"price": price, "tasks": benchmark_tasks}
    check_choice("benchmark", kind, modules)
    known, out = modules[kind].RECIPES, out or Path("runs") / kind
    for name in recipes:
        check_choice("each of recipes", name, known)
    given = {"steps": steps, "seeds": seeds}
    given = {name: number for name, number in given.items() if number is not None}
    experiments = {name: replace(known[name](), **given) for name in recipes or known}
    _sweep(experiments, Sweep(out, ray))
    told, numbers = modules[kind].table({name: out / name for name in experiments})
    console().print(told)
    file = out / f"{kind}.csv"
    write_whole(file, numbers.write_csv().encode(), "the table")
    print(shown(f"numbers: {file}"))


def metatrain(arguments: Sequence[str]) -> None:
    """Meta-train a learned optimizer."""
    from ..metatrain import loop
    from ..metatrain.trainings import RECIPES

    given = next(iter(arguments), "")
    name, recipe = find_recipe(given, RECIPES, "metatrain", loop.MetaTraining)
    where = Where(Path("runs") / name)
    where, config = override(recipe, where, arguments[1:], f"metatrain {given}")
    with _resumable(where):
        weights = loop.metatrain(config, where.out, resume=where.resume)
    print(shown(f"weights: {weights}"))
    show(where.out)


def _run(where: Where, experiment: Any) -> None:
    from ..experiments.run import run

    with _resumable(where):
        run(experiment, where.out, resume=where.resume)
    show(where.out)


def _sweep(experiments: Mapping[str, Any], where: Sweep) -> None:
    """Run what isn't complete, and show what is; exit status 1 if one fails."""
    from ..experiments.sweep import sweep

    failed = 0
    with _resumable():
        for outcome in sweep(experiments, where.out, ray=where.ray):
            if outcome.state == "complete":
                show(outcome.folder)
            elif outcome.state == "skipped":
                print(shown(f"{outcome.name}: complete already\nrecords: {outcome.folder}"))
            else:
                failed += 1
                tell(f"{outcome.name}: {outcome.reason}\nrecords: {outcome.folder}")
    if failed:
        tell(f"lossguard: {failed} of {len(experiments)} runs failed")
        sys.exit(1)


@contextmanager
def _resumable(where: Where | None = None) -> Iterator[None]:
    """Ctrl-C inside comes out with the command that goes on, if a run has begun."""
    if where and where.resume and not where.out.exists():
        tell(f"lossguard: {where.out} holds no run to go on with: it begins")
    try:
        yield
    except KeyboardInterrupt:
        from ..runs.records import CONFIG

        if where and not (where.out / CONFIG).exists():
            raise KeyboardInterrupt from None
        given, more = sys.argv[1:], []
        if where and not any(argument.startswith("--out") for argument in given):
            more += ["--out", str(where.out)]
        if where and not where.resume:
            more += ["--resume"]
        raise KeyboardInterrupt(f"{program()} {shlex.join([*given, *more])}") from None


def program() -> str:
    """What to type for this command, which ``make demo`` doesn't put on the path."""
    return "lossguard" if which("lossguard") else f"{shlex.quote(sys.executable)} -m lossguard"

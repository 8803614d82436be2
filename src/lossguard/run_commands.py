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
from typing import Any

import tyro

from .command_line import (
    Benchmark,
    Sweep,
    Where,
    check_beside,
    find_recipe,
    override,
    usage,
    wants_help,
)
from .read_commands import show
from .terminal import console, shown, tell
from .validation import one_of


def demo(arguments: Sequence[str]) -> None:
    """The paper's methods and ours on Circles: a table and a figure."""
    from .experiments.recipes import demo as recipe

    out = Path(tempfile.gettempdir(), f"lossguard-demo-{secrets.token_hex(4)}")
    where, experiment = override(recipe(), Where(out), arguments, "demo")
    _run(where, experiment)
    from .experiments.price import at_equal_price

    print(shown(at_equal_price(experiment.methods[0], where.out)))


def run(arguments: Sequence[str]) -> None:
    """One experiment of the paper, or of the user's own module."""
    from .experiments import RECIPES, Experiment
    from .experiments.recipes import ELSEWHERE

    if wants_help(arguments):
        print(usage("run", RECIPES))
        return
    name, recipe = find_recipe(arguments, RECIPES, "run", Experiment, ELSEWHERE)
    _run(*override(recipe, Where(Path("runs") / name), arguments[1:], f"run {name}"))


def sweep(arguments: Sequence[str]) -> None:
    """Experiments one after another, or over a cluster: the options apply to each."""
    from .experiments import RECIPES, Experiment
    from .experiments.recipes import ELSEWHERE, SETS

    known = {**SETS, **RECIPES}
    if wants_help(arguments):
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
    if not arguments or wants_help(arguments):
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
    _sweep(experiments, where)
    shown, numbers = module.table({name: where.out / name for name in experiments})
    console().print(shown)
    file = where.out / f"{kind}.csv"
    numbers.write_csv(file)
    print(f"numbers: {file}")


BENCHMARKS: Mapping[str, str] = {
    "price": "All guards at equal price.",
    "tasks": "Learned optimizers, alone and guarded, on published tasks with published baselines.",
}


def metatrain(arguments: Sequence[str]) -> None:
    """Meta-train a learned optimizer."""
    from .metatrain import loop
    from .metatrain.recipes import RECIPES

    if wants_help(arguments):
        print(usage("metatrain", RECIPES))
        return
    name, recipe = find_recipe(arguments, RECIPES, "metatrain", loop.MetaTraining)
    where = Where(Path("runs") / name)
    where, config = override(recipe, where, arguments[1:], f"metatrain {name}")
    with _resumable(where):
        weights = loop.metatrain(config, where.out, resume=where.resume)
    print(shown(f"weights: {weights}"))
    show(where.out)


def _run(where: Where, experiment: Any) -> None:
    from .experiments.run import run

    with _resumable(where):
        run(experiment, where.out, resume=where.resume)
    show(where.out)


def _sweep(experiments: Mapping[str, Any], where: Sweep) -> None:
    """Run what isn't complete, and show what is; exit status 1 if one fails."""
    from .experiments.sweep import sweep

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

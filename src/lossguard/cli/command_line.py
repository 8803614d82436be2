"""What a command line names: options, and a recipe, by name or from a Python file."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..validation import nearest

FREE = ("title", "steps", "seeds", "seed", "methods", "vectorize", "nc", "adam_rate", "meta_steps")
"""Options with which a run is still of the figure of its recipe."""


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


def find_recipe(name: str, recipes: Mapping[str, Any], command: str, kind: type) -> tuple[str, Any]:
    """The recipe of that name: one of ours, or ``path/to/module.py:function``.

    Asked for help it tells how to use the command, and exits.
    """
    if name in ("-h", "--help"):
        several = "..." if command == "sweep" else ""
        print(
            f"usage: lossguard {command} RECIPE{several} [OPTIONS]\n\n"
            "RECIPE is one that lossguard list shows, or path/to/module.py:function.\n"
            f"lossguard {command} RECIPE --help lists its options."
        )
        sys.exit(0)
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        make = _load(Path(path), function)
        try:
            config = make()
        except TypeError as error:  # of arguments that it must not have, or of a misspelt field
            raise ValueError(f"recipe {name}: {error}") from error
        if not isinstance(config, kind):
            raise ValueError(
                f"recipe {name} must return the {kind.__name__} that {command} takes, "
                f"got {type(config).__name__}"
            )
        return function, config
    if name.endswith(".py"):
        raise ValueError(f"{command} needs a function of {name}: name it, as in {name}:my_recipe")
    if name not in recipes:
        from ..experiments import RECIPES
        from ..experiments.recipes import ELSEWHERE
        from ..metatrain.trainings import RECIPES as META

        runs = {n: f"run {n}" for n in RECIPES} | {n: f"metatrain {n}" for n in META}
        if other := {**runs, **ELSEWHERE}.get(name):
            raise ValueError(f"{name} is run by lossguard {other}")
        got = f"{name!r}{nearest(recipes, name)}" if name else "none"
        raise ValueError(
            f"{command} needs a recipe, one that lossguard list shows or "
            f"path/to/module.py:function, got {got}"
        )
    return name, recipes[name]()


def override(config: Any, where: Any, arguments: Sequence[str], program: str) -> tuple[Any, Any]:
    """Where to put a run, and its config, with the fields replaced that the command line names.

    It is of a figure of the paper no more if others than ``FREE`` are.
    """
    place = tyro.conf.OmitArgPrefixes[type(where)]
    kind = Annotated[type(config), tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    both = make_dataclass("Arguments", [("where", place), ("config", kind)], frozen=True)
    parsed = tyro.cli(
        both,
        default=both(where, config),
        args=arguments,
        prog=f"lossguard {program}",
        description="",
    )
    made = parsed.config
    settings = [f.name for f in fields(made) if f.name not in FREE] if made.figure else []
    if any(getattr(made, name) != getattr(config, name) for name in settings):
        made = replace(made, figure="")
    return parsed.where, made


def _load(path: Path, function: str) -> Callable[[], Any]:
    """A function of a Python file, which is imported by its name, as what is beside it may be."""
    recipe = f"recipe {path}:{function}"
    if not path.is_file():
        raise ValueError(f"{recipe} can't be read: there is no such Python file")
    if "." in path.stem:
        raise ValueError(f"{recipe} can't be imported: its file's name must have no other dots")
    sys.path.append(str(path.parent.resolve()))  # the last, so that it hides no library
    try:
        module = importlib.import_module(path.stem)
    except (SyntaxError, ImportError, NameError) as error:
        raise ValueError(f"{recipe} can't be read: {error}") from error
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise ValueError(
            f"{recipe} can't be imported: its file's name must be one that no other module has"
        )
    if not callable(made := getattr(module, function, None)):
        raise ValueError(f"{recipe} can't be read: the file has no such function")
    return made

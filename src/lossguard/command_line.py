"""What a command line names: options, and a recipe, by name or from a Python file."""

import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .validation import nearest


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
            inspect.signature(make).bind()
        except TypeError as error:
            raise ValueError(f"recipe {name} must take no arguments, but is {error}") from error
        try:
            config = make()
        except TypeError as error:
            _check_fields(name, error, kind)
            raise
        if not isinstance(config, kind):
            raise ValueError(
                f"recipe {name} must return the {kind.__name__} that {command} takes, "
                f"got {type(config).__name__}"
            )
        return function, config
    if name.endswith(".py"):
        raise ValueError(f"{command} needs a function of {name}: name it, as in {name}:my_recipe")
    if name not in recipes:
        from .experiments import RECIPES
        from .experiments.recipes import ELSEWHERE
        from .metatrain.recipes import RECIPES as META

        runs = {n: f"run {n}" for n in RECIPES} | {n: f"metatrain {n}" for n in META}
        if other := {**runs, **ELSEWHERE}.get(name):
            raise ValueError(f"{name} is run by lossguard {other}")
        got = f"{name!r}{nearest(recipes, name)}" if name else "none"
        raise ValueError(
            f"{command} needs a recipe, one that lossguard list shows or "
            f"path/to/module.py:function, got {got}"
        )
    return name, recipes[name]()


def _check_fields(name: str, error: TypeError, kind: type) -> None:
    """Refuse a recipe that gives a field that there is not, if that is the error."""
    for one in (kind, *kind.__subclasses__()):
        init = rf"^{one.__name__}\.__init__\(\) got an unexpected keyword argument '(\w+)'"
        if found := re.search(init, str(error)):
            near = nearest([field.name for field in fields(one)], found[1])
            told = f"recipe {name} gives {found[1]}, but there is no such field{near}"
            raise ValueError(told) from error


def check_beside(names: Sequence[str]) -> None:
    """Refuse recipes of folders in which they import modules of one name: all get the first."""
    files = {Path(name.rpartition(":")[0]).resolve() for name in names if ".py:" in name}
    for one, other in itertools.permutations({file.parent for file in files}, 2):
        for file in {*one.glob("*.py")} - files:
            loaded = file.stem in sys.modules and file == _place(file.stem)
            if loaded and (other / file.name).exists():
                raise ValueError(
                    "recipes must not import modules of one name from different folders, but "
                    f"beside them are {file} and {other / file.name}: run them one by one"
                )


def override(config: Any, where: Any, arguments: Sequence[str], program: str) -> tuple[Any, Any]:
    """Where to put a run, and its config, with the fields replaced that the command line names."""
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
    return parsed.where, parsed.config


def _load(path: Path, function: str) -> Callable[[], Any]:
    name = path.stem
    if "." in name or _place(name) not in (None, path.resolve()):
        name = str(path.resolve())  # the name is another module's, for example Python's json
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"recipe {path}:{function} can't be read: there is no such Python file")
    try:
        if name not in sys.modules:  # two recipes of a file share it
            sys.modules[name] = importlib.util.module_from_spec(spec)
            sys.path.append(str(path.parent.resolve()))  # it may import modules beside it
            spec.loader.exec_module(sys.modules[name])
    except (SyntaxError, ImportError, NameError) as error:
        del sys.modules[name]
        raise ValueError(f"recipe {path}:{function} can't be read: {error}") from error
    if not callable(getattr(sys.modules[name], function, None)):
        raise ValueError(f"recipe {path}:{function} can't be read: the file has no such function")
    return getattr(sys.modules[name], function)


def _place(module: str) -> Path | None:
    """The file of a module, loaded or not; None if there is no such module."""
    if module in sys.modules:
        return Path(getattr(sys.modules[module], "__file__", None) or "built in").resolve()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).resolve() if spec and spec.origin else None  # a folder has none

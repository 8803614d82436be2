"""The command line: ``lossguard metatrain RECIPE`` and the like."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True)
class Where:
    """Where a run leaves its folder."""

    out: Path
    """Folder of the run, empty or absent; with --resume the one to go on with."""
    resume: bool = False
    """Go on from the last checkpoint."""


def metatrain(arguments: Sequence[str]) -> None:
    """Meta-train a learned optimizer."""
    from .metatrain.loop import metatrain as run
    from .metatrain.recipes import RECIPES

    recipe, config = _recipe(arguments, RECIPES, "metatrain")
    where, config = _override(config, Path("runs") / recipe, arguments[1:], f"metatrain {recipe}")
    print(f"weights: {run(config, where.out, resume=where.resume)}")


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {"metatrain": metatrain}


def main() -> None:
    """The ``lossguard`` command: bad input is one sentence on stderr and exit status 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lossguard COMMAND ...\n")
        for command, function in COMMANDS.items():
            print(f"  {command:<12}{(function.__doc__ or '').splitlines()[0]}")
        return
    try:
        if name not in COMMANDS:
            raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
        COMMANDS[name](arguments)
    except (ValueError, OSError) as error:
        print(f"lossguard: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lossguard: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _recipe(
    arguments: Sequence[str], recipes: Mapping[str, Callable[[], Any]], command: str
) -> tuple[str, Any]:
    name = arguments[0] if arguments else None
    if name not in recipes:
        raise ValueError(f"{command} needs a recipe, one of {', '.join(recipes)}; got {name!r}")
    return name, recipes[name]()


def _override(config: Any, out: Path, arguments: Sequence[str], program: str) -> tuple[Where, Any]:
    """The config with the fields that the command line names replaced, and where to put the run."""

    kind = type(config)

    @dataclass(frozen=True)
    class Arguments:
        where: tyro.conf.OmitArgPrefixes[Where]
        config: Annotated[kind, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]

    parsed = tyro.cli(
        Arguments,
        default=Arguments(Where(out), config),
        args=arguments,
        prog=f"lossguard {program}",
        description="",
    )
    return parsed.where, parsed.config

"""lossguard: use an optimizer that you don't trust, beside one that you do.

lossguard demo                  a learned optimizer alone and guarded, in a minute
lossguard run RECIPE            an experiment of the paper, or path/to/module.py:recipe
lossguard sweep SET...          sets of recipes, or recipes, one after another or on a cluster
lossguard benchmark price       what four guards cost and are worth, on five tasks
lossguard benchmark tasks       learned optimizers against published baselines, on five tasks
lossguard metatrain RECIPE      meta-train a learned optimizer
lossguard plot DIR...           figures and tables from records alone
lossguard claims DIR...         the paper's claims, judged by records
lossguard report DIR...         one page of claims, figures and tables
lossguard list                  recipes, data sets, learned optimizers
lossguard --version             which release this is
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro

from .. import __version__
from ..validation import check_choice
from .read_commands import claims, list_all, plot, report
from .run_commands import benchmark, demo, metatrain, run, sweep
from .terminal import tell

WITH_RECIPES: Mapping[str, Callable[[Sequence[str]], None]] = {
    one.__name__: one for one in (demo, run, sweep, metatrain)
}
"""Their options are those of a recipe."""
OTHERS = {one.__name__: one for one in (benchmark, plot, claims, report)}
COMMANDS: Mapping[str, Callable[..., None]] = {**WITH_RECIPES, **OTHERS, "list": list_all}


def main() -> None:
    """The ``lossguard`` command: bad input is one sentence on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # of letters that a terminal doesn't have
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *arguments = sys.argv[1:] or ["--help"]
    try:
        _run(name, arguments)
        _flush()
    except BrokenPipeError:  # as of ``| head``
        _drop_output()
        if name in WITH_RECIPES or name == "benchmark":  # which may not have done all
            sys.exit(1)
    except (Exception, SystemExit) as error:
        place = _place(error, arguments)
        if not place and not isinstance(error, ValueError | OSError):
            raise  # a fault of ours, or the end that was asked for
        with contextlib.suppress(OSError):
            tell(f"lossguard: {_sentence(error)}{place}")
        try:
            _flush()
        except OSError:
            _drop_output()
        sys.exit(2)
    except KeyboardInterrupt as stop:
        how = f"; to go on: {stop}" if stop.args else ""
        with contextlib.suppress(OSError):  # the same Ctrl-C may have stopped who reads it
            tell(f"lossguard: stopped{how}")
            _flush()
        os._exit(130)  # torn out of a compilation, JAX may crash where the interpreter ends


def _run(name: str, arguments: list[str]) -> None:
    if name in ("-h", "--help"):
        print((__doc__ or "").strip() + "\n\nlossguard COMMAND --help tells more.")
    elif name == "--version":
        print(f"lossguard {__version__}")
    elif name in WITH_RECIPES:
        WITH_RECIPES[name](arguments)
    else:
        check_choice("command", name, COMMANDS)
        tyro.cli(COMMANDS[name], args=arguments, prog=f"lossguard {name}")


def _flush() -> None:
    """Here, where an error is told in a sentence, not where the interpreter ends."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Of what can't be written, which the interpreter would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: Exception | SystemExit) -> str:
    """What went wrong, on one line."""
    if isinstance(error, SystemExit):
        return "a recipe must return, but its file calls sys.exit"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    told = " ".join(str(error).split())
    return told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"


def _place(error: Exception | SystemExit, arguments: Sequence[str]) -> str:
    """The line of the user's own module that raised it, or called what did, if one did."""
    try:
        own = {Path(given.rpartition(":")[0]).resolve() for given in arguments if ".py:" in given}
    except OSError:  # the current folder is gone
        return ""
    tracebacks = error.__traceback__, getattr(error.__cause__, "__traceback__", None)
    frames = [frame for one in tracebacks for frame in traceback.extract_tb(one)]
    places = [f"{one.filename}, line {one.lineno}" for one in frames if Path(one.filename) in own]
    return f" ({places[-1]})" if places else ""

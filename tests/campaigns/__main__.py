"""Random attacks on what is promised, each from a seed that repeats it; not part of the tests.

    make campaigns                                           all of them, ten minutes
    python -m tests.campaigns jax_guards --minutes 5         one of them
    python -m tests.campaigns jax_guards --seed 7 --once     one attempt again

A campaign is a module here with ``attempt(seed, folder)``: it does what its docstring says, checks
what must hold by ``assert``, and returns what it tried, counted by what came of it.
"""

import argparse
import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
CAMPAIGNS = sorted(file.stem for file in HERE.glob("[!_]*.py"))
LIMIT = 1800
"""Seconds after which an attempt counts as one that hangs."""


def main() -> int:
    """Attack until the time is over; exit status 1 if anything didn't hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CAMPAIGNS))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first attempt")
    parser.add_argument("--once", action="store_true", help="one attempt each")
    given = parser.parse_args()
    names = given.names or CAMPAIGNS
    if unknown := [name for name in names if name not in CAMPAIGNS]:
        parser.error(f"NAME must be one of {', '.join(CAMPAIGNS)}, got {unknown[0]}")
    prepare()
    seconds = 0.0 if given.once else 60 * given.minutes / len(names)
    return int(sum(attack(name, given.seed, seconds) for name in names) > 0)


def prepare() -> None:
    """What the tests have by themselves: their modules, and compilation that is quick."""
    folders = ("torch", "guards", "metatrain", "experiments", "")
    sys.path[:0] = [str(HERE.parent / name) for name in folders]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", quick)
    signal.signal(signal.SIGALRM, hangs)


def hangs(*_: object) -> None:
    """End an attempt that takes too long."""
    faulthandler.dump_traceback()
    raise TimeoutError(f"an attempt took more than {LIMIT} seconds")


def attack(name: str, seed: int, seconds: float) -> int:
    """Attempts of one campaign, from a seed on; how many failed."""
    attempt = importlib.import_module(f".{name}", __package__).attempt
    tried, failed, began = Counter[str](), 0, time.monotonic()
    while True:
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(LIMIT)
            try:
                tried.update(attempt(seed, Path(folder)))
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"again: python -m tests.campaigns {name} --seed {seed} --once\n", flush=True)
            finally:
                signal.alarm(0)
        seed += 1
        if time.monotonic() - began >= seconds:
            break
    outcomes = ", ".join(f"{many:,} {what}" for what, many in sorted(tried.items()))
    print(f"{name}: {tried.total():,} held ({outcomes}), {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""The command: run what isn't in the records yet, then make the tables and the figure of them."""

import argparse
import functools
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .faults import CLEAN, FAULTS
from .methods import METHODS, TUNED
from .report import Key, Records, final, rows, write
from .run import costs, record
from .tasks import TASKS

TUNING = (0, 1)
"""Seeds with which good rates are chosen, and times measured; results are of others."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ROUNDS = 12
"""Of the measurement of time."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it; ``arguments`` are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the records; what is there isn't run again")
    parser.add_argument("--tasks", nargs="+", default=["fashion", "cifar", "text"], choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--minutes", type=float, default=180, help="begin no run after so many")
    parser.add_argument("--result", type=Path, help="leave tables and the figure there")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(asked.folder / "runs.jsonl")
    end = time.monotonic() + 60 * asked.minutes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of others' code, several at each intervention
        methods = {"AdamW", *asked.methods}
        ran = (missing(journal, name, methods, asked.seeds) for name in asked.tasks)
        for what in chain.from_iterable(ran):
            print(*what, flush=True)
            if time.monotonic() > end:
                print("out of time: the same command goes on from here")
                break
    if asked.result is not None:
        if not rows(journal.records):
            parser.exit(1, "no method has all of its runs yet: there is no result to leave\n")
        write(journal.records, asked.result)


def missing(journal: "Journal", name: str, methods: set[str], seeds: list[int]) -> Iterator[Key]:
    """Run what has no record, one at a time; yields what it was."""
    ordered = [method for method in METHODS if method in methods]
    task = functools.cache(TASKS[name])  # data take seconds to decode
    for method in TUNED:
        for seed in TUNING:
            for rate in RATES:
                key = Key(name, method, f"tune {rate:g}", seed)
                if key not in journal.records:
                    journal.add(key, record(task(), method, CLEAN, rate, seed))
                    yield key
    rates = {method: good_rate(journal.records, name, method) for method in ordered}
    keys = {method: Key(name, method, "cost", TUNING[0]) for method in ordered}
    if any(key not in journal.records for key in keys.values()):
        for method, cost in costs(task(), rates, ROUNDS, TUNING[0]).items():
            journal.add(keys[method], {**cost._asdict(), "load": os.getloadavg()[0]})
            yield keys[method]
    for seed in seeds:
        for fault in (CLEAN, *FAULTS):
            for method in ordered:
                key = Key(name, method, fault.name, seed)
                if key not in journal.records:
                    journal.add(key, record(task(), method, fault, rates[method], seed))
                    yield key


def good_rate(records: Records, task: str, method: str) -> float:
    """That with the lowest mean of final losses over the seeds for tuning."""
    tuned = method if method in TUNED else "AdamW"

    def loss(rate: float) -> float:
        return sum(final(records[Key(task, tuned, f"tune {rate:g}", seed)]) for seed in TUNING)

    return min(RATES, key=loss)


class Journal:
    """Records in a file of lines, each written as it comes; one that was cut off is dropped."""

    def __init__(self, file: Path) -> None:
        self.records: Records = {}
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if lines != whole:
            file.write_bytes(b"".join(whole))
        for line in map(json.loads, whole):
            self.records[Key(*(line.pop(name) for name in Key._fields))] = line
        self._file = file

    def add(self, key: Key, what: dict[str, Any]) -> None:
        """Keep a record for good."""
        with self._file.open("a") as file:
            file.write(json.dumps({**key._asdict(), **what}) + "\n")
        self.records[key] = what


if __name__ == "__main__":
    main()

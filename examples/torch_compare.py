"""A table of methods that were run on the same minibatches, for the examples."""

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

Row = dict[str, Any]


def marks(calls: int) -> list[int]:
    """An eighth of all minibatches, a quarter, half, and all."""
    return [calls // part for part in (8, 4, 2, 1)]


def follow(
    step: Callable[[Any], float], batches: Iterable[Any], evaluate: Callable[[], float], calls: int
) -> list[Row]:
    """What came of a training by each mark.

    Args:
        step: takes a minibatch to train on, and gives its loss.
        batches: the minibatches.
        evaluate: the loss of the model as it is.
        calls: how many minibatches there are.
    """
    highest, seconds, rows = 0.0, 0.0, []
    for call, batch in enumerate(batches, 1):
        began = time.process_time()
        highest = max(highest, step(batch))
        seconds += time.process_time() - began
        if call in marks(calls):
            with torch.no_grad():
                told = {"loss": evaluate(), "highest": highest, "seconds": seconds}
            rows.append({"minibatches": call} | told)
    return rows


def compare(
    methods: Sequence[str],
    train: Callable[[str, int], list[Row]],
    calls: int,
    seeds: int,
    out: Path | None,
) -> list[Row]:
    """Run each method with each seed, and print the means as they come.

    Args:
        methods: what to run.
        train: what came of a method, with a seed, by each mark.
        calls: minibatches that each of them trains on.
        seeds: how many.
        out: a CSV file for all rows.
    """
    print(" " * 20 + "".join(f"{mark:8,}" for mark in marks(calls)) + "   highest   seconds")
    rows = []
    for method in methods:
        runs = [train(method, seed) for seed in range(seeds)]
        means = "".join(
            f"{fmean(row['loss'] for row in at):8.3f}" for at in zip(*runs, strict=True)
        )
        highest = max(run[-1]["highest"] for run in runs)
        seconds = fmean(run[-1]["seconds"] for run in runs)
        print(f"{method:20}{means}{highest:10.2f}{seconds:10.1f}", flush=True)
        for seed, run in enumerate(runs):
            rows += [{"method": method, "seed": seed} | row for row in run]
    if out is not None:
        with out.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return rows

"""Ratios of times, measured side by side.

The candidates take turns, so that what else the machine does hits all alike, and a ratio is one of
medians. PyTorch's threads wait for each other at full speed, which costs it a factor of ten or more
where other programs want the same cores: it counts with one thread or with all of them, whichever
is faster. For a comparison of one core with one core: ``taskset -c 0 make bench``.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[[], object]
PAUSE = 0.05
"""Seconds before each measurement, in which the threads of the one before come to rest."""


def milliseconds(candidates: dict[str, Run], rounds: int) -> dict[str, float]:
    """The median time of each candidate, all of them warmed up and then run in turns."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def torch_candidates(run: Run) -> dict[str, Run]:
    """The same with one thread, and with one for every core."""
    import torch

    def with_threads(number: int) -> Run:
        def run_with() -> object:
            torch.set_num_threads(number)
            return run()

        return run_with

    cores = len(os.sched_getaffinity(0))
    return {f"torch, threads: {n}": with_threads(n) for n in sorted({1, cores})}


def guards_of(learned: Any, fallback: Any) -> dict[str, Any]:
    """Every guard of two optimizers, by name."""
    import lossguard  # takes JAX

    alone = lossguard.unguarded(fallback, trusted=True), lossguard.unguarded(learned)
    return {
        "loss_guard": lossguard.loss_guard(learned, fallback),
        "residual_guard": lossguard.residual_guard(learned, fallback),
        "recommended": lossguard.recommended(learned, fallback),
        "hedged": lossguard.hedged(learned, fallback),
        "best_of": lossguard.best_of(alone, share=0.05),
    }


@pytest.fixture
def report(benchmark, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Store and print what was measured; ``run`` fills the table of pytest-benchmark."""
    if benchmark.disabled:
        benchmark(int)  # pytest-benchmark warns of a fixture that isn't used
        pytest.skip("benchmarks are off without --benchmark-enable")

    def store(run: Run, target: str, **measured: object) -> None:
        cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)
        benchmark.extra_info.update(measured, target=target, cores=cores, load=load)
        shown = ", ".join(f"{name} {value}" for name, value in measured.items())
        with capsys.disabled():
            print(f"\n{benchmark.name}: {shown} (target: {target}; {cores} cores, load {load})")
        benchmark.pedantic(run, rounds=3)

    return store


@pytest.fixture
def against_torch(report: Callable[..., None]) -> Callable[..., None]:
    """Compare ``ours`` with ``torch_run``, which do the same work."""

    def compare(ours: Run, torch_run: Run, *, target: str, rounds: int = 9) -> None:
        times = milliseconds({"ours": ours, **torch_candidates(torch_run)}, rounds)
        best = min(value for name, value in times.items() if name != "ours")
        rounded = {f"{name} ms": round(value, 2) for name, value in times.items()}
        report(ours, target, times_faster_than_torch=round(best / times["ours"], 2), **rounded)

    return compare

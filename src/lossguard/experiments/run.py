"""Run an experiment: its methods one after another, its seeds side by side, its records on disk."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from .. import records
from ..checkpoints import Checkpoints
from ..guards.protocol import Decision, Guard, GuardState
from ..progress import Progress, stopping_at_interrupt
from ..rollout import rollout
from ..tasks.task import Objective, Task
from .experiment import Experiment

CHUNK = 100
"""Cycles in one compiled loop: what Ctrl-C waits for, and what a progress bar moves by."""
FIRST_CHUNKS = 5
"""The same for the first ``CHUNK`` cycles, so that early marks are at the ends of chunks."""
SAVE_SECONDS = 60.0
"""Between two checkpoints."""


def run(experiment: Experiment, folder: Path, *, resume: bool = False) -> Path:
    """Run every method of an experiment; returns the folder of its records.

    Beside the curves it leaves ``evaluations.parquet``: loss and accuracy of the iterate on the
    whole of both splits, at steps 50, 100, 200, 300, 500, 1,000 and so on, and at the last one. So
    methods are compared without the noise of minibatches.

    Every seed draws its own initialization and order of minibatches, the same for all methods. A
    run stopped by Ctrl-C or killed goes on with ``resume``, from the last checkpoint, and ends with
    the same curves to the bit.

    Raises:
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or the
            experiment names a method or data set that does not exist or has a count below 1.
    """
    for name in ("steps", "seeds", "batch_size"):
        if (count := getattr(experiment, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    guards = experiment.guards()
    task = experiment.make_task(experiment)
    records.open_folder(folder, as_config(experiment), resume=resume)
    made = records.manifest(data=task.dataset.note)  # now: a checkout may change while it runs
    curves, evaluations, seconds = [], [], {}
    for method, guard in guards.items():
        table, evaluated, seconds[method] = _run_method(experiment, method, guard, task, folder)
        curves.append(table)
        evaluations.append(evaluated)
    records.write_parquet(folder / records.EVALUATIONS, pl.concat(evaluations))
    records.write_parquet(folder / records.CURVES, pl.concat(curves))
    records.write_json(folder / records.MANIFEST, made | {"seconds": seconds})
    return folder


def as_config(value: Any) -> Any:
    """A config as plain JSON; a function by its module and name."""
    if is_dataclass(value):
        kind = {} if isinstance(value, Experiment) else {"kind": type(value).__name__}
        return kind | {f.name: as_config(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: as_config(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [as_config(v) for v in value]
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else value


def _run_method(
    experiment: Experiment, method: str, guard: Guard, task: Task, folder: Path
) -> tuple[pl.DataFrame, pl.DataFrame, float]:
    """One method's curves and evaluations, and the seconds that it took.

    Without compilation, if there is more than one chunk: the first took as long a cycle.
    """
    name = quote(method, safe=" ()")
    written = folder / "methods" / f"{name}.parquet"
    evaluated = folder / "evaluated" / f"{name}.parquet"
    if written.exists():
        table, evaluations = records.read_parquet(written), records.read_parquet(evaluated)
        return table.drop("seconds"), evaluations, float(table["seconds"][0])

    seeds = experiment.seed + np.arange(experiment.seeds)
    init_keys, order_keys = jax.vmap(lambda s: jax.random.split(jax.random.key(s)), out_axes=1)(
        jnp.asarray(seeds)
    )
    objective = Objective(task, order_keys)
    axes = Objective(None, 0)  # pyright: ignore[reportArgumentType]
    state = jax.jit(jax.vmap(lambda key: guard.init(task.init(key))))(init_keys)

    steps = -(-experiment.steps // experiment.nt) * experiment.nt
    done, chunks, evaluations = 0, [], []
    seconds, timed = 0.0, 0  # of all chunks but the first, which compiles: time, cycles
    checkpoints = Checkpoints(folder / "methods" / f"{name}.checkpoints")
    if (found := checkpoints.latest((state, jnp.zeros(2)))) is not None:
        done, (state, (seconds, timed)), table = found
        seconds, timed, chunks = float(seconds), int(timed), [table]
        if evaluated.exists():
            evaluations = [records.read_parquet(evaluated).filter(pl.col("cycle") <= done)]

    with (
        stopping_at_interrupt() as stopped,
        Progress(method, total=experiment.steps, done=_taken(state)) as progress,
    ):
        saved, compiled = progress.seconds, False
        while (left := steps - _taken(state)) > 0:
            count = min(FIRST_CHUNKS if done < CHUNK else CHUNK, CHUNK, -(-left // experiment.nt))
            before = np.asarray(state.steps)
            began = progress.seconds
            if experiment.vectorize:
                state, decisions = rollout(
                    guard, state, objective, cycles=count, most=CHUNK, axes=axes
                )
            else:
                state, decisions = _one_by_one(guard, state, objective, count)
            spent = records.totals(chunks[-1]) if chunks else None
            chunks.append(records.thin(decisions, before, spent))
            if compiled:
                seconds, timed = seconds + progress.seconds - began, timed + count
            compiled = True
            done += count
            used = float(np.asarray(decisions.used_learned).mean())
            loss = float(np.asarray(decisions.losses).mean())
            progress.advance(left - steps + _taken(state), loss=loss, learned=used)
            finished = _taken(state) >= steps
            if _is_mark(done * experiment.nt) or finished:
                evaluations.append(_evaluate(task, method, done, state))
                records.write_parquet(evaluated, pl.concat(evaluations))
            if (stopped() or progress.seconds - saved > SAVE_SECONDS) and not finished:
                saved = progress.seconds
                chunks = [pl.concat(chunks)]
                checkpoints.save(done, (state, jnp.array([seconds, timed])), chunks[0])
            if stopped() and not finished:
                raise KeyboardInterrupt
        seconds = seconds * done / timed if timed else progress.seconds
    table = records.join(chunks, method).filter(pl.col("step") <= steps)  # windows may adapt
    records.write_parquet(written, table.with_columns(seconds=pl.lit(seconds)))
    checkpoints.delete()
    if stopped():
        raise KeyboardInterrupt
    return table, pl.concat(evaluations), seconds


def _taken(state: GuardState) -> int:
    """The optimizer steps that every seed has taken at least."""
    return int(np.asarray(state.steps).min())


def _is_mark(step: int) -> bool:
    """Whether a step is 1, 2, 3 or 5 times a power of ten."""
    return str(step).rstrip("0") in ("1", "2", "3", "5")


def _evaluate(task: Task, method: str, cycle: int, state: GuardState) -> pl.DataFrame:
    """Losses and accuracies on the whole of both splits, a row for each seed."""
    steps = np.asarray(state.steps)
    rows = []
    for seed, step in enumerate(steps):
        params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state.params)
        values = {name: float(value) for name, value in task.evaluate(params).items()}
        rows.append({"method": method, "seed": seed, "cycle": cycle, "step": int(step)} | values)
    return pl.DataFrame(rows)


def _one_by_one(
    guard: Guard, state: GuardState, objective: Objective, cycles: int
) -> tuple[GuardState, Decision]:
    """The same as a rollout over all seeds, one seed after another."""
    done = [
        rollout(
            guard,
            jax.tree.map(lambda leaf, seed=seed: leaf[seed], state),
            Objective(objective.task, objective.key[seed]),
            cycles=cycles,
            most=CHUNK,
        )
        for seed in range(len(objective.key))
    ]
    states, decisions = zip(*done, strict=True)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jax.tree.map(
        lambda *leaves: np.stack(leaves), *decisions
    )

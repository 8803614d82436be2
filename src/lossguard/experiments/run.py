"""Run an experiment: its methods one after another, seed by seed in chunks; records on disk."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import PRNGKeyArray, PyTree

from ..guards.protocol import Decision, Guard, GuardState
from ..learned.weights_file import noting_weights
from ..rollout import rollout
from ..runs import curves, records
from ..runs import folder as run_folder
from ..runs.checkpoints import Checkpoints
from ..runs.config import as_config
from ..runs.progress_bar import Progress, stopping_at_interrupt
from ..tasks.task import Task
from ..validation import check_choice, check_count, check_positive, check_seed
from .experiment import Experiment, Policy

CHUNK = 100
"""Cycles in one compiled loop: what Ctrl-C waits for, and what a progress bar moves by."""
MARKS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
"""Times a power of ten: the steps at which iterates are evaluated on whole splits."""
SAVE_SECONDS = 60.0
"""Between two checkpoints."""
MOST_STEPS = 2**30
"""Of a method: guards count in 32 bits, and two gradients a step."""


def run(experiment: Experiment, folder: Path, *, resume: bool = False) -> Path:
    """Run every method of an experiment; returns the folder of its records.

    Beside the curves it leaves ``evaluations.parquet``: loss and accuracy of the iterate on the
    whole of both splits and what was spent by then, at the end of the cycle that reaches a step of
    ``MARKS`` times a power of ten, and at the last one. So methods are compared at equal price, and
    without the noise of minibatches.

    Every seed draws its own initialization and order of minibatches, the same for all methods. A
    run stopped by Ctrl-C or killed goes on with ``resume``, from the last checkpoint, and ends with
    the same curves to the bit; of one that is finished nothing is written again.

    Raises:
        ValueError: as ``hold_folder`` and ``start`` of ``runs/folder.py``, or if the experiment
            names a method or data set that does not exist or has a number out of range.
    """
    check(experiment)
    with stopping_at_interrupt() as stopped:
        with noting_weights() as noted:
            guards = experiment.guards()
            task = experiment.make_task(experiment)
            for method, guard in guards.items():
                _trace_cycle(method, guard, task, experiment.nt)
        if stopped():
            raise KeyboardInterrupt
        with run_folder.hold_folder(folder, as_config(experiment), resume=resume) as finished:
            if not finished:
                inputs = {"the data": task.dataset.checksum()} | noted
                _run_all(experiment, guards, task, folder, inputs, stopped)
    return folder


def _run_all(
    experiment: Experiment,
    guards: dict[str, Guard],
    task: Task,
    folder: Path,
    inputs: dict[str, str],
    stopped: Callable[[], bool],
) -> None:
    """Every method, one after another, and the records of them all."""
    made = run_folder.start(folder, data=task.dataset.note, inputs=inputs)
    tables, evaluations, seconds = [], [], {}
    for number, (method, guard) in enumerate(guards.items()):
        checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS / str(number))
        table, evaluated, seconds[method] = _run_method(
            experiment, method, guard, task, checkpoints, stopped
        )
        tables.append(table)
        evaluations.append(evaluated)
    records.write_parquet(folder / records.EVALUATIONS, pl.concat(evaluations))
    records.write_parquet(folder / records.CURVES, pl.concat(tables))
    run_folder.finish(folder, made | {"seconds": seconds})


def check(experiment: Experiment) -> None:
    """Its names and numbers, also those that none of its methods uses."""
    check_choice("loser", experiment.loser, get_args(Policy))
    for name in ("batch_size", "nt", "nc"):
        check_count(name, getattr(experiment, name))
    check_seed(experiment.seed, experiment.seeds)
    check_count("steps", experiment.steps, most=MOST_STEPS)
    for name in ("sgd_rate", "sgd_tau", "adam_rate"):
        check_positive(**{name: getattr(experiment, name)})


def _trace_cycle(method: str, guard: Guard, task: Task, nt: int) -> None:
    """Nothing is computed, but whatever refuses its arguments does so before there is a folder."""

    def cycle(key: PRNGKeyArray) -> tuple[GuardState, Decision]:
        return guard.step(guard.init(task.init(key)), task.objective(key))

    _, decision = jax.eval_shape(cycle, jax.random.key(0))
    if decision.losses.shape != (nt,):
        raise ValueError(
            f"method {method} must have nt = {nt}, as the experiment, got {len(decision.losses)}"
        )


def _run_method(
    experiment: Experiment,
    method: str,
    guard: Guard,
    task: Task,
    checkpoints: Checkpoints,
    stopped: Callable[[], bool],
) -> tuple[pl.DataFrame, pl.DataFrame, float]:
    """Its curves and evaluations, and the seconds that its cycles took, without compilation.

    It goes on from its last checkpoint. There is one of its end, so that it is not run again.
    """
    nt, end = experiment.nt, -(-experiment.steps // experiment.nt)
    seeds = jnp.asarray(experiment.seed + np.arange(experiment.seeds))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)), out_axes=1)(seeds)
    state = jax.jit(jax.vmap(lambda key: guard.init(task.init(key))))(keys[0])
    done, state, seconds, chunks, evaluations = _last(checkpoints, state)
    if stopped():
        raise KeyboardInterrupt
    if done == end:
        return curves.join(chunks, method), pl.concat(evaluations), seconds
    advance = partial(_advance, guard, task, keys[1], experiment.vectorize)
    with Progress(method, total=end * nt, done=done * nt, first="compiling") as progress:
        advance(jax.tree.map(jnp.copy, state), 1)  # compiles
        saved = progress.seconds
        while done < end:
            goal = min(-(-next_mark(done * nt) // nt), end)
            cycles, began = min(CHUNK, goal - done), progress.seconds
            before = np.asarray(state.steps)
            state, decisions = advance(state, cycles)
            spent = curves.totals(chunks[-1]) if chunks else None
            chunks.append(curves.thin(decisions, before, spent))
            done += cycles
            seconds += progress.seconds - began
            progress.advance(
                cycles * nt,
                loss=float(np.mean(decisions.losses)),
                leader=leader(float(np.mean(decisions.used_learned))),
                price=float(np.mean(decisions.price())) / nt,
            )
            if done == goal:
                for seed, counts in enumerate(curves.totals(chunks[-1]).to_dicts()):
                    place = {"method": method, "seed": seed, "cycle": done, "step": done * nt}
                    scores = task.evaluate(_of_seed(state.params, seed))
                    scores = {name: float(score) for name, score in scores.items()}
                    evaluations.append(pl.DataFrame(place | counts | scores))
            stop = stopped()
            if stop or done == end or progress.seconds - saved > SAVE_SECONDS:
                saved, chunks = progress.seconds, [pl.concat(chunks)]
                evaluated = pl.concat(evaluations or [pl.DataFrame()])
                checkpoints.save(done, (state, jnp.float32(seconds)), *chunks, evaluated)
            if stop:
                raise KeyboardInterrupt
    return curves.join(chunks, method), pl.concat(evaluations), seconds


def _last(
    checkpoints: Checkpoints, state: GuardState
) -> tuple[int, GuardState, float, list[pl.DataFrame], list[pl.DataFrame]]:
    """Cycles, state, seconds, curves and evaluations of the last checkpoint, or of the start."""
    found = checkpoints.latest((state, jnp.float32(0)))
    if found is None:
        return 0, state, 0.0, [], []
    done, (state, seconds), *tables = found
    chunks, evaluations = ([table] if table.height else [] for table in tables)
    return done, state, float(seconds), chunks, evaluations


def _advance(
    guard: Guard, task: Task, keys: PRNGKeyArray, vectorize: bool, start: GuardState, cycles: int
) -> tuple[GuardState, Decision]:
    """So many cycles of every seed, all at once or one after another."""

    def one(state: GuardState, key: PRNGKeyArray) -> tuple[GuardState, Decision]:
        return rollout(guard, state, task.objective(key), cycles=cycles, most=CHUNK)

    if vectorize:
        return jax.vmap(one)(start, keys)
    each = [one(_of_seed(start, k), key) for k, key in enumerate(keys)]
    states, decisions = zip(*each, strict=True)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jax.tree.map(
        lambda *leaves: np.stack(leaves), *decisions
    )


def leader(learned: float) -> str:
    """Who led, of the part of the steps that were the learned optimizer's.

    >>> leader(1.0), leader(0.0), leader(0.4)
    ('learned', 'fallback', 'learned in 40%')
    """
    return {1.0: "learned", 0.0: "fallback"}.get(learned, f"learned in {learned:.0%}")


def next_mark(step: int) -> int:
    """The first step after this one that is one of ``MARKS`` times a power of ten."""
    exponents = range(-1, len(str(step)))
    marks = (mark * 10**n for n in exponents for mark in MARKS)
    return next(int(mark) for mark in marks if mark > step and mark == int(mark))


def _of_seed(tree: PyTree, seed: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[seed], tree)

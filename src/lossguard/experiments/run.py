"""Run an experiment: its methods one after another, seed by seed in chunks; records on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import PRNGKeyArray, PyTree

from .. import curves, records, run_folder
from ..checkpoints import Checkpoints
from ..config import as_config
from ..guards.protocol import Decision, Guard, GuardState
from ..learned.weights_file import noting_weights
from ..progress import Progress, stopping_at_interrupt
from ..rollout import rollout
from ..tasks.task import Task
from ..validation import check_choice, check_count, check_kind, check_positive, check_seed
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
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or the
            experiment names a method or data set that does not exist or has a number out of range,
            or ``make_task`` doesn't return a task, or another process writes to the folder, or data
            or weights changed since the run was started.
    """
    check(experiment)
    with stopping_at_interrupt() as stopped:
        with noting_weights() as noted:
            guards = experiment.guards()
            task = experiment.make_task(experiment)
            if not isinstance(task, Task):
                raise ValueError(f"make_task must return a Task, got {type(task).__name__}")
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
        under_way = _MethodRun(experiment, method, guard, task, checkpoints, stopped)
        table, evaluated, seconds[method] = under_way.records()
        tables.append(table)
        evaluations.append(evaluated)
    records.write_parquet(folder / records.EVALUATIONS, pl.concat(evaluations))
    records.write_parquet(folder / records.CURVES, pl.concat(tables))
    run_folder.finish(folder, made | {"seconds": seconds})


def check(experiment: Experiment) -> None:
    """Its names and numbers, also those that none of its methods uses."""
    for name in ("name", "title", "tested_on", "dataset", "scaling"):
        check_kind(name, getattr(experiment, name), str, "'mine'")
    for method in experiment.methods:
        check_kind("each of methods", method, str, "'SGDnm'")
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


@dataclass
class _MethodRun:
    """A method of an experiment under way: where its seeds are, and its records so far."""

    experiment: Experiment
    method: str
    guard: Guard
    task: Task
    checkpoints: Checkpoints
    """The last one is of its end, so that it is not run again."""
    stopped: Callable[[], bool]

    def records(self) -> tuple[pl.DataFrame, pl.DataFrame, float]:
        """Its curves and evaluations, and the seconds that its cycles took, without compilation.

        It is run first, unless it has been.
        """
        self._start()
        if self.stopped():
            raise KeyboardInterrupt
        cycles = -(-self.experiment.steps // self.experiment.nt)
        if self._cycles < cycles:
            self._run(cycles)
        return curves.join(self._chunks, self.method), pl.concat(self._evaluations), self._seconds

    def _start(self) -> None:
        """At the start, or at the last checkpoint."""
        seeds = self.experiment.seed + np.arange(self.experiment.seeds)
        init_keys, self._order_keys = jax.vmap(
            lambda seed: jax.random.split(jax.random.key(seed)), out_axes=1
        )(jnp.asarray(seeds))
        self._state = jax.jit(jax.vmap(lambda key: self.guard.init(self.task.init(key))))(init_keys)
        self._cycles, self._chunks, self._evaluations, self._seconds = 0, [], [], 0.0
        if (found := self.checkpoints.latest((self._state, jnp.float32(0)))) is not None:
            self._cycles, (self._state, seconds), table, evaluations = found
            self._seconds, self._chunks = float(seconds), [table]
            self._evaluations = [evaluations] if evaluations.height else []

    def _run(self, end: int) -> None:
        """To the end, in cycles, or until Ctrl-C."""
        nt = self.experiment.nt
        total, done = end * nt, self._cycles * nt
        with Progress(self.method, total=total, done=done, first="compiling") as progress:
            self._rollouts(jax.tree.map(jnp.copy, self._state), 1)  # compiles
            saved = progress.seconds
            while self._cycles < end:
                goal = min(-(-next_mark(self._cycles * nt) // nt), end)
                cycles, began = min(CHUNK, goal - self._cycles), progress.seconds
                decisions = self._advance(cycles)
                self._seconds += progress.seconds - began
                progress.advance(
                    cycles * nt,
                    loss=float(np.mean(decisions.losses)),
                    leader=leader(float(np.mean(decisions.used_learned))),
                    price=float(np.mean(decisions.price())) / nt,
                )
                if self._cycles == goal:
                    self._evaluate()
                stop, finished = self.stopped(), self._cycles == end
                if stop or finished or progress.seconds - saved > SAVE_SECONDS:
                    saved = progress.seconds
                    self._save()
                if stop:
                    raise KeyboardInterrupt

    def _advance(self, cycles: int) -> Decision:
        """So many cycles of every seed."""
        before = np.asarray(self._state.steps)
        self._state, decisions = self._rollouts(self._state, cycles)
        spent = curves.totals(self._chunks[-1]) if self._chunks else None
        self._chunks.append(curves.thin(decisions, before, spent))
        self._cycles += cycles
        return decisions

    def _rollouts(self, start: GuardState, cycles: int) -> tuple[GuardState, Decision]:
        """A rollout of every seed, all at once or one after another."""

        def one(state: GuardState, key: PRNGKeyArray) -> tuple[GuardState, Decision]:
            return rollout(self.guard, state, self.task.objective(key), cycles=cycles, most=CHUNK)

        if self.experiment.vectorize:
            return jax.vmap(one)(start, self._order_keys)
        done = [one(_of_seed(start, k), key) for k, key in enumerate(self._order_keys)]
        states, decisions = zip(*done, strict=True)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jax.tree.map(
            lambda *leaves: np.stack(leaves), *decisions
        )

    def _evaluate(self) -> None:
        """Losses and accuracies on the whole of both splits, a row for each seed."""
        rows, step = [], self._cycles * self.experiment.nt
        for seed, spent in enumerate(curves.totals(self._chunks[-1]).to_dicts()):
            params = _of_seed(self._state.params, seed)
            values = {name: float(value) for name, value in self.task.evaluate(params).items()}
            place = {"method": self.method, "seed": seed, "cycle": self._cycles, "step": step}
            rows.append(place | spent | values)
        self._evaluations.append(pl.DataFrame(rows))

    def _save(self) -> None:
        """A checkpoint."""
        self._chunks = [pl.concat(self._chunks)]
        evaluations = pl.concat(self._evaluations or [pl.DataFrame()])
        state = self._state, jnp.float32(self._seconds)
        self.checkpoints.save(self._cycles, state, *self._chunks, evaluations)


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

"""Learned optimizers on published tasks, alone and guarded, against published baselines.

A speedup is the number of steps in which the published envelope reaches one's own loss, over one's
own steps, or over one's own price: gradient evaluations + forward passes / 3.

The published file is ``learned_optimization/baselines/data/speedup_over_multiple_baselines.json``
of google/learned_optimization (commit 32186aa). It holds the lowest loss at each number of steps
over Adam, Adam with two decays and RAdam, each at 15 rates.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from rich.console import Group
from rich.table import Table

from ..cli import terminal
from ..guards.cycle import of_cycle
from ..guards.protocol import Decision, Guard, GuardState, Loss, following
from ..guards.unguarded import unguarded
from ..learned.pretrained import pretrained
from ..rewinding.rewind import rewind
from ..runs.curves import PRICE
from ..runs.records import read_json, read_run
from ..tasks.published import PUBLISHED, published_task
from ..tasks.task import Task
from ..validation import check_choice
from .experiment import Experiment, Methods, alone, best_of_both, learned_alone, ours

FILE = "LOSSGUARD_BASELINES"
"""The environment variable that names the published file."""
EVERY = 10
"""Steps from one loss to the next."""
LEARNED = {"LSTM": "lstm-mnist-mlp", "MLP": "mlp-small"}
"""What is measured, by its name in the tables."""
MARKS = (500, 1_000, 2_000, 5_000, 10_000)
"""Steps and prices at which losses are compared."""
COLUMNS = ("task", "method", "by", "mark", "seed", "loss", "speedup")
"""Of ``rows``, and of the CSV file."""
OF_TASK = ("dataset", "scaling", "model", "batch_size", "learned")
"""Fields of an experiment that are those of the published task."""
TUNED, ENVELOPE = "Tuned", "Published envelope"


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """As in the published baselines: 1e-8 is added inside the root too."""
    return optax.adam(rate, eps_root=1e-8)


def exponential(rate: float) -> optax.Schedule:
    """rate exp(-7e-5 k) at step k."""
    return optax.exponential_decay(rate, 100_000, math.exp(-7))


def root(rate: float) -> optax.Schedule:
    """rate min(k / 1000, sqrt(1000 / k)) at step k, with k = 1 for 0."""

    def at(k: Any) -> Any:
        k = jnp.maximum(k, 1)
        return rate * jnp.minimum(k / 1_000, jnp.sqrt(1_000 / k))

    return at


HAND_MADE: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "Adam": adam,
    "Adam, exponential": lambda rate: adam(exponential(rate)),
    "Adam, root": lambda rate: adam(root(rate)),
    "RAdam": optax.radam,
}
"""What the envelope is made of."""


_OF_CLASSIFIERS = (("Adam", 0.003), ("Adam, exponential", 0.003))
_OF_AUTOENCODERS = (("Adam", 0.01), ("RAdam", 0.01), ("Adam, root", 0.03))
TRIED: Mapping[str, tuple[tuple[str, float], ...]] = {
    "ImageMLP_FashionMnist_Relu128x128": _OF_CLASSIFIERS,
    "ImageMLP_Mnist_128x128x128_Relu": (*_OF_CLASSIFIERS, ("Adam, exponential", 0.001)),
    "ImageMLP_FashionMnist8_Relu32": (("Adam", 0.01), ("Adam", 0.03)),
    "ImageMLPAE_FashionMnist_128x32x128_bs128": _OF_AUTOENCODERS,
    "ImageMLPAE_Mnist_128x32x128_bs128": _OF_AUTOENCODERS,
}
"""What is run of ``HAND_MADE`` on a task: of all kinds and of the envelope's rates those near the
best. The best at a mark is shown, as in the envelope. Guards fall back on the first."""


def task_methods(e: Experiment) -> Methods:
    """What is tuned; learned optimizers alone, guarded over Adam, and MLP in other guards too.

    "best of" is ``best_of`` of it and Adam with ``share=0.05``, "guarded" is ``recommended``.

    Raises:
        ValueError: if the experiment isn't named after a published task.
    """
    check_choice("name of a published task", e.name, PUBLISHED)
    made = {f"{kind} {rate:g}": alone(e, HAND_MADE[kind](rate)) for kind, rate in TRIED[e.name]}
    fallback = adam(e.adam_rate)
    for name, weights in LEARNED.items():
        own = replace(e, learned=weights)
        made[name] = learned_alone(own)
        if name == "MLP":  # the other one diverges on all tasks
            made[f"{name}, rewind"] = lambda w=weights: unguarded(rewind(pretrained(w)), nt=e.nt)
            made[f"{name}, best of"] = best_of_both(made[name], alone(e, fallback))
        made[f"{name}, guarded"] = ours(own, fallback)
    return {name: lambda make=make: watched(make()) for name, make in made.items()}


def watched(guard: Guard, batches: int = 5) -> Guard:
    """The guard; its decisions report losses as those of the published baselines were measured.

    Before each cycle, the mean over the next minibatches in the order, which are left out of
    training. It stands in each of ``decision.losses``, and what it costs is not counted.
    """

    per_cycle = batches + guard.per_cycle

    def step(state: GuardState, loss: Loss, minibatches: Any = None) -> tuple[GuardState, Decision]:
        given = of_cycle(state, minibatches, per_cycle)
        own = jax.tree.map(lambda leaf: leaf[:batches], given)
        rest = jax.tree.map(lambda leaf: leaf[batches:], given)
        before = jax.vmap(loss, (None, 0))(state.params, own).mean()
        after, decision = guard.step(state, loss, rest)
        number = following(state.minibatches, per_cycle)
        losses = jnp.full_like(decision.losses, before)
        return after._replace(minibatches=number), decision._replace(losses=losses)

    return Guard(guard.init, step, per_cycle)


def task_of(experiment: Experiment) -> Task:
    """The published task that an experiment is named after.

    Raises:
        ValueError: if the experiment has other data or another model, or there is no envelope.
    """
    own = task_recipe(experiment.name)
    for name in OF_TASK:
        if getattr(experiment, name) != getattr(own, name):
            raise ValueError(
                f"{name} of a published task must be {getattr(own, name)!r}, got "
                f"{getattr(experiment, name)!r}"
            )
    envelope(experiment.name)  # a missing file is told before hours of computation
    return published_task(experiment.name)


def task_recipe(name: str) -> Experiment:
    """A published task, to 10,000 steps, on five seeds that nothing was chosen with."""
    task = PUBLISHED[name]
    return Experiment(
        name=name,
        title=f"{name}: learned optimizers alone and guarded over Adam",
        tested_on=name,
        dataset=task.dataset,
        scaling="unit",
        model=task.model,
        steps=MARKS[-1],
        seed=5_000,
        nt=EVERY,
        adam_rate=TRIED[name][0][1],
        methods=(),
        make_methods=task_methods,
        make_task=task_of,
    )


RECIPES = {name: partial(task_recipe, name) for name in PUBLISHED}
"""What ``lossguard benchmark tasks`` runs."""


class Envelope(NamedTuple):
    """The losses of one task."""

    steps: np.ndarray
    """[points], increasing from 0 to 100,000."""
    loss: np.ndarray
    """[points], the mean of five seeds, smoothed as in ``curves_of``; it never rises."""

    def at(self, step: float) -> float:
        """The loss at a step."""
        return float(np.exp(np.interp(step, self.steps, np.log(self.loss))))

    def steps_to(self, loss: np.ndarray | float) -> np.ndarray:
        """Steps to a loss: 0 to one above the first or not finite, 100,000 at most."""
        with np.errstate(divide="ignore"):  # a loss of 0
            given = np.log(np.where(np.isfinite(loss), loss, np.inf))
        return np.interp(given, np.log(self.loss)[::-1], self.steps[::-1])


def envelope(task: str) -> Envelope:
    """The published envelope of a task.

    Args:
        task: a name of ``lossguard.tasks.published.PUBLISHED``.

    Raises:
        ValueError: if ``LOSSGUARD_BASELINES`` names no file, or there is no such task in it.
    """
    given = os.environ.get(FILE, "")
    if not (path := Path(given)).is_file():
        raise ValueError(
            f"{FILE} must name the published file of baselines, got {given!r}: "
            "speedup_over_multiple_baselines.json of google/learned_optimization"
        )
    content = read_json(path)
    check_choice("task of an envelope", task, content)
    one = content[task]
    steps, loss = one.values() if isinstance(one, dict) else one
    return Envelope(np.rint(steps), np.array(loss, float))  # copies differ in their last digits


class Curves(NamedTuple):
    """A method's losses, smoothed as those of the envelope."""

    steps: np.ndarray
    """[points], optimizer steps before each loss."""
    price: np.ndarray
    """[seeds, points], what was spent by then, in gradients."""
    loss: np.ndarray
    """[seeds, points]."""

    def at(self, mark: int, by: str) -> np.ndarray | None:
        """The loss of each seed at so many ``steps``, or at that ``price``: None beyond the end.

        The last loss is of the cycle before the end, and stands for it.
        """
        spent = np.broadcast_to(self.steps, self.loss.shape) if by == "steps" else self.price
        if spent.shape[1] < 2 or (mark > 2 * spent[:, -1] - spent[:, -2]).any():
            return None
        return np.array([np.interp(mark, x, y) for x, y in zip(spent, self.loss, strict=True)])


def curves_of(table: pl.DataFrame, method: str) -> Curves:
    """From the curves of a run whose guards are ``watched``: one loss a cycle, taken before it.

    Losses are smoothed, y <- 0.95 y + 0.05 loss from the first one on: they lag 190 steps.
    """
    smoothed = pl.col("loss").cast(pl.Float64).ewm_mean(alpha=0.05, adjust=False)
    rows = table.filter(pl.col("method") == method, pl.col("step") % EVERY == 0)
    rows = rows.with_columns(price=PRICE, loss=smoothed.over("seed", order_by="step"))
    seeds = [one.sort("step") for _, one in rows.group_by("seed", maintain_order=True)]
    spent, loss = (np.array([one[name].to_numpy() for one in seeds]) for name in ("price", "loss"))
    return Curves(
        steps=seeds[0]["step"].to_numpy() - EVERY,
        price=np.concatenate([np.zeros_like(spent[:, :1]), spent[:, :-1]], axis=1),
        loss=np.where(np.isfinite(loss), loss, np.inf),
    )


def rows(task: str, table: pl.DataFrame, against: Envelope) -> list[tuple[Any, ...]]:
    """The ``COLUMNS`` of a run: each seed of each method at marks in ``by``, "steps" or "price".

    Of what is tuned, the one that is best at each mark.
    """
    tried: dict[str, list[Curves]] = {TUNED: []}
    for name in table["method"].unique(maintain_order=True).to_list():
        label = TUNED if name.rpartition(" ")[0] in HAND_MADE else name
        tried.setdefault(label, []).append(curves_of(table, name))
    found = []
    for (method, curves), by, mark in product(tried.items(), ("steps", "price"), MARKS):
        reached = [losses for one in curves if (losses := one.at(mark, by)) is not None]
        if not reached:
            continue
        losses = min(reached, key=np.mean)
        for seed, (loss, steps) in enumerate(zip(losses, against.steps_to(losses), strict=True)):
            found.append((task, method, by, mark, seed, float(loss), float(steps) / mark))
    return found


def table(found: Mapping[str, Path]) -> tuple[Group, pl.DataFrame]:
    """What is printed, a table for each task and one of all; and its rows as numbers."""
    runs = {task: (read_run(folder).curves, envelope(task)) for task, folder in found.items()}
    made = [row for task, (curves, against) in runs.items() for row in rows(task, curves, against)]
    every = pl.DataFrame(made, COLUMNS, orient="row")
    if every.is_empty():
        return Group(f"Too short: there are numbers from step {MARKS[0]:,} on."), every
    shown = []
    for task, (_, against) in runs.items():
        one = _lines(task, every.filter(task=task), _means)
        one.add_row(ENVELOPE, "steps", *(f"{against.at(mark):.3g} (1.00)" for mark in MARKS))
        shown.append(one)
    title = "Speedup over the published envelope, interquartile mean"
    return Group(*shown, _lines(title, every, _interquartile)), every


def _lines(title: str, numbers: pl.DataFrame, cell: Callable[[pl.DataFrame], str]) -> Table:
    """A line for each method at equal steps and at equal price."""
    cells = {of: cell(one) for of, one in numbers.group_by("method", "by", "mark")}
    names = numbers.select("method", "by").unique(maintain_order=True).rows()
    rows = ((*name, *(cells.get((*name, mark)) for mark in MARKS)) for name in names)
    return terminal.table(("method", "at equal", *map("{:,}".format, MARKS)), rows, title=title)


def _means(rows: pl.DataFrame) -> str:
    """The mean loss, and the mean speedup in brackets."""
    loss, speedup = rows.select(pl.col("loss", "speedup").mean()).row(0)
    return f"{loss:.3g} ({speedup:.2f})"


def _interquartile(rows: pl.DataFrame) -> str:
    """The interquartile mean of all tasks' and seeds' speedups, and its 95 % interval."""
    tasks = [of["speedup"].to_numpy() for _, of in rows.group_by("task", maintain_order=True)]
    middle, low, high = interquartile_mean(tasks)
    return f"{middle:.2f}" if math.isnan(low) else f"{middle:.2f} ({low:.2f}-{high:.2f})"


def interquartile_mean(
    scores: Sequence[np.ndarray], *, draws: int = 2_000
) -> tuple[float, float, float]:
    """The mean of the middle half of all scores (Agarwal et al., 2021, arXiv 2108.13264).

    And the ends of its 95 % interval, when seeds are drawn again with replacement within each task.
    As their package rliable computes them, which needs arch, pandas and seaborn.

    Args:
        scores: of each task, those of its seeds; of one seed there is no interval.
        draws: of the bootstrap.
    """

    def middle(every: np.ndarray) -> np.ndarray:
        left_out = every.shape[-1] // 4
        return np.sort(every)[..., left_out : every.shape[-1] - left_out].mean(axis=-1)

    value, rng = float(middle(np.concatenate(scores))), np.random.default_rng(0)
    if min(map(len, scores)) < 2:
        return value, math.nan, math.nan
    drawn = [one[rng.integers(len(one), size=(draws, len(one)))] for one in scores]
    low, high = np.quantile(middle(np.concatenate(drawn, axis=1)), (0.025, 0.975))
    return value, float(low), float(high)

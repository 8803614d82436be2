"""How often ``rewind`` goes back where nothing is wrong: ordinary steps, counted.

    python -m benchmarks.false_alarms [a folder for what is done, to go on from]

An alarm is raised at a score of 32, with the defaults; the table has the highest that there was.
A quarter of an hour of a core, at rates at which each optimizer trains well.
"""

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from lossguard import rewind
from lossguard.rewinding.rewind import RewindState
from lossguard.tasks import MLP, ConvNet, Task, load_dataset

TASKS = {
    "Circles": ("circles", "none", MLP(), 100_000),
    "Spirals": ("spirals", "none", MLP(), 100_000),
    "MNIST": ("mnist", "unit", MLP(), 50_000),
    "Fashion-MNIST": ("fashion_mnist", "unit", MLP(), 50_000),
    "MNIST, ConvNet": ("mnist", "unit", ConvNet(), 1_000),
    "CIFAR-10, ConvNet": ("cifar10", "unit", ConvNet(), 1_000),
}
"""Data set, scaling, model, and steps of each run."""
OPTIMIZERS = {
    "SGD": lambda on_points: optax.sgd(1.0 if on_points else 0.1),
    "momentum": lambda on_points: optax.sgd(0.1 if on_points else 0.01, momentum=0.9),
    "Adam": lambda on_points: optax.adam(0.01 if on_points else 0.001),
}
BATCHES = (128, 32)
CHUNK = 1_000
"""Steps in one compiled loop."""


def counted(task: Task, optimizer: optax.GradientTransformation, steps: int) -> tuple[int, int]:
    """Alarms of a run, answered or not, and its highest score."""
    watched, (begins, order) = rewind(optimizer), jax.random.split(jax.random.key(7_000))
    objective, params = task.objective(order), task.init(begins)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        params, state = carry
        loss, gradient = jax.value_and_grad(objective)(params, i)
        updates, state = watched.update(gradient, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), state.alarm.score

    @partial(jax.jit, donate_argnums=0)
    def chunk(carry: tuple, first: jax.Array) -> tuple[tuple, jax.Array]:
        carry, scores = jax.lax.scan(step, carry, first + jnp.arange(CHUNK))
        return carry, scores.max()

    carry, highest = (params, watched.init(params)), 0
    for first in range(0, steps, CHUNK):
        carry, score = chunk(carry, jnp.int32(first))
        highest = max(highest, int(score))
    state: RewindState = carry[1]
    return int(state.returns + state.unanswered), highest


def main(folder: Path | None) -> None:
    """Run what is not in the folder yet, and print the table."""
    file = None if folder is None else folder / "alarms.jsonl"
    lines = file.read_text().splitlines() if file and file.exists() else []
    done = {tuple(row[:3]): row for row in map(json.loads, lines)}
    for name, kind, batch in product(TASKS, OPTIMIZERS, BATCHES):
        dataset, scaling, model, steps = TASKS[name]
        if (name, kind, batch) not in done:
            task = Task(load_dataset(dataset, scaling=scaling), model, batch)
            on_points = name in ("Circles", "Spirals")
            row = [name, kind, batch, steps, *counted(task, OPTIMIZERS[kind](on_points), steps)]
            done[name, kind, batch] = row
            print(*row, file=sys.stderr, flush=True)
            if file:
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    print("| task | steps of all runs | alarms | highest count of 32: SGD | momentum | Adam |")
    print("|---|---|---|---|---|---|")
    for name in TASKS:
        rows = [row for row in done.values() if row[0] == name]
        most = {kind: max(row[5] for row in rows if row[1] == kind) for kind in OPTIMIZERS}
        steps, alarms = sum(row[3] for row in rows), sum(row[4] for row in rows)
        print(f"| {name} | {steps:,} | {alarms} | {' | '.join(map(str, most.values()))} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)

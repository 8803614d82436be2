"""Meta-training: many meta-steps, validated, resumable; the best weights by validation are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import records
from ..checkpoints import Checkpoints
from ..config import as_config
from ..learned.lstm import LSTMWeights, init_lstm_weights, lstm_optimizer
from ..learned.pretrained import save_weights
from ..progress import Progress, stopping_at_interrupt
from ..tasks.datasets import load_dataset
from ..tasks.models import MLP, ConvNet
from ..tasks.task import Task
from ..validation import check_count, check_positive, check_real, check_seed
from .truncated import Optimizees, meta_gradient, restart_finished, start, unroll

WEIGHTS = "weights.safetensors"
COUNTS = (
    "batch_size",
    "optimizees",
    "shortest",
    "meta_steps",
    "hidden",
    "layers",
    "validate_every",
    "validation_optimizees",
)
"""What must be at least 1."""
LENGTHS = ("truncation", "validation_steps")
"""What must be at least 2: the first loss is before the learned optimizer has done anything."""
SAVE_SECONDS = 60.0
"""Between two checkpoints."""


@dataclass(frozen=True)
class MetaTraining:
    """Everything that a meta-training run depends on."""

    name: str
    """What the learned optimizer is called."""
    dataset: str = "mnist"
    scaling: str = "unit"
    """Of the inputs, as the data set's loader takes it."""
    model: MLP | ConvNet = MLP()
    batch_size: int = 128
    optimizees: int = 2
    """K, optimizees under way side by side."""
    truncation: int = 50
    """Optimizer steps of a piece, after which back-propagation is cut."""
    shortest: int = 100
    longest: int = 500
    """Rollout lengths are drawn log-uniformly between the two, rounded up to whole pieces."""
    curriculum: int = 0
    """Meta-steps over which the longest rollout grows from ``shortest``, geometrically."""
    meta_steps: int = 3000
    rate: float = 3e-3
    """Of Adam on the weights."""
    decay: bool = True
    """Whether the rate falls to zero, by a cosine; otherwise it is constant."""
    b2: float = 0.999
    """Of Adam; less forgets sooner the gradients of an exploding start."""
    clip: float | None = 1.0
    """Largest norm of a meta-gradient; None leaves it as it is."""
    hidden: int = 20
    layers: int = 2
    scale: float = 0.1
    p: float = 10.0
    validate_every: int = 100
    validation_steps: int = 300
    """Optimizer steps of a validation."""
    select: bool = True
    """The weights kept are those with the lowest mean validation loss; otherwise the last whose
    validation is finite."""
    validation_optimizees: int = 4
    others: tuple[str, ...] = ()
    """Other data sets that are validated on as well, as in figure 2; they don't choose weights."""
    seed: int = 0

    def task(self) -> Task:
        """The task that is trained on, loaded."""
        return Task(load_dataset(self.dataset, scaling=self.scaling), self.model, self.batch_size)

    def other_tasks(self) -> dict[str, Task]:
        """The same model on ``others``, scaled as their loaders do by default."""
        return {name: Task(load_dataset(name), self.model, self.batch_size) for name in self.others}

    def optimizer(self, weights: LSTMWeights) -> optax.GradientTransformation:
        """The learned optimizer that these weights make."""
        return lstm_optimizer(weights, scale=self.scale, p=self.p)


class MetaState(NamedTuple):
    """Where meta-training stands."""

    weights: LSTMWeights
    adam: PyTree
    optimizees: Optimizees
    best: LSTMWeights
    best_validation: Float[Array, ""]


def metatrain(config: MetaTraining, folder: Path, *, resume: bool = False) -> Path:
    """Meta-train a learned optimizer; returns the file of its weights.

    A meta-gradient that isn't finite, as of an optimizee that overflows, is left out.

    Leaves ``config.json``, ``manifest.json``, ``curves.parquet`` (columns ``meta_step``,
    ``meta_loss``, ``gradient_norm``, ``validation``: [validation_steps] mean losses a step, and
    ``validation_NAME`` on each of ``others``) and ``weights.safetensors`` in the folder. It saves
    once a minute, and when it is stopped by Ctrl-C or SIGTERM. Then, or killed, it goes on with
    ``resume``, with the same result as without the stop; of one that is finished nothing is written
    again.

    Raises:
        ValueError: if the folder holds another run, or this one and ``resume`` is false, or another
            process writes to it, or the data changed since it was started, or the config names a
            data set that does not exist, has a number out of range or holds what JSON can't, or if
            every validation diverged.
    """
    _check(config)
    with stopping_at_interrupt() as stopped:
        task, others = config.task(), config.other_tasks()
        for each in (task, *others.values()):
            _trace_loss(each)
        if stopped():
            raise KeyboardInterrupt
        with records.hold_folder(folder, as_config(config), resume=resume) as finished:
            if not finished:
                _metatrain(config, task, others, folder, stopped)
    return folder / WEIGHTS


def _metatrain(
    config: MetaTraining,
    task: Task,
    others: dict[str, Task],
    folder: Path,
    stopped: Callable[[], bool],
) -> None:
    """All of it, and what it leaves."""
    inputs = {"the data": task.dataset.checksum()}
    inputs |= {f"the data of {name}": other.dataset.checksum() for name, other in others.items()}
    made = records.start(folder, data=task.dataset.note, inputs=inputs)
    checkpoints = Checkpoints(folder / "checkpoints")
    state, table, seconds = _train_to_the_end(config, task, others, checkpoints, stopped)
    records.write_parquet(folder / records.CURVES, table)
    if not np.isfinite(state.best_validation):
        raise ValueError(f"no validation of {config.name} was finite: there are no weights to keep")
    made |= {"seconds": seconds, "best_validation": float(state.best_validation)}
    provenance = {
        "made": " ".join(made["command"]),
        "commit": str(made["commit"]),
        "time": made["time"],
        "dataset": config.dataset,
        "best_validation": f"{float(state.best_validation):.4f}",
    }
    save_weights(folder / WEIGHTS, state.best, p=config.p, scale=config.scale, made=provenance)
    records.finish(folder, made)
    checkpoints.delete()


def _check(config: MetaTraining) -> None:
    for name in COUNTS:
        check_count(name, getattr(config, name))
    for name in LENGTHS:
        check_count(name, getattr(config, name), least=2)
    for name in ("rate", "scale", "p"):
        check_positive(**{name: getattr(config, name)})
    if config.clip is not None:
        check_positive(clip=config.clip)
    check_real("b2", config.b2, "at least 0 and below 1", lambda v: 0 <= v < 1)
    check_count("curriculum", config.curriculum, least=0)
    check_seed(config.seed)
    if config.longest < config.shortest:
        raise ValueError(
            f"longest must be at least shortest, which is {config.shortest}, got {config.longest}"
        )


def _trace_loss(task: Task) -> None:
    """Nothing is computed, but whatever refuses its arguments does so before there is a folder."""
    jax.eval_shape(lambda key: task.objective(key)(task.init(key), 0), jax.random.key(0))


def _train_to_the_end(
    config: MetaTraining,
    task: Task,
    others: dict[str, Task],
    checkpoints: Checkpoints,
    stopped: Callable[[], bool],
) -> tuple[MetaState, pl.DataFrame, float]:
    """All meta-steps from the last checkpoint on: the state after them, the curves, the seconds."""
    start_key, train_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    every = config.validate_every
    state, table, done, before = _start(config, task, start_key), pl.DataFrame(), 0, jnp.float32(0)
    seen = np.zeros((2, every), np.float32)  # losses and gradient norms since the last validation
    if (found := checkpoints.latest((state, jnp.asarray(seen), before))) is not None:
        done, (state, seen, before), table = found
        seen = np.array(seen)
    first = "" if done else "compiling"

    with Progress(
        config.name, total=config.meta_steps, done=done, unit="meta-steps", first=first
    ) as progress:
        saved = 0.0
        while done < config.meta_steps:
            begun, within = done - done % every, done % every
            steps = min(every, config.meta_steps - begun)
            keys = jax.random.split(jax.random.fold_in(train_key, begun), steps)
            key = keys[jnp.int32(within)]  # by a plain one, each index is compiled
            state, loss, norm = _meta_step(config, task, state, key, jnp.int32(done))
            seen[:, within] = float(loss), float(norm)
            done += 1
            if within + 1 == steps:
                state, row = _validated(config, task, others, state, validation_key)
                means = seen[:, :steps].mean(axis=1).tolist()
                means = {"meta_step": done, "meta_loss": means[0], "gradient_norm": means[1]}
                rows = [table] * (done > every) + [pl.DataFrame(means | row)]
                table = pl.concat(rows, how="vertical_relaxed")
            progress.advance(1, loss=float(loss), best=float(state.best_validation))
            if stopped() or done == config.meta_steps or progress.seconds - saved > SAVE_SECONDS:
                saved = progress.seconds
                checkpoints.save(done, (state, jnp.asarray(seen), before + saved), table)
            if stopped() and done < config.meta_steps:
                raise KeyboardInterrupt
        seconds = float(before) + progress.seconds
    return state, table, seconds


def _validated(
    config: MetaTraining,
    task: Task,
    others: dict[str, Task],
    state: MetaState,
    key: PRNGKeyArray,
) -> tuple[MetaState, dict[str, Any]]:
    """The state with the best weights so far, and the validation's columns of a row."""
    validation = np.asarray(_validate(config, task, state.weights, key))
    row = {"validation": validation[None]}
    for name, other in others.items():
        row[f"validation_{name}"] = np.asarray(_validate(config, other, state.weights, key))[None]
    return _keep(config, state, jnp.float32(validation.mean())), row


def _start(config: MetaTraining, task: Task, key: PRNGKeyArray) -> MetaState:
    weights_key, first_key = jax.random.split(key)
    weights = init_lstm_weights(weights_key, hidden=config.hidden, layers=config.layers)
    return MetaState(
        weights,
        _meta_optimizer(config).init(weights),
        _fresh(config, task, config.optimizer(weights), first_key, 0),
        weights,
        jnp.float32(jnp.inf),
    )


def _meta_optimizer(config: MetaTraining) -> optax.GradientTransformation:
    decayed = optax.cosine_decay_schedule(config.rate, config.meta_steps)
    adam = optax.adam(decayed if config.decay else config.rate, b2=config.b2)
    if config.clip is not None:
        adam = optax.chain(optax.clip_by_global_norm(config.clip), adam)
    return optax.apply_if_finite(adam, max_consecutive_errors=config.meta_steps)


def _fresh(
    config: MetaTraining,
    task: Task,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    done: Array | int,
) -> Optimizees:
    """Optimizees at the start of rollouts of random lengths, ``done`` meta-steps into training."""
    length_key, key = jax.random.split(key)
    grown = jnp.minimum(1, (done + 1) / (config.curriculum + 1))
    low, high = jnp.log(config.shortest), jnp.log(config.longest)
    bounds = low, low + grown * (high - low)
    log_length = jax.random.uniform(length_key, (config.optimizees,), jnp.float32, *bounds)
    pieces = jnp.ceil(jnp.exp(log_length) / config.truncation - 1e-3).astype(jnp.int32)
    keys = jax.random.split(key, config.optimizees)
    return start(task, optimizer, keys, pieces * config.truncation)


@eqx.filter_jit
def _meta_step(
    config: MetaTraining, task: Task, state: MetaState, key: PRNGKeyArray, done: Array
) -> tuple[MetaState, Float[Array, ""], Float[Array, ""]]:
    """One meta-step: the state after it, the loss, the norm of the meta-gradient."""
    losses, gradient, optimizees = meta_gradient(
        config.optimizer, task, state.weights, state.optimizees, config.truncation
    )
    updates, adam = _meta_optimizer(config).update(gradient, state.adam, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    fresh = _fresh(config, task, config.optimizer(state.weights), key, done)
    optimizees = restart_finished(optimizees, fresh)
    state = state._replace(weights=weights, adam=adam, optimizees=optimizees)
    return state, losses.mean(), optax.tree.norm(gradient)


@eqx.filter_jit
def _validate(
    config: MetaTraining, task: Task, weights: LSTMWeights, key: PRNGKeyArray
) -> Float[Array, " validation_steps"]:
    """Mean training losses a step, on initializations and minibatches that training never draws."""
    keys = jax.random.split(key, config.validation_optimizees)
    optimizer = config.optimizer(weights)
    optimizees = start(task, optimizer, keys, jnp.zeros(config.validation_optimizees, jnp.int32))
    losses, _ = unroll(task, optimizer, optimizees, config.validation_steps)
    return losses.mean(axis=1)


def _keep(config: MetaTraining, state: MetaState, validation: Float[Array, ""]) -> MetaState:
    if validation < state.best_validation if config.select else jnp.isfinite(validation):
        return state._replace(best=state.weights, best_validation=validation)
    return state

"""Meta-training: many meta-steps, validated, resumable; the best weights by validation are kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import tyro
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..cli.terminal import shown
from ..learned.pretrained import load_weights
from ..learned.weights_file import noting_weights
from ..runs import folder as run_folder
from ..runs import records
from ..runs.checkpoints import Checkpoints
from ..runs.config import as_config
from ..runs.progress_bar import Progress, stopping_at_interrupt
from ..tasks.task import Task
from ..validation import (
    check_count,
    check_network,
    check_part,
    check_positive,
    check_seed,
    freeze_lists,
)

WEIGHTS = "weights.safetensors"
COUNTS = ("shortest", "longest", "meta_steps", "validate_every")
"""What must be at least 1."""
LENGTHS = ("truncation", "validation_steps")
"""What must be at least 2: the first loss is before the learned optimizer has done anything."""
MOST = 10**9
"""Of these, and of ``curriculum``: two of them are counted in 32 bits."""
SAVE_SECONDS = 60.0
"""Between two checkpoints."""


class Method(eqx.Module):
    """A way to meta-train, with its tasks; a pytree, so that meta-steps are compiled whole."""

    @property
    @abstractmethod
    def tasks(self) -> Mapping[str, Task]:
        """All tasks, by what messages call their data."""

    @abstractmethod
    def start(self, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        """Fresh weights, and the inner problems at the start of their rollouts."""

    @abstractmethod
    def gradient(
        self, weights: PyTree, inner: PyTree, key: PRNGKeyArray, done: Array
    ) -> tuple[Float[Array, ""], PyTree, PyTree]:
        """The loss of the next pieces, the meta-gradient, and the inner problems after them."""

    @abstractmethod
    def validate(self, weights: PyTree, key: PRNGKeyArray) -> dict[str, np.ndarray]:
        """Columns of the curves; ``validation``, losses a step, chooses the weights that are
        kept, and others are called ``validation_NAME``."""

    @abstractmethod
    def save(self, path: Path, weights: PyTree, made: dict[str, str]) -> None:
        """Write the weights that are kept."""


@dataclass(frozen=True)
class MetaTraining(ABC):
    """What every meta-training run depends on."""

    name: str
    """What the learned optimizer is called."""
    figure: Annotated[str, tyro.conf.Suppress] = ""
    """Of the paper, as "fig11", if its records are about one."""
    truncation: int = 50
    """Optimizer steps of a piece."""
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
    """Units of each layer of the learned optimizer."""
    layers: int = 2
    """Of the learned optimizer."""
    validate_every: int = 100
    """Meta-steps between two validations."""
    validation_steps: int = 300
    """Optimizer steps of a validation."""
    select: bool = True
    """The weights kept are those with the lowest mean validation loss; otherwise the last whose
    validation is finite."""
    seed: int = 0

    __post_init__ = freeze_lists

    @abstractmethod
    def method(self) -> Method:
        """The method, with its tasks loaded."""

    def check(self) -> None:
        """Refuse what is out of range."""
        for name in COUNTS:
            check_count(name, getattr(self, name), most=MOST)
        for name in LENGTHS:
            check_count(name, getattr(self, name), least=2, most=MOST)
        check_network(self.hidden, self.layers)
        check_positive(rate=self.rate)
        if self.clip is not None:
            check_positive(clip=self.clip)
        check_part("b2", self.b2)
        check_count("curriculum", self.curriculum, least=0, most=MOST)
        check_seed(self.seed)
        if self.longest < self.shortest:
            raise ValueError(
                f"longest must be at least shortest, which is {self.shortest}, got {self.longest}"
            )

    def lengths(self, key: PRNGKeyArray, count: int, done: Array | int) -> Int[Array, " count"]:
        """Of rollouts that begin ``done`` meta-steps into training, in optimizer steps."""
        grown = jnp.minimum(1, (done + 1) / (self.curriculum + 1))
        low, high = jnp.log(self.shortest), jnp.log(self.longest)
        bounds = low, low + grown * (high - low)
        logs = jax.random.uniform(key, (count,), jnp.float32, *bounds)
        return jnp.ceil(jnp.exp(logs) / self.truncation - 1e-3).astype(jnp.int32) * self.truncation

    def optimizer_of_weights(self) -> optax.GradientTransformation:
        """Adam, with a clipped gradient if asked for; one that isn't finite is left out."""
        decayed = optax.cosine_decay_schedule(self.rate, self.meta_steps)
        adam = optax.adam(decayed if self.decay else self.rate, b2=self.b2)
        if self.clip is not None:
            adam = optax.chain(optax.clip_by_global_norm(self.clip), adam)
        return optax.apply_if_finite(adam, max_consecutive_errors=self.meta_steps)


class MetaState(NamedTuple):
    """Where meta-training stands."""

    weights: PyTree
    adam: PyTree
    inner: PyTree
    """The inner problems under way."""
    best: PyTree
    best_validation: Float[Array, ""]


def metatrain(config: MetaTraining, folder: Path, *, resume: bool = False) -> Path:
    """Meta-train a learned optimizer; returns the file of its weights.

    A meta-gradient that isn't finite, as of an optimizee that overflows, is left out.

    Leaves ``config.json``, ``manifest.json``, ``curves.parquet`` (columns ``meta_step``,
    ``meta_loss``, ``gradient_norm``, ``validation``: [validation_steps] mean losses a step, and
    ``validation_NAME`` on other tasks; at meta-step 0 it is validated alone) and
    ``weights.safetensors`` in the folder. It saves once a minute, before each validation, and when
    it is stopped by Ctrl-C or SIGTERM, which wait for the end of a validation. Then, or killed, it
    goes on with ``resume``, with the same result as without the stop; of one that is finished
    nothing is written again.

    Raises:
        ValueError: as ``hold_folder`` and ``start`` of ``runs/folder.py``, or if the config names a
            data set that does not exist or has a number out of range, or if every validation
            diverged.
    """
    config.check()
    with stopping_at_interrupt() as stopped:
        with noting_weights() as noted:
            method = config.method()
        for task in method.tasks.values():
            _trace_loss(task)
        if stopped():
            raise KeyboardInterrupt
        with run_folder.hold_folder(folder, as_config(config), resume=resume) as finished:
            if not finished:
                _metatrain(config, method, folder, noted, stopped)
        if not (folder / WEIGHTS).exists():
            raise ValueError(f"folder {folder} has lost its {WEIGHTS}: choose another --out")
        load_weights(folder / WEIGHTS)  # refuses damaged ones of an earlier call
    return folder / WEIGHTS


def _metatrain(
    config: MetaTraining,
    method: Method,
    folder: Path,
    weights: Mapping[str, str],
    stopped: Callable[[], bool],
) -> None:
    """All of it, and what it leaves; ``weights`` are the checksums of what it goes on from."""
    inputs = {name: task.dataset.checksum() for name, task in method.tasks.items()}
    notes = dict.fromkeys(task.dataset.note for task in method.tasks.values())
    made = run_folder.start(
        folder, data=", ".join(filter(None, notes)), inputs={**inputs, **weights}
    )
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS)
    state, table, seconds = _train_to_the_end(config, method, checkpoints, stopped)
    records.write_parquet(folder / records.CURVES, table)
    if not np.isfinite(state.best_validation):
        raise ValueError(f"no validation of {config.name} was finite: there are no weights to keep")
    made |= {"seconds": seconds, "best_validation": float(state.best_validation)}
    provenance = {
        "made": shown(" ".join(made["command"])),
        "commit": str(made["commit"]),
        "time": made["time"],
        "best_validation": f"{float(state.best_validation):.4f}",
    }
    method.save(folder / WEIGHTS, state.best, provenance)
    run_folder.finish(folder, made)


def _trace_loss(task: Task) -> None:
    """Nothing is computed, but whatever refuses its arguments does so before there is a folder."""
    jax.eval_shape(lambda key: task.objective(key)(task.init(key), 0), jax.random.key(0))


def _train_to_the_end(
    config: MetaTraining, method: Method, checkpoints: Checkpoints, stopped: Callable[[], bool]
) -> tuple[MetaState, pl.DataFrame, float]:
    """All meta-steps from the last checkpoint on: the state after them, the curves, the seconds."""
    start_key, train_key, validation_key = jax.random.split(jax.random.key(config.seed), 3)
    every = min(config.validate_every, config.meta_steps)
    weights, inner = method.start(start_key)
    adam = config.optimizer_of_weights().init(weights)
    state, table = MetaState(weights, adam, inner, weights, jnp.float32(jnp.inf)), pl.DataFrame()
    done, before = 0, jnp.float32(0)
    seen = np.zeros((2, every), np.float32)  # losses and gradient norms since the last validation
    if (found := checkpoints.latest((state, jnp.asarray(seen), before))) is not None:
        done, (state, seen, before), table = found
        seen = np.array(seen)
    first = "" if done else "compiling"

    def row(step: int, loss: float, norm: float, columns: Mapping[str, np.ndarray]) -> pl.DataFrame:
        losses = {name: column[None] for name, column in columns.items()}
        return pl.DataFrame({"meta_step": step, "meta_loss": loss, "gradient_norm": norm} | losses)

    with Progress(
        config.name, total=config.meta_steps, done=done, unit="meta-steps", first=first
    ) as progress:
        saved = 0.0
        if table.is_empty():
            table = row(0, np.nan, np.nan, method.validate(weights, validation_key))
        while (begun := (table.height - 1) * every) < config.meta_steps:  # up to it is validated
            steps, within = min(every, config.meta_steps - begun), done - begun
            if within == steps:
                columns = method.validate(state.weights, validation_key)
                mean = jnp.float32(columns["validation"].mean())
                if mean < state.best_validation if config.select else jnp.isfinite(mean):
                    state = state._replace(best=state.weights, best_validation=mean)
                means = seen[:, :steps].mean(axis=1).tolist()
                table = pl.concat([table, row(done, *means, columns)], how="vertical_relaxed")
                continue
            keys = jax.random.split(jax.random.fold_in(train_key, begun), steps)
            key = keys[jnp.int32(within)]  # by a plain one, each index is compiled
            state, loss, norm = _meta_step(config, method, state, key, jnp.int32(done))
            seen[:, within] = float(loss), float(norm)
            done += 1
            figures = {"meta-loss": float(loss)}
            if np.isfinite(state.best_validation):
                figures["best validation"] = float(state.best_validation)
            progress.advance(1, **figures)
            stop = stopped()
            if stop or within + 1 == steps or progress.seconds - saved > SAVE_SECONDS:
                saved = progress.seconds
                checkpoints.save(done, (state, jnp.asarray(seen), before + saved), table)
            if stop:
                raise KeyboardInterrupt
        checkpoints.save(done, (state, jnp.asarray(seen), before + progress.seconds), table)
        seconds = float(before) + progress.seconds
    return state, table, seconds


@eqx.filter_jit
def _meta_step(
    config: MetaTraining, method: Method, state: MetaState, key: PRNGKeyArray, done: Array
) -> tuple[MetaState, Float[Array, ""], Float[Array, ""]]:
    """One meta-step: the state after it, the loss, the norm of the meta-gradient."""
    loss, gradient, inner = method.gradient(state.weights, state.inner, key, done)
    updates, adam = config.optimizer_of_weights().update(gradient, state.adam, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    state = state._replace(weights=weights, adam=adam, inner=inner)
    return state, loss, optax.tree.norm(gradient)

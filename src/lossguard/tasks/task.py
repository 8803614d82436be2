"""A task is a data set and a model, composed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .dataset import Dataset, Split
from .goals import CLASSIFICATION, Goal, Scores
from .models import Model
from .shuffle import minibatch_indices


class Task(eqx.Module):
    """A data set, a model, and what is asked of it: classification unless ``goal`` says else.

    Raises:
        ValueError: if a label of a classification is no class.

    >>> from lossguard.tasks import MLP, spirals
    >>> task = Task(spirals(samples=1000), MLP())
    >>> params = task.init(jax.random.key(0))
    >>> objective = task.objective(jax.random.key(1))
    >>> objective(params, 0).shape
    ()
    """

    dataset: Dataset
    model: Model = eqx.field(static=True)
    batch_size: int = eqx.field(static=True, default=128)
    goal: Goal = eqx.field(static=True, default=CLASSIFICATION)

    def __check_init__(self) -> None:
        """A label that is no class would make losses NaN, or count from the last class."""
        classes = self.dataset.classes
        for name in ("train", "test") if self.goal is CLASSIFICATION else ():
            labels = getattr(self.dataset, name).labels
            if isinstance(labels, Tracer):
                continue
            if labels.ndim != 1 or np.dtype(labels.dtype).kind not in "iu":
                raise ValueError(
                    f"labels of {name} must be a row of integers, got {labels.dtype} of shape "
                    f"{labels.shape}"
                )
            numbers = np.asarray(labels)
            if not ((numbers >= 0) & (numbers < classes)).all():
                raise ValueError(
                    f"labels of {name} must be in 0 .. {classes - 1}, as there are {classes} "
                    f"classes, got {numbers.min()} to {numbers.max()}"
                )

    def init(self, key: PRNGKeyArray) -> PyTree[Float[Array, "..."]]:
        """Parameters, drawn as the model draws them."""
        return self.model.init(self.dataset.shape, self.goal.outputs(self.dataset), key)

    def objective(self, key: PRNGKeyArray) -> "TaskObjective":
        """The loss as a function of parameters and the number of a minibatch; the key shuffles."""
        return TaskObjective(self, key)

    def loss(self, params: PyTree, inputs: Array, labels: Int[Array, " batch"]) -> Float[Array, ""]:
        """The mean loss on a batch of inputs as they are stored."""
        return self._scores(params, inputs, labels)["loss"].mean()

    def evaluate(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Means of the goal's scores on the whole of both splits.

        Keys: ``train_loss``, ``test_loss``; of a classification also ``train_accuracy`` and
        ``test_accuracy``.
        """
        return {
            f"{name}_{key}": value
            for name, split in (("train", self.dataset.train), ("test", self.dataset.test))
            for key, value in self._evaluate(params, split).items()
        }

    @eqx.filter_jit
    def _evaluate(self, params: PyTree, split: Split) -> Scores:
        def one(sample: tuple[Array, Array]) -> Scores:
            inputs, label = sample
            scores = self._scores(params, inputs[None], label[None])
            return {name: values[0] for name, values in scores.items()}

        scores = jax.lax.map(one, (split.inputs, split.labels), batch_size=1000)
        return {name: values.mean() for name, values in scores.items()}

    def _scores(self, params: PyTree, inputs: Array, labels: Int[Array, " batch"]) -> Scores:
        scaled = self.dataset.normalize(inputs)
        scores = self.goal.scores(self.model.apply(params, scaled), scaled, labels)
        shapes = {name: jnp.shape(values) for name, values in scores.items()}
        if "loss" not in shapes or {*shapes.values()} != {(len(inputs),)}:
            raise ValueError(
                "scores of goal must have a loss, and all one number for each example, got "
                f"{shapes} of {len(inputs)}"
            )
        return scores


class TaskObjective(eqx.Module):
    """``objective(params, i)``: a task's loss on minibatch number i of the order that a key names.

    A pytree, so that many of them (one key each) are vmapped over. Two of them are equal only if
    they are the same object, like plain functions, so that ``jax.jit`` takes one as it is.
    """

    task: Task
    key: PRNGKeyArray

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __call__(self, params: PyTree, i: Int[Array, ""] | int) -> Float[Array, ""]:
        train = self.task.dataset.train
        rows = minibatch_indices(
            self.key, i, samples=train.labels.shape[0], batch_size=self.task.batch_size
        )
        return self.task.loss(params, train.inputs[rows], train.labels[rows])

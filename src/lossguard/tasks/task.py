"""A task is a data set and a model, composed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .dataset import Dataset, Split
from .models import Model
from .shuffle import minibatch_indices


class Task(eqx.Module):
    """Classification of a data set by a model: softmax, negative log-likelihood.

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

    def init(self, key: PRNGKeyArray) -> PyTree[Float[Array, "..."]]:
        """Parameters, drawn as PyTorch draws them by default."""
        return self.model.init(self.dataset.shape, self.dataset.classes, key)

    def objective(self, key: PRNGKeyArray) -> "TaskObjective":
        """The loss as a function of parameters and the number of a minibatch; the key shuffles."""
        return TaskObjective(self, key)

    def loss(
        self,
        params: PyTree,
        inputs: Array,
        labels: Int[Array, " batch"],
    ) -> Float[Array, ""]:
        """The mean loss on a batch of inputs as they are stored."""
        logits = self.model.apply(params, self.dataset.normalize(inputs))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def evaluate(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Mean loss and accuracy on the whole of both splits.

        Keys: ``train_loss``, ``train_accuracy``, ``test_loss``, ``test_accuracy``.
        """
        return {
            f"{name}_{key}": value
            for name, split in (("train", self.dataset.train), ("test", self.dataset.test))
            for key, value in self._evaluate(params, split).items()
        }

    @eqx.filter_jit
    def _evaluate(self, params: PyTree, split: Split) -> dict[str, Float[Array, ""]]:
        def one(sample: tuple[Array, Array]) -> tuple[Array, Array]:
            inputs, label = sample
            logits = self.model.apply(params, self.dataset.normalize(inputs)[None])[0]
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
            return loss, jnp.argmax(logits) == label

        loss, correct = jax.lax.map(one, (split.inputs, split.labels), batch_size=1000)
        return {"loss": loss.mean(), "accuracy": correct.mean()}


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

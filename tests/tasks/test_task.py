"""A task against NumPy: its loss, its minibatches, its evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

from lossguard.tasks import MLP, Dataset, Split, Task, TaskObjective, digits
from lossguard.tasks.goals import Goal
from lossguard.tasks.shuffle import minibatch_indices


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(digits(), MLP((20,)), batch_size=32)


@pytest.fixture(scope="module")
def params(task: Task) -> PyTree:
    return jax.tree.map(lambda leaf: 3 * leaf, task.init(jax.random.key(0)))


def in_numpy(task: Task, params: PyTree, inputs: Array, labels: Array) -> tuple[float, float]:
    """Mean loss and accuracy in float64."""
    x = np.asarray(inputs, np.float64)
    x = (x - np.asarray(task.dataset.offset, np.float64)) * np.asarray(task.dataset.scale)
    x = x.reshape(len(x), -1)
    first, last = ((np.asarray(layer.weight), np.asarray(layer.bias)) for layer in params)
    hidden = 1 / (1 + np.exp(-(x @ first[0].T + first[1])))
    logits = hidden @ last[0].T + last[1]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    return -log_p[rows, labels].mean(), np.mean(logits.argmax(axis=1) == np.asarray(labels))


def test_evaluate_equals_numpy(task: Task, params: PyTree) -> None:
    evaluation = task.evaluate(params)
    for name, split in (("train", task.dataset.train), ("test", task.dataset.test)):
        loss, accuracy = in_numpy(task, params, split.inputs, split.labels)
        assert float(evaluation[f"{name}_loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(evaluation[f"{name}_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert set(evaluation) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}


@pytest.mark.parametrize("i", [0, 1, 43, 44, 1_000_000])
def test_objective_is_the_loss_on_minibatch_i(task: Task, params: PyTree, i: int) -> None:
    key, train = jax.random.key(1), task.dataset.train
    rows = minibatch_indices(key, i, samples=len(train.labels), batch_size=32)
    expected, _ = in_numpy(task, params, train.inputs[rows], train.labels[rows])
    assert float(task.objective(key)(params, i)) == pytest.approx(expected, rel=1e-5)


def test_keys_shuffle_differently_and_vmap(task: Task, params: PyTree) -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    each = jnp.stack([task.objective(key)(params, 7) for key in keys])
    assert len(np.unique(each)) == 4
    many = TaskObjective(task, keys)
    axes = TaskObjective(task=None, key=0)  # pyright: ignore
    together = jax.vmap(lambda objective: objective(params, 7), in_axes=(axes,))(many)
    np.testing.assert_allclose(together, each, rtol=1e-6)


def test_two_objectives_compile_apart(task: Task, params: PyTree) -> None:
    one, other = (task.objective(jax.random.key(k)) for k in (6, 7))
    for objective in (one, other, task.objective(jax.random.key(6))):
        np.testing.assert_allclose(jax.jit(objective)(params, 3), objective(params, 3), rtol=1e-5)
    assert one != other and len({one, other}) == 2


def test_init_is_a_pure_function_of_the_key(task: Task) -> None:
    made = (task.init(jax.random.key(k)) for k in (0, 0, 1))
    for x, y, z in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).all()


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([-1, 1], "in 0 .. 1, as there are 2 classes, got -1 to 1$"),
        ([1, 2], "in 0 .. 1, as there are 2 classes, got 1 to 2$"),
        ([True, False], "a row of integers, got bool of shape"),
        ([0.0, 1.0], "a row of integers, got float32 of shape"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list, reason: str, name: str) -> None:
    x = jnp.zeros((2, 3))
    right, wrong = Split(x, jnp.array([0, 1])), Split(x, jnp.asarray(labels))
    splits = {"train": right, "test": right, name: wrong}
    data = Dataset(**splits, offset=jnp.zeros(()), scale=jnp.ones(()), name="mine", classes=2)
    with pytest.raises(ValueError, match=f"^labels of {name} must be {reason}"):
        Task(data, MLP((4,)))


@pytest.mark.parametrize(
    "scores",
    [
        lambda outputs, inputs, labels: {"error": outputs.sum(axis=1)},
        lambda outputs, inputs, labels: {"loss": outputs.sum()},
        lambda outputs, inputs, labels: {"loss": outputs.sum(axis=1), "more": outputs},
    ],
)
def test_scores_of_ones_own_goal_have_a_loss_and_a_number_for_each_example(scores) -> None:
    split = Split(np.zeros((8, 2), np.float32), np.arange(8) % 2)
    data = Dataset(split, split, 0.0, 1.0, name="mine", classes=2)
    task = Task(data, MLP(hidden=(3,)), batch_size=4, goal=Goal(lambda _: 3, scores))
    with pytest.raises(ValueError, match=r"^scores of goal must have a loss, and all one number"):
        task.objective(jax.random.key(0))(task.init(jax.random.key(1)), 0)

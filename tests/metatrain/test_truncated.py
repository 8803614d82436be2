"""The truncated meta-gradient against PyTorch's autograd, and what happens between two pieces."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

from lossguard import LSTMWeights, init_lstm_weights, lstm_optimizer
from lossguard.metatrain.truncated import Optimizees, meta_gradient, restart_finished, start
from lossguard.tasks import MLP, Task, digits
from lossguard.tasks.shuffle import minibatch_indices

torch = pytest.importorskip("torch")

K, STEPS, HIDDEN = 3, 6, 5


class Setting(NamedTuple):
    task: Task
    weights: LSTMWeights
    optimizees: Optimizees


@pytest.fixture(scope="module")
def setting() -> Setting:
    task = Task(digits(), MLP((4,)), batch_size=16)
    weights = init_lstm_weights(jax.random.key(0), hidden=HIDDEN)
    weights = jax.tree.map(lambda leaf: 1.5 * leaf, weights)
    optimizees = at_the_start(task, weights, seed=1, length=jnp.full(K, 100))
    return Setting(task, weights, optimizees)


def at_the_start(task: Task, weights: LSTMWeights, *, seed: int, length: Array) -> Optimizees:
    keys = jax.random.split(jax.random.key(seed), K)
    params = jax.vmap(task.init)(keys)
    state = lstm_optimizer(weights).init(params)
    return Optimizees(params, state, keys, jnp.zeros_like(length), length)


@pytest.fixture(scope="module")
def piece(setting: Setting) -> tuple[Array, LSTMWeights, Optimizees]:
    return a_piece(*setting)


@eqx.filter_jit
def a_piece(
    task: Task, weights: LSTMWeights, optimizees: Optimizees
) -> tuple[Array, LSTMWeights, Optimizees]:
    return meta_gradient(lstm_optimizer, task, weights, optimizees, STEPS)


@jax.jit
def rows_of(key: Array, i: Array) -> Array:
    """Of minibatch i of digits."""
    return minibatch_indices(key, i, samples=1437, batch_size=16)


def number(optimizees: Optimizees, k: int) -> PyTree:
    """Parameters, shuffling key and step of one optimizee."""
    return jax.tree.map(lambda leaf: leaf[k], (optimizees.params, optimizees.key, optimizees.step))


def in_torch(setting: Setting, pieces: int) -> tuple[np.ndarray, list[Any]]:
    """The losses [pieces * STEPS, K], and the gradients of the mean loss of the last piece.

    Coordinates first and nn.LSTM, one optimizee after another. Parameters and memory are detached
    between two pieces, optimizee gradients always.
    """
    task, weights, optimizees = setting
    lstm, linear = torch.nn.LSTM(2, HIDDEN, 2), torch.nn.Linear(HIDDEN, 1)
    learned = [*lstm.parameters(), *linear.parameters()]
    for tensor, array in zip(learned, jax.tree.leaves(weights), strict=True):
        tensor.data = torch.from_numpy(np.array(array))

    def loss_of(params: list[Any], rows: Array) -> Any:
        data = task.dataset
        x = torch.from_numpy(np.array(data.normalize(data.train.inputs[rows]))).flatten(1)
        labels = torch.from_numpy(np.array(data.train.labels[rows])).long()
        hidden = torch.sigmoid(torch.nn.functional.linear(x, *params[:2]))
        logits = torch.nn.functional.linear(hidden, *params[2:])
        return torch.nn.functional.cross_entropy(logits, labels)

    losses = torch.zeros(pieces * STEPS, K)
    for k in range(K):
        params, key, _ = number(optimizees, k)
        params = [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(params)]
        memory = None
        for t in range(pieces * STEPS):
            if t % STEPS == 0:
                params = [p.detach() for p in params]
                memory = None if memory is None else tuple(m.detach() for m in memory)
            rows = rows_of(key, t)
            losses[t, k] = loss_of(params, rows)
            at = [p.detach().requires_grad_() for p in params]
            gradients = torch.autograd.grad(loss_of(at, rows), at)
            g = torch.cat([gradient.flatten() for gradient in gradients])
            small = g.abs() < np.exp(-10)
            features = torch.stack(
                [
                    torch.where(small, -1.0, g.abs().clamp(min=1e-30).log() / 10),
                    torch.where(small, np.exp(10) * g, g.sign()),
                ],
                dim=1,
            )
            output, memory = lstm(features[None], memory)
            updates = (0.1 * linear(output)[0, :, 0]).split([p.numel() for p in params])
            params = [p + u.view_as(p) for p, u in zip(params, updates, strict=True)]
    last = losses[-STEPS:].mean()
    return losses.detach().numpy(), [g.numpy() for g in torch.autograd.grad(last, learned)]


def test_equals_torch_over_two_pieces(setting, piece) -> None:
    losses, first, after = piece
    more, second, _ = a_piece(setting.task, setting.weights, after)
    for pieces, ours, gradient in ((1, losses, first), (2, more, second)):
        theirs, expected = in_torch(setting, pieces)
        np.testing.assert_allclose(ours, theirs[-STEPS:], rtol=1e-4)
        for mine, other in zip(jax.tree.leaves(gradient), expected, strict=True):
            np.testing.assert_allclose(mine, other, rtol=2e-3, atol=2e-6)
            assert np.abs(other).max() > 1e-4


@pytest.mark.parametrize("step", [20, 25])
def test_restart_replaces_what_is_over_or_lost_and_nothing_else(setting, step) -> None:
    task, weights, optimizees = setting
    params, state = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan), (optimizees.params, optimizees.state)
    )
    steps, length = jnp.array([10, step, 10]), jnp.array([20, 20, 20])
    under_way = optimizees._replace(params=params, state=state, step=steps, length=length)
    fresh = at_the_start(task, weights, seed=7, length=jnp.array([30, 40, 50]))
    after = restart_finished(under_way, fresh, jnp.array([False, False, True]))

    assert after.step.tolist() == [10, 0, 0]
    assert after.length.tolist() == [20, 40, 50]
    for k, source in enumerate((under_way, fresh, fresh)):
        for ours, theirs in zip(
            jax.tree.leaves(number(after, k)[0]), jax.tree.leaves(number(source, k)[0]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert after.key[k] == source.key[k]
    # The memory of a coordinate goes with its optimizee: NaN where it is under way, 0 where fresh.
    _, unravel = jax.flatten_util.ravel_pytree(after.params)
    for memory in jax.tree.leaves(after.state):
        for row in memory:
            for leaf in jax.tree.leaves(unravel(row)):
                assert jnp.isnan(leaf[0]).all() and not leaf[1:].any()


def test_start_draws_every_optimizee_anew(setting: Setting) -> None:
    keys = jax.random.split(jax.random.key(1), K)
    optimizees = start(setting.task, lstm_optimizer(setting.weights), keys, jnp.full(K, 100))
    weight = optimizees.params[0].weight
    assert not jnp.isclose(weight[0], weight[1]).any()
    assert len({str(jax.random.key_data(key)) for key in optimizees.key}) == K
    assert all(not leaf.any() for leaf in jax.tree.leaves(optimizees.state))

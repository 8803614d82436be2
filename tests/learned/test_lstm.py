"""The LSTM optimizer against PyTorch's LSTM, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float
from safetensors.torch import load_file

from lossguard import init_lstm_weights, init_mlp_weights, lstm_optimizer, save_weights
from lossguard.learned.lstm import LSTMState, LSTMWeights, log_and_sign

torch = pytest.importorskip("torch")


def updates_of(
    optimizer: optax.GradientTransformation, gradients: Float[Array, "steps n"]
) -> tuple[Float[Array, "steps n"], LSTMState]:
    def step(state: LSTMState, gradient: Array) -> tuple[LSTMState, Array]:
        update, state = optimizer.update(gradient, state)
        return state, update

    state, updates = jax.lax.scan(step, optimizer.init(gradients[0]), gradients)
    return updates, state


class InTorch(torch.nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(2, hidden, layers)
        self.linear = torch.nn.Linear(hidden, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lstm(features)[0])[..., 0]


@pytest.mark.parametrize(("hidden", "layers", "p"), [(20, 2, 10.0), (6, 1, 7.0), (8, 3, 10.0)])
def test_equals_torch_with_the_saved_weights(tmp_path, gradients, hidden, layers, p) -> None:
    weights = init_lstm_weights(jax.random.key(1), hidden=hidden, layers=layers)
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights, p=p, scale=0.1, made={})
    module = InTorch(hidden, layers)
    module.load_state_dict(load_file(path))  # strict: the names and shapes are PyTorch's

    features = np.stack([log_and_sign(gradient, p).T for gradient in gradients])  # [steps, n, 2]
    with torch.no_grad():
        theirs = 0.1 * module(torch.from_numpy(features)).numpy()
    ours, _ = updates_of(lstm_optimizer(weights, scale=0.1, p=p), gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_weights_begin_as_torch_draws_them() -> None:
    ours = init_lstm_weights(jax.random.key(0))
    module = InTorch(20, 2)
    for array, tensor in (
        (ours.layers[0].weight_ih, module.lstm.weight_ih_l0),
        (ours.layers[1].weight_ih, module.lstm.weight_ih_l1),
        (ours.layers[1].weight_hh, module.lstm.weight_hh_l1),
        (ours.layers[0].bias_hh, module.lstm.bias_hh_l0),
        (ours.linear_weight, module.linear.weight),
        (ours.linear_bias, module.linear.bias),
    ):
        assert array.shape == tuple(tensor.shape)
        assert jnp.abs(array).max() <= 20**-0.5
        assert tensor.abs().max() <= 20**-0.5
    everything = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ours.layers)])
    assert everything.std() == pytest.approx(20**-0.5 / 3**0.5, rel=0.03)


def test_weights_are_drawn_apart() -> None:
    """Of a layer and of all layers."""
    leaves = jax.tree.leaves(init_lstm_weights(jax.random.key(0), hidden=2, layers=3))
    for number, leaf in enumerate(leaves):
        for other in leaves[:number]:
            if leaf.shape == other.shape:
                assert not jnp.isclose(leaf, other).any()


def test_keeps_shapes_and_dtypes_of_a_pytree(weights: LSTMWeights) -> None:
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": (jnp.ones(()), jnp.ones(4))}
    optimizer = lstm_optimizer(weights)
    updates, state = optimizer.update(params, optimizer.init(params))
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    assert state.h[0].shape == state.c[1].shape == (20, 11)


def test_is_vmapped_over_weights_and_states(gradients: Array) -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    many = jax.vmap(init_lstm_weights)(keys)

    def run(weights: LSTMWeights) -> Array:
        return updates_of(lstm_optimizer(weights), gradients[:20])[0]

    each = jnp.stack([run(init_lstm_weights(key)) for key in keys])
    np.testing.assert_allclose(jax.vmap(run)(many), each, rtol=1e-4, atol=1e-6)


def test_state_shows_a_gradient_that_is_not_finite(weights: LSTMWeights) -> None:
    optimizer = lstm_optimizer(weights)
    gradient = jnp.array([1.0, jnp.nan, 1.0])
    update, state = optimizer.update(gradient, optimizer.init(gradient))
    assert jnp.isfinite(update).tolist() == [True, False, True]
    assert not jnp.isfinite(state.h[0][:, 1]).any()
    assert jnp.isfinite(state.h[0][:, ::2]).all()


def test_numbers_are_positive_and_p_is_one_of_which_float32_has_the_exponential(weights) -> None:
    with pytest.raises(ValueError, match=r"^scale must be positive and finite, got 0\.0$"):
        lstm_optimizer(weights, scale=0.0)
    for p in (0.0, 80.1):
        with pytest.raises(ValueError, match=rf"^p must be above 0 and at most 80, got {p}$"):
            lstm_optimizer(weights, p=p)
    assert jnp.isfinite(log_and_sign(jnp.array([0.0, 1e-3]), 80.0)).all()
    assert float(log_and_sign(jnp.array([1e-35]), 80.0)[1, 0]) == pytest.approx(5.54e-1, rel=1e-2)


@pytest.mark.usefixtures("x64")
def test_weights_are_in_float32_where_others_are_in_float64() -> None:
    for weights in (init_lstm_weights(jax.random.key(0)), init_mlp_weights(jax.random.key(0))):
        assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}


def test_complex_parameters_are_refused(weights: LSTMWeights) -> None:
    with pytest.raises(ValueError, match=r"^params must be real for lstm_optimizer, got complex"):
        lstm_optimizer(weights).init(jnp.ones(2, jnp.complex64))

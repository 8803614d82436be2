"""The MLP optimizer against its equations in NumPy, step by step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mlp_reference
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float, PyTree

from lossguard import (
    MLPWeights,
    init_mlp_weights,
    load_weights,
    lstm_optimizer,
    mlp_optimizer,
    pretrained_path,
    recommended,
    rollout,
)
from lossguard.learned.mlp import MLPLayer, SchedulerWeights

STEPS = 12
SHAPES = [(), (1,), (7,), (5, 3), (3, 5), (4, 4), (1, 6), (3, 3, 4, 8), (6, 2, 3), (50, 2)]


@pytest.fixture(scope="session")
def mlp_weights() -> MLPWeights:
    """Of outputs that are large enough to be seen, with biases, moved decays and large powers."""
    weights = init_mlp_weights(jax.random.key(0))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.02 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    moved = tree.unflatten([w + n for w, n in zip(leaves, noise, strict=True)])
    scheduler = [2 * jax.random.normal(k, w.shape) for k, w in zip(keys, moved.scheduler)]  # noqa: B905
    return moved._replace(
        scaling=jnp.array([0.3, -0.3, -0.5, 0.4, -2.0, 3.0, -5.0]),
        scheduler=SchedulerWeights(*scheduler),
    )


def random_gradients(shape: tuple[int, ...], size: float = 1.0) -> Float[Array, "steps ..."]:
    """Of sizes that differ between coordinates, some always zero."""
    rng = np.random.default_rng(len(shape))
    scale = np.exp(rng.uniform(-6, 1, shape)) * rng.choice([0, 1, 1, 1], shape)
    return jnp.asarray(size * scale * rng.normal(0.3, 1, (STEPS, *shape)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def updates_of(
    optimizer: optax.GradientTransformation, params: PyTree, gradients: PyTree
) -> tuple[PyTree, PyTree]:
    """The updates, [steps, ...], and the state after them."""

    def step(carry: tuple[PyTree, Any], gradient: PyTree) -> tuple[Any, PyTree]:
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (_, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), gradients)
    return updates, state


def assert_equal(weights: MLPWeights, params: list[np.ndarray], *sizes: float) -> None:
    """Each update of each tensor is that of the equations, under gradients of these sizes."""
    optimizer = mlp_optimizer(weights)
    for size in sizes:
        gradients = [random_gradients(p.shape, size) for p in params]
        ours, _ = updates_of(optimizer, jax.tree.map(jnp.float32, params), gradients)
        for p, of_tensor, updates in zip(params, gradients, ours, strict=True):
            memory = mlp_reference.start(p)
            for gradient, update in zip(np.asarray(of_tensor), updates, strict=True):
                expected, memory = mlp_reference.step(weights, memory, gradient, p)
                p = p + expected
                np.testing.assert_allclose(update, expected, rtol=2e-4, atol=1e-7)


def test_equals_the_equations(mlp_weights: MLPWeights) -> None:
    params = [np.asarray(np.random.default_rng(0).normal(size=shape)) for shape in SHAPES]
    assert_equal(mlp_weights, params, 1e-4, 1.0, 100.0)


@pytest.mark.parametrize(("hidden", "layers"), [(7, 1), (3, 3)])
def test_equals_the_equations_with_other_sizes(hidden: int, layers: int) -> None:
    weights = init_mlp_weights(jax.random.key(4), hidden=hidden, layers=layers)
    assert_equal(weights, [np.ones((4, 3))], 1.0)


def test_equals_the_published_code() -> None:
    """Numbers of ``AdafacMLPLOpt`` in google/learned_optimization, after ten steps from zero."""

    def cosines(shape: tuple[int, ...], start: float) -> np.ndarray:
        return np.cos(start + np.arange(np.prod(shape))).reshape(shape)

    layers = [
        MLPLayer(
            jnp.float32(cosines((outputs, inputs), k) / inputs**0.5),
            jnp.float32(cosines((outputs,), k + 5) / 2),
        )
        for k, (inputs, outputs) in enumerate(((39, 4), (4, 4), (4, 2)))
    ]
    fresh = init_mlp_weights(jax.random.key(0))
    moved = jnp.array([0.01, -0.02, 0.015])
    weights = MLPWeights(
        tuple(layers),
        fresh.momentum_decays + moved,
        fresh.second_moment_decay + 0.02,
        fresh.factored_decays - moved,
        jnp.zeros(7),
        fresh.scheduler,
    )
    gradients = {
        "w": jnp.stack([jnp.float32(cosines((2, 3), 3 * t)) for t in range(10)]),
        "b": jnp.stack([jnp.float32(cosines((2,), 2 * t)) for t in range(10)]),
    }
    params = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    updates, _ = updates_of(mlp_optimizer(weights), params, gradients)
    expected = {
        "w": [[-4.136198e-4, -8.252643e-5, 1.497276e-3], [1.368930e-3, 8.142916e-4, -2.895257e-4]],
        "b": [-1.810640e-4, 8.659458e-4],
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(updates[name].sum(0), numbers, rtol=1e-4, atol=1e-8)


def test_fresh_weights() -> None:
    weights = init_mlp_weights(jax.random.key(0), hidden=64)
    for layer, inputs in zip(weights.layers, (39, 64, 64), strict=True):
        assert layer.weight.shape[1] == inputs and not layer.bias.any()
        assert jnp.abs(layer.weight).max() <= 2 / inputs**0.5
    # a normal distribution that is cut at two deviations has a deviation of 0.88
    assert weights.layers[0].weight.std() == pytest.approx(0.88 / 39**0.5, rel=0.05)
    for stored, decays in (
        (weights.momentum_decays, (0.9, 0.99, 0.999)),
        (weights.second_moment_decay, (0.999,)),
        (weights.factored_decays, (0.9, 0.99, 0.999)),
    ):
        np.testing.assert_allclose(1 - np.exp(10 * np.asarray(stored)), decays, rtol=1e-5)


def test_keeps_shapes_and_dtypes_of_a_pytree(mlp_weights: MLPWeights) -> None:
    params = {
        "w": jnp.ones((3, 2), jnp.bfloat16),
        "b": (jnp.ones(()), jnp.ones(4, jnp.float16), None, jnp.ones((0, 3))),
    }
    optimizer = mlp_optimizer(mlp_weights)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    rows, columns = state.tensors.rows[0], state.tensors.columns[0]
    assert rows["w"].shape == (1, 2) and columns["w"].shape == (3, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.tensors)} == {jnp.dtype(jnp.float32)}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("shape", "memory"), [((30, 20), 16 * 600 + 12 * 50 + 32), ((7,), 28 * 7 + 32)]
)
def test_memory_is_what_the_docstring_says(shape: tuple[int, ...], memory: int) -> None:
    state = mlp_optimizer(init_mlp_weights(jax.random.key(0))).init(jnp.ones(shape))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.tensors)) == memory


def test_is_vmapped_and_differentiated_over_weights() -> None:
    gradients = random_gradients((4, 3))
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def moved(weights: MLPWeights) -> Array:
        updates, _ = updates_of(mlp_optimizer(weights), jnp.ones((4, 3)), gradients)
        return updates.sum(0)

    each = jnp.stack([moved(init_mlp_weights(key)) for key in keys])
    many = jax.jit(jax.vmap(moved))(jax.vmap(init_mlp_weights)(keys))
    np.testing.assert_allclose(many, each, rtol=1e-3, atol=1e-7)

    def total(weights: MLPWeights) -> Array:
        return (moved(weights) ** 2).sum()

    weights = init_mlp_weights(keys[0])
    slopes = jax.jit(jax.grad(total))(weights)
    assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
    small = 1e-3
    for name in ("momentum_decays", "second_moment_decay", "factored_decays", "scaling"):
        up, down = (
            weights._replace(**{name: getattr(weights, name) + sign * small}) for sign in (1, -1)
        )
        slope = (total(up) - total(down)) / (2 * small)
        assert getattr(slopes, name).sum() == pytest.approx(float(slope), rel=0.05)


def test_an_empty_array_changes_nothing() -> None:
    p, weights = jnp.ones((4, 3)), init_mlp_weights(jax.random.key(0), hidden=2, layers=1)

    def moved(weights: MLPWeights, params: PyTree) -> Array:
        optimizer = mlp_optimizer(weights)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return updates["p"].sum()

    with jax.debug_nans():
        slopes, expected = (
            jax.jit(jax.grad(moved))(weights, {"p": p, **more})
            for more in ({"none": jnp.zeros((0, 3))}, {})
        )
    for ours, theirs in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_stored_decay_above_zero_counts_as_zero() -> None:
    weights = init_mlp_weights(jax.random.key(0))
    above = weights._replace(momentum_decays=jnp.full(3, 0.1))
    at = weights._replace(momentum_decays=jnp.zeros(3))
    p, gradients = jnp.ones((4, 3)), random_gradients((4, 3))
    ours, state = updates_of(mlp_optimizer(above), p, gradients)
    np.testing.assert_array_equal(ours, updates_of(mlp_optimizer(at), p, gradients)[0])
    np.testing.assert_array_equal(state.tensors.momenta[0], gradients[-1])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_shows(mlp_weights: MLPWeights, bad: float) -> None:
    optimizer = mlp_optimizer(mlp_weights)
    params = {"w": jnp.ones((3, 2)), "v": jnp.ones(2)}
    gradients = {"w": jnp.ones((3, 2)).at[1, 1].set(bad), "v": jnp.ones(2)}
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert jnp.isnan(updates["w"][1, 1]) and jnp.isfinite(updates["v"]).all()
    finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), state.tensors)
    assert not finite.momenta[0]["w"] and not finite.second_moment["w"]
    assert finite.momenta[0]["v"] and finite.second_moment["v"]


def test_a_zero_tensor_has_a_derivative(mlp_weights: MLPWeights) -> None:
    """As biases are at first, and momenta."""
    optimizer = mlp_optimizer(mlp_weights)

    def moved(slope: Array) -> Array:
        w, state = jnp.zeros(3), optimizer.init(jnp.zeros(3))
        for _ in range(2):
            updates, state = optimizer.update(slope * jnp.array([0.0, 1.0, 2.0]), state, w)
            w = optax.apply_updates(w, updates)
        return w

    for slope in (0.0, 1.0):
        _, derivative = jax.jvp(moved, (jnp.float32(slope),), (jnp.float32(1),))
        assert jnp.isfinite(derivative).all()


def test_an_equinox_model_may_be_the_params(mlp_weights: MLPWeights) -> None:
    """As with optax: what has no gradient may be anything."""
    optimizer = mlp_optimizer(mlp_weights)
    gradients = {"w": jnp.ones((3, 2)), "activation": None}
    params = gradients | {"activation": jax.nn.relu}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), params)
    expected, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert updates["activation"] is None
    np.testing.assert_array_equal(updates["w"], expected["w"])


def test_its_steps_in_flax_are_its_own(mlp_weights: MLPWeights) -> None:
    """``nnx.Optimizer`` makes its own containers of all that is within a tree of parameters."""
    nnx = pytest.importorskip("flax.nnx")
    optimizer, x = mlp_optimizer(mlp_weights), jnp.cos(jnp.arange(32.0)).reshape(8, 4)
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    w, b = model.kernel[...], model.bias[...]
    state, inside = optimizer.init((w, b)), nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    for _ in range(4):
        inside.update(model, nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model))
        gradients = jax.grad(lambda p: jnp.mean((x @ p[0] + p[1] - 1) ** 2))((w, b))
        updates, state = optimizer.update(gradients, state, (w, b))
        w, b = optax.apply_updates((w, b), updates)
        np.testing.assert_allclose(model.kernel[...], w, rtol=1e-5)
        np.testing.assert_allclose(model.bias[...], b, rtol=1e-5)


def test_what_it_refuses(mlp_weights: MLPWeights) -> None:
    optimizer = mlp_optimizer(mlp_weights)
    with pytest.raises(ValueError, match=r"^params must be real for mlp_optimizer, got complex"):
        optimizer.init(jnp.ones(2, jnp.complex64))
    reason = r"^params must be given to the update of mlp_optimizer, got None$"
    with pytest.raises(ValueError, match=reason):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
    for name in ("hidden", "layers"):
        with pytest.raises(ValueError, match=rf"^{name} must be an integer of at least 1, got 0$"):
            init_mlp_weights(jax.random.key(0), **{name: 0})


def test_in_a_guard_its_clock_is_that_of_the_run(mlp_weights: MLPWeights) -> None:
    """It loses its trials, and runs in two of twenty cycles."""
    guard = recommended(mlp_optimizer(mlp_weights), optax.sgd(0.1))
    state, decisions = rollout(guard, guard.init(jnp.ones(3)), lambda w, i: w @ w, cycles=20)
    assert decisions.learned_updates.sum() == 20
    assert state.inner.relay.y.state.clock.count == state.steps == 200


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [mlp_optimizer, lstm_optimizer])
def test_names_and_files_are_no_weights(make) -> None:
    for wrong in ("mlp-small", load_weights(pretrained_path("mlp-small"))):
        with pytest.raises(ValueError, match=r"^weights must be an (MLP|LSTM)Weights such as load"):
            make(wrong)

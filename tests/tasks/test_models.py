"""The optimizees against PyTorch's: values, gradients, initialization; and the convolutions."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy import stats

from lossguard.tasks.models import MLP, ConvNet, Model, convolve, convolve_lax, convolve_patches

torch = pytest.importorskip("torch")

CONVNET3 = ConvNet()
CONVNET5 = ConvNet((8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1))


def in_torch(model: Model, params: Any, shape: tuple[int, ...]) -> Any:
    """The same network, holding the same weights, for inputs [batch, channels, height, width]."""
    modules: list[Any] = []
    for layer in params:
        if isinstance(layer, eqx.nn.Conv2d):
            made = torch.nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
            )
            modules += [made, torch.nn.ReLU()]
            bias = layer.bias.ravel()
        else:
            made = torch.nn.Linear(layer.in_features, layer.out_features)
            if isinstance(model, ConvNet):
                modules.append(torch.nn.Flatten())
            modules += [made, torch.nn.Sigmoid()]
            bias = layer.bias
        made.weight.data = torch.from_numpy(np.array(layer.weight))
        made.bias.data = torch.from_numpy(np.array(bias))
    if isinstance(model, ConvNet):
        # PyTorch flattens channels first, and we channels last.
        channels = model.channels[-1]
        side = round((params[-1].in_features / channels) ** 0.5)
        weight = np.array(params[-1].weight).reshape(-1, side, side, channels)
        modules[-2].weight.data = torch.from_numpy(
            np.ascontiguousarray(weight.transpose(0, 3, 1, 2)).reshape(len(weight), -1)
        )
    return torch.nn.Sequential(*modules[:-1])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (MLP(), (28, 28, 1)),
        (MLP((7, 5)), (2,)),
        (MLP(()), (3, 3, 2)),
        (CONVNET3, (28, 28, 1)),
        (CONVNET3, (32, 32, 3)),
        (CONVNET5, (32, 32, 3)),
    ],
    ids=str,
)
def test_equals_torch(model: Model, shape: tuple[int, ...]) -> None:
    params = model.init(shape, 10, jax.random.key(0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, *shape)).astype(np.float32)
    weights = rng.normal(size=(8, 10)).astype(np.float32)

    network = in_torch(model, params, shape)
    x_torch = torch.from_numpy(x if isinstance(model, MLP) else x.transpose(0, 3, 1, 2).copy())
    logits = network(x_torch.flatten(1) if isinstance(model, MLP) else x_torch)
    (logits * torch.from_numpy(weights)).sum().backward()

    def loss(params: Any) -> tuple[Array, Array]:
        ours = model.apply(params, jnp.asarray(x))
        return jnp.sum(ours * weights), ours

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(ours, logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    first, layer = gradient[0], network[0]
    np.testing.assert_allclose(first.weight, layer.weight.grad.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(first.bias.ravel(), layer.bias.grad.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "shape"), [(MLP(), (28, 28, 1)), (CONVNET3, (32, 32, 3)), (CONVNET5, (32, 32, 3))]
)
def test_begins_as_torch_does(model: Model, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    params = model.init(shape, 10, jax.random.key(0))
    layers = [m for m in in_torch(model, params, shape) if hasattr(m, "weight")]
    for ours, theirs in zip(params, layers, strict=True):
        theirs.reset_parameters()
        fan_in = np.prod(ours.weight.shape[1:])
        for array, tensor in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            both = np.asarray(array).ravel(), tensor.detach().numpy().ravel()
            assert both[0].size == both[1].size
            for values in both:
                assert np.abs(values).max() <= fan_in**-0.5
            assert stats.ks_2samp(*both).pvalue > 1e-3


@pytest.mark.parametrize(
    ("model", "shape"), [(MLP((5, 5)), (5,)), (ConvNet((3, 3), (1, 1), (1, 1)), (4, 4, 3))], ids=str
)
def test_layers_of_a_size_are_drawn_apart(model: Model, shape: tuple[int, ...]) -> None:
    first, second, _ = model.init(shape, 10, jax.random.key(0))
    for ours, theirs in ((first.weight, second.weight), (first.bias, second.bias)):
        assert ours.shape == theirs.shape and not jnp.isclose(ours, theirs).any()


@pytest.mark.parametrize("shape", [(28, 40, 1), (40, 28, 1)])
def test_images_may_be_wider_or_higher(shape: tuple[int, ...]) -> None:
    params = CONVNET3.init(shape, 10, jax.random.key(0))
    assert CONVNET3.apply(params, jnp.ones((2, *shape))).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        *(
            (model, (8, 8, 1), f"each of {name} must be an integer of at least 1, got {value}")
            for model, name, value in (
                (MLP((5, 0)), "hidden", 0),
                (MLP((-1,)), "hidden", -1),
                (ConvNet((8,), (3,), (0,)), "strides", 0),
                (ConvNet((8,), (-3,), (1,)), "kernels", -3),
                (ConvNet((0,), (3,), (1,)), "channels", 0),
            )
        ),
        (ConvNet((8,)), (8, 8, 1), "channels, kernels and strides must be equally many, got .*"),
        (ConvNet(), (2,), r"inputs .* must be \[height, width, channels\], got \(2,\)"),
        (ConvNet(), (8, 8, 1), r"inputs of shape \(8, 8, 1\) are too small for ConvNet.*"),
    ],
)
def test_bad_fields_are_refused(model: Model, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        model.init(shape, 10, jax.random.key(0))


@pytest.mark.parametrize(
    ("height", "width", "inputs", "outputs", "kernel", "stride"),
    [
        (32, 32, 3, 8, 5, 2),  # the paper's
        (14, 14, 8, 16, 3, 2),
        (2, 2, 32, 64, 1, 1),
        (7, 12, 2, 3, 4, 3),
        (9, 5, 1, 4, 2, 3),
        (5, 8, 3, 2, 5, 1),
        (6, 6, 2, 1, 1, 2),
        (10, 11, 4, 5, 3, 1),
        (11, 7, 2, 2, 2, 4),
    ],
)
def test_patches_equal_lax(height, width, inputs, outputs, kernel, stride) -> None:
    """Values and both gradients."""
    rng = np.random.default_rng(0)
    x, w, direction = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (
            (3, height, width, inputs),
            (outputs, inputs, kernel, kernel),
            (3, (height - kernel) // stride + 1, (width - kernel) // stride + 1, outputs),
        )
    )

    @jax.jit
    def all_of_both(x: Array, w: Array, direction: Array) -> list[tuple[Array, ...]]:
        made = []
        for run in (convolve_patches, convolve_lax):
            values, pull = jax.vjp(lambda x, w, run=run: run(x, w, stride), x, w)
            made.append((values, *pull(direction)))
        return made

    for ours, theirs in zip(*all_of_both(x, w, direction), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-4)


def test_convolve_has_second_derivatives_and_is_vmapped() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 2, 7, 7, 2)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(2, 3, 2, 3, 3)), jnp.float32)

    def curvature(run: Any, x: Array, w: Array) -> Array:
        def slope(x: Array) -> Array:
            return jnp.sum(jax.grad(lambda w: jnp.sum(jnp.tanh(run(x, w, 2))))(w) ** 2)

        return jax.grad(slope)(x)

    ours = jax.jit(jax.vmap(lambda x, w: curvature(convolve, x, w)))(x, w)
    for k in range(2):
        np.testing.assert_allclose(
            ours[k], curvature(convolve_lax, x[k], w[k]), rtol=1e-3, atol=1e-4
        )

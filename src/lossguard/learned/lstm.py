"""The LSTM optimizer of Andrychowicz et al. (2016): one small LSTM, run on every coordinate alike.

Letters: n coordinates, H hidden cells, p the scale of the input logarithm.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..validation import check_kind, check_lstm, check_network
from .weights_file import ARCHITECTURES


class LSTMLayer(NamedTuple):
    """One LSTM layer in the layout of ``torch.nn.LSTM``: gates in the order i, f, g, o."""

    weight_ih: Float[Array, "4H inputs"]
    weight_hh: Float[Array, "4H H"]
    bias_ih: Float[Array, " 4H"]
    bias_hh: Float[Array, " 4H"]


class LSTMWeights(NamedTuple):
    """What meta-training learns: the layers, and the linear output to one number a coordinate."""

    layers: tuple[LSTMLayer, ...]
    linear_weight: Float[Array, "1 H"]
    linear_bias: Float[Array, " 1"]


class LSTMState(NamedTuple):
    """The memory of each coordinate, zero at the start; coordinates come last."""

    h: tuple[Float[Array, "H n"], ...]
    c: tuple[Float[Array, "H n"], ...]


def init_lstm_weights(key: PRNGKeyArray, *, hidden: int = 20, layers: int = 2) -> LSTMWeights:
    """Fresh weights, as PyTorch draws them by default: uniform within 1 / sqrt(H).

    >>> init_lstm_weights(jax.random.key(0)).layers[0].weight_ih.shape
    (80, 2)
    """
    check_network(hidden, layers)
    bound = hidden**-0.5
    *layer_keys, output_key = jax.random.split(key, layers + 1)
    keys = [k for one in layer_keys for k in jax.random.split(one, 4)]
    keys += [*jax.random.split(output_key)]
    shapes = ARCHITECTURES["lstm"].shapes(hidden, layers).values()
    leaves = [
        jax.random.uniform(k, tuple(shape), jnp.float32, -bound, bound)
        for k, shape in zip(keys, shapes, strict=True)
    ]
    made = tuple(LSTMLayer(*leaves[k : k + 4]) for k in range(0, 4 * layers, 4))
    return LSTMWeights(made, *leaves[-2:])


def lstm_optimizer(
    weights: LSTMWeights, *, scale: float = 0.1, p: float = 10.0
) -> optax.GradientTransformation:
    """A learned optimizer as an optax transformation.

    For each coordinate, with gradient g and memory m:

        o, m <- LSTM(log_and_sign(g), m);   update = scale * (linear_weight o + linear_bias)

    Args:
        weights: what meta-training made; ``pretrained`` loads what the package ships.
        scale: factor of the output. It belongs to the weights: use the one they were trained with.
        p: scale of the input logarithm, likewise.

    The computation is in float32, updates have the gradients' dtypes. The state takes 4 layers H
    bytes a coordinate for h and as many for c: 320 bytes for the default of two layers of 20.

    Raises:
        ValueError: if weights are none, scale is not positive and finite, or p not above 0 and at
            most 80; in ``init``, if parameters are complex.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016;
    the paper's L2O (section 4).

    >>> optimizer = lstm_optimizer(init_lstm_weights(jax.random.key(0)))
    >>> params = {"w": jnp.ones((3, 2))}
    >>> updates, state = optimizer.update(params, optimizer.init(params))
    >>> updates["w"].shape
    (3, 2)
    """
    check_kind("weights", weights, LSTMWeights, "load_weights(path).weights")
    check_lstm(scale, p)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    scale, p = float(scale), float(p)
    hidden = weights.linear_weight.shape[1]

    def init(params: PyTree) -> LSTMState:
        if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
            raise ValueError("params must be real for lstm_optimizer, got complex ones")
        n = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
        zeros = tuple(jnp.zeros((hidden, n), jnp.float32) for _ in weights.layers)
        return LSTMState(h=zeros, c=zeros)

    @jax.default_matmul_precision("highest")  # some accelerators have less by default
    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, LSTMState]:
        del params
        gradient, unravel = ravel_pytree(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        x = log_and_sign(gradient, p)
        h, c = [], []
        for layer, h_layer, c_layer in zip(weights.layers, *state, strict=True):
            x, memory = lstm_cell(layer, x, h_layer, c_layer)
            h.append(x)
            c.append(memory)
        output = scale * (weights.linear_weight @ x + weights.linear_bias[:, None])[0]
        cast = jax.tree.map(lambda u, g: u.astype(g.dtype), unravel(output), updates)
        return cast, LSTMState(tuple(h), tuple(c))

    return optax.GradientTransformation(init, update)


def log_and_sign(gradient: Float[Array, " n"], p: float = 10.0) -> Float[Array, "2 n"]:
    """Two inputs for each coordinate g of a gradient, its magnitude apart from its sign:

        (log|g| / p, sign g)   where |g| >= exp(-p)
        (-1, exp(p) g)         elsewhere

    Both lie within [-1, 1] for |g| up to exp(p). Source: Andrychowicz et al. 2016, appendix A.

    >>> log_and_sign(jnp.array([1.0, -1.0, 0.0]))
    Array([[ 0.,  0., -1.],
           [ 1., -1.,  0.]], dtype=float32)
    """
    floor = jnp.exp(-p)
    magnitude = jnp.abs(gradient)
    log = jnp.log(jnp.maximum(magnitude, floor)) / p
    sign = jnp.where(magnitude >= floor, jnp.sign(gradient), gradient * jnp.exp(p))
    return jnp.stack([log, sign])


def lstm_cell(
    layer: LSTMLayer, x: Float[Array, "inputs n"], h: Float[Array, "H n"], c: Float[Array, "H n"]
) -> tuple[Float[Array, "H n"], Float[Array, "H n"]]:
    """One step of one layer for all coordinates at once.

    With coordinates last the gates are rows, which makes the product and the splits contiguous:
    twice as fast on a CPU. One product for input, memory and bias is up to three times faster
    again: the barrier keeps XLA from taking it apart where the weights are constants.
    """
    matrix = jax.lax.optimization_barrier(
        jnp.concatenate(
            [layer.weight_ih, layer.weight_hh, (layer.bias_ih + layer.bias_hh)[:, None]], axis=1
        )
    )
    i, f, g, o = jnp.split(matrix @ jnp.concatenate([x, h, jnp.ones_like(x[:1])]), 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c

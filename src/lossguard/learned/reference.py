"""The LSTM optimizer as its paper writes it: m, one function of one coordinate.

The slow twin of ``lstm.py``, to read and to test against. Letters: g the gradient of a coordinate,
h and c its memory, H hidden cells, p the scale of the input logarithm.

Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016,
section 2.1 (one network for every coordinate) and appendix A (its input).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .lstm import LSTMLayer, LSTMState, LSTMWeights

Memory = tuple[tuple[Float[Array, " H"], Float[Array, " H"]], ...]
"""(h, c) of each layer."""


def reference_lstm_optimizer(
    weights: LSTMWeights, *, scale: float = 0.1, p: float = 10.0
) -> optax.GradientTransformation:
    """The same transformation as ``lstm_optimizer``, states of the same layout included.

    >>> from lossguard.learned.lstm import init_lstm_weights
    >>> optimizer = reference_lstm_optimizer(init_lstm_weights(jax.random.key(0)))
    >>> updates, state = optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
    >>> updates.shape, state.h[0].shape
    ((3,), (20, 3))
    """

    def init(params: PyTree) -> LSTMState:
        n = ravel_pytree(params)[0].size
        zeros = tuple(jnp.zeros((layer.weight_hh.shape[1], n)) for layer in weights.layers)
        return LSTMState(zeros, zeros)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, LSTMState]:
        del params
        gradient, unravel = ravel_pytree(updates)
        memory = tuple(zip(state.h, state.c, strict=True))
        every_coordinate = jax.vmap(
            update_coordinate, in_axes=(None, 0, -1, None), out_axes=(0, -1)
        )
        output, memory = every_coordinate(weights, gradient, memory, p)
        h, c = zip(*memory, strict=True)
        return unravel(scale * output), LSTMState(h, c)

    return optax.GradientTransformation(init, update)


def update_coordinate(
    weights: LSTMWeights, g: Float[Array, ""], memory: Memory, p: float
) -> tuple[Float[Array, ""], Memory]:
    """(output, memory) <- m(g, memory)."""
    x = features(g, p)
    after = []
    for layer, (h, c) in zip(weights.layers, memory, strict=True):
        h, c = cell(layer, x, h, c)
        after.append((h, c))
        x = h
    return (weights.linear_weight @ x + weights.linear_bias)[0], tuple(after)


def features(g: Float[Array, ""], p: float) -> Float[Array, " 2"]:
    """What the network sees of a gradient (appendix A)."""
    large = jnp.abs(g) >= jnp.exp(-p)
    return jnp.where(
        large,
        jnp.array([jnp.log(jnp.abs(g)) / p, jnp.sign(g)]),
        jnp.array([-1.0, jnp.exp(p) * g]),
    )


def cell(
    layer: LSTMLayer, x: Float[Array, " inputs"], h: Float[Array, " H"], c: Float[Array, " H"]
) -> tuple[Float[Array, " H"], Float[Array, " H"]]:
    """An LSTM cell as ``torch.nn.LSTM`` defines it."""
    gates = layer.weight_ih @ x + layer.bias_ih + layer.weight_hh @ h + layer.bias_hh
    i, f, g, o = jnp.split(gates, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h, c

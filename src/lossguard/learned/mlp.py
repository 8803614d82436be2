"""The MLP optimizer of Metz et al. (2022): one tiny network, run on every coordinate alike.

What it sees of a coordinate are running means over time and, for matrices, over rows and columns.

Letters: g gradient, p parameter, m momenta, v second moment, t steps taken so far, H hidden units.
"""

import functools
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..validation import check_kind, check_network
from .mlp_features import (
    AGES,
    FACTORED_DECAYS,
    FEATURES,
    LARGEST,
    LEAKS,
    MOMENTUM_DECAYS,
    OUTPUTS,
    SCALE,
    SCALING,
    SECOND_MOMENT_DECAY,
    SIGNALS,
    TIMES,
    TINY,
    UNITS,
    factored_axes,
    size_features,
)


class MLPLayer(NamedTuple):
    """One linear layer, in the layout of ``torch.nn.Linear``."""

    weight: Float[Array, "outputs inputs"]
    bias: Float[Array, " outputs"]


class SchedulerWeights(NamedTuple):
    """A small recurrent network, run on every tensor alike: it scales the tensor's step."""

    input: Float[Array, "8 15"]
    hidden: Float[Array, "8 8"]
    bias: Float[Array, " 8"]
    output: Float[Array, " 8"]


class MLPWeights(NamedTuple):
    """What meta-training learns. A decay d is stored as log(1 - d) / 10, below 0."""

    layers: tuple[MLPLayer, ...]
    """Inputs 28 features and 11 times; outputs direction and magnitude."""
    momentum_decays: Float[Array, " 3"]
    second_moment_decay: Float[Array, " 1"]
    factored_decays: Float[Array, " 3"]
    scaling: Float[Array, " 7"]
    """Two factors, and powers of a tensor's size and of the time, by which its step is scaled."""
    scheduler: SchedulerWeights


class Memory(NamedTuple):
    """Running means of one tensor, in float32, zero at the start."""

    momenta: tuple[Any, ...]
    """Three means of g, each of the tensor's shape."""
    second_moment: Any
    """Mean of g^2, of the tensor's shape."""
    rows: tuple[Any, ...]
    """Three means of g^2, also over the longest axis, which has length 1 here. With fewer than two
    axes they are of the tensor's shape."""
    columns: tuple[Any, ...]
    """Likewise over the second longest axis; of length 0 with fewer than two axes."""
    units: Any
    """Of the scheduler, [8]."""


PARTS = jax.tree.structure(Memory((0, 0, 0), 0, (0, 0, 0), (0, 0, 0), 0))


class MLPState(NamedTuple):
    """The optimizer's memory."""

    clock: optax.ScaleByScheduleState
    """Steps taken, as optax's schedules count them: guards set it to the time of the whole run."""
    tensors: Memory
    """Each part a tree like the parameters, as in the states of optax."""


def init_mlp_weights(key: PRNGKeyArray, *, hidden: int = 4, layers: int = 2) -> MLPWeights:
    """Fresh weights: normal of deviation 1 / sqrt(inputs), cut at two deviations; biases are zero.

    Before meta-training a step is about 0.001, in a direction that means nothing. The scheduler's
    inputs are drawn likewise, all else of it is zero: so its factor is 1.

    Args:
        key: draws the weights.
        hidden: H, units of each hidden layer.
        layers: hidden layers.

    Raises:
        ValueError: if hidden or layers is not a positive integer, or above 10,000 or 100.

    >>> init_mlp_weights(jax.random.key(0)).layers[0].weight.shape
    (4, 39)
    """
    check_network(hidden, layers)
    sizes = [FEATURES + len(TIMES), *[hidden] * layers, OUTPUTS]
    made = []
    keys = jax.random.split(key, layers + 1)
    for layer_key, (inputs, outputs) in zip(keys, pairwise(sizes), strict=True):
        weight = jax.random.truncated_normal(layer_key, -2.0, 2.0, (outputs, inputs), jnp.float32)
        made.append(MLPLayer(weight / math.sqrt(inputs), jnp.zeros(outputs, jnp.float32)))
    momentum, second_moment, factored = (
        jnp.log1p(-jnp.asarray(decays, jnp.float32)) / 10
        for decays in (MOMENTUM_DECAYS, SECOND_MOMENT_DECAY, FACTORED_DECAYS)
    )
    scaling, units = jnp.zeros(SCALING, jnp.float32), jnp.zeros(UNITS, jnp.float32)
    drawn = jax.random.normal(jax.random.fold_in(key, layers), (UNITS, SIGNALS), jnp.float32)
    back = jnp.zeros((UNITS, UNITS), jnp.float32)
    scheduler = SchedulerWeights(drawn / math.sqrt(SIGNALS), back, units, units)
    return MLPWeights(tuple(made), momentum, second_moment, factored, scaling, scheduler)


def mlp_optimizer(weights: MLPWeights) -> optax.GradientTransformation:
    """A small learned optimizer as an optax transformation.

    For each coordinate, from its features (``_features``) and the number of steps t:

        direction, magnitude = MLP(features, tanh(t / TIMES - 1))
        update = -0.001 scale direction exp(0.001 magnitude)
        scale = exp(scaling . (size_features(shape), ln(1 + t / AGES)) + output . units)
        units <- units + LEAKS (tanh(input signals + hidden units + bias) - units)

    The scale is ours. Large tensors need smaller steps than small ones, and late steps are smaller
    than early ones. Powers of size and time hold beyond what was trained on. The units of a tensor
    follow ``_signals`` of it, such as whether gradients still point the same way. Each feature is
    divided by the root of its mean square over the tensor (of the mean square plus 1e-5). The
    ``update`` needs ``params``.

    Args:
        weights: what meta-training made; ``pretrained`` loads files of them.

    The computation is in float32, updates have the gradients' dtypes. The state takes 16 bytes a
    coordinate. A matrix of r rows and c columns takes 12 (r + c) more, a vector of n 12 n; and each
    tensor 32. While an update runs it takes about 48 bytes a coordinate of the largest matrix, or
    72 of the largest vector (compiled for a CPU).

    Raises:
        ValueError: if weights are none; in ``init``, if parameters are complex; in ``update``, if
            ``params`` is missing.

    Source: Metz et al., "Practical tradeoffs between memory, compute, and performance in learned
    optimizers", 2022 (small_fc_lopt), which has no scale. A recurrent network for each tensor is an
    idea of Celo (Moudgil et al., "Training versatile learned optimizers on a compute diet", 2025).

    >>> optimizer = mlp_optimizer(init_mlp_weights(jax.random.key(0)))
    >>> params = {"w": jnp.ones((3, 2))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["w"].shape
    (3, 2)
    """
    check_kind("weights", weights, MLPWeights, "load_weights(path).weights")
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)

    def init(params: PyTree) -> MLPState:
        if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
            raise ValueError("params must be real for mlp_optimizer, got complex ones")
        leaves, tree = jax.tree.flatten(params)
        clock = optax.ScaleByScheduleState(jnp.int32(0))
        return MLPState(clock, _in_trees(tree, map(_no_memory, leaves)))

    @jax.default_matmul_precision("highest")  # some accelerators have less by default
    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MLPState]:
        if params is None:
            raise ValueError("params must be given to the update of mlp_optimizer, got None")
        step = state.clock.count
        t = step.astype(jnp.float32)
        times = jnp.tanh(t / jnp.asarray(TIMES, jnp.float32) - 1)
        ages = jnp.log1p(t / jnp.asarray(AGES, jnp.float32))
        params = jax.tree.map(  # an Equinox model holds more than what has a gradient
            lambda g, p: None if g is None else p, updates, params, is_leaf=lambda g: g is None
        )
        gradients, tree = jax.tree.flatten(updates)
        steps, memories = [], []
        for g, p, memory in zip(
            gradients, tree.flatten_up_to(params), _of_each(tree, state.tensors), strict=True
        ):
            g32, p32 = g.astype(jnp.float32), jnp.asarray(p, jnp.float32)
            before, memory = memory, _remember(weights, memory, g32)
            features = _features(memory, g32, p32)
            direction, magnitude = _network(weights.layers, features, times)
            sizes = jnp.asarray(size_features(g.shape), jnp.float32)
            signals = _signals(before, memory, g32, p32, sizes, step)
            units = _schedule(weights.scheduler, before.units, signals)
            factor = jnp.clip(weights.scheduler.output @ units, -LARGEST, LARGEST)
            power = weights.scaling @ jnp.concatenate([sizes, ages]) + factor
            memory, scale = memory._replace(units=units), SCALE * jnp.exp(power)
            steps.append((-scale * direction * jnp.exp(SCALE * magnitude)).astype(g.dtype))
            memories.append(memory)
        clock = optax.ScaleByScheduleState(optax.safe_increment(step))
        return tree.unflatten(steps), MLPState(clock, _in_trees(tree, memories))

    return optax.GradientTransformation(init, update)


def _in_trees(tree: Any, memories: Iterable[Memory]) -> Memory:
    """Each part as a tree."""
    each = [PARTS.flatten_up_to(memory) for memory in memories]
    return PARTS.unflatten(tree.unflatten(one[k] for one in each) for k in range(PARTS.num_leaves))


def _of_each(tree: Any, trees: Memory) -> list[Memory]:
    """The memory of each tensor."""
    parts = [tree.flatten_up_to(part) for part in PARTS.flatten_up_to(trees)]
    return [PARTS.unflatten(one) for one in zip(*parts, strict=True)]


def _no_memory(p: Array) -> Memory:
    zeros = jnp.zeros_like(p, jnp.float32)  # with the parameter's sharding
    axes = factored_axes(jnp.shape(p))
    rows, columns = zeros, jnp.zeros(0, jnp.float32)
    if axes:
        shorter, longer = axes
        rows, columns = zeros.sum(longer, keepdims=True), zeros.sum(shorter, keepdims=True)
    units = jnp.zeros(UNITS, jnp.float32)
    return Memory((zeros,) * 3, zeros, (rows,) * 3, (columns,) * 3, units)


def _remember(weights: MLPWeights, memory: Memory, g: Array) -> Memory:
    """The running means after gradient g."""
    squares = g * g

    def means(log_rest: Array, old: tuple[Array, ...], new: Array) -> Any:
        rest = jnp.exp(10 * jnp.minimum(log_rest, 0))  # 1 - decay
        return tuple((1 - a) * mean + a * new for a, mean in zip(rest, old, strict=True))

    axes = factored_axes(g.shape)
    rows, columns = squares, memory.columns[0]
    if axes:
        shorter, longer = axes
        rows, columns = rows.mean(longer, keepdims=True), squares.mean(shorter, keepdims=True)
    (second_moment,) = means(weights.second_moment_decay, (memory.second_moment,), squares)
    return Memory(
        means(weights.momentum_decays, memory.momenta, g),
        second_moment,
        means(weights.factored_decays, memory.rows, rows + 1e-30),
        means(weights.factored_decays, memory.columns, columns + 1e-30),
        memory.units,
    )


def _features(memory: Memory, g: Array, p: Array) -> list[Array]:
    """What the network sees of each coordinate, not yet normalized; each broadcasts to g's shape.

        g, p, m, v, m / sqrt(v), 1 / sqrt(v)              1, 1, 3, 1, 3, 1
        g / sqrt(V), V's rows and columns                 3, 3, 3
        1 / sqrt(rows), 1 / sqrt(columns), m / sqrt(V)    3, 3, 3

    V is Adafactor's second moment, rows columns / mean(rows). With fewer than two axes it is the
    plain one, which is then in the rows' and the columns' place.
    """
    rsqrt = jax.lax.rsqrt
    m, v, rows, columns, _ = memory
    by_v = rsqrt(v + 1e-6)
    if axis := factored_axes(g.shape):
        factors = [
            rsqrt(jnp.maximum(r / (r.mean(axis[0], keepdims=True) + 1e-9), 1e-9))
            * rsqrt(jnp.maximum(c, 1e-9))
            for r, c in zip(rows, columns, strict=True)
        ]
        of_g = of_m = factors
    else:
        columns = rows
        of_g = [rsqrt(r + 1e-9) for r in rows]
        of_m = [rsqrt(r + 1e-6) for r in rows]
    return [
        *(g, p, *m, v),
        *(one * by_v for one in m),
        *(by_v, *(g * factor for factor in of_g)),
        *(*rows, *columns),
        *(rsqrt(one + 1e-8) for one in (*rows, *columns)),
        *(one * factor for one, factor in zip(m, of_m, strict=True)),
    ]


def _signals(
    before: Memory, memory: Memory, g: Array, p: Array, sizes: Array, step: Array
) -> Float[Array, " 15"]:
    """What the scheduler sees of a tensor after step t, with the momenta m' before it.

        3 cos(g, m'), 3 cos(m_1, p), ln(rms(m) / root mean v)           3, 1, 3
        ln rms(g) / 3, ln rms(p) / 3, ln rms(m_1) / 3                   3
        ln(its size) / 3 and whether it is a matrix (size_features)     2
        ln(1 + t / 10) / 3 - 1, ln(1 + t / 1000) - 1, tanh(t / 30)      3

    Each is cut at ``LARGEST``.
    """

    def cosine(a: Array, b: Array) -> Array:
        shrink = (jax.lax.rsqrt(jnp.sum(one * one) + 1e-24) for one in (a, b))
        return math.prod(shrink, start=jnp.sum(a * b))

    def log(squares: Array) -> Array:
        return jnp.log(jnp.sum(squares) / max(squares.size, 1) + TINY) / 2

    m, level = memory.momenta, log(memory.second_moment)
    of_m = [log(one * one) for one in m]
    signals = [
        *(3 * cosine(g, one) for one in before.momenta),
        3 * cosine(m[1], p),
        *(one - level for one in of_m),
        *(log(g * g) / 3, log(p * p) / 3, of_m[1] / 3),
        *((sizes[1] + sizes[3]) / 3, sizes[0]),
        *(jnp.log1p(step / 10) / 3 - 1, jnp.log1p(step / 1000) - 1, jnp.tanh(step / 30)),
    ]
    return jnp.clip(jnp.stack(signals), -LARGEST, LARGEST)


def _schedule(
    weights: SchedulerWeights, units: Float[Array, " 8"], signals: Float[Array, " 15"]
) -> Float[Array, " 8"]:
    """The scheduler's units after a step."""
    towards = jnp.tanh(weights.input @ signals + weights.hidden @ units + weights.bias)
    return units + jnp.asarray(LEAKS, jnp.float32) * (towards - units)


def _network(
    layers: tuple[MLPLayer, ...], features: list[Array], times: Float[Array, " T"]
) -> tuple[Array, Array]:
    """Direction and magnitude of each coordinate.

    Layers are sums of scalars times features, which XLA fuses into one loop: nothing of size
    [coordinates, features] is in memory.
    """
    first, *others = layers
    means = [jnp.sum(f * f) / max(f.size, 1) for f in features]
    scales = jax.lax.rsqrt(1e-5 + jnp.stack(means))
    weight = first.weight[:, : len(features)] * scales[None]
    bias = first.weight[:, len(features) :] @ times + first.bias
    outputs = [
        _by_size([w * f for w, f in zip(row, features, strict=True)]) + b
        for row, b in zip(weight, bias, strict=True)
    ]
    for layer in others:
        inputs = [jax.nn.relu(x) for x in outputs]
        outputs = [
            functools.reduce(jnp.add, [w * x for w, x in zip(row, inputs, strict=True)], b)
            for row, b in zip(*layer, strict=True)
        ]
    direction, magnitude = outputs
    return direction, magnitude


def _by_size(terms: list[Array]) -> Array:
    """Their sum. What is constant along an axis is summed up before it becomes as long as that."""
    by_shape: dict[tuple[int, ...], Array] = {}
    for term in terms:
        by_shape[term.shape] = by_shape.get(term.shape, 0) + term
    return functools.reduce(jnp.add, sorted(by_shape.values(), key=lambda total: total.size))

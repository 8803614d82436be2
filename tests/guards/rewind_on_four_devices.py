"""A program for four devices: over all of them ``rewind`` does what it does on one.

``test_devices.py`` runs it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lossguard

LOSSES = jnp.concatenate([jnp.linspace(3, 1, 150), jnp.full(12, 9.0), jnp.ones(20)])
OPTIMIZER = lossguard.rewind(optax.adam(0.01), window=64)
START = {"a": jnp.linspace(-1, 1, 32).reshape(4, 8), "b": jnp.ones(4)}
SPECS = {"a": P(None, "data"), "b": P("data")}


@jax.jit
def step(params, state, value):
    gradient = jax.tree.map(jnp.sin, params)
    # One shard alone is not finite, and all of them must skip the step.
    gradient["a"] = gradient["a"].at[0, 7].add(jnp.where(state.calls == 20, jnp.nan, 0))
    updates, state = OPTIMIZER.update(gradient, state, params, value=value)
    return optax.apply_updates(params, updates), state


def play(params):
    state = OPTIMIZER.init(params)
    for value in LOSSES:
        # One step at a time: four devices of two cores share threads, and steps that are started
        # ahead can take the thread that an all-reduce waits for.
        params, state = jax.block_until_ready(step(params, state, value))
    return params, state


if __name__ == "__main__":
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    on = partial(NamedSharding, mesh)
    alone = play(START)
    params, state = play(jax.device_put(START, {name: on(spec) for name, spec in SPECS.items()}))
    assert state.returns == 1 and state.skipped == 1
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), (params, state), alone)
    for name, spec in SPECS.items():
        for leaf in (params[name], state.snapshots.trusted[0][name], state.inner[0].mu[name]):
            assert leaf.sharding.is_equivalent_to(on(spec), leaf.ndim), (name, leaf.sharding)

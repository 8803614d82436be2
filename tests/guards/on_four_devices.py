"""A program for four devices: over all of them guards and ``rewind`` do what they do on one.

``test_devices.py`` runs it.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lossguard

CYCLES = 8
ADAM, SGD = optax.adam(0.05), optax.sgd(0.1, momentum=0.9)
RECOMMENDED = lossguard.recommended(ADAM, optax.sgd(0.01), nt=2)
HEDGED = lossguard.hedged(ADAM, optax.sgd(0.01), nt=2)
PAPERS = lossguard.loss_guard(ADAM, SGD, nt=2, nc=1)
BEST = lossguard.best_of([PAPERS, lossguard.unguarded(SGD, nt=2)], share=0.1)
REWIND = lossguard.rewind(optax.adam(0.01), window=64)
RISES = jnp.concatenate([jnp.linspace(3, 1, 150), jnp.full(12, 9.0), jnp.ones(20)])
"""Losses at which it goes back once."""

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (40, 8, 6))
T = jnp.tanh(X @ jax.random.normal(KEYS[1], (6, 4)))
START = {
    "a": jax.random.normal(KEYS[2], (6, 8)) / 2,
    "b": jax.random.normal(KEYS[3], (8, 4)) / 2,
    "c": jnp.zeros(4),
}
SPECS = {"a": P(None, "data"), "b": P("data"), "c": P()}
MINIBATCHES = P(None, "data")

compiled = []


def note(event: str, seconds: float, **_: object) -> None:
    if "backend_compile" in event:
        compiled.append(event)


def loss(params, i, x, t):
    prediction = jnp.tanh(x[i % 40] @ params["a"]) @ params["b"] + params["c"]
    return jnp.mean((prediction - t[i % 40]) ** 2)


def play(step, state):
    """The last state and all decisions; only the first cycle compiles."""
    decisions = []
    for cycle in range(CYCLES):
        before = len(compiled)
        state, decision = step(state)
        assert (len(compiled) > before) == (cycle == 0), f"compiled in cycle {cycle}"
        decisions.append(jax.device_get(decision))
    return state, decisions


@cache
def alone(guard):
    """On one device."""
    step = jax.jit(lambda state: guard.step(state, partial(loss, x=X, t=T)))
    return play(step, guard.init(START))


def assert_same(one, other) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def test_parameters_and_minibatches_are_sharded(guard, kind: AxisType) -> None:
    """As under FSDP. What is as large as the parameters stays sharded as they are."""
    on = partial(NamedSharding, mesh_of(kind))
    x, t = jax.device_put((X, T), on(MINIBATCHES))
    shardings = {name: on(spec) for name, spec in SPECS.items()}

    def objective(params, i):
        if kind == AxisType.Explicit:
            params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, on(P())), params)
        return loss(params, i, x, t)

    step = jax.jit(lambda state: guard.step(state, objective), donate_argnums=0)
    state, decisions = play(step, guard.init(jax.device_put(START, shardings)))
    assert_same((state, decisions), alone(guard))
    for path, leaf in jax.tree.leaves_with_path(state):
        name = getattr(path[-1], "key", None)
        expected = shardings[name] if name in SPECS else on(P())
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (path, leaf.sharding)


def test_losses_are_averaged_under_shard_map(guard) -> None:
    mesh = mesh_of(AxisType.Auto)
    specs = {"in_specs": (P(), MINIBATCHES, MINIBATCHES), "out_specs": P()}

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, **specs)
    def step(state, x, t):
        return guard.step(state, lambda *at: jax.lax.pmean(loss(*at, x, t), "data"))

    x, t = jax.device_put((X, T), NamedSharding(mesh, MINIBATCHES))
    state = guard.init(jax.device_put(START, NamedSharding(mesh, P())))
    assert_same(play(lambda state: step(state, x, t), state), alone(guard))


@jax.jit
def step_of_rewind(params, state, value):
    gradient = jax.tree.map(jnp.sin, params)
    # One shard alone is not finite, and all of them must skip the step.
    gradient["a"] = gradient["a"].at[0, 7].add(jnp.where(state.calls == 20, jnp.nan, 0))
    updates, state = REWIND.update(gradient, state, params, value=value)
    return optax.apply_updates(params, updates), state


def rewound(params):
    state = REWIND.init(params)
    for value in RISES:
        # One step at a time: four devices of two cores share threads, and steps that are started
        # ahead can take the thread that an all-reduce waits for.
        params, state = jax.block_until_ready(step_of_rewind(params, state, value))
    return params, state


def test_rewind_skips_and_goes_back_on_all_shards() -> None:
    on = partial(NamedSharding, mesh_of(AxisType.Auto))
    shardings = {name: on(spec) for name, spec in SPECS.items()}
    params, state = rewound(jax.device_put(START, shardings))
    assert state.returns == 1 and state.skipped == 1
    same = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(same, (params, state), rewound(START))
    for name, sharding in shardings.items():
        for leaf in (params[name], state.snapshots.trusted[0][name], state.inner[0].mu[name]):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (name, leaf.sharding)


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(note)
    assert len({int(decision.winner) for decision in alone(RECOMMENDED)[1]}) > 1
    for guard in (RECOMMENDED, HEDGED, BEST):
        test_parameters_and_minibatches_are_sharded(guard, AxisType.Auto)
    test_parameters_and_minibatches_are_sharded(PAPERS, AxisType.Explicit)
    test_losses_are_averaged_under_shard_map(PAPERS)
    test_rewind_skips_and_goes_back_on_all_shards()

"""Compiled runs of a guard, as several tests want them."""

import jax
import numpy as np

import lossguard


def play(guard: lossguard.Guard, objective, start, cycles: int):
    """The states after every cycle, and the decisions."""

    def step(state, _):
        state, decision = guard.step(state, objective)
        return state, (state, decision)

    return jax.jit(lambda start: jax.lax.scan(step, guard.init(start), length=cycles)[1])(start)


def side_by_side(run, *seeds: jax.Array):
    """``run`` over seeds by vmap, which must be what it is with each of them alone."""
    together, alone = jax.jit(jax.vmap(run))(*seeds), jax.jit(run)
    for seed, arguments in enumerate(zip(*seeds, strict=True)):
        jax.tree.map(
            lambda one, all_of_them, seed=seed: np.testing.assert_allclose(
                all_of_them[seed], one, rtol=1e-9, atol=1e-12
            ),
            alone(*arguments),
            together,
        )
    return together

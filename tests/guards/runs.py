"""Compiled runs of a guard, as several tests want them."""

import jax

import lossguard


def play(guard: lossguard.Guard, objective, start, cycles: int):
    """The states after every cycle, and the decisions."""

    def step(state, _):
        state, decision = guard.step(state, objective)
        return state, (state, decision)

    return jax.jit(lambda start: jax.lax.scan(step, guard.init(start), length=cycles)[1])(start)

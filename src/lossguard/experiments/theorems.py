"""Claim C14: theorems 5 and 7, checked on a quadratic whose minimum is known.

It needs no records: it plays the loss guard over learned optimizers that do their worst, in a few
seconds and the same way each time. ``docs/theory.md`` has the proofs.

Letters: w the iterate, E its excess over the minimum, mu and L the strong convexity and the
smoothness, a the fallback's step size times L, k steps, k0 the offset of its schedule.
"""

from functools import cache

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..guards.loss_guard import loss_guard
from ..guards.protocol import Objective
from ..learned.pretrained import pretrained
from ..schedules import harmonic_decay
from ..tasks.synthetic import Noisy, Quadratic, quadratic
from .findings import Finding

STEPS = 300
SEEDS = 100
"""For theorem 7's expectation."""
SIGMA = 1.0
"""Deviation of its gradients."""
ROUNDING = 1 + 1e-4


def hostile(problem: Quadratic) -> dict[str, optax.GradientTransformation]:
    """Learned optimizers: three that are made to spoil a run, and the shipped one."""
    return {
        "gradient ascent": optax.sgd(-0.1),
        "SGD at 1e6": optax.sgd(1e6),
        "SGD that turns": optax.sgd(lambda t: jnp.where(jnp.asarray(t) < 30, 1 / problem.L, -1e3)),
        "lstm-mnist-mlp": pretrained("lstm-mnist-mlp"),
    }


@cache
def theorem_5() -> Finding:
    """E_k <= (1 - (2 mu a / L)(1 - a / 2))^k E_0 for gradient descent with step a / L."""
    problem, a = _problem(), 1.0
    bound = (1 - 2 * problem.mu * a / problem.L * (1 - a / 2)) ** jnp.arange(1, STEPS + 1)
    bound = bound * problem.excess(_start(problem))
    worst = {
        name: float(jnp.max(_play(problem, problem, learned, optax.sgd(a / problem.L)) / bound))
        for name, learned in hostile(problem).items()
    }
    return _finding("theorem 5", worst)


@cache
def theorem_7() -> Finding:
    """E[E_k] <= C / (k + k0) for SGD with rate (2 / mu) / (k + k0), where k0 = 2 L / mu."""
    problem = _problem()
    k0 = 2 * float(problem.L / problem.mu)
    fallback = optax.sgd(harmonic_decay(1 / float(problem.L), offset=k0))
    start = float(problem.excess(_start(problem)))
    constant = max(k0 * start, float(2 * problem.L * SIGMA**2 / problem.mu**2))
    bound = constant / (jnp.arange(1, STEPS + 1) + k0)

    def mean_excess(learned: optax.GradientTransformation) -> Float[Array, " steps"]:
        def one(key: Array) -> Float[Array, " steps"]:
            noisy = Noisy(problem, key, SIGMA)

            def objective(w: Array, i: Array) -> Array:  # trains on even numbers, checks on odd
                return jnp.where(i % 2 == 0, noisy(w, i), problem(w))

            return _play(problem, objective, learned, fallback)

        return jax.vmap(one)(jax.random.split(jax.random.key(1), SEEDS)).mean(axis=0)

    worst = {
        name: float(jnp.max(mean_excess(learned) / bound))
        for name, learned in hostile(problem).items()
    }
    return _finding("theorem 7", worst)


def _play(
    problem: Quadratic,
    objective: Objective,
    learned: optax.GradientTransformation,
    fallback: optax.GradientTransformation,
) -> Float[Array, " steps"]:
    """The excess after each step of the loss guard, one step a cycle."""
    guard = loss_guard(learned, fallback, nt=1, nc=1)

    def step(state, _):
        state, _ = guard.step(state, objective)
        return state, problem.excess(state.params)

    return jax.lax.scan(step, guard.init(_start(problem)), length=STEPS)[1]


def _problem() -> Quadratic:
    return quadratic(jax.random.key(0), n=6, mu=0.05, L=2.0, distance=3.0)


def _start(problem: Quadratic) -> Float[Array, " n"]:
    return jnp.zeros_like(problem.minimum) + 2.0


def _finding(theorem: str, worst: dict[str, float]) -> Finding:
    numbers = f"E is at most {max(worst.values()):.3g} of its bound over {', '.join(worst)}"
    holds = all(ratio <= ROUNDING for ratio in worst.values())  # not so if one is NaN
    return Finding(holds, f"{theorem}: {numbers}")

"""JAX: hostile optimizers on either side, problems, options; many side by side in a program.

Held: iterates are finite; the price is bounded; reported losses never sum up to more than the
fallback's, or each member's; without a trial that was won x is the fallback's; what ``rewind``
discards is within its budget.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
from problems import valleys

import lossguard

MANY, STEPS = 128, 120
NEVER = 10**6
VALUES = (np.nan, np.inf, -np.inf, 1e30, -1e38, 1e3)
PROBLEMS = {
    "bowl": lambda w: jnp.sum(jnp.array([0.05, 1.0, 4.0], w.dtype) * (w - 1) ** 2) / 2,
    "valleys": valleys,
    "quartic": lambda w: jnp.sum(w**4) / 8,
    "cliff": lambda w: jnp.sum(jnp.abs(w)) + jnp.where(w[0] > 2, 1e6, 0.0).astype(w.dtype),
}
FALLBACKS = {
    "sgd": lambda: optax.sgd(0.03),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9),
    "adam": lambda: optax.adam(0.03),
    "decaying": lambda: optax.sgd(lossguard.harmonic_decay(0.1, offset=50.0)),
}
GUARDS = ("recommended", "hedged", "best_of", "loss_guard", "residual_guard", "rewind", "guarded")


def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What differs between runs of one program: the optimizers' ways, the data's faults."""

    def faults(often: float) -> dict[str, np.ndarray]:
        at = np.where(rng.random(MANY) < often, rng.integers(0, STEPS, MANY), NEVER)
        return {"at": at, "kind": rng.integers(0, 3, MANY), "value": rng.choice(VALUES, MANY)}

    return {
        "which": rng.integers(0, len(optimizers.HOSTILE), MANY),
        "rate": 10.0 ** rng.uniform(-3, 1, MANY),
        "turn": rng.integers(0, STEPS, MANY),
        "sigma": rng.choice([0.0, 0.1, 1.0], MANY),
        "seed": rng.integers(0, 2**31, MANY),
        **{f"y {name}": one for name, one in faults(0.5).items()},
        **{f"z {name}": one for name, one in faults(0.2).items()},
        **{f"data {name}": one for name, one in faults(0.2).items()},
    }


def attempt(seed: int, folder: Path) -> Counter[str]:
    """One program, and ``MANY`` runs of it."""
    rng = np.random.default_rng(seed)
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    name, problem, fallback = pick(GUARDS), pick([*PROBLEMS]), pick([*FALLBACKS])
    double = rng.random() < 0.7
    options = {"nt": pick((1, 2, 3, 5)), "share": pick((0.0, 0.05, 0.2, 0.5)), "nc": pick((1, 3))}
    options |= {"loser": pick(("keep", "reset")), "rho": pick((0.0, 0.1, 0.5))}
    drawn = draw(rng)
    told = f"{name} on {problem} over {fallback}, double {double}, {options}"
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else pick((jnp.float32, jnp.bfloat16, jnp.float16))
        outcome = jax.jit(jax.vmap(lambda one: run(one, name, problem, fallback, dtype, options)))
        found = jax.tree.map(np.asarray, outcome(drawn))
    wrong = check(found, name, options, double)
    assert not wrong.any(), f"{told}: runs {np.flatnonzero(wrong)[:9]}"
    return Counter({name: MANY})


def run(one: dict[str, Any], name: str, problem: str, fallback: str, dtype: Any, options: Any):
    """A guarded run, and the two optimizers alone: iterates and decisions of each."""
    nt, cycles, start = options["nt"], STEPS // options["nt"], jnp.array([3.0, -2.0, 0.5], dtype)
    noise = one["sigma"] * jax.random.normal(jax.random.key(one["seed"]), (4 * STEPS, 3))

    def objective(w: Any, i: Any) -> Any:
        loss = PROBLEMS[problem](w) + noise.astype(dtype)[i % (4 * STEPS)] @ w
        return jnp.where(i == one["data at"], loss * one["data value"], loss).astype(dtype)

    def with_fault(optimizer: Any, side: str) -> Any:
        at, kind, value = (one[f"{side} {what}"] for what in ("at", "kind", "value"))
        return optax.chain(optimizer, optimizers.faulty(-1.0, at=at, fault=kind, value=value))

    hostile = optimizers.hostile(one["which"], one["rate"], turn=one["turn"])
    y, z = with_fault(hostile, "y"), with_fault(FALLBACKS[fallback](), "z")
    alone = [lossguard.unguarded(z, nt=nt), lossguard.unguarded(y, nt=nt)]
    under_attack = {
        "recommended": lambda: lossguard.recommended(y, z, nt=nt, share=options["share"]),
        "hedged": lambda: lossguard.hedged(y, z, nt=nt, share=options["share"]),
        "best_of": lambda: lossguard.best_of(alone),
        "loss_guard": lambda: lossguard.loss_guard(
            y, z, nt=nt, nc=options["nc"], loser=options["loser"]
        ),
        "residual_guard": lambda: lossguard.residual_guard(y, z, nt=nt),
        "rewind": lambda: lossguard.unguarded(
            lossguard.rewind(y, window=64, rho=options["rho"]), nt=nt
        ),
        "guarded": lambda: lossguard.unguarded(lossguard.guarded(y, z), nt=nt),
    }[name]()

    def played(guard: lossguard.Guard) -> Any:
        def step(state: Any, _: Any) -> Any:
            state, decision = guard.step(state, objective)
            more = jnp.int32(0)
            if guard is under_attack and name == "rewind":
                (on_path, _), (clock, _) = state.inner.inner  # the clock goes on where y goes back
                more = jnp.stack([state.inner.thrown, clock.count - on_path])
            elif guard is under_attack and name == "best_of":
                more = jnp.stack([member.params for member in state.inner.members])
            return state, (state.params, decision, more)

        return jax.lax.scan(step, guard.init(start), length=cycles)[1]

    return played(under_attack), played(alone[0]), played(alone[1]) if name == "best_of" else None


def check(found: Any, name: str, options: dict[str, Any], double: bool) -> np.ndarray:
    """Which runs have broken a promise; axes are [runs, cycles, ...]."""
    (x, decisions, more), (s, alone, _), other = found
    np.seterr(all="ignore")  # sums of losses that aren't finite are left out
    nt, share = options["nt"], options["share"]
    k = nt * np.arange(1, x.shape[1] + 1)
    wrong = ~np.isfinite(x.astype(float)).all(axis=(1, 2))
    if name in ("recommended", "hedged"):
        price = np.cumsum(decisions.gradients, axis=1)
        most = (1 + share + min(1, 5 * share) if name == "recommended" else 2 + share) * k
        wrong |= (price > most + np.sqrt(k) + 2 * nt * -(-10 // nt) + nt).any(axis=1)
    if name == "recommended" and double:
        untried = (decisions.winner != 0).cumprod(axis=1).astype(bool) & is_finite(s, alone)
        differs = ~np.isclose(x, s, rtol=1e-6, atol=1e-9).all(axis=2)
        wrong |= (untried & differs).any(axis=1)
    if name in ("hedged", "best_of") and double:
        for j, (point, one, _) in enumerate([found[1]] + [other] * (name == "best_of")):
            one_sum = np.cumsum(one.losses.sum(axis=2), axis=1)
            size = np.cumsum(np.abs(one.losses).sum(axis=2), axis=1)
            above = np.cumsum(decisions.losses.sum(axis=2), axis=1) - one_sum
            counts = is_finite(point, one)
            if name == "best_of":  # until x goes back, or the member begins again
                by_itself = np.isclose(more[:, :, j], point).all(axis=2) & (decisions.winner >= 0)
                counts &= by_itself.cumprod(axis=1).astype(bool)
            wrong |= (counts & ~(above <= 1e-9 * size + 1e-9)).any(axis=1)
    if name == "rewind":
        wrong |= (more > options["rho"] * k[:, None] + 64).any(axis=(1, 2))
        wrong |= (more[..., 0] != more[..., 1]).any(axis=1)
    return wrong


def is_finite(x: np.ndarray, decisions: lossguard.Decision) -> np.ndarray:
    """Until which cycle a run was finite [runs, cycles]."""
    fine = np.isfinite(x).all(axis=2) & np.isfinite(decisions.losses).all(axis=2)
    return fine.cumprod(axis=1).astype(bool)

"""What ``recommended`` promises per unit of compute, whatever the learned optimizer does.

Letters: k steps of x, p the price, in gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from problems import trap
from runs import check_price, over_hostile, play, relapses

import lossguard
from lossguard.guards.protocol import OWN

NT, STEPS, SEEDS, SHARE = 10, 6_000, 4, 0.05
CURVATURES = np.geomspace(1e-4, 1.0, 12, dtype=np.float32)
"""Of a quadratic whose loss falls by a power of k, as losses do."""


def whole(w: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(CURVATURES * w**2)


@pytest.mark.parametrize("c", [1e-30, 1e20, 1e30])
def test_what_decides_does_not_depend_on_the_unit_of_the_loss(c) -> None:
    """Whose square may overflow, or vanish."""

    def winners(c):
        guard = lossguard.recommended(optax.sgd(0.1 / c), optax.sgd(0.03 / c))

        def objective(w, i):
            return c * jnp.sum((w - 0.1 * jax.random.normal(jax.random.key(i), (2,))) ** 2)

        return play(guard, objective, jnp.ones(2), 40)[1].winner.tolist()

    assert winners(c) == winners(1.0) and len({*winners(1.0)}) > 1


@pytest.fixture(scope="module")
def played():
    """Of every hostile optimizer and seed: the loss after each cycle, decisions; and the
    fallback's."""
    start, fallback = jnp.ones(len(CURVATURES)), optax.sgd(0.5)

    def curve(guard, key):
        xi = jax.random.normal(key, (1_000, len(CURVATURES)))
        xi = 0.02 * CURVATURES**0.5 * (xi - xi.mean(axis=0))  # as in least squares
        objective = lambda w, i: whole(w) + xi[i % 1_000] @ w  # noqa: E731
        states, decisions = play(guard, objective, start, STEPS // NT)
        return jax.vmap(whole)(states.params), decisions

    def guarded(which, key):
        learned = optimizers.hostile(which, 1.0)
        return curve(lossguard.recommended(learned, fallback, nt=NT, share=SHARE), key)

    keys = jax.random.split(jax.random.key(0), SEEDS)
    loss, decisions = over_hostile(guarded, keys)
    alone, _ = jax.jit(jax.vmap(lambda key: curve(lossguard.unguarded(fallback, nt=NT), key)))(keys)
    return np.asarray(loss), jax.tree.map(np.asarray, decisions), np.asarray(alone)


def test_challengers_have_a_share_of_the_steps(played) -> None:
    _, decisions, _ = played
    of_s, trials = check_price(decisions, NT, SHARE)
    k = NT * np.arange(1, STEPS // NT + 1)
    assert (of_s <= 5 * SHARE * k + NT).all() and (of_s > SHARE / 2 * k + NT).any()
    assert trials > 0.9


def test_s_and_trials_have_what_they_may_and_no_more() -> None:
    nt, k = 4, np.arange(4, STEPS + 4, 4)
    runs = relapses(lossguard.recommended, nt=nt, share=SHARE)
    for part, decisions in zip((5 * SHARE, SHARE), runs, strict=True):
        of_s, trials = check_price(decisions, nt, SHARE)
        assert trials > 0.9
        assert (of_s <= part * k + nt).all() and (of_s >= part * k - 4 * nt)[k > 1_000].all()


@pytest.mark.parametrize(("nt", "first"), [(1, 10), (3, 12), (50, 50)])
def test_trials_take_ten_steps_in_whole_cycles_and_come_when_the_budget_allows(nt, first) -> None:
    """Of a share of 0: the first at once, the second after as many steps squared and four times."""
    guard = lossguard.recommended(optax.sgd(5e-5), optax.sgd(4e-5), nt=nt, share=0.0)
    state = guard.init(jnp.ones(3))
    cycles = 5 * first**2 // nt
    _, decisions = lossguard.rollout(guard, state, lambda w, i: jnp.sum(w**2), cycles=cycles)
    k, of_y = nt * np.arange(1, cycles + 1), decisions.learned_updates.cumsum()
    assert int(decisions.winner[first // nt]) == OWN
    early = k < 4 * first**2
    assert (of_y[early] == np.minimum(k, first)[early]).all()
    assert of_y[-1] >= 2 * first


def test_x_is_finite(played) -> None:
    loss, decisions, _ = played
    assert np.isfinite(loss).all()
    broke = np.isfinite(decisions.fallback_loss) & ~np.isfinite(decisions.learned_loss)
    assert broke[optimizers.HOSTILE.index("overflows")].any()
    led = decisions.used_learned.any(axis=(1, 2, 3))
    assert led[[optimizers.HOSTILE.index(name) for name in ("turns", "creeps", "breaks")]].all()


def test_a_hostile_optimizer_slows_the_fallback_down_by_little(played) -> None:
    """The fallback's loss at price k is reached at price 1.15 k, for k >= 1,000: mean of seeds."""
    loss, decisions, alone = played
    price, slowdowns = decisions.price().cumsum(axis=-1).mean(axis=1), []
    best = np.minimum.accumulate(loss.mean(axis=1), axis=-1)
    for k in range(1_000, 5_200, 200):
        target = alone.mean(axis=0)[: k // NT].min()
        for which, name in enumerate(optimizers.HOSTILE):
            reached = np.flatnonzero(best[which] <= target)
            slowdowns.append(price[which, reached[0]] / k if len(reached) else np.inf)
            assert slowdowns[-1] <= 1.15, (name, k)
    assert max(slowdowns) > 1.05


@pytest.mark.parametrize("share", [0.1, 0.3, 0.0])
def test_a_loss_is_reached_in_the_fallbacks_time_over_its_share(share) -> None:
    """Also where x is led to where nothing helps any more. Without a share it stays there."""
    start, fallback = jnp.float32(-0.01), optax.sgd(0.1)
    alone, _ = play(lossguard.unguarded(fallback, nt=NT), trap, start, 100)
    guard = lossguard.recommended(optimizers.constant(0.1), fallback, nt=NT, share=share)
    states, decisions = play(guard, trap, start, 1_000)
    assert trap(states.params[20]) == jnp.float32(0.3) and decisions.winner[1] == 0
    of_x, of_s = (jax.vmap(trap)(s.params) for s in (states, alone))
    for loss in (0.25, 0.2, 0.1):
        k, own = (int(np.argmax(np.asarray(c) <= loss)) * NT for c in (of_x, of_s))
        assert own > 0
        if share == 0:
            assert (of_x >= 0.3).all()
        else:  # of its losses those of three cycles have to be below x's
            assert 0 < k <= (own + 3 * NT) / share + NT

"""Shuffling is a bijection, its epochs are disjoint and differ, and its draws look random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy import stats

from lossguard.tasks.shuffle import minibatch_indices, permuted

KEY = jax.random.key(0)


def permutation(key: Array, n: int) -> np.ndarray:
    return np.asarray(jax.jit(permuted, static_argnums=3)(key, 0, jnp.arange(n), n))


def test_is_a_bijection_of_small_sets() -> None:
    with jax.disable_jit():  # or a loop would be compiled for each
        for n in [*range(1, 90), *range(90, 301, 7), 121, 128, 169, 225, 255, 256, 257, 289, 293]:
            positions = jnp.arange(300) % n  # always the same shape, for the same reason
            assert set(permuted(jax.random.key(n), 0, positions, n).tolist()) == set(range(n))


@pytest.mark.parametrize("n", [997, 1024, 4097, 7919, 10_000, 25_000, 50_000, 60_000, 104_729])
def test_is_a_bijection(n: int) -> None:
    np.testing.assert_array_equal(np.sort(permutation(jax.random.key(n), n)), np.arange(n))


@pytest.mark.parametrize(("n", "epoch"), [(10_000, 6629), (60_000, 8369)])
def test_is_a_bijection_where_a_hash_is_almost_2_to_the_32(n: int, epoch: int) -> None:
    images = jax.jit(permuted, static_argnums=3)(KEY, epoch, jnp.arange(n), n)
    np.testing.assert_array_equal(np.sort(images), np.arange(n))


@pytest.mark.parametrize(
    ("samples", "batch_size"), [(10, 5), (10, 3), (7, 7), (1, 1), (1797, 128), (60_000, 128)]
)
def test_minibatches_of_an_epoch_are_disjoint(samples: int, batch_size: int) -> None:
    per_epoch = samples // batch_size
    draw = jax.jit(
        jax.vmap(lambda i: minibatch_indices(KEY, i, samples=samples, batch_size=batch_size))
    )
    for epoch in (0, 1, 5):
        rows = np.asarray(draw(epoch * per_epoch + jnp.arange(per_epoch))).ravel()
        assert len(np.unique(rows)) == per_epoch * batch_size
        assert rows.min() >= 0 and rows.max() < samples


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint32])
def test_numpys_numbers_are_numbers(kind: type) -> None:
    """As that of samples that are counted by NumPy: other types would change the hash."""
    for i in (0, 7):
        drawn = minibatch_indices(KEY, i, samples=kind(1000), batch_size=kind(100))
        expected = minibatch_indices(KEY, i, samples=1000, batch_size=100)
        np.testing.assert_array_equal(drawn, expected)


def test_epochs_and_keys_differ() -> None:
    indices = jax.jit(lambda key, i: minibatch_indices(key, i, samples=1000, batch_size=100))

    def draw(key: Array, i: int) -> tuple[int, ...]:
        return tuple(indices(key, i).tolist())

    draws = [draw(key, i) for key in (KEY, jax.random.key(1)) for i in (0, 1, 10, 20)]
    assert len(set(draws)) == len(draws)
    assert draw(KEY, 10) == draws[2]


def test_what_an_epoch_leaves_out_changes() -> None:
    draw = jax.vmap(lambda i: minibatch_indices(KEY, i, samples=10, batch_size=3))
    epochs = np.asarray(draw(jnp.arange(36))).reshape(12, 9)
    missing = [set(range(10)) - set(rows.tolist()) for rows in epochs]
    assert all(len(rows) == 1 for rows in missing)
    assert len(set().union(*missing)) > 4


def test_equals_itself_under_jit_and_vmap() -> None:
    def draw(key: Array, i: Array) -> Array:
        return minibatch_indices(key, i, samples=1797, batch_size=16)

    keys, numbers = jax.random.split(KEY, 2), jnp.array([0, 112])
    with jax.disable_jit():
        loop = np.stack([[draw(key, i) for i in numbers] for key in keys])
    both = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
    np.testing.assert_array_equal(jax.jit(both)(keys, numbers), loop)


@pytest.mark.parametrize("over", ["keys", "epochs"])
@pytest.mark.parametrize("n", [16, 23, 50])
def test_every_position_takes_every_value_alike(n: int, over: str) -> None:
    """Chi-square of the table position by value over 20,000 draws: (n - 1)^2 degrees of freedom.

    Below n = 16 or so eight rounds of a Feistel network leave a trace, whatever the hash.
    """
    draws = many(over, 20_000, n, n)
    table = np.stack([np.bincount(column, minlength=n) for column in draws.T])
    assert in_bulk(table, (n - 1) ** 2)


@pytest.mark.parametrize("over", ["keys", "epochs"])
@pytest.mark.parametrize("n", [16, 23, 50])
def test_neighbours_take_every_pair_of_values_alike(n: int, over: str) -> None:
    draws = many(over, 50_000, 2, n)
    table = np.bincount(draws @ [n, 1], minlength=n * n).reshape(n, n)
    assert not table.diagonal().any()
    table = table[~np.eye(n, dtype=bool)]
    assert in_bulk(table, len(table) - 1)


@pytest.mark.parametrize("n", [16, 23, 50])
def test_neighbouring_epochs_are_independent(n: int) -> None:
    """Chi-square of the table: what position 0 takes in an epoch, by what it takes in the next."""
    first = many("epochs", 50_000, 1, n)[:, 0].reshape(-1, 2)
    table = np.bincount(first @ [n, 1], minlength=n * n)
    assert in_bulk(table, len(table) - 1)


def many(over: str, draws: int, positions: int, n: int) -> np.ndarray:
    """What the first positions take under many keys, numbered as users number them, or epochs."""
    numbers = jnp.arange(draws)
    keys = jax.vmap(jax.random.key)(numbers)

    def draw(key: Array, epoch: Array) -> Array:
        return permuted(key, epoch, jnp.arange(positions), n)

    if over == "keys":
        return np.asarray(jax.jit(jax.vmap(draw, (0, None)))(keys, 0))
    return np.asarray(jax.jit(jax.vmap(draw, (None, 0)))(jax.random.key(n), numbers))


def in_bulk(table: np.ndarray, degrees: int) -> bool:
    """Whether a table's chi-square is as it would be if all of its cells were alike."""
    statistic = ((table - table.mean()) ** 2).sum() / table.mean()
    return 0.0005 < stats.chi2.cdf(statistic, degrees) < 0.9995


@pytest.mark.parametrize(
    ("samples", "batch_size", "message"),
    [
        (10, 0, "batch_size must be an integer of at least 1, got 0"),
        (10, 2.5, "batch_size must be an integer of at least 1, got 2.5"),
        (10, 11, "batch_size must be between 1 and samples = 10, got 11"),
        (0, 1, "samples must be an integer of at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_sizes_are_refused(samples, batch_size, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        minibatch_indices(KEY, 0, samples=samples, batch_size=batch_size)

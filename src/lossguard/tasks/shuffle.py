"""Shuffling without a permutation: where minibatch number i lies is a pure function of (key, i).

A keyed bijection of 0..n-1 is evaluated at the positions that are asked for, so that nothing is
sorted or stored, and any minibatch can be drawn again. It is a Feistel network on pairs in
Z_a x Z_b with a b >= n, each half added to modulo its radix, and values that fall outside 0..n-1
are encrypted again until they fall inside (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002, methods 2 and 3). a b exceeds n by less than a, so that this is rare.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from ..validation import check_count

ROUNDS = 8
"""Enough from about n = 16 on; below that the bijection is measurably uneven."""


def minibatch_indices(
    key: PRNGKeyArray, i: Int[Array, ""] | int, *, samples: int, batch_size: int
) -> Int[Array, " batch"]:
    """The indices of minibatch number i: epoch-wise shuffling without replacement.

    An epoch has ``samples // batch_size`` minibatches, no two of which share an index; the few
    samples that are left over differ from epoch to epoch.

    Raises:
        ValueError: if samples isn't an integer of at least 1, or batch_size of 1 .. samples.

    >>> key = jax.random.key(0)
    >>> epoch = [minibatch_indices(key, i, samples=10, batch_size=5) for i in (0, 1)]
    >>> sorted(int(j) for batch in epoch for j in batch)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    samples, batch_size = check_count("samples", samples), check_count("batch_size", batch_size)
    if batch_size > samples:
        raise ValueError(f"batch_size must be between 1 and samples = {samples}, got {batch_size}")
    epoch, within = jnp.divmod(jnp.asarray(i, jnp.int32), samples // batch_size)
    positions = within * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    return permuted(key, epoch, positions, samples)


def permuted(
    key: PRNGKeyArray, epoch: Int[Array, ""] | int, positions: Int[Array, " m"], n: int
) -> Int[Array, " m"]:
    """The images of ``positions`` under the bijection of 0..n-1 that key and epoch name."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    round_keys = _round_keys(key, epoch)

    def encrypt(x: UInt32[Array, " m"]) -> UInt32[Array, " m"]:
        left, right, radix, other = x % a, x // a, a, b
        for round_key in round_keys:
            moved = left + _hash(right ^ round_key) % radix  # the hash alone may overflow the sum
            left, right = right, moved % radix
            radix, other = other, radix
        return left + a * right  # ROUNDS is even: the halves are back in their places

    x = encrypt(positions.astype(jnp.uint32))
    if a * b > n:
        x = jax.lax.while_loop(
            lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, encrypt(x), x), x
        )
    return x.astype(jnp.int32)


def _round_keys(key: PRNGKeyArray, epoch: Int[Array, ""] | int) -> UInt32[Array, " rounds"]:
    """One number a round, hashed from the key, the epoch and the round.

    ``jax.random`` runs loops on a CPU, which a compiler can't merge where several lanes draw the
    same minibatch: that took a third of the loss guard's time on small problems.
    """
    words = jnp.append(jax.random.key_data(key).ravel(), jnp.asarray(epoch, jnp.uint32))
    mixed = jnp.arange(1, ROUNDS + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for word in words:
        mixed = _hash(mixed + word)
    return mixed


def _hash(x: UInt32[Array, " m"]) -> UInt32[Array, " m"]:
    """The 32-bit finalizer of MurmurHash3, in which every input bit flips every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

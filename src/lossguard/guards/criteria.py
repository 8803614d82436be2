"""When is a learned lane better? Rules over paired differences of check losses.

A criterion sees d[j] = (fallback's loss - learned lane's loss) on check minibatch j, which is the
same for both, so that what they share of its noise cancels. m learned lanes are tested at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import stdtrit

from ..validation import check_confidence, check_count, checked_looks


class Criterion(NamedTuple):
    """``test(d, n)`` says which learned lanes are better, and which are settled either way.

    ``d`` is [m, most], of which the first n columns count: training minibatches, then check ones.
    """

    test: Callable[
        [Float[Array, "m most"], Int[Array, ""]], tuple[Bool[Array, " m"], Bool[Array, " m"]]
    ]
    looks: tuple[int, ...] | None = None
    """Numbers of check minibatches after which the test is asked, until all lanes are settled;
    None: once, after nc."""
    least: int = 1
    """Check minibatches without which the test can't be asked."""
    training: int = 0
    """Training minibatches, a cycle's last, whose losses count as well."""


def mean_criterion(*, training: int = 0) -> Criterion:
    """Better is a lower mean: mean(d) > 0. The paper's criterion (1).

    A loss before the step that trains on its minibatch is as fresh as a check's, and free
    (progressive validation: Blum, Kalai and Langford, COLT 1999). So with ``training`` few check
    minibatches do, or none (nc = 0). But it is of where a lane was in the cycle: what the last step
    has done, check minibatches alone see.

    Args:
        training: how many of a cycle's training losses, the last, count beside the check losses.

    Raises:
        ValueError: if training is no integer, or negative.

    >>> better, _ = mean_criterion().test(jnp.array([[1.0, -3.0], [1.0, 0.0]]), jnp.int32(2))
    >>> better.tolist()
    [False, True]
    """

    def test(d: Array, n: Array) -> tuple[Array, Array]:
        mean, _ = moments(d, n)
        return mean > 0, jnp.ones(len(d), bool)

    training = check_count("training", training, least=0)
    return Criterion(test, least=0 if training else 1, training=training)


def paired_criterion(*, confidence: float = 0.95) -> Criterion:
    """Better is a lower mean at a stated confidence: Student's one-sided paired t-test.

        mean(d) > t(1 - a; n - 1) sd(d) / sqrt(n),   a = (1 - confidence) / m

    Of two equal lanes the learned one is kept at most at the rate 1 - confidence, if the
    differences are normal (each is a mean over a minibatch). With m learned lanes that holds for
    all of them together (Bonferroni).

    Raises:
        ValueError: if confidence is not at least 0.5 and below 1.

    >>> d = jnp.array([[2.0, 3.0, 2.5], [2.0, -3.0, 5.0]])
    >>> paired_criterion().test(d, jnp.int32(3))[0].tolist()  # both means are above 0
    [True, False]
    """
    confidence = check_confidence(confidence)
    return Criterion(lambda d, n: _t_test(d, n, (1 - confidence) / len(d)), least=2)


def sequential_criterion(*, confidence: float = 0.95, first: int = 5, most: int = 160) -> Criterion:
    """The paired test, asked after ``first`` check minibatches, then twice as many, and so on.

    It stops as soon as every learned lane is better, or worse, at the confidence, so that clear
    cases cost less than nc and close ones are settled. Each of the k looks is a t-test at level
    (1 - confidence) / (k m): by the union bound the rate over all looks is at most 1 - confidence.
    This is alpha spending (Lan and DeMets, Biometrika 1983) in equal parts, each paid in full;
    doubling keeps k small.
    What the last look doesn't settle is the fallback's.

    A gap g with standard deviation s of the differences is settled at about the first look with
    n >= (t s / g)^2, t the quantile of that look.

    Args:
        confidence: of the looks together.
        first: check minibatches before the first look.
        most: those before the last.

    Raises:
        ValueError: if confidence is not at least 0.5 and below 1, first is below 2, most below
            first, or either no integer.

    >>> sequential_criterion(first=5, most=30).looks
    (5, 10, 20, 30)
    """
    confidence = check_confidence(confidence)
    looks = checked_looks(first, most)
    share = (1 - confidence) / len(looks)
    return Criterion(lambda d, n: _t_test(d, n, share / len(d)), looks)


def curtailed_criterion(*, confidence: float = 0.7, first: int = 10, most: int = 160) -> Criterion:
    """A lower mean of ``most`` check minibatches, given up early where it is clearly not lower.

    After ``first`` minibatches, then twice as many, and so on, it stops if every learned lane is
    worse by the paired test, at level (1 - confidence) / (k m) at each of the k looks before the
    last. So a learned lane is kept by the mean of ``most`` alone, as by ``mean_criterion`` with nc
    = ``most``, and few minibatches are spent on one that loses. One that isn't worse is given up
    early at most at the rate 1 - confidence, if differences are normal, which costs a gain and does
    no harm.

    Source: stochastic curtailment for futility (Lan, Simon and Halperin, Sequential Analysis 1982).

    Args:
        confidence: of the looks together.
        first: check minibatches before the first look.
        most: those by which a learned lane is kept.

    Raises:
        ValueError: as ``sequential_criterion``.

    >>> curtailed_criterion(first=5, most=30).looks
    (5, 10, 20, 30)
    """
    confidence = check_confidence(confidence)
    looks = checked_looks(first, most)
    share = (1 - confidence) / max(len(looks) - 1, 1)

    def test(d: Array, n: Array) -> tuple[Array, Array]:
        better, settled = _t_test(d, n, share / len(d))
        last = n >= looks[-1]
        return last & (moments(d, n)[0] > 0), last | (settled & ~better)

    return Criterion(test, looks)


def _t_test(
    d: Float[Array, "m most"], n: Int[Array, ""], level: float
) -> tuple[Bool[Array, " m"], Bool[Array, " m"]]:
    mean, deviation = moments(d, n)
    samples = np.arange(2, d.shape[1] + 1)
    quantiles = np.concatenate([[np.inf, np.inf], stdtrit(samples - 1, 1 - level)])
    bound = jnp.asarray(quantiles, d.dtype)[n] * deviation / jnp.sqrt(n.astype(d.dtype))
    better, worse = mean > bound, -mean > bound
    return better, better | worse


def moments(
    d: Float[Array, "m most"], n: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Mean and standard deviation of the first n columns."""
    counts, n = jnp.arange(d.shape[1]) < n, n.astype(d.dtype)
    mean = jnp.where(counts, d, 0).sum(axis=1) / n
    squares = jnp.where(counts, (d - mean[:, None]) ** 2, 0).sum(axis=1)
    return mean, jnp.sqrt(squares / jnp.maximum(n - 1, 1))

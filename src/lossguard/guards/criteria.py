"""When is a learned lane better? Rules over paired differences of check losses.

A criterion sees d[j] = (fallback's loss - learned lane's loss) on check minibatch j, which is the
same for both, so that what they share of its noise cancels. m learned lanes are tested at once.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

Undecided = Literal["fallback", "mean"]


class Criterion(NamedTuple):
    """``test(d, n)`` says which learned lanes are better, and which are settled either way.

    ``d`` is [m, most], of which the first n columns count.
    """

    test: Callable[
        [Float[Array, "m most"], Int[Array, ""]], tuple[Bool[Array, " m"], Bool[Array, " m"]]
    ]
    looks: tuple[int, ...] | None = None
    """Numbers of check minibatches after which the test is asked, until all lanes are settled;
    None: once, after nc."""
    least: int = 1
    """Check minibatches without which the test can't be asked."""


def mean_criterion() -> Criterion:
    """Better is a lower mean: mean(d) > 0. The paper's criterion (1)."""

    def test(d: Array, n: Array) -> tuple[Array, Array]:
        mean, _ = moments(d, n)
        return mean > 0, jnp.ones(len(d), bool)

    return Criterion(test)


def paired_criterion(*, confidence: float = 0.95) -> Criterion:
    """Better is a lower mean at a stated confidence: Student's one-sided paired t-test.

        mean(d) > t(1 - a; n - 1) sd(d) / sqrt(n),   a = (1 - confidence) / m

    Of two equal lanes the learned one is kept at most at the rate 1 - confidence, if the
    differences are normal (each is a mean over a minibatch). With m learned lanes that holds for
    all of them together (Bonferroni).

    Raises:
        ValueError: if confidence is not between 0.5 and 1.
    """
    _check_confidence(confidence)
    return Criterion(lambda d, n: _t_test(d, n, (1 - confidence) / len(d)), least=2)


def sequential_criterion(
    *,
    confidence: float = 0.95,
    first: int = 5,
    most: int = 160,
    undecided: Undecided = "fallback",
) -> Criterion:
    """The paired test, asked after ``first`` check minibatches, then twice as many, and so on.

    It stops as soon as every learned lane is better, or worse, at the confidence, so that clear
    cases cost less than nc and close ones are settled. Each of the k looks is a t-test at level
    (1 - confidence) / (k m): by the union bound the rate over all looks is at most 1 - confidence.
    This is alpha spending in equal parts (Lan and DeMets, Biometrika 1983); doubling keeps k small.

    A gap g with standard deviation s of the differences is settled at about the first look with
    n >= (t s / g)^2, t the quantile of that look.

    Args:
        confidence: of the looks together.
        first: check minibatches before the first look.
        most: those before the last.
        undecided: what is kept where the last look doesn't settle it: "fallback", so that a
            learned lane is kept on evidence only; or "mean", the lower mean of all ``most``. Then
            the last look is no test (k is one less), and the rule is ``mean_criterion`` with nc =
            ``most``, cut short where the outcome is clear (stochastic curtailment: Lan, Simon and
            Halperin, Sequential Analysis 1982).

    Raises:
        ValueError: if confidence is not between 0.5 and 1, first is below 2, most below first, or
            undecided neither of the two.
    """
    _check_confidence(confidence)
    if not 2 <= first <= most:
        raise ValueError(f"first must be between 2 and most = {most}, got {first}")
    if undecided not in get_args(Undecided):
        raise ValueError(
            f"undecided must be one of {', '.join(get_args(Undecided))}, got {undecided!r}"
        )
    looks = [first]
    while looks[-1] < most:
        looks.append(min(2 * looks[-1], most))
    tests = len(looks) - (undecided == "mean")
    share = (1 - confidence) / max(tests, 1)

    def test(d: Array, n: Array) -> tuple[Array, Array]:
        better, settled = _t_test(d, n, share / len(d))
        if undecided == "mean":
            better = jnp.where(n < most, better, moments(d, n)[0] > 0)
        return better, settled

    return Criterion(test, tuple(looks))


def _t_test(
    d: Float[Array, "m most"], n: Int[Array, ""], level: float
) -> tuple[Bool[Array, " m"], Bool[Array, " m"]]:
    mean, deviation = moments(d, n)
    samples = np.arange(2, d.shape[1] + 1)
    quantiles = np.concatenate([[np.inf, np.inf], stats.t.ppf(1 - level, samples - 1)])
    bound = jnp.asarray(quantiles, d.dtype)[n] * deviation / jnp.sqrt(n)
    better, worse = mean > bound, -mean > bound
    return better, better | worse


def moments(
    d: Float[Array, "m most"], n: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Mean and standard deviation of the first n columns."""
    counts = jnp.arange(d.shape[1]) < n
    mean = jnp.where(counts, d, 0).sum(axis=1) / n
    squares = jnp.where(counts, (d - mean[:, None]) ** 2, 0).sum(axis=1)
    return mean, jnp.sqrt(squares / jnp.maximum(n - 1, 1))


def _check_confidence(confidence: float) -> None:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be at least 0.5 and below 1, got {confidence!r}")

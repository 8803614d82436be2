"""When is a learned lane better? Rules over paired differences of check losses.

A criterion sees d[j] = (fallback's loss - learned lane's loss) on check minibatch j, which is the
same for both, so that what they share of its noise cancels. m learned lanes are tested at once.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossguard.torch.quantile import student_quantile
from lossguard.validation import check_confidence, check_count, checked_looks

Differences = NDArray[np.float64]
Answers = tuple[NDArray[np.bool_], NDArray[np.bool_]]


class Criterion(NamedTuple):
    """A rule for keeping a learned lane.

    Attributes:
        test: from d [m, n], which learned lanes are better, and which are settled either way.
        looks: numbers of check minibatches after which the test is asked, until all lanes are
            settled; None: once, after nc.
        least: check minibatches without which the test can't be asked.
        training: training minibatches, a cycle's last, whose losses count as well, before those of
            check minibatches.
    """

    test: Callable[[Differences], Answers]
    looks: tuple[int, ...] | None = None
    least: int = 1
    training: int = 0


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

    >>> mean_criterion().test(np.array([[1.0, -3.0], [1.0, 0.0]]))[0].tolist()
    [False, True]
    """
    training = check_count("training", training, least=0)
    return Criterion(_mean_test, least=0 if training else 1, training=training)


def paired_criterion(*, confidence: float = 0.95) -> Criterion:
    """Better is a lower mean at a stated confidence: Student's one-sided paired t-test.

        mean(d) > t(1 - a; n - 1) sd(d) / sqrt(n),   a = (1 - confidence) / m

    Of two equal lanes the learned one is kept at most at the rate 1 - confidence, if the
    differences are normal; with m learned lanes that holds for all together (Bonferroni).

    Raises:
        ValueError: if confidence is not at least 0.5 and below 1.

    >>> d = np.array([[2.0, 3.0, 2.5], [2.0, -3.0, 5.0]])
    >>> paired_criterion().test(d)[0].tolist()  # both means are above 0
    [True, False]
    """
    confidence = check_confidence(confidence)
    return Criterion(partial(_t_test, level=1 - confidence), least=2)


def sequential_criterion(*, confidence: float = 0.95, first: int = 5, most: int = 160) -> Criterion:
    """The paired test, asked after ``first`` check minibatches, then twice as many, and so on.

    It stops as soon as every learned lane is better, or worse, at the confidence. Each of the k
    looks is a t-test at level (1 - confidence) / (k m), so that the rate over all looks is at most
    1 - confidence. What the last look doesn't settle is the fallback's.

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
    return Criterion(partial(_t_test, level=(1 - confidence) / len(looks)), looks)


def curtailed_criterion(*, confidence: float = 0.7, first: int = 10, most: int = 160) -> Criterion:
    """A lower mean of ``most`` check minibatches, given up early where it is clearly not lower.

    After ``first`` minibatches, then twice as many, and so on, it stops if every learned lane is
    worse by the paired test, at level (1 - confidence) / (k m) at each of the k looks before the
    last. So a learned lane is kept by the mean of ``most`` alone, and few minibatches are spent on
    one that loses.

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
    level = (1 - confidence) / max(len(looks) - 1, 1)
    return Criterion(partial(_curtailed_test, level=level, most=looks[-1]), looks)


def _mean_test(d: Differences) -> Answers:
    return d.mean(axis=1) > 0, np.ones(len(d), bool)


def _curtailed_test(d: Differences, level: float, most: int) -> Answers:
    if d.shape[1] == most:
        return _mean_test(d)
    better, settled = _t_test(d, level)
    return np.zeros(len(d), bool), settled & ~better


def _t_test(d: Differences, level: float) -> Answers:
    m, n = d.shape
    mean, deviation = d.mean(axis=1), d.std(axis=1, ddof=1)
    bound = student_quantile(n - 1, 1 - level / m) * deviation / np.sqrt(n)
    better, worse = mean > bound, -mean > bound
    return better, better | worse

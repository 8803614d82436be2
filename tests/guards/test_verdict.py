"""Which lane is kept, by lanes' check losses as they are given."""

import jax.numpy as jnp
import numpy as np
import pytest
from lossguard.guards.verdict import follow_first, judge

import lossguard

NAN, INF = np.nan, np.inf
MEAN = lossguard.mean_criterion()
pytestmark = pytest.mark.usefixtures("eager")


def judged(losses, m: int = 1, criterion=MEAN, sound=None):
    """The verdict on each lane's two losses, or one for both. What is not drawn is NaN."""
    checks = np.full((len(losses), 4), NAN, np.float32)
    for row, loss in zip(checks, losses, strict=True):
        row[:2] = loss
    sound = [True] * len(losses) if sound is None else sound
    return judge(criterion, jnp.array(checks), jnp.int32(2), jnp.array(sound), m)


@pytest.mark.parametrize(
    ("losses", "m", "row"),
    [
        # y, z
        ([1, 2], 1, 0),
        ([2, 1], 1, 1),
        ([1, 1], 1, 1),
        ([NAN, 1], 1, 1),
        ([-INF, 1], 1, 1),
        ([1, NAN], 1, 0),
        ([1, -INF], 1, 0),
        ([INF, NAN], 1, -1),
        # y, z, s: who won is compared with s, whose is a tie
        ([1, 2, 3], 1, 0),
        ([2, 1, 3], 1, 1),
        ([3, 2, 1], 1, 2),
        ([1, 2, 1], 1, 2),
        ([2, 1, 1], 1, 2),
        ([1, 2, NAN], 1, 0),
        ([2, 1, -INF], 1, 1),
        ([NAN, INF, 5], 1, 2),
        ([-INF, 1, 2], 1, 1),
        ([NAN, -INF, INF], 1, -1),
        # two of y, z
        ([2, 1, 3], 2, 1),
        ([1, 1, 2], 2, 0),
        ([1, 2, 1], 2, 2),
        ([3, 2, 1], 2, 2),
        ([NAN, 1, 2], 2, 1),
        ([-INF, 3, 2], 2, 2),
        ([NAN, 3, INF], 2, 1),
        # two of y, z, s
        ([2, 1, 3, 1.5], 2, 1),
        ([2, 1, 3, 0.5], 2, 3),
        ([4, 3, 1, 2], 2, 2),
    ],
)
def test_the_row_that_is_kept(losses, m, row) -> None:
    assert judged(losses, m).row == row


@pytest.mark.parametrize(
    ("sound", "row"),
    [((0, 1, 1), 2), ((0, 1, 0), 1), ((1, 0, 0), 0), ((0, 0, 1), 2), ((0, 0, 0), -1)],
)
def test_a_lane_that_is_not_sound_is_not_kept(sound, row) -> None:
    """However low its losses are: here y before s before z."""
    assert judged([1, 3, 2], sound=[bool(one) for one in sound]).row == row


def test_means_of_what_was_drawn_are_compared() -> None:
    assert judged([[1, 4], [3, 1]]).row == 1
    assert judged([[1, 4], [3, 3]]).row == 0


@pytest.mark.parametrize(
    ("losses", "m", "best", "told", "finite"),
    [
        ([1, 2], 1, (0, 1), (1, 2), (True, True)),
        ([3, 1, 2], 2, (1, 2), (1, 2), (True, True)),
        ([3, 4, 2], 1, (0, 2), (3, 2), (True, True)),  # z or s
        ([3, 2, 2], 1, (0, 2), (3, 2), (True, True)),
        ([3, 2, 4], 1, (0, 1), (3, 2), (True, True)),
        ([3, NAN, 4], 1, (0, 2), (3, 4), (True, True)),
        ([NAN, 5, 2], 2, (1, 2), (5, 2), (True, True)),  # any of several
        ([-INF, 5], 1, (0, 1), (-INF, 5), (False, True)),
        ([1, NAN], 1, (0, 1), (1, NAN), (True, False)),
        ([1, NAN, INF], 1, (0, 2), (1, INF), (True, False)),
    ],
)
def test_what_is_told_of_either_side(losses, m, best, told, finite) -> None:
    verdict = judged(losses, m)
    assert (verdict.best_learned, verdict.best_fallback) == best
    np.testing.assert_array_equal((verdict.learned_loss, verdict.fallback_loss), told)
    assert (verdict.finite_learned, verdict.finite_fallback) == finite


CLEAR, CLOSE, WORSE = [1.0, 1.1], [0.0, 1.9], [3.0, 3.1]  # than 2


@pytest.mark.parametrize(
    ("learned", "row", "settled"),
    [
        ([CLEAR], 0, True),
        ([CLOSE], 1, False),
        ([WORSE], 1, True),
        ([[NAN, 0.0]], 1, True),
        ([CLEAR, WORSE], 0, True),
        ([CLOSE, CLEAR], 1, False),  # though the other's mean is lower
    ],
)
@pytest.mark.parametrize("hedged", [False, True])
def test_a_lane_is_kept_only_by_the_criterion(learned, row, settled, hedged) -> None:
    """Lane s needs none: it is compared by its mean with the one that is kept."""
    criterion = lossguard.sequential_criterion(confidence=0.8, first=2, most=4)
    m = len(learned)
    verdict = judged([*learned, 2, *([1.9] if hedged else [])], m, criterion)
    assert verdict.row == (m + 1 if hedged and row == m else row)
    assert bool(verdict.settled) == settled


@pytest.mark.parametrize(("sound", "row"), [([True, False], 0), ([False, True], -1)])
def test_unchecked_the_first_is_kept_if_sound(sound, row) -> None:
    verdict = follow_first(jnp.array(sound), jnp.dtype("float32"))
    assert (verdict.row, verdict.finite_fallback) == (row, sound[0])
    assert np.isnan([verdict.learned_loss, verdict.fallback_loss]).all()
    assert verdict.settled and verdict.finite_learned

"""What a wrong decision costs at most, of which theory.md has the numbers."""

from lossguard.guards.criteria import Criterion
from scipy import optimize, stats

import lossguard

CONFIDENCE = 0.95
MEAN = lossguard.mean_criterion()
PAIRED = lossguard.paired_criterion(confidence=CONFIDENCE)


def dearest(criterion: Criterion, n: int) -> float:
    """max_u u P(kept), where a lane is worse by u s / sqrt(n), and differences are normal."""
    t = stats.t.ppf(CONFIDENCE, n - 1)

    def cost(u: float) -> float:
        return u * (stats.norm.sf(u) if criterion is MEAN else stats.nct.sf(t, n - 1, -u))

    return -optimize.minimize_scalar(lambda u: -cost(u), bounds=(0.01, 5), method="bounded").fun

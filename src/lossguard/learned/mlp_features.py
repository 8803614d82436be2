"""What the MLP optimizer sees, in numbers that JAX and PyTorch share. Imports neither."""

import math

import numpy as np

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SECOND_MOMENT_DECAY = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
"""Decays of the running means before meta-training."""
FEATURES = 28
"""Of a coordinate."""
TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Scales of the number of steps, which all coordinates see."""
OUTPUTS = 2
"""Direction and magnitude."""
SCALE = 1e-3
"""Of the step, and of the magnitude in its exponent."""
AGES = (100, 1_000, 10_000)
"""Steps from which on each of three powers of the time takes effect."""
SCALING = 4 + len(AGES)
"""What the size of a tensor's step depends on: its own size, and the time."""
LEAKS = (0.1, 0.1, 0.03, 0.03, 0.01, 0.01, 0.003, 0.001)
"""Of the scheduler's units: the share of the way to its input that each goes in a step."""
UNITS = len(LEAKS)
SIGNALS = 15
"""What the scheduler sees of a tensor."""
LARGEST = 4.0
"""Of a signal, and of the logarithm of the scheduler's factor."""
TINY = 1e-20
"""Added to mean squares before their logarithm is taken."""


def size_features(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """What the size of a step depends on, of a tensor of n coordinates.

    1, ln(n / 1000), 0, 0 with two or more axes, else 0, 0, 1, ln(n / 30).

    >>> size_features((1000, 1)), size_features((30,))
    ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    """
    n = max(math.prod(shape), 1)
    if len(shape) > 1:
        return 1.0, math.log(n / 1000), 0.0, 0.0
    return 0.0, 0.0, 1.0, math.log(n / 30)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The second longest and the longest axis, over which a factored second moment is a mean.

    None with fewer than two axes, or no coordinates. Of axes of one length the last is the longest.

    >>> factored_axes((3, 3, 16, 32)), factored_axes((4, 4)), factored_axes((5,))
    ((2, 3), (0, 1), None)
    """
    if len(shape) < 2 or 0 in shape:
        return None
    *_, shorter, longer = np.argsort(shape, kind="stable")
    return int(shorter), int(longer)

"""What counts as finite, and how often it is read from the device."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard.torch.inner import finite

HUGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"exp_avg": torch.ones(3), "step": 2, "k": None}, True),
        ({"exp_avg": torch.tensor([1.0, math.nan])}, False),
        ([torch.ones(2), (torch.tensor([math.inf, -math.inf]),)], False),
        ([{"lr": math.nan}, torch.ones(2)], False),
        (torch.full((3,), HUGE), True),  # whose sum isn't
        ([torch.full((1,), HUGE), torch.full((1,), HUGE)], True),
        (torch.full((3,), 6e4, dtype=torch.float16), True),
        (torch.full((2,), 1e300, dtype=torch.float64), True),  # too large for single precision
        (torch.tensor([complex(0, math.inf)]), False),
        (torch.tensor([2**62, 2**62]), True),
        ([], True),
    ],
)
def test_finite(value, expected):
    assert finite(value) is expected


def test_all_tensors_are_read_at_once():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    with Reads() as reads:
        assert finite([torch.ones(2) for _ in range(100)])
    assert reads.count == 0  # no single number is read: all come in one list

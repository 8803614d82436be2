"""What counts as finite, how often it is read from the device, and what a copy shares."""

import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lossguard.torch.guards.memory import Memory, OwnMemory
from lossguard.torch.process import Randomness
from lossguard.torch.tensors import are_finite, finite, stacked, zero_unsound


class Subclass(torch.Tensor):
    """As quantized weights are."""


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
        (torch.tensor([0.0, math.nan]).to_sparse(), False),
        (torch.full((3,), HUGE).to_sparse(), True),
        (torch.ones(2).to(torch.float8_e4m3fn), True),
        (torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn), False),
        (torch.tensor([2**62, 2**62]), True),
        ([], True),
        (torch.ones(2).as_subclass(Subclass), True),
        (torch.tensor([1.0, math.nan]).as_subclass(Subclass), False),
    ],
)
def test_finite(value, expected):
    assert finite(value) is expected


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "kinds",
    [
        [torch.float16, torch.float16],
        [torch.bfloat16],
        [torch.float32, torch.float32],
        [torch.float64],
        [torch.complex64],
        [torch.float32, torch.float64],
    ],
)
def test_one_bad_number_makes_all_gradients_0(kinds, bad):
    params = [torch.nn.Parameter(torch.ones(2, 3, dtype=kind)) for kind in kinds]
    params.append(torch.nn.Parameter(torch.ones(4)))  # that has none
    for of in params[:-1]:
        for p in params[:-1]:
            p.grad = torch.full_like(p, 2)
        if bad is not None:
            of.grad[0, 1] = bad
        assert bool(zero_unsound(params)) == (bad is not None)
        for p in params[:-1]:
            assert torch.equal(p.grad, torch.full_like(p, 2 if bad is None else 0))
    assert not zero_unsound([params[-1]])


def test_numbers_of_the_host_make_those_of_a_device_no_wider():
    """Some devices have no double precision; on the host a loss may be of it."""
    there = torch.ones((), device="meta")
    assert stacked([there, True, 0.1]).dtype == torch.float32
    assert stacked([0.1, there.double()]).dtype == torch.float64
    assert stacked([True, 0.1]).tolist() == [1.0, 0.1]


def test_no_norm_tells_what_is_finite_on_mps(monkeypatch):
    """There the largest of several numbers leaves NaN out."""
    numbers = [torch.tensor([1.0, math.nan]), torch.ones(2)]
    zero = torch.zeros(())
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda tensors, order: zero)
    monkeypatch.setattr(torch.Tensor, "is_mps", True)
    flag = are_finite(numbers)
    monkeypatch.undo()
    assert not flag


def test_a_flag_is_copied_to_a_device_once():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(9)]
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    copies = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            copies.append(func is torch.Tensor.to)
            return func(*args, **(kwargs or {}))

    with Noted():
        assert zero_unsound(params)
    assert sum(copies) == 1 and all(p.grad.tolist() == [0, 0] for p in params)


def test_random_numbers_are_drawn_where_shards_are_gathered():
    mesh = SimpleNamespace(device_type="cuda")
    offloaded = SimpleNamespace(device=torch.device("cpu"), device_mesh=mesh)
    there = SimpleNamespace(device=torch.device("cuda:1"), device_mesh=mesh)
    plain = torch.ones(1)
    of = {"offloaded": [offloaded], "there": [there], "plain": [plain]}
    kept = {name: Randomness(params).generators[1:] for name, params in of.items()}
    assert kept == {
        "offloaded": [(torch.cuda, [torch.device("cuda")])],
        "there": [(torch.cuda, [torch.device("cuda:1")])],
        "plain": [],
    }


def test_a_gradient_may_have_one_number_for_several_places():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(()).expand(3)
    assert not zero_unsound([p])


def test_all_tensors_are_read_at_once():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **kwargs or {})

    with Reads() as reads:
        assert finite([torch.ones(2) for _ in range(100)])
    assert reads.count == 1


def test_a_copy_of_a_memory_shares_within_what_was_shared_within_and_nothing_else():
    step, p = torch.tensor(1.0), torch.nn.Parameter(torch.ones(1))
    memory = Memory({p: {"step": step, "all": [step, (step, 2)]}}, [OrderedDict(b=1, a=step)])
    copied = memory.copy()
    (entries,), (options,) = copied.state.values(), copied.options
    assert [*copied.state] == [p] and next(iter(copied.state)) is p
    assert entries["step"] is entries["all"][0] is options["a"] is not step
    assert entries["all"][1] == (step, 2) and list(options) == ["b", "a"]


class Counts(SGD):
    """Whose group has a bound that is infinite, and a number that its steps change."""

    def __init__(self, params, number):
        super().__init__(params, lr=0.1)
        self.param_groups[0] |= {"bound": math.inf, "number": number}


@pytest.mark.parametrize(("made", "is_finite"), [(1.0, True), (math.nan, False)])
def test_of_a_group_what_was_given_may_be_infinite(made, is_finite):
    p = torch.ones(2, requires_grad=True)
    optimizer = Counts([p], 0.0)
    memory = OwnMemory(optimizer, [p], [p], first=True)
    group = optimizer.param_groups[0]
    group["lr"], group["number"] = math.inf, made  # a rate is no memory
    assert memory.is_finite() == is_finite
    group["made"] = math.inf
    assert not memory.is_finite()


def test_of_a_group_lanes_share_the_settings_alone():
    p = torch.ones(2, requires_grad=True)
    optimizer = Counts([p], 0.0)
    one, other = (OwnMemory(optimizer, [p], [p], first=first) for first in (True, False))
    group = optimizer.param_groups[0]
    group |= {"lr": 0.2, "initial_lr": 0.3, "number": 5.0, "made": 1}
    one.go_out()
    other.go_in()
    assert (group["lr"], group["initial_lr"], group["number"]) == (0.2, 0.3, 0.0)
    assert "made" not in group
    group["lr"] = 0.4
    other.go_out()
    one.go_in()
    assert (group["lr"], group["number"], group["made"]) == (0.4, 5.0, 1)

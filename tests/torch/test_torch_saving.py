"""What a guard saves: whole, its own, and enough to go on from bit by bit."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import (
    KINDS,
    assert_resumes,
    assert_same_state,
    minibatches,
    mlp,
    quadratic,
    refusals_of_damaged,
    refuses,
    run,
    two,
    two_rates,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as names
from torch.optim import SGD, AdamW

from lossguard.torch import BestOf, LossGuard, Recommended
from lossguard.torch.guards import saving


def with_rest(state, change):
    """A copy in which what is in one piece is another."""
    first, *others = state["param_groups"]
    groups = [first | {key: change(first[key]) for key in first.keys() & {"guard"}}, *others]
    return copy.deepcopy({**state, "param_groups": groups})


def opened(state):
    return with_rest(state, lambda rest: saving.unfolded(rest, torch.zeros(())))


def closed(state):
    return with_rest(state, saving.folded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 4, 9, 33])
def test_resumes_bit_by_bit_at_any_point_of_a_cycle(kind, done):
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.2))
    options = {} if kind is LossGuard else {"share": 0.5}
    history = assert_resumes(lambda m: two(kind, m, nt=4, **options), model, minibatches(), done)
    assert len(history) >= 10


@pytest.mark.parametrize("shape", [(), (3,)])
def test_what_is_loaded_goes_to_the_device_of_its_parameter(monkeypatch, shape):
    """As there is one here, tensors that are moved are noted. Counts stay on the host."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: moved.append((t, device)) or t)
    p = torch.zeros(shape, device="meta")
    lane = SimpleNamespace(name="z", optimizer=SimpleNamespace(param_groups=[{}]))
    saved = {"z.memory.step": torch.ones(()), "z.memory.exp_avg": torch.ones(shape)}
    loaded = saving._memory(lane, [p], [saved], {})[p]
    ((tensor, device),) = moved
    assert tensor is loaded["exp_avg"] and device == p.device


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_shares_nothing_with_the_guard(kind):
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    saved = guard.state_dict()
    assert "guard" not in guard.param_groups[0] and not any(guard.state.values())  # no copies stay
    before = copy.deepcopy(saved)
    run(guard, model, minibatches(4))
    assert_same_state(saved, before)
    guard.load_state_dict(saved)
    run(guard, model, minibatches(4))
    assert_same_state(saved, before)


def test_loading_keeps_the_dtype_of_states():
    class Precise(SGD):
        """Keeps its momentum in single precision, beside a count and a list, as SOAP does."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p, dtype=torch.float32))
                state.setdefault("all", [torch.zeros(2), None, "text"])
                state["m"].mul_(0.9).add_(p.grad.float())
                state["all"][0] += 0.1
                p.sub_(0.1 * state["m"].to(p.dtype))

    model = mlp().bfloat16()
    batches = [(x.bfloat16(), labels) for x, labels in minibatches(30)]
    assert_resumes(
        lambda m: two(Recommended, m, lambda ps: Precise(ps, lr=0.1), nt=4), model, batches, 13
    )


def test_options_of_any_kind_are_those_that_an_optimizer_was_built_with():
    """Numbers of NumPy, and objects that can't be loaded safely."""

    class Odd(SGD):
        def __init__(self, params):
            super().__init__(params, lr=np.float64(0.1), weight_decay=np.float64(0.1))
            self.param_groups[0] |= {"half": lambda: 0.5, "scales": [np.float32(0.5)]}

        def step(self, closure=None):
            self.param_groups[0]["scales"] = [self.param_groups[0]["half"]() * 0.9]
            super().step()

    def build(model):
        return two(Recommended, model, Odd, Odd, nt=2)

    assert_resumes(build, model := mlp(), minibatches(30), 13)
    guard = build(model)
    guard.load_state_dict(guard.state_dict())
    (group,) = guard._optimizers["learned"].param_groups
    assert group["half"]() == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_state_of_its_own_is_refused_whole(kind):
    model = mlp()
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    before = guard.state_dict()
    wide = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    foreign = LossGuard if kind is not LossGuard else Recommended
    missing = copy.deepcopy(before)
    del missing["state"][3][f"{guard._leader.name}.value"]
    numbers = opened(before)
    numbers["param_groups"][0]["guard"]["numbers"] = ["something else"]
    forgotten = copy.deepcopy(before)
    for entries in forgotten["state"].values():
        for key in [key for key in entries if ".memory." in key]:
            del entries[key]
    for one, message in (
        (two(kind, nn.Linear(2, 2), nt=3), r"be of a guard with .*'SGD', 4\].* got .*'SGD', 2\]"),
        (two(kind, wide, nt=3), "be of the same model, with a tensor of shape"),
        (two(kind, mlp(nn.BatchNorm1d(16, affine=False)), nt=3), "be of the .* None, got"),
        (two(foreign, mlp(), nt=3), f"be of a guard with {{'kind': '{kind.__name__}'"),
        (two(kind, mlp(), nt=4), "be of a guard with .*'nt': 3.* got .*'nt': 4"),
        (two(kind, mlp(), AdamW, nt=3), "be of a guard with .*'Adam'.* got .*'AdamW'"),
        (SGD(model.parameters()), "be of a .* before the first step"),
        (missing, r"hold .\.value of each parameter, got one without$"),
        (closed(numbers), "have the numbers of"),
        (forgotten, r"hold .\.memory\.\* of parameters, got none$"),
    ):
        with pytest.raises(ValueError, match=f"^state_dict must {message}"):
            guard.load_state_dict(one if isinstance(one, dict) else one.state_dict())
        assert_same_state(guard.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_loaded_whole_or_not_at_all(kind):
    model = mlp(nn.BatchNorm1d(16))
    guard = two(kind, model, nt=3)
    run(guard, model, minibatches(4))
    before = guard.state_dict()
    run(guard, model, minibatches(4))
    open_one = SimpleNamespace(
        state_dict=lambda: opened(guard.state_dict()),
        load_state_dict=lambda state: guard.load_state_dict(closed(state)),
    )
    assert refusals_of_damaged(open_one, opened(before)) > 80


def test_lengths_of_a_cycle_are_plain_numbers():
    """NumPy's carry a type that ``torch.load`` refuses."""
    guard = two(LossGuard, mlp(), nt=np.int64(2), nc=np.int64(1))
    assert type(guard.nt) is type(guard.nc) is int


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied):
    with refuses("a Recommended can't be copied or pickled: build another one, and load state_di"):
        copied(two(Recommended, mlp()))


@pytest.mark.parametrize("kind", KINDS)
def test_history_is_bounded_and_not_saved(kind):
    weight, closure = quadratic(1.0)
    guard = two_rates(kind, weight, 0.01, 0.001, nt=1)
    assert guard.history.maxlen == 1000
    for _ in range(100 if kind is not BestOf else 1100):
        guard.step(closure)
    assert len(guard.history) in (100, 1000)
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    assert file.tell() < 12_000


def by_names(model, guard):
    return {"guard": names.get_optimizer_state_dict(model, guard)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [(), (nn.BatchNorm1d(16),)])
def test_a_distributed_checkpoint_needs_no_ranks(kind, norm, tmp_path):
    """Between two cycles and within one, by one file and by the state of one rank alone."""
    model, batches = mlp(*copy.deepcopy(norm)), minibatches(30)
    guard, twin, whole = two(kind, model, nt=4), copy.deepcopy(model), []
    full = names.StateDictOptions(full_state_dict=True)
    for done, next_ones in ((12, batches[:12]), (14, batches[12:14])):
        run(guard, model, next_ones)
        checkpoint.save(by_names(model, guard), checkpoint_id=tmp_path / f"{done}", no_dist=True)
        whole.append(names.get_optimizer_state_dict(model, guard, options=full))
    run(guard, model, batches[14:])
    for done, of_one in zip((12, 14), whole, strict=True):
        other = two(kind, twin, nt=4)
        state = by_names(twin, other)
        checkpoint.load(state, checkpoint_id=tmp_path / f"{done}", no_dist=True)
        names.set_optimizer_state_dict(twin, other, state["guard"])
        run(other, twin, batches[done:])
        assert_same_state(other.state_dict(), guard.state_dict())
        another = two(kind, twin, nt=4)
        names.set_optimizer_state_dict(twin, another, of_one, options=full)
        run(another, twin, batches[done:])
        assert_same_state(another.state_dict(), guard.state_dict())


def test_steps_that_a_fresh_guard_takes_to_be_saved_draw_nothing():
    class Noisy(SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["noise"] = torch.randn(3)

    guard, before = two(Recommended, mlp(), Noisy, Noisy), torch.get_rng_state()
    assert guard.state_dict()["state"][0]["y.memory.noise"].any()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_optimizer_that_remembers_nothing_is_resumed():
    """Though it has asked for an entry of its state."""

    class Signs(SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                assert self.state[p] == {}
                p.data.sub_(0.01 * p.grad.sign())

    assert_resumes(lambda m: two(Recommended, m, Signs, nt=2), mlp(), minibatches(9), 4)

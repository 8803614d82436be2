"""What ``Rewind`` saves, and where its snapshots are."""

import copy
import errno
import os

import pytest
import torch
from models import loss_fn, minibatches, mlp, refusals_of_damaged, step_by
from rewinding import FALLS, HIGH, WINDOW, assert_same, drive, network, one_weight, train
from torch.distributed import checkpoint

from lossguard.torch import Rewind
from lossguard.torch.rewind.snapshot import Live, copied
from lossguard.torch.tensors import leaves


def save(rewind, model, optimizer, tmp_path, how):
    state = {"rewind": rewind.state_dict()}
    if how == "dcp":
        checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        state = {}
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(parts | state, tmp_path / "state.pt")


def resume(rewind, model, optimizer, tmp_path, how):
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if how == "dcp":
        state = {"rewind": rewind.state_dict()}
        checkpoint.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    rewind.load_state_dict(state["rewind"])


def memories(rewind):
    return [saved.get("optimizer", {}) for saved in (rewind._trusted, rewind._candidate)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "at"), [("torch", 3), ("torch", 70), ("torch", 137), ("dcp", 3), ("dcp", 137)]
)
def test_it_resumes_to_the_last_bit(tmp_path, how, at):
    options = {"window": WINDOW, "every": 8}
    fault = range(125, 140)

    def start(seed=0):
        model, optimizer = network(seed)
        return Rewind(model, optimizer, **options), model, optimizer

    rewind, model, optimizer = start()
    train(model, optimizer, rewind, 0, 200, fault)
    assert rewind.returns >= 1
    first, half, its_optimizer = start()
    train(half, its_optimizer, first, 0, at, fault)
    save(first, half, its_optimizer, tmp_path, how)
    again, twin, its_optimizer = start(seed=1)
    resume(again, twin, its_optimizer, tmp_path, how)
    assert again._trusted.keys() == first._trusted.keys()
    assert bool(first._trusted["optimizer"]) == (at > 64)
    for saved, loaded in zip(memories(first), memories(again), strict=True):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    train(twin, its_optimizer, again, at, 200, fault)
    assert_same(model, twin)
    assert again.scale == rewind.scale and again.thrown == rewind.thrown


def test_a_damaged_state_is_loaded_whole_or_not_at_all():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rewind = Rewind(model, optimizer, window=64, every=4)
    states = []
    for _ in range(2):
        for batch in minibatches(57):
            rewind.observe(step_by(optimizer, loss_fn(model, batch)).detach())
        states.append(rewind.state_dict())
    assert refusals_of_damaged(rewind, states[0]) > 30


def test_snapshots_take_two_copies():
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=16)
    train(model, optimizer, rewind, 0, 100)

    def size(saved):
        tensors = (value for value in leaves(saved) if isinstance(value, torch.Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    live = [*model.state_dict().values()]
    live += [t for entry in optimizer.state.values() for t in entry.values()]
    whole = sum(t.numel() * t.element_size() for t in live)
    assert size(rewind._trusted) == size(rewind._candidate) == whole and rewind._last is None

    def places():
        snapshots = (rewind._trusted, rewind._candidate)
        return {tensor.data_ptr() for one in snapshots for tensor in one["model"].values()}

    kept = places()
    train(model, optimizer, rewind, 100, 200)  # and the same memory is used again
    assert places() == kept


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_copies_elsewhere_change_nothing(device, where, tmp_path):
    runs = []
    for offload in (False, True if where == "host" else tmp_path):
        model, optimizer = network()
        model.to(device)
        model.register_buffer("empty", torch.ones(0, device=device))
        rewind = Rewind(model, optimizer, window=WINDOW, every=8, offload=offload)
        train(model, optimizer, rewind, 0, 200, range(125, 140))
        runs.append((model, rewind))
    (one, plain), (other, rewind) = runs
    assert_same(one, other)
    assert rewind.events == plain.events != []
    live = {t.data_ptr() for t in other.state_dict().values() if t.numel()}
    for saved in (rewind._trusted, rewind._candidate):
        tensors = (value for value in leaves(saved) if isinstance(value, torch.Tensor))
        copies = [t for t in tensors if t.numel()]
        assert len(copies) > 2 * len(live) and live.isdisjoint(t.data_ptr() for t in copies)
        assert all(t.device.type == "cpu" for t in copies)
        assert where == "disk" or device == "cpu" or any(t.is_pinned() for t in copies)
        files = {t.untyped_storage().filename for t in copies}
        assert files == {None} if where == "host" else len(files) == len(copies)
    assert not [*tmp_path.iterdir()]


def test_tensors_in_lists_are_copied_elsewhere_too(tmp_path):
    model, optimizer = one_weight()
    held = optimizer.state[model.weight]["factors"] = [torch.ones(3), (torch.zeros(2),)]
    rewind = Rewind(model, optimizer, window=WINDOW, every=4, offload=tmp_path)
    drive(rewind, model, optimizer, FALLS)
    files = [one.untyped_storage().filename for one in leaves(rewind._trusted["optimizer"])]
    assert len({*files}) == 2 and None not in files
    held[0].add_(1)
    held[1][0].fill_(5)
    drive(rewind, model, optimizer, HIGH[:8])
    first, (second,) = optimizer.state[model.weight]["factors"]
    assert rewind.returns == 1 and first.tolist() == [1, 1, 1] and second.tolist() == [0, 0]


def test_what_is_sparse_is_not_pinned(monkeypatch):
    sparse = torch.eye(3).to_sparse()
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))  # as it is on a GPU
    made = copied(sparse, None, torch.device("cpu"))
    monkeypatch.undo()
    assert torch.equal(made.to_dense(), torch.eye(3)) and made is not sparse


def test_a_state_is_loaded_after_copies_that_are_still_under_way(monkeypatch):
    """As copies from a GPU into the host's memory may be, until the host waits for it."""
    model, optimizer = network()
    rewind = Rewind(model, optimizer, window=WINDOW, every=8)
    train(model, optimizer, rewind, 0, 80)
    state = copy.deepcopy(rewind.state_dict())
    train(model, optimizer, rewind, 80, 120)
    save, are_finite, under_way = Live.save, Live.are_finite, []

    def save_late(self, old=None):
        saved = save(self, old)
        under_way.append((copy.deepcopy(saved), saved))
        return saved

    def wait(self=None):
        while under_way:
            copied(*under_way.pop())
        return self and are_finite(self)

    monkeypatch.setattr(Live, "save", save_late)
    monkeypatch.setattr(Live, "are_finite", wait)
    rewind.load_state_dict(state)
    wait()
    torch.testing.assert_close(rewind._trusted["model"], state["trusted"]["model"], rtol=0, atol=0)


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    """Not a signal that ends the process, as where a file without blocks is written to."""
    asked = []

    def full(number, start, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, optimizer = network()
    with pytest.raises(OSError, match="No space left"):
        Rewind(model, optimizer, offload=tmp_path)
    assert asked == [next(model.parameters()).nbytes]

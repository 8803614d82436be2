"""What ``Rewind`` saves, and goes on from."""

import copy

import pytest
import torch
from models import refusals_of_damaged
from rewinding import FAULT, assert_same, network, train
from torch.distributed import checkpoint

from lossguard.torch import Rewind
from lossguard.torch.rewind.store import Live, copied


def start(seed=0, **options):
    model, optimizer = network(seed)
    return Rewind(model, optimizer, **options), model, optimizer


def saved(tmp_path, rewind, model, optimizer, **options):
    parts = [model.state_dict(), optimizer.state_dict(), rewind.state_dict(**options)]
    torch.save(parts, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def load(parts, rewind, model, optimizer):
    for one, state in zip((model, optimizer, rewind), parts, strict=True):
        one.load_state_dict(state)


def whole():
    run = start()
    train(run[1], run[2], run[0], 0, 300, FAULT)
    return run


# Before the first step, between two reads, in the fault, within the trial, after the return.
@pytest.mark.parametrize("at", [0, 3, 70, 210, 243, 260])
def test_it_resumes_to_the_last_bit(tmp_path, at):
    rewind, model, _ = whole()
    assert [event.kind for event in rewind.events] == ["trial", "return"]
    assert rewind.events[0].call < 243 < rewind.events[1].call
    first, half, its_optimizer = start()
    train(half, its_optimizer, first, 0, at, FAULT)
    again, twin, optimizer = start(seed=1)
    load(saved(tmp_path, first, half, its_optimizer), again, twin, optimizer)
    train(twin, optimizer, again, at, 300, FAULT)
    assert_same(model, twin)
    assert again.logged() == rewind.logged()


@pytest.mark.parametrize("at", [0, 70, 243, 260])
def test_without_snapshots_it_goes_on_from_what_is_loaded(tmp_path, at):
    first, half, its_optimizer = start()
    train(half, its_optimizer, first, 0, at, FAULT)
    again, twin, optimizer = start(seed=1)
    parts = saved(tmp_path, first, half, its_optimizer, snapshots=False)
    load(parts, again, twin, optimizer)
    assert again._run.on_trial is None and again.scale == first._run.response.scale
    train(twin, optimizer, again, at, at + 1)
    assert [one.call for one in again._run.store] == [at]
    twin[0].weight.data.fill_(torch.nan)
    again.read()
    assert torch.equal(twin[0].weight, half[0].weight)


@pytest.mark.filterwarnings("ignore")
def test_without_snapshots_it_goes_through_distributed_checkpoints(tmp_path):
    first, half, its_optimizer = start()
    train(half, its_optimizer, first, 0, 100)
    checkpoint.save({"rewind": first.state_dict(snapshots=False)}, checkpoint_id=tmp_path)
    again, *_ = start()
    state = {"rewind": again.state_dict(snapshots=False)}
    checkpoint.load(state, checkpoint_id=tmp_path)
    again.load_state_dict(state["rewind"])
    assert again.logged() == first.logged() and again.calls == 100


def test_a_damaged_state_is_loaded_whole_or_not_at_all():
    rewind, model, optimizer = start()
    states = []
    for k in range(2):
        train(model, optimizer, rewind, 150 * k, 150 * (k + 1))
        states.append(copy.deepcopy(rewind.state_dict()))
    assert refusals_of_damaged(rewind, states[0]) > 30


def test_a_state_is_loaded_after_copies_that_are_still_under_way(monkeypatch):
    """As copies from a GPU into the host's memory may be, until the host waits for it."""
    rewind, model, optimizer = start()
    train(model, optimizer, rewind, 0, 80)
    state = copy.deepcopy(rewind.state_dict())
    train(model, optimizer, rewind, 80, 150)
    made, are_finite, under_way = Live.copy, Live.are_finite, []

    def copy_late(self, old=None):
        content = made(self, old)
        under_way.append((copy.deepcopy(content), content))
        return content

    def wait(self=None):
        while under_way:
            copied(*under_way.pop())
        return self and are_finite(self)

    monkeypatch.setattr(Live, "copy", copy_late)
    monkeypatch.setattr(Live, "are_finite", wait)
    rewind.load_state_dict(state)
    wait()
    for one, row in zip(rewind._run.store, state["store"]["snapshots"], strict=True):
        torch.testing.assert_close(one.content["model"], row[-1]["model"], rtol=0, atol=0)

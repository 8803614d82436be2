"""Under torch.distributed every rank decides the same, with whole models and with shards."""

import pytest
import torch
from ranks import spawn

pytest.importorskip("torch.distributed.fsdp", reason="fully_shard needs PyTorch 2.6")


def test_the_trainer_begins_anew_on_all_ranks_if_one_has_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    assert spawn("rewind_ranks.in_a_trainer", 2, tmp_path) == [0, 0]


def test_two_ranks_decide_the_same_and_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    assert spawn("rewind_ranks.both", 2, tmp_path) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not any(rank[what] for rank in (one, other) for what in ("moved", "alone"))
    assert one["mean"] == other["mean"] == [1.5]
    for kind in ("replicated", "sharded"):
        numbers, events, weights = one[kind]
        assert numbers == other[kind][0] and events == other[kind][1]
        assert numbers[0] == 1 and numbers[2] >= 1
        assert [event[0] for event in events if event[0] != "skipped"] == ["trial", "return"]
        assert events[0][0] == "skipped"
        for mine, its in zip(weights, other[kind][2], strict=True):
            assert torch.equal(mine, its) and mine.isfinite().all()

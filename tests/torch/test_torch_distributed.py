"""Every rank takes the same decision, and the one that a single process would take."""

import time

import pytest
import torch
from models import assert_same_state
from ranks import spawn
from scenarios import CYCLES, alone, by_best_of, by_loss_guard, by_ratchet, by_track_record

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed, "fsdp") or not hasattr(torch.distributed.fsdp, "fully_shard"),
    reason="fully_shard needs PyTorch 2.6, built with distributed",
)


@pytest.fixture(scope="module")
def single():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return alone(by_loss_guard)


def results(scenario, size, folder):
    assert spawn(scenario, size, folder) == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks say to everything, by scenario."""
    ranks = results("two", 2, tmp_path_factory.mktemp("two"))
    return {scenario: [rank[scenario] for rank in ranks] for scenario in ranks[0]}


def winners(result):
    return [decision["winner"] for decision in result["history"]]


def assert_ranks_agree(ranks):
    for other in ranks[1:]:
        assert_same_state(other["model"], ranks[0]["model"])
        assert_same_state(other["history"], ranks[0]["history"])


def assert_is_one_process(ranks, single, lanes=(0, 1)):
    assert_ranks_agree(ranks)
    assert winners(ranks[0]) == winners(single)
    assert set(winners(single)) == set(lanes)
    for key, value in single["model"].items():
        torch.testing.assert_close(ranks[0]["model"][key], value, rtol=1e-3, atol=1e-4)


def test_equal_shards_on_two_ranks(single, two):
    assert_is_one_process(two["ddp"], single)


def test_equal_shards_on_four_ranks(single, tmp_path):
    assert_is_one_process(results("ddp", 4, tmp_path), single)


def test_ranks_look_again_and_back_off_together(two):
    ranks = two["ddp_beyond_the_paper"]
    assert_ranks_agree(ranks)
    history = ranks[0]["history"]
    assert {d["forwards"] > 0 for d in history} == {True, False}


def test_ranks_keep_one_track_record(two):
    torch.manual_seed(0)
    single = alone(by_track_record)
    assert_is_one_process(two["ddp_by_track_record"], single, lanes=(0, 1, 2))
    assert winners(single)[-2:] == [2, 2]  # s leads, and then x goes back; the check was for others


def test_ranks_go_back_to_one_best(two):
    torch.manual_seed(0)
    assert_is_one_process(two["ddp_by_ratchet"], alone(by_ratchet), lanes=(-1, 0))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_follow_one_path(kind, two):
    torch.manual_seed(0)
    assert_is_one_process(two[f"{kind}_by_best_of"], alone(by_best_of))


def test_unequal_shards(two):
    ranks = two["ddp_unequal"]
    assert_ranks_agree(ranks)
    assert len(winners(ranks[0])) == CYCLES


def test_one_rank_whose_loss_turns_nan(two):
    ranks = two["ddp_nan"]
    assert_ranks_agree(ranks)
    history = ranks[0]["history"]
    assert winners(ranks[0])[1:3] == [1, -1]
    assert [d["finite_learned"] for d in history[:4]] == [True, False, False, True]
    assert [d["finite_fallback"] for d in history[:4]] == [True, True, False, True]


def test_a_killed_rank_ends_the_others(tmp_path):
    start = time.monotonic()
    assert spawn("ddp_killed", 2, tmp_path) == [1, 9]
    assert time.monotonic() - start < 60


def test_fully_sharded_is_one_process(single, two):
    ranks = two["fsdp"]
    assert_is_one_process(ranks, single)
    # Copies are of shards, which together are the model once, and take no communication.
    assert sum(rank["shard"] for rank in ranks) == ranks[0]["whole"]
    assert [rank["collectives"] for rank in ranks] == [0, 0]


def test_sharded_parameters_need_the_model(two):
    message = "model must be the sharded module if parameters are sharded, got None"
    assert two["fsdp_needs_the_model"] == [message] * 2

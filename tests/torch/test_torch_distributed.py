"""Every rank takes the same decision, and the one that a single process would take."""

import pytest
import torch
import torch.distributed
from models import assert_same_state, minibatches, mlp, run
from ranks import spawn
from scenarios import KINDS, alone, build
from torch.distributed.checkpoint import state_dict as names

pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed, "fsdp") or not hasattr(torch.distributed.fsdp, "fully_shard"),
    reason="fully_shard needs PyTorch 2.6, built with distributed",
)


def results(scenario, size, folder):
    assert spawn(f"scenarios.{scenario}", size, folder) == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What two ranks say to everything, by scenario."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINTS", str(folder))
        ranks = results("two", 2, folder)
    return {scenario: [rank[scenario] for rank in ranks] for scenario in ranks[0]}


def winners(result):
    return [decision["winner"] for decision in result["history"]]


def assert_ranks_agree(ranks):
    for other in ranks[1:]:
        assert_same_state(other["model"], ranks[0]["model"])
        assert_same_state(other["history"], ranks[0]["history"])


def assert_is_one_process(ranks, single):
    assert_ranks_agree(ranks)
    assert winners(ranks[0]) == winners(single)
    torch.testing.assert_close(ranks[0]["model"], single["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "kind"),
    [(how, kind) for how in ("ddp", "fsdp") for kind in KINDS],
)
def test_two_ranks_are_one_process(how, kind, two):
    assert_is_one_process(two[f"{how} {kind}"], alone(kind))


def test_four_ranks_are_one_process_and_lost_ranks_end_the_others(tmp_path, monkeypatch):
    """One that dies, one that raises, one that has fewer minibatches; in groups of their own."""
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    assert spawn("scenarios.in_groups", 6, tmp_path) == [1, 9, 1, 1, 1, 0]
    four = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert_is_one_process(four, alone("LossGuard"))


def test_shards_are_the_model_once(two):
    ranks = two["fsdp Recommended"]
    assert sum(rank["shard"] for rank in ranks) == ranks[0]["whole"]


def test_unequal_shards(two):
    assert_ranks_agree(two["unequal"])


def test_one_rank_whose_loss_turns_nan(two):
    ranks = two["ddp_nan"]
    assert_ranks_agree(ranks)
    assert winners(ranks[0])[1:3] == [1, -1]


def test_what_one_lane_raises_is_passed_on(two):
    assert two["ddp_raises"] == ["mine", "mine"]


def test_a_file_of_another_ranks_shards_is_refused(two):
    assert two["fsdp_foreign"] == [
        f"state_dict must be of rank {rank}'s own shards, got rank {1 - rank}'s (save and load by "
        "torch.distributed.checkpoint)"
        for rank in range(2)
    ]


def test_sharded_parameters_need_the_model(two):
    message = "model must be the sharded module if parameters are sharded, got None"
    assert two["fsdp_needs_the_model"] == [message] * 2


@pytest.mark.parametrize("of", [*KINDS, "whole"])
def test_a_distributed_checkpoint_goes_on_bit_by_bit(of, two):
    for on, resumed in two[f"dcp {of}"]:
        assert_same_state(resumed["model"], on["model"])
        assert_same_state(resumed["history"], on["history"][len(on["history"]) // 2 :])


def test_it_reshards(folder, two, tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", str(folder))
    (answers,) = results("one", 1, tmp_path)
    for kind, answer in answers.items():
        on, _ = two[f"dcp {kind}"][0]
        assert winners(answer) == winners(on)[len(on["history"]) // 2 :]
        torch.testing.assert_close(answer["model"], on["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_asking_a_fresh_guard_for_its_state_changes_nothing(kind):
    """Its optimizers take a step, for torch.distributed.checkpoint to know what they keep."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ends = []
        for asked in (False, True):
            torch.manual_seed(0)
            model = mlp()
            guard = build(kind, model)
            if asked:
                state = names.get_optimizer_state_dict(model, guard)
                assert "0.weight" in state["state"]
                of_adam = {"1.memory.exp_avg", "y.memory.exp_avg"} & set(state["state"]["0.weight"])
                assert len(of_adam) == 1
                assert guard.param_groups[0]["lr"] == 0.2
            run(guard, model, minibatches(20))
            ends.append(guard.state_dict())
    finally:
        torch.distributed.destroy_process_group()
    assert_same_state(*ends)

"""Where the numbers of several ranks are added up."""

import pytest
import torch
from torch import distributed

from lossguard.torch.distributed import mean_of_ranks


@pytest.mark.parametrize(
    ("backends", "at", "where"),
    [
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("meta:nccl", "cpu", "meta"),  # stands for a group that has no backend for the host
        ("meta:nccl", "meta", "meta"),
    ],
)
def test_numbers_go_where_the_group_has_a_backend(monkeypatch, backends, at, where):
    places = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(distributed, "all_reduce", lambda t, group: places.append(t.device.type))
    mean = mean_of_ranks(torch.ones(3, device=at), None)
    assert places == [where]
    assert where == "meta" or mean.tolist() == [0.5] * 3

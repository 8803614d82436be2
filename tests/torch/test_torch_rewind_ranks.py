"""Under torch.distributed every rank decides the same, with whole models and with shards."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="fully_shard needs PyTorch 2.6")


def test_two_ranks_decide_the_same_and_resume(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, str(Path(__file__).with_name("rewind_ranks.py")), str(tmp_path)]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            program, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=150)
        assert process.returncode == 0, said
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for kind in ("replicated", "sharded"):
        numbers, events, weights = one[kind]
        assert numbers == other[kind][0] and events == other[kind][1]
        assert numbers[0] == 1 and numbers[2] == 1 and len(events) == 1
        for mine, its in zip(weights, other[kind][2], strict=True):
            assert torch.equal(mine, its) and mine.isfinite().all()

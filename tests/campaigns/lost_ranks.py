"""Four ranks (gloo), with DDP or FSDP2, of which one raises, hangs, sleeps or is killed.

Held: within the timeout of the group the other ranks end, and say why in a sentence; after a sleep
that is shorter than the timeout all go on to the same parameters.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from models import loss_fn
from ranks import spawn
from scenarios import COUNT, KINDS, build, sharded, shards, whole
from torch import distributed

from lossguard.torch import Rewind

SIZE, WAIT, SLACK = 4, 10, 15
"""Ranks; the timeout of their group in seconds; what ending them may take on a busy machine."""
FAULTS = ("raises", "hangs", "sleeps", "killed", "ends")


def attempt(seed: int, folder: Path) -> Counter[str]:
    """One group of ranks."""
    rng = random.Random(seed)
    fault, who = rng.choice(FAULTS), rng.randrange(SIZE)
    plan = {
        "how": rng.choice(("ddp", "fsdp")),
        "kind": rng.choice([*KINDS, "Rewind"]),
        "fault": fault,
        "who": who,
        "at": rng.randrange(1, COUNT - 5),
        "late": rng.random() < 0.5,  # after the backward pass
    }
    (folder / "plan").write_text(json.dumps(plan))
    os.environ.update({"CHECKPOINTS": str(folder), "RANKS_TIMEOUT": str(WAIT)})
    statuses = spawn("tests.campaigns.lost_ranks.scenario", SIZE, folder)
    told = f"{plan}: exit statuses {statuses}"
    if fault == "sleeps":
        assert statuses == [0] * SIZE, told
        ends = [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]
        pairs = [(a, b) for one in ends[1:] for a, b in zip(one, ends[0], strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs), told
        return Counter({f"{fault}, went on": 1})
    for rank in {*range(SIZE)} - {who}:
        error = folder / f"{rank}.error"
        assert statuses[rank] == 1 and error.exists(), told
        late = error.stat().st_mtime - (folder / "done").stat().st_mtime
        assert late < WAIT + SLACK, f"{told}: rank {rank} ended {late:.0f} s after"
        assert len(error.read_text()) > 20, f"{told}: {error.read_text()}"
    return Counter({f"{fault}, others told": 1})


def scenario(rank: int) -> list[torch.Tensor]:
    """A training loop, in which the plan's fault happens at a call of the plan's rank."""
    folder = Path(os.environ["CHECKPOINTS"])
    plan = json.loads((folder / "plan").read_text())
    torch.manual_seed(0)
    model = whole() if plan["how"] == "ddp" else sharded()
    calls = 0

    def fault() -> None:
        nonlocal calls
        calls += 1
        if rank != plan["who"] or calls != plan["at"]:
            return
        (folder / "done").touch()
        if plan["fault"] == "raises":
            raise KeyError("mine")
        if plan["fault"] in ("hangs", "sleeps"):
            time.sleep(WAIT / 5 if plan["fault"] == "sleeps" else 4 * WAIT)
        if plan["fault"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan["fault"] == "ends":
            os._exit(0)

    def evaluate(batch: object) -> torch.Tensor:
        if not plan["late"]:
            fault()
        loss = loss_fn(model, batch)
        loss.backward()
        if plan["late"]:
            fault()
        return loss

    if plan["kind"] == "Rewind":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        rewind = Rewind(model, optimizer, every=1)
    else:
        guard = build(plan["kind"], model)
    for batch in shards(rank, distributed.get_world_size()):
        if plan["kind"] == "Rewind":
            loss = evaluate(batch).detach()
            optimizer.step()
            rewind.observe(loss)
            optimizer.zero_grad()
        else:
            guard.step(lambda batch=batch: evaluate(batch))
    values = model.state_dict().values()
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]

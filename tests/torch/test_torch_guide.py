"""The code of the PyTorch guide runs, one block after the other."""

import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from lossguard.torch import LossGuard

GUIDE = Path(__file__).parents[2] / "docs" / "torch.md"


class Log:
    """In place of TensorBoard and Weights & Biases: keeps what it is told."""

    def __init__(self):
        self.told = []

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def log(self, values):
        self.told += values.items()


def test_torch_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block saves there
    log = Log()
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda: log)
    )
    monkeypatch.setattr(
        torch.utils, "tensorboard", sys.modules["torch.utils.tensorboard"], raising=False
    )
    model = torch.nn.Linear(3, 1)
    loader = [(x, x.sum(1, keepdim=True)) for x in torch.randn(20, 8, 3)]
    known = {
        "torch": torch,
        "itertools": itertools,
        "wandb": SimpleNamespace(init=lambda: log),
        "LossGuard": LossGuard,
        "model": model,
        "loader": loader,
        "held_out_loader": loader,
        "parts": loader[:2],
        "loss_fn": torch.nn.functional.mse_loss,
        "cycles": 2,
        "steps": 20,
        "matrices": [model.weight],
        "others": [model.bias],
    }

    def closure_of(batch):
        def closure():
            known["guard"].zero_grad()
            loss = known["loss_fn"](model(batch[0]), batch[1])
            loss.backward()
            return loss

        return closure

    known["closure_of"] = closure_of
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    for block in blocks:
        block = block.replace('"cuda"', '"cpu"').replace("float16", "bfloat16")
        exec(compile(block, "docs/torch.md", "exec"), known)
        guard = known["guard"]
        if "def closure():" in block:  # of which the guide doesn't show the call
            guard.step(known["closure"])
        if "def log" in block:
            for batch in loader:
                guard.step(closure_of(batch))
            known["log"](guard.last_decision)
    assert {name for name, *_ in log.told} >= {"guard/winner", "guard/used_learned"}

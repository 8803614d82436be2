"""What ``Rewind`` can't cure: a model that causes spikes by itself.

    python -m benchmarks.bad_model

The character transformer of the stability benchmark at a rate of 0.03, with layer normalization
and without: the training loss at the end, and how often ``Rewind`` went back. Four minutes.
"""

import logging

import numpy as np
import torch
from torch import nn

from lossguard.torch import Rewind

from .stability.tasks import Task, transformer_on_text

SEEDS = 200, 201, 202
RATE = 0.03


def without_norms(model: nn.Module) -> nn.Module:
    """The model itself, whose layer normalizations do nothing."""
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    return model


def run(task: Task, seed: int, *, normed: bool, rewound: bool) -> tuple[float, int]:
    """The mean loss of the last 100 minibatches, and the number of returns."""
    torch.manual_seed(seed)
    model = task.model() if normed else without_norms(task.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rewind = Rewind(model, optimizer) if rewound else None
    random, losses = np.random.default_rng(seed), []
    for _ in range(task.gradients):
        text, following = task.draw(random)
        loss = nn.functional.cross_entropy(model(text).flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rewind is not None:
            rewind.observe(loss)
        losses.append(loss.item())
    returns = [one for one in rewind.events if one.kind == "return"] if rewind is not None else []
    return float(np.mean(losses[-100:])), len(returns)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    task = transformer_on_text()
    print("seed  model    alone  with Rewind  returns")
    for seed in SEEDS:
        for normed in (False, True):
            alone, _ = run(task, seed, normed=normed, rewound=False)
            rewound, returns = run(task, seed, normed=normed, rewound=True)
            name = "normed" if normed else "bare"
            print(f"{seed}  {name:<6}  {alone:.3g}  {rewound:.3g}  {returns}")

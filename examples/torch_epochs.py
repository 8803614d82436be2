"""A small ConvNet under AdamW at two rates, on few images that it sees again and again.

The higher rate is ahead first, and overfits. Training losses can't tell; so ``BestOf`` with a
``check`` compares the optimizers on held-out minibatches, and follows the one that is better there.

    python examples/torch_epochs.py
"""

from functools import partial
from pathlib import Path

import polars as pl
import torch
import tyro
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch_compare import Row, compare, follow
from torch_data import Batch, images, minibatches

from lossguard.torch import BestOf

METHODS = ("careful", "bold", "best of", "best of, held out")


def convnet(size: int) -> nn.Module:
    """Two convolutions of stride 2 with BatchNorm, for images [n, 1, size, size]."""
    width = -(-size // 4)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * width**2, 10)),
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    pixels, labels = batch
    return nn.functional.cross_entropy(model(pixels), labels)


def optimizer_of(
    method: str, model: nn.Module, careful: float, bold: float, held_out: Batch
) -> Optimizer:
    """AdamW at one of the rates, or guarded."""
    learned, fallback = (AdamW(model.parameters(), lr=rate) for rate in (bold, careful))
    if method in ("careful", "bold"):
        return fallback if method == "careful" else learned
    pixels, labels = held_out

    def check(k: int) -> Tensor:
        """With BatchNorm's running statistics; minibatch k, of 64 images."""
        part = torch.arange(64 * k, 64 * (k + 1)) % len(labels)
        model.eval()
        loss = loss_of(model, (pixels[part], labels[part]))
        model.train()
        return loss

    held = check if method == "best of, held out" else None
    return BestOf([fallback, learned], check=held, share=None, model=model)


def train(method: str, seed: int, *, calls: int, careful: float, bold: float) -> list[Row]:
    """Train on ``calls`` minibatches; what came of it, one by one."""
    pixels, labels = images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split((len(order) // 5, len(order) // 2))
    training, held_out, others = ((pixels[part], labels[part]) for part in parts)
    torch.manual_seed(seed)
    model = convnet(pixels.shape[-1])
    optimizer = optimizer_of(method, model, careful, bold, held_out)

    def step(batch: Batch) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        return optimizer.step(closure).item()

    def evaluate() -> float:
        model.eval()
        loss = loss_of(model, others).item()
        model.train()
        return loss

    return follow(step, minibatches(training, 64, calls), evaluate, calls)


def main(
    calls: int = 800,
    careful: float = 1e-3,
    bold: float = 2e-2,
    seeds: int = 1,
    out: Path | None = None,
) -> pl.DataFrame:
    """Compare the two rates, alone and guarded, on the same minibatches of a fifth of the images.

    Args:
        calls: minibatches that each of them trains on.
        careful: the rate of the fallback.
        bold: that of the optimizer which isn't trusted.
        seeds: of the initialization and of the order of minibatches.
        out: a folder for what was measured of each seed, and its figure.
    """
    run = partial(train, calls=calls, careful=careful, bold=bold)
    title = f"AdamW at {careful:g} (careful) and {bold:g} (bold)"
    return compare(METHODS, run, calls, seeds, title, out)


if __name__ == "__main__":
    tyro.cli(main)

"""A small character-level transformer under AdamW at two rates, alone and guarded.

At a rate that is too high the loss spikes, and at one that is too low it falls slowly. Which of two
rates is better depends on the length of the run. ``BestOf`` follows the one that is better so far.

    python examples/torch_characters.py                             # 0.09 spikes
    python examples/torch_characters.py --careful 0.001 --bold 0.01 # 0.01 is bold, and good
"""

import argparse as text_source
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean

import polars as pl
import torch
import tyro
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch_compare import Row, compare, follow

from lossguard.torch import BestOf, Recommended

METHODS = ("careful", "bold", "recommended", "best of")


class Transformer(nn.Module):
    """Predicts the next byte: two pre-norm blocks with causal attention.

    Args:
        symbols: size of the alphabet.
        context: length of a sequence, in characters.
        width: size of an embedding.
    """

    def __init__(self, symbols: int = 128, context: int = 32, width: int = 48) -> None:
        super().__init__()
        self.symbol = nn.Embedding(symbols, width)
        self.place = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=4 * width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Scores [batch, context, symbols] of the character after each one in [batch, context]."""
        x = self.symbol(text) + self.place.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def sequences(count: int, seed: int, size: int = 16, context: int = 32) -> Iterator[Tensor]:
    """Random pieces [size, context + 1] of a text that every Python has: argparse's source."""
    source = Path(text_source.__file__).read_text()
    text = torch.tensor([min(ord(c), 127) for c in source])
    draws = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - context - 1, (size, 1), generator=draws)
        yield text[starts + torch.arange(context + 1)]


def loss_of(model: Transformer, text: Tensor) -> Tensor:
    """Mean cross-entropy of the next character."""
    scores = model(text[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())


def optimizer_of(method: str, model: Transformer, careful: float, bold: float) -> Optimizer:
    """AdamW at one of the rates, or guarded."""
    learned, fallback = (AdamW(model.parameters(), lr=rate) for rate in (bold, careful))
    if method in ("careful", "bold"):
        return fallback if method == "careful" else learned
    if method == "recommended":
        return Recommended(learned, fallback, model=model)
    return BestOf([fallback, learned], model=model)


def train(method: str, seed: int, *, calls: int, careful: float, bold: float) -> list[Row]:
    """Train on ``calls`` minibatches; what came of it, one by one."""
    validation = [*sequences(30, seed=1000)]
    torch.manual_seed(seed)
    model = Transformer()
    optimizer = optimizer_of(method, model, careful, bold)

    def step(text: Tensor) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, text)
            loss.backward()
            return loss

        return optimizer.step(closure).item()

    def evaluate() -> float:
        return fmean(loss_of(model, text).item() for text in validation)

    return follow(step, sequences(calls, seed=seed), evaluate, calls)


def main(
    calls: int = 400,
    careful: float = 3e-3,
    bold: float = 9e-2,
    seeds: int = 1,
    out: Path | None = None,
) -> pl.DataFrame:
    """Compare the two rates, alone and guarded, on the same minibatches.

    Args:
        calls: minibatches that each of them sees.
        careful: the rate of the fallback.
        bold: that of the optimizer which isn't trusted.
        seeds: of the initialization and of the text's pieces.
        out: a folder for what was measured of each seed, and its figure.
    """
    run = partial(train, calls=calls, careful=careful, bold=bold)
    title = f"AdamW at {careful:g} (careful) and {bold:g} (bold)"
    return compare(METHODS, run, calls, seeds, title, out)


if __name__ == "__main__":
    tyro.cli(main)

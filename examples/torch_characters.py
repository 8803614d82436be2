"""A character-level transformer under AdamW at 30 times its good rate, guarded by the good one.

Unguarded, such a rate lets the loss spike. The guard keeps its steps only where they were good.

    python examples/torch_characters.py
    python examples/torch_characters.py --no-guarded     # see it spike
"""

import argparse as text_source
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from lossguard.torch import LossGuard

RATE = 3e-3


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


def sequences(count: int, size: int = 16, context: int = 32) -> Iterator[Tensor]:
    """Random pieces [size, context + 1] of a text that every Python has: argparse's source."""
    source = Path(text_source.__file__).read_text()
    text = torch.tensor([min(ord(c), 127) for c in source])
    for _ in range(count):
        starts = torch.randint(len(text) - context - 1, (size, 1))
        yield text[starts + torch.arange(context + 1)]


def main(
    calls: int = 400, guarded: bool = True, factor: float = 30.0, seed: int = 0
) -> list[float]:
    """Train, and return the training loss of each optimizer step of the kept iterate.

    Args:
        calls: minibatches of the stream; half of them train the guarded model, all the other.
        guarded: whether the guard is used, or AdamW at the high rate alone.
        factor: how much too high the rate is.
        seed: of the initialization and of the text's pieces.
    """
    torch.manual_seed(seed)
    model = Transformer()
    bold = torch.optim.AdamW(model.parameters(), lr=factor * RATE)
    careful = torch.optim.AdamW(model.parameters(), lr=RATE)
    guard = LossGuard(bold, careful, nt=10, nc=10, model=model)
    optimizer: Any = guard if guarded else bold

    losses = []
    for text in sequences(calls):

        def closure(text=text):
            optimizer.zero_grad()
            scores = model(text[:, :-1])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        losses.append(loss.item())
    if guarded:
        losses = [loss for decision in guard.history for loss in decision.losses]
        won = sum(decision.winner == 0 for decision in guard.history)
        print(f"the high rate won {won} of {len(guard.history)} cycles")
    for k in range(0, len(losses), 50):
        print(f"step {k:4d}   loss {max(losses[k : k + 50]):.3f} at most until step {k + 49}")
    spike = max(losses) / losses[0]
    print(f"the highest loss was {spike:.1f} times the first: {'a' if spike > 2 else 'no'} spike")
    return losses


if __name__ == "__main__":
    tyro.cli(main)

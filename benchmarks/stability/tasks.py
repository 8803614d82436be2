"""What is trained: three tasks of under a minute a run on one core.

Letters: G gradients a run may evaluate.
"""

import pydoc_data.topics
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs, and the class of each or of each place in it."""


class Task(NamedTuple):
    """A problem of classification.

    Attributes:
        model: makes one, by PyTorch's global random state.
        draw: a training minibatch.
        held: what is evaluated, and never trained on.
        classes: the classes are 0 .. classes - 1.
        gradients: G.
    """

    model: Callable[[], nn.Module]
    draw: Callable[[np.random.Generator], Batch]
    held: Batch
    classes: int
    gradients: int


def mlp_on_fashion() -> Task:
    """An MLP with two hidden layers on Fashion-MNIST."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip

    return _of_images("fashion_mnist", model, size=64, gradients=600)


def convnet_on_cifar() -> Task:
    """A ConvNet with batch normalization on CIFAR-10."""

    def model() -> nn.Module:
        widths = (3, 16, 32, 32)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * widths[-1], 10))

    return _of_images("cifar10", model, size=32, gradients=1500)


def _of_images(name: str, model: Callable[[], nn.Module], size: int, gradients: int) -> Task:
    from lossguard.tasks import load_dataset  # takes JAX

    data = load_dataset(name)

    def tensors(split: str) -> Batch:
        part = getattr(data, split)
        x = torch.tensor(np.asarray(part.inputs)).movedim(-1, 1)
        return x, torch.tensor(np.asarray(part.labels)).long()

    (x, t), (held_x, held_t) = tensors("train"), tensors("test")

    def draw(random: np.random.Generator) -> Batch:
        rows = torch.from_numpy(random.integers(len(x), size=size))
        return x[rows] / 255, t[rows]

    return Task(model, draw, (held_x[:2000] / 255, held_t[:2000]), data.classes, gradients)


class Transformer(nn.Module):
    """Predicts the next byte: two pre-norm blocks with causal attention."""

    def __init__(self, symbols: int, context: int, width: int = 64) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, symbols)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Scores [batch, context, symbols] of what follows each character."""
        x = self.symbol(text) + self.place.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def transformer_on_text(context: int = 48, size: int = 16) -> Task:
    """A character transformer on the help texts that Python ships; the last tenth is held out."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    codes = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    end = len(codes) * 9 // 10

    def cut(starts: Tensor) -> Batch:
        windows = codes[starts[:, None] + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def draw(random: np.random.Generator) -> Batch:
        return cut(torch.from_numpy(random.integers(end - context - 1, size=size)))

    held = cut(torch.linspace(end, len(codes) - context - 1, 128).long())
    return Task(lambda: Transformer(128, context), draw, held, 128, 1000)


TASKS: dict[str, Callable[[], Task]] = {
    "fashion": mlp_on_fashion,
    "cifar": convnet_on_cifar,
    "text": transformer_on_text,
}

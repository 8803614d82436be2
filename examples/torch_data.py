"""Labelled images for the examples: MNIST from a local folder, or scikit-learn's digits."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def images() -> tuple[Tensor, Tensor]:
    """Images [n, 1, height, width] in [0, 1] and labels [n].

    MNIST's test images, if ``LOSSGUARD_DATA`` names a folder with ``mnist/test.parquet`` in the
    layout of the Hugging Face hub; otherwise the 1797 digits that scikit-learn carries.
    """
    folder = os.environ.get("LOSSGUARD_DATA")
    if folder is None:
        from sklearn.datasets import load_digits

        flat, labels = load_digits(return_X_y=True)
        pixels = np.asarray(flat).reshape(-1, 1, 8, 8) / 16
    else:
        import polars
        from PIL import Image

        table = polars.read_parquet(Path(folder) / "mnist" / "test.parquet")
        encoded = table["image"].struct.field("bytes")
        pixels = (
            np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in encoded])[:, None] / 255
        )
        labels = table["label"].to_numpy()
    return torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def minibatches(
    data: Batch, size: int, count: int, draws: torch.Generator | None = None
) -> Iterator[Batch]:
    """``count`` minibatches, drawn without replacement until the data is used up."""
    pixels, labels = data
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        if len(order) < size:
            order = torch.randperm(len(labels), generator=draws)
        part, order = order[:size], order[size:]
        yield pixels[part], labels[part]

"""One thread and one seed for every PyTorch test, and few objects to look through."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """What other modules left is no guard's model: each looks for its own among all objects."""
    gc.freeze()
    yield
    gc.unfreeze()

"""One thread, one seed and no hub for every PyTorch test, and signals that raise for some."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_one_seed_no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def as_ctrl_c():
    """SIGTERM raises, as in a program that saves what it has before a cluster kills it."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in before:
        signal.signal(one, signal.default_int_handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)

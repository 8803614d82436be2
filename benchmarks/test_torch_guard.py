"""What a guarded step costs, against its parts, and what memory it takes, against its formula.

A cycle of the paper's guard is nt training steps of each optimizer and 2 nc forward passes. A step
of the recommended guard, once it is clear who leads, is a training step of the leader and its share
of challengers. The ratio of the time to that of the parts is reported. What is timed is processor
time on one thread, in turns, and the median over the turns counts, so that other work on the
machine disturbs little. The C library's allocator hands freed memory back to the system when a
threshold is passed, which is a matter of luck and can cost 10% on either side; both sides do
without.
"""

import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.optim import SGD, Adam  # noqa: E402

from lossguard.torch import LossGuard, Recommended  # noqa: E402

NT = NC = 5
TURNS = int(os.environ.get("LOSSGUARD_TURNS", "7"))


def mlp():
    """10 million parameters."""
    return nn.Sequential(
        nn.Linear(784, 2400), nn.ReLU(), nn.Linear(2400, 2400), nn.ReLU(), nn.Linear(2400, 1000)
    ), (784,)


def convnet():
    """The paper's three layers, four times as wide, on CIFAR-10's shape."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10),
    ), (3, 32, 32)  # fmt: skip


MODELS = {"mlp": mlp, "convnet": convnet}


@pytest.fixture(autouse=True)
def _steady():
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(name, batch=128):
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    data = [(torch.randn(batch, *shape), torch.randint(0, 10, (batch,))) for _ in range(NT + NC)]
    model(data[0][0])
    return model, data


def train(model, optimizer, batches):
    for x, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def forward(model, batches):
    with torch.no_grad():
        for x, labels in batches:
            functional.cross_entropy(model(x), labels)


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def guarded_training(guard, model, data):
    for x, labels in data:

        def closure(x=x, labels=labels):
            guard.zero_grad()
            loss = functional.cross_entropy(model(x), labels)
            loss.backward()
            return loss

        guard.step(closure)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_costs_its_price(report, name):
    """The fallback leads, and the learned optimizer doesn't move."""
    model, data = setting(name)
    learned, fallback = SGD(model.parameters(), lr=0.0), Adam(model.parameters(), lr=1e-4)
    guard = Recommended(learned, fallback, model=model)
    twin, _ = setting(name)
    alone = Adam(twin.parameters(), lr=1e-4)
    guarded_training(guard, model, data * 4)
    mine, theirs, spent = 0.0, 0.0, len(guard.history)
    for _ in range(TURNS):  # their sums: a median would leave out the turns with trials
        mine += seconds(lambda: guarded_training(guard, model, data * 4))
        theirs += seconds(lambda: train(twin, alone, data * 4))
    late = [*guard.history][spent:]
    report(
        lambda: guarded_training(guard, model, data),
        "at most 1.12 in gradients once it is clear who leads",
        over_fallback_alone=round(mine / theirs, 3),
        gradients=round(sum(d.gradients for d in late) / (len(late) * guard.nt), 3),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_cycle_costs_its_parts(report, name):
    model, data = setting(name)
    learned, fallback = Adam(model.parameters(), lr=1e-4), SGD(model.parameters(), lr=1e-3)

    def check(k):
        x, labels = data[NT + k % NC]
        return functional.cross_entropy(model(x), labels)

    guard = LossGuard(learned, fallback, model=model, check=check, nt=NT, nc=NC)

    def guarded():
        guarded_training(guard, model, data[:NT])

    twin, _ = setting(name)
    alone = [Adam(twin.parameters(), lr=1e-4), SGD(twin.parameters(), lr=1e-3)]
    times = {"guarded": [], "learned": [], "fallback": [], "forwards": []}

    def turn():
        times["guarded"].append(seconds(guarded))
        times["learned"].append(seconds(lambda: train(twin, alone[0], data[:NT])))
        times["fallback"].append(seconds(lambda: train(twin, alone[1], data[:NT])))
        times["forwards"].append(seconds(lambda: forward(twin, data[NT:] * 2)))

    for _ in range(1 + TURNS):
        turn()
    rows = list(zip(*times.values(), strict=True))[1:]  # the first one warms up

    def median(parts):
        return round(statistics.median(row[0] / parts(row) for row in rows), 3)

    report(
        guarded,
        "at most 1.05 of its parts",
        over_its_parts=median(lambda row: sum(row[1:])),
        over_learned_alone=median(lambda row: row[1]),
        over_fallback_alone=median(lambda row: row[2]),
    )


PEAK = """
import ctypes, sys, torch
from torch.optim import SGD
import lossguard.torch

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # large tensors go back to the system when freed
size, kind = 8_000_000, getattr(lossguard.torch, sys.argv[1])
params = [torch.randn(size // 8).requires_grad_() for _ in range(8)]

def closure():
    loss = sum((p * p).sum() for p in params)
    loss.backward()
    return loss

make = lambda: SGD(params, lr=1e-3, foreach=False)
optimizer = make()
for _ in range(2):
    optimizer.zero_grad()
    optimizer.step(closure)
    optimizer.zero_grad()
before = peak()
check = lambda k: sum((p * p).sum() for p in params)
options = {"check": check, "nc": 1} if sys.argv[1] == "LossGuard" else {}
if sys.argv[1] == "BestOf":
    guard = kind([make(), make()], model=None, nt=1)
else:
    guard = kind(make(), make(), model=None, nt=1, **options)
for _ in range(6):
    guard.step(closure)
print((peak() - before) / (4 * size))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak as Linux gives it")
@pytest.mark.parametrize("kind", ["LossGuard", "BestOf", "Recommended"])
def test_memory_is_the_formula(report, kind):
    """A copy of the parameters per lane beside the model, and one more while another lane runs."""
    command = [sys.executable, "-c", PEAK, kind]
    copies = float(subprocess.run(command, capture_output=True, check=True).stdout)
    expected = 4 if kind == "Recommended" else 3
    report(
        lambda: None,
        f"{expected} copies of the parameters beside the model",
        copies=round(copies, 2),
    )
    assert expected - 0.2 < copies < expected + 0.3

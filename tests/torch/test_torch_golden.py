"""The PyTorch guard follows the JAX one: same weights, same minibatches, same decisions."""

import io
import os
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import lossguard
import lossguard.torch
from lossguard.torch import LSTMOptimizer, ResidualGuard

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from lossguard.tasks.models import convolve  # noqa: E402

NT, NC, CYCLES = 10, 10, 20
COUNT = (NT + 2 * NC) * CYCLES  # a sequential criterion may ask for twice as many


def spirals():
    """Two arms and a net of one hidden layer, as the paper has them."""
    rng = np.random.default_rng(0)
    u, labels = rng.uniform(size=(COUNT, 64)), rng.integers(0, 2, (COUNT, 64))
    angle = 3 * np.pi * np.sqrt(u) + np.pi * labels
    points = np.stack([np.sqrt(u) * np.cos(angle), np.sqrt(u) * np.sin(angle)], -1)
    model = nn.Sequential(nn.Linear(2, 20), nn.Sigmoid(), nn.Linear(20, 2))

    def logits(params, x):
        w0, b0, w1, b1 = params
        return jax.nn.sigmoid(x @ w0.T + b0) @ w1.T + b1

    return model, logits, (points.astype(np.float32), labels)


@cache
def digits(file):
    """Minibatches of MNIST, and no more of it: decoding all takes seconds."""
    rows = pl.read_parquet(file, n_rows=8 * COUNT)
    encoded = rows["image"].struct.field("bytes")
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one)), np.float32) for one in encoded])
    return pixels.reshape(COUNT, 8, 1, 28, 28) / 255, np.array(rows["label"]).reshape(COUNT, 8)


def images():
    """MNIST, and the paper's convolutional net."""
    file = Path(os.environ.get("LOSSGUARD_DATA", ""), "mnist", "train.parquet")
    if not file.is_file():
        pytest.skip("LOSSGUARD_DATA names no folder with mnist")
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip

    def logits(params, x):
        *layers, w, b = params
        x = x.transpose(0, 2, 3, 1)
        for weight, bias in zip(layers[::2], layers[1::2], strict=True):
            x = jax.nn.relu(convolve(x, weight, 2) + bias)
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ w.T + b

    return model, logits, digits(file)


PROBLEMS = {"spirals-mlp": (spirals, 0.02, 0.5), "mnist-convnet": (images, 0.002, 0.02)}


def sides(name):
    """The problem, and the learned optimizer's weights and scale, in both frameworks."""
    torch.manual_seed(0)
    make, scale, lr = PROBLEMS[name]
    model, logits, data = make()
    weights = lossguard.init_lstm_weights(jax.random.key(3))
    named = {
        f"lstm.{kind}_l{k}": torch.tensor(np.asarray(getattr(layer, kind)))
        for k, layer in enumerate(weights.layers)
        for kind in layer._fields
    }
    named["linear.weight"] = torch.tensor(np.asarray(weights.linear_weight))
    named["linear.bias"] = torch.tensor(np.asarray(weights.linear_bias))

    def loss(params, batch):
        scores = logits(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()

    start = tuple(jnp.asarray(p.detach().numpy().copy()) for p in model.parameters())
    return model, start, loss, data, weights, named, scale, lr


def run_jax(guard, start, loss, data):
    """The kept parameters and the decision after each cycle."""
    state, columns = guard.init(start), tuple(jnp.asarray(column) for column in data)
    step = jax.jit(
        lambda state: guard.step(
            state, lambda params, i: loss(params, tuple(column[i] for column in columns))
        )
    )
    for _ in range(CYCLES):
        state, decision = step(state)
        yield state.params, decision
    assert state.minibatches <= len(data[0])


def run_torch(guard, model, data):
    """The same."""
    for inputs, labels in zip(*map(torch.from_numpy, data), strict=True):

        def closure(inputs=inputs, labels=labels):
            guard.zero_grad()
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        before = len(guard.history)
        guard.step(closure)
        if len(guard.history) > before:
            yield [p.detach().numpy() for p in model.parameters()], guard.last_decision
        if len(guard.history) == CYCLES:
            break


def run_cycles(guard, model, data):
    """The same, with check minibatches of their own: the last ones first, as JAX numbers them."""
    batches = list(zip(*map(torch.from_numpy, data), strict=True))
    last_first = reversed(batches)
    for k in range(0, CYCLES * NT, NT):
        guard.cycle(
            lambda batch: functional.cross_entropy(model(batch[0]), batch[1]),
            batches[k : k + NT],
            last_first,
        )
        yield [p.detach().numpy() for p in model.parameters()], guard.last_decision


def assert_same_trajectory(ours, theirs):
    """Twenty cycles, decided alike; the winners."""
    winners = []
    for (params, decision), (kept, expected) in zip(ours, theirs, strict=True):
        assert_same_decision(decision, expected, loose=2e-4)
        assert_same_params(params, kept)
        winners.append(decision.winner)
    return winners


def assert_same_decision(ours, theirs, loose):
    assert ours.winner == int(theirs.winner)
    assert ours.used_learned == theirs.used_learned.tolist()
    for field in ("steps", "gradients", "forwards", "learned_updates"):
        assert getattr(ours, field) == int(getattr(theirs, field)), field
    for field in ("finite_learned", "finite_fallback", "reset_learned", "reset_fallback"):
        assert getattr(ours, field) == bool(getattr(theirs, field)), field
    for field in ("losses", "learned_loss", "fallback_loss"):
        np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=loose)


def assert_same_params(ours, theirs):
    """Within 1e-4, relative to the norm of each parameter tensor."""
    for p, q in zip(ours, theirs, strict=True):
        assert np.linalg.norm(p - np.asarray(q)) <= 1e-4 * np.linalg.norm(q)


def paper_decay(t):
    return 1 / (t / 50 + 1) ** 1.5


def both(name, build, *, several=False, run=run_torch):
    """Run the guards that ``build`` makes of a library and two optimizers of it."""
    model, start, loss, data, weights, named, scale, lr = sides(name)
    params = list(model.parameters())
    fallback = torch.optim.SGD(params, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(fallback, paper_decay)
    ours = [LSTMOptimizer(params, named, scale=scale), torch.optim.SGD(params, lr=4 * lr)]
    theirs = [lossguard.lstm_optimizer(weights, scale=scale), optax.sgd(4 * lr)]
    guard = build(lossguard.torch, ours if several else ours[0], fallback, schedulers=[schedule])
    expected = build(
        lossguard,
        theirs if several else theirs[0],
        optax.sgd(lambda t: lr * paper_decay(t), momentum=0.9),
    )
    return assert_same_trajectory(run(guard, model, data), run_jax(expected, start, loss, data))


def loss_guard(library, *optimizers, **options):
    make = library.LossGuard if library is lossguard.torch else library.loss_guard
    return make(*optimizers, **{"nt": NT, "nc": NC, **options})


POLICIES = [("keep", False), ("rollback", True), ("reset", False), ("keep", "only")]


@pytest.mark.parametrize(
    ("name", "loser", "hedge"),
    [
        *(("spirals-mlp", *policy) for policy in POLICIES),
        *(("mnist-convnet", *policy) for policy in POLICIES[:2]),  # each takes many seconds
    ],
)
def test_loss_guard(name, loser, hedge):
    def build(library, *optimizers, **options):
        return loss_guard(library, *optimizers, loser=loser, hedge=hedge, **options)

    winners = both(name, build)
    assert 0 in winners and {*winners} & {1, 2}


MISLEAD = {"nt": 3, "nc": 1}  # so short a check is often wrong, and x has to go back
BEYOND = {
    "paired": lambda lib: {"criterion": lib.paired_criterion(confidence=0.9)},
    "sequential": lambda lib: {
        "criterion": lib.sequential_criterion(confidence=0.8, first=3, most=20), "hedge": "only",
    },
    "curtailed": lambda lib: {
        "criterion": lib.curtailed_criterion(first=3, most=20), "hedge": True,
    },
    "training": lambda lib: {
        "criterion": lib.mean_criterion(training=2), "nt": 4, "nc": 1, "hedge": True,
    },
    "record": lambda lib: {"hedge": lib.track_record(decay=0.9), **MISLEAD},
    "record-reset": lambda lib: {
        "hedge": lib.track_record(decay=0.5), "loser": "reset", **MISLEAD,
    },
    "record-backoff": lambda lib: {
        "hedge": lib.track_record(decay=0.5), "probing": lib.backoff(patience=4, most=2), **MISLEAD,
    },
    "record-backoff-reset": lambda lib: {
        "hedge": lib.track_record(decay=0.5), "loser": "reset",
        "probing": lib.backoff(patience=1, most=2, start="reset"),
        "criterion": lib.sequential_criterion(confidence=0.5, first=2, most=4),
    },
    "ratchet": lambda lib: {"ratchet": lib.ratchet(cycles=2, tolerance=0.0), **MISLEAD},
    "ratchet-record": lambda lib: {
        "hedge": lib.track_record(decay=0.9), "loser": "reset",
        "ratchet": lib.ratchet(cycles=1, tolerance=0.0), **MISLEAD,
    },
    "backoff": lambda lib: {"probing": lib.backoff(patience=1, most=4)},
    "backoff-hedge": lambda lib: {
        "probing": lib.backoff(patience=1, most=2, start="reset"), "hedge": True,
    },
    "backoff-only": lambda lib: {
        "probing": lib.backoff(patience=1, most=2), "hedge": "only", "loser": "rollback",
        "criterion": lib.sequential_criterion(first=4, most=16),
    },
}  # fmt: skip


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_beyond_the_paper(name, several):
    def build(library, *optimizers, **options):
        return loss_guard(library, *optimizers, **BEYOND[name](library), **options)

    winners = both("spirals-mlp", build, several=several)
    assert len({*winners}) >= 2
    own = max(winners)
    went_back = any(a != own == b for a, b in pairwise(winners))
    assert went_back or "record" not in name, winners


@pytest.mark.parametrize(("most", "run"), [(NC, run_torch), (2 * NC, run_cycles)])
def test_recommended(most, run):
    """On Spirals, where both win; on the ConvNet a learned lane that begins anew never does."""

    def build(library, *optimizers, **options):
        return library.recommended(*optimizers, nt=NT, nc=NC, most=most, **options)

    assert len({*both("spirals-mlp", build, run=run)}) >= 2


@pytest.mark.parametrize("residual", ["step", "gradient"])
def test_residual_guard(residual):
    model, start, loss, data, weights, named, scale, lr = sides("spirals-mlp")
    theirs = lossguard.residual_guard(
        lossguard.lstm_optimizer(weights, scale=scale),
        optax.sgd(lr, momentum=0.9),
        residual=residual,
        nt=NT,
    )
    guard = ResidualGuard(
        LSTMOptimizer(model.parameters(), named, scale=scale),
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        residual=residual,
        nt=NT,
    )
    assert_same_trajectory(run_torch(guard, model, data), run_jax(theirs, start, loss, data))
    used = {flag for decision in guard.history for flag in decision.used_learned}
    assert used == {True, False}


def test_the_shipped_optimizer_is_the_same():
    params = {"w": np.linspace(-1, 1, 7, dtype=np.float32)}
    theirs = lossguard.pretrained("lstm-mnist-mlp")
    state, x = theirs.init(params), params
    w = nn.Parameter(torch.tensor(params["w"]))
    ours = LSTMOptimizer.pretrained([w], "lstm-mnist-mlp")
    for _ in range(20):
        updates, state = theirs.update(jax.tree.map(lambda v: 2 * v, x), state, x)
        x = optax.apply_updates(x, updates)
        w.grad = 2 * w.detach()
        ours.step()
    np.testing.assert_allclose(w.detach().numpy(), x["w"], rtol=1e-4, atol=1e-6)

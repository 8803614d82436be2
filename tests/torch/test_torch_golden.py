"""The PyTorch guards follow the JAX ones: same problem, same optimizers, same decisions."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import backward
from torch.optim import SGD, Adam

from lossguard import torch as guards

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import optax  # noqa: E402

import lossguard  # noqa: E402

NT, CYCLES = 10, 50
rng = np.random.default_rng(0)
X = rng.normal(size=(CYCLES * 2 * NT, 16, 4))
T = np.tanh(X @ rng.normal(size=(4, 1))) + 0.1 * rng.normal(size=(*X.shape[:2], 1))
START = (rng.normal(size=(4, 8)), np.zeros(8), rng.normal(size=(8, 1)), np.zeros(1))


@pytest.fixture(autouse=True)
def _double_precision():
    # Shapes and types are checked in the tests of the JAX guards, in single precision.
    jaxtyping.config.update("jaxtyping_disable", True)
    with jax.enable_x64(True):
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


BROKEN = rng.random(len(X)) < 0.02
"""Minibatches whose gradient isn't finite, though the loss is, in some of the tests."""


def objective(params, i):
    w, b, v, c = params
    return jnp.mean((jnp.tanh(jnp.asarray(X)[i] @ w + b) @ v + c - jnp.asarray(T)[i]) ** 2)


def loss_of(params, i):
    w, b, v, c = params
    x, t = torch.from_numpy(X[i]), torch.from_numpy(T[i])
    return ((torch.tanh(x @ w + b) @ v + c - t) ** 2).mean()


def broken_objective(params, i):
    """sqrt(0 w) has the value 0 and no gradient."""
    fine = 1.0 - jnp.asarray(BROKEN)[i]
    return objective(params, i) + jnp.sqrt(fine + 0 * params[0].sum()) - fine


def broken_loss_of(params, i):
    fine = 1.0 - BROKEN[i]
    return loss_of(params, i) + torch.sqrt(fine + 0 * params[0].sum()) - fine


class AdamOf(NamedTuple):
    """Optax adds its epsilon to the same root as PyTorch."""

    rate: float

    def in_optax(self):
        return optax.adam(self.rate)

    def in_torch(self, params):
        return Adam(params, lr=self.rate)


class SGDOf(NamedTuple):
    rates: np.ndarray
    """Of each step."""
    momentum: float | None = None

    def in_optax(self):
        return optax.sgd(lambda t: self.rates[t], self.momentum)

    def in_torch(self, params):
        first, momentum = float(self.rates[0]), self.momentum or 0
        if (self.rates == first).all():
            return SGD(params, lr=first, momentum=momentum)
        return Scheduled(params, self.rates)


class Scheduled(SGD):
    """It counts the steps of the run, as a schedule of optax does; its rate is a factor."""

    def __init__(self, params, rates):
        super().__init__(params, lr=1.0)
        self.rates, self.param_groups[0]["clock"] = rates, 0

    def step(self, closure=None):
        (group,) = self.param_groups
        factor = group["lr"]
        group["lr"] = factor * float(self.rates[group["clock"]])
        group["clock"] += 1
        super().step(closure)
        group["lr"] = factor


LOST = 1e15
STEPS, ONES = np.arange(len(X)), np.ones(len(X))
adam = AdamOf


def sgd(rate, momentum=None):
    return SGDOf(np.full(len(X), rate), momentum)


def falls_behind(rate, after, later=1.0, until=math.inf):
    """For a while its rate is another one; at 1 the run diverges."""
    return SGDOf(np.where((after <= STEPS) & (until > STEPS), later, rate))


def breaks_cycles(rate, after):
    """From a step on the last step of each cycle leads to infinity."""
    return SGDOf(np.where((after <= STEPS) & (STEPS % NT == NT - 1), np.inf, rate))


PAIRS = {
    "adam over sgd": (adam(0.02), sgd(0.05)),
    "bold sgd over adam": (sgd(0.3), adam(0.003)),
    "hopeless": (sgd(1.0), sgd(0.1, 0.9)),
    "diverges": (sgd(0.1), sgd(1.0)),
    "breaks": (sgd(1e80), sgd(0.1)),
    "both break": (sgd(1e80), sgd(1e80)),
    "it breaks late": (adam(0.02), falls_behind(0.05, 100, 1e80)),
    "the same": (sgd(0.1), sgd(0.1)),
    "late": (falls_behind(0.3, 200), sgd(0.02)),
    "noisy": (falls_behind(0.05, 200, 0.2), sgd(0.2, 0.9)),
}
ALL = list(PAIRS)
PAIRS |= {
    # The learned optimizer leads, and breaks twice.
    "breaks late": (breaks_cycles(0.3, 60), sgd(0.02)),
    # The fallback's own run breaks, while the learned optimizer leads.
    "own run breaks": (sgd(0.3), falls_behind(0.02, 105, math.inf, 106)),
    "it breaks at once": (sgd(0.01), falls_behind(0.3, 5, math.inf, 6)),
    # The learned optimizer wins its first trial, and is then slower.
    "s gets ahead": (sgd(0.02), falls_behind(0.001, 60, 0.3)),
}
CASES = [
    *(("recommended", {}, pair) for pair in ALL),
    *(("recommended", {"share": 0.5}, p) for p in ("late", "the same", "noisy", "s gets ahead")),
    ("recommended", {}, "breaks late"),
    ("recommended", {"share": 0.5}, "own run breaks"),
    *(("loss_guard", {"nc": 5}, pair) for pair in ("breaks", "both break", "adam over sgd")),
    ("loss_guard", {"nc": 5, "loser": "reset"}, "bold sgd over adam"),
]


def in_pytorch(name, optimizers, checked=False, **options):
    """What makes the guard of these optimizers from parameters.

    ``checked``: by held-out losses that rank them the other way round.
    """

    def build(params):
        ours, kind = [one.in_torch(params) for one in optimizers], name.title().replace("_", "")
        given = [ours] if name == "best_of" else ours
        default = {"share": None} if name == "best_of" else {}  # as in JAX
        check = {"check": lambda j: -loss_of(params, j + 7)} if checked else {}
        if kind == "LossGuard":
            check = {"check": lambda k: loss_of(params, k // 5 * 15 + 10 + k % 5)}  # as in JAX
        return getattr(guards, kind)(*given, model=None, nt=NT, **default | options, **check)

    return build


def guard_of(name, optimizers, checked=False, **options):
    """The same in JAX."""
    theirs = [one.in_optax() for one in optimizers]
    if name == "best_of":
        members = [lossguard.unguarded(one, nt=NT) for one in theirs]
        check = {"check": lambda params, j: -objective(params, j + 7)} if checked else {}
        return lossguard.best_of(members, **options, **check)
    return getattr(lossguard, name)(*theirs, nt=NT, **options)


@partial(jax.jit, static_argnames=("name", "objective", "options"))
def cycle(name, objective, options, optimizers, factors, state):
    """One program for all optimizers of a kind: rates are its arguments."""
    guard = guard_of(name, optimizers, **dict(options))
    return guard.step(state, lambda params, i: objective(params, i) * factors[i])


def in_jax(name, optimizers, objective=objective, factors=ONES, **options):
    """The parameters and the decision after each cycle; losses are times factors."""
    given = tuple(options.items())
    state = guard_of(name, optimizers, **options).init(tuple(map(jnp.asarray, START)))
    for _ in range(CYCLES):
        state, decision = cycle(name, objective, given, tuple(optimizers), factors, state)
        yield state.params, decision


def in_torch(build, body=False, loss_of=loss_of):
    """The same, by closures or by bodies of a loop."""
    params = [torch.tensor(p, requires_grad=True) for p in START]
    guard = build(params)
    checks = isinstance(guard, guards.LossGuard)
    for i in (i for i in range(len(X)) if not checks or i % 15 < 10):
        if body:
            for lane in guard.lanes():
                lane.step(backward(loss_of(params, i)))
        else:
            guard.step(lambda i=i: backward(loss_of(params, i)))
        if guard.phase == 0:
            yield [p.detach().numpy().copy() for p in params], guard.last_decision
        if len(guard.history) == CYCLES:
            return


def assert_same(in_torch, in_jax):
    """Cycle by cycle; the winners."""
    winners = []
    for (params, decision), (kept, expected) in zip(in_torch, in_jax, strict=True):
        assert decision.winner == int(expected.winner)
        assert decision.used_learned == expected.used_learned.tolist()
        for field in ("gradients", "forwards", "learned_updates"):
            assert getattr(decision, field) == int(getattr(expected, field)), field
        for field in ("losses", "learned_loss", "fallback_loss"):
            # Beyond LOST the run of a lane that diverges is decided by rounding.
            ours, theirs = (
                np.nan_to_num(np.clip(getattr(one, field), None, LOST), nan=-1.0)
                for one in (decision, expected)
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=field)
        for p, q in zip(params, kept, strict=True):
            np.testing.assert_allclose(p, np.asarray(q), rtol=1e-6, atol=1e-9)
        winners.append(decision.winner)
    return winners


def compare(name, optimizers, body=False, factors=ONES, **options):
    """The winners, which are the same in both."""
    build = in_pytorch(name, optimizers, **options)
    made = in_torch(build, body, lambda params, i: loss_of(params, i) * factors[i])
    return assert_same(made, in_jax(name, optimizers, factors=factors, **options))


@pytest.mark.parametrize(("name", "options", "pair"), CASES)
def test_two_optimizers(name, options, pair):
    body = pair == "adam over sgd"
    winners = compare(name, PAIRS[pair], body, **options)
    assert len(winners) == CYCLES
    if pair == "diverges":
        assert winners[0] == 0 or name != "recommended"
    if pair == "breaks late":
        assert winners[5] == 0 and not {*winners[8:]} <= {0}


@pytest.mark.parametrize(("share", "checked"), [(None, False), (0.25, True)])
def test_best_of(share, checked):
    several = [adam(0.02), sgd(0.05), sgd(1e80), sgd(0.3)]
    assert len(compare("best_of", several, share=share, checked=checked)) == CYCLES


@pytest.mark.parametrize("name", ["recommended", "best_of"])
def test_gradients_that_are_not_finite_ruin_no_lane(name):
    pair = [adam(0.02), adam(0.003)]
    pair = pair[::-1] if name == "best_of" else pair

    def finite():
        for params, decision in in_torch(in_pytorch(name, pair), loss_of=broken_loss_of):
            assert all(np.isfinite(p).all() for p in params)
            yield params, decision

    assert_same(finite(), in_jax(name, pair, broken_objective))
    assert BROKEN[: NT * CYCLES].sum() > 5


def winners_without(lost, name, pair, **options):
    """Where the loss is NaN on these minibatches."""
    return compare(name, pair, factors=np.where(lost, np.nan, 1.0), **options)


def test_minibatches_without_a_finite_loss_are_passed_over():
    """A fifth of them: the run goes on as without, and learns."""
    pair = [adam(0.02), adam(0.003)]
    winners = winners_without(rng.random(len(X)) < 0.2, "recommended", pair)
    assert winners == [0] * CYCLES


@pytest.mark.parametrize("pair", ["bold sgd over adam", "late"])
def test_minibatches_that_are_lost(pair):
    """Of the third cycle, which the learned optimizer leads, and of others, two at a stretch."""
    lost = np.zeros(len(X), bool)
    lost[[25, 103, 114, 161, 267, 273, 284, 355]] = True
    assert winners_without(lost, "recommended", PAIRS[pair])[1:3] == [0, 0]


@pytest.mark.parametrize(
    ("first", "name", "options", "pair"),
    [
        (0, "recommended", {}, "it breaks at once"),
        (0, "recommended", {"share": 0.5}, "late"),
        (20, "recommended", {}, "bold sgd over adam"),
        (20, "best_of", {}, "late"),
    ],
)
def test_cycles_that_are_lost(first, name, options, pair):
    """The first one, with its trial, or one that the learned optimizer leads; then others."""
    lost = np.zeros(len(X), bool)
    lost[[*range(first, first + 10), *range(60, 70), *range(130, 150)]] = True
    winners = winners_without(lost, name, PAIRS[pair], **options)
    if first == 0:
        assert winners[0] == 2  # the lost minibatches are to blame, though z breaks
    else:
        assert winners[:2] == [0, 0]


@pytest.mark.parametrize("step", [5, 155])
@pytest.mark.parametrize("share", [None, 0.2])
def test_best_of_begins_broken_ones_again(share, step):
    """At first from where the careful one is, later from where the cycle began that it led."""
    bold = falls_behind(0.1, step, math.inf, step + 1)
    winners = compare("best_of", [sgd(0.01), bold], share=share)
    assert winners[14:18] == [1, -1 if step == 155 else 1, 1, 1]


@pytest.mark.parametrize("share", [None, 0.2])
def test_best_of_begins_ruined_ones_again(share):
    """The bold one leads, is ruined, and comes back from where the careful one is."""
    bold = falls_behind(0.1, 150, 5.0, 170)
    winners = compare("best_of", [bold, sgd(0.01)], share=share)
    assert winners[14] == 0 and 1 in winners[15:] and (winners[-1] == 0 or share)

"""PyTorch: hostile optimizers on either side, exceptions at random calls.

Held: the model is finite at the end of each cycle; an exception leaves it as it was, with neither
gradients nor modes of torch left on; the price is bounded; reported losses never sum up to more
than the fallback's; what ``Rewind`` discards is within its budget.
"""

import copy
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from models import KINDS, loss_fn, minibatches, mlp, step_by, two
from rewinding import hostile_run
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lossguard.torch import BestOf, LossGuard, Recommended, Rewind

MANY, STEPS, PAUSE = 8, 60, 10**6
WAYS = ("leaps", "nan", "ascends", "breaks", "rebinds", "drops", "rates", "raises")


class Boom(Exception):
    """What a hostile optimizer or closure raises."""


class Hostile(SGD):
    """Descends up to step ``turn``; from there on it does one of ``WAYS``, for a few steps."""

    way, turn, last, by = "leaps", PAUSE, PAUSE, 1e30
    drawn: ClassVar[list[str]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.taken = getattr(self, "taken", 0) + 1
        now = self.turn <= self.taken <= self.last
        if now and self.way == "raises":
            raise Boom
        loss = super().step(closure)
        for p in self.param_groups[0]["params"] if now else ():
            if self.way in ("leaps", "nan"):
                p.add_(self.by if self.way == "leaps" else math.nan)
            elif self.way == "ascends" and p.grad is not None:
                p.add_(p.grad, alpha=self.by)
            elif self.way == "breaks" and self.state[p].get("momentum_buffer") is not None:
                self.state[p]["momentum_buffer"].fill_(self.by)
            elif self.way == "rebinds":
                p.data = p.data * 1.01
            elif self.way == "drops":
                self.state.pop(p, None)
        if now and self.way == "rates":
            self.param_groups[0]["momentum"] = math.nan
        return loss


def hostile(rng: random.Random, params: Sequence[nn.Parameter], often: float) -> Optimizer:
    """One that turns hostile, or, less often, one of PyTorch's."""
    made = Hostile(params, lr=10 ** rng.uniform(-2.5, 0), momentum=rng.choice((0.0, 0.9)))
    if rng.random() < often:
        made.way, made.turn = rng.choice(WAYS), rng.randrange(1, STEPS)
        made.last = rng.choice((made.turn, PAUSE))
        made.by = rng.choice((math.nan, math.inf, 1e30, -1e20, 1e4))
        Hostile.drawn += [f"{made.way} in steps {made.turn} to {made.last} by {made.by}"]
    return made


def attempt(seed: int, folder: Path) -> Counter[str]:
    """``MANY`` short runs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tried: Counter[str] = Counter()
    for number in range(MANY):
        rng = random.Random(f"{seed} {number}")
        torch.manual_seed(rng.randrange(2**31))
        kind = rng.choice([*KINDS, Rewind])
        Hostile.drawn = []
        try:
            tried[rewound(rng) if kind is Rewind else guarded(rng, kind)] += 1
        except Exception as error:
            error.add_note(f"run {number} of the attempt: {kind.__name__}, {Hostile.drawn}")
            raise
    return tried


def guarded(rng: random.Random, kind: type) -> str:
    """A run of a guard; what came of it."""
    model = mlp(*rng.choice(((), (nn.BatchNorm1d(16),), (nn.Dropout(0.2),))))
    twin, options = copy.deepcopy(model), {"nt": rng.choice((1, 2, 3, 5))}
    if kind is LossGuard:
        options |= {"nc": rng.choice((1, 2)), "loser": rng.choice(("keep", "reset"))}
    elif kind is Recommended:
        options |= {"share": rng.choice((0.0, 0.05, 0.3))}
    elif kind is BestOf:
        options |= {"share": None}  # the promise is of this
    bad = rng.random() < 0.2
    learned = lambda ps: hostile(rng, ps, 0.9)  # noqa: E731
    fallback = lambda ps: hostile(rng, ps, 1.0) if bad else Adam(ps, lr=0.01)  # noqa: E731
    guard = two(kind, model, learned, fallback, **options)
    again: list[int] = []
    if kind is BestOf:  # the fallback is the first: when it begins again it isn't alone any more
        first = guard._lanes["0"]
        forget = first.forget
        first.forget = lambda: (again.append(guard.steps), forget())
    calls, boom = 0, rng.choice((PAUSE, rng.randrange(1, 3 * STEPS)))

    def closure(batch: Any) -> Callable[[], Any]:
        def evaluate() -> Any:
            nonlocal calls
            calls += 1
            if calls == boom:
                raise Boom
            loss = loss_fn(model, batch)
            loss.backward()
            if calls == boom + 1:
                raise Boom
            return loss

        return evaluate

    raised, before = 0, points(model)
    batches = minibatches(STEPS)
    for batch in batches:
        draws, last = torch.get_rng_state(), points(model)
        try:
            guard.step(closure(batch))
        except (Boom, ValueError, RuntimeError) as error:
            assert isinstance(error, Boom) or len(str(error)) > 20, error
            raised += 1
            now = points(model)
            assert same(now, last) or same(now, before), "a model between two states"
            torch.set_rng_state(draws)
        assert_clean(model)
        if guard.phase == 0:
            before = points(model)
            assert all(t.isfinite().all() for t in before), "a model that isn't finite"
    if kind is Recommended and not raised:
        price, k = sum(d.gradients for d in guard.history), guard.steps
        nt, share = options["nt"], options["share"]
        most = (1 + share + min(1, 5 * share)) * k
        first = nt * -(-10 // nt)
        assert price <= most + math.sqrt(k) + 2 * first + nt, "a price above its bound"
    if kind is BestOf and not raised and not bad and type(model[1]) is nn.Tanh:
        alone = Adam(twin.parameters(), lr=0.01)
        own = [step_by(alone, loss_fn(twin, batch)).item() for batch in batches]
        reported = [loss for decision in guard.history for loss in decision.losses]
        back = [options["nt"] * k for k, one in enumerate(guard.history) if one.winner < 0]
        last = min([len(reported), *again, *back])
        for end in range(options["nt"], last + 1, options["nt"]):
            assert sum(reported[:end]) <= sum(own[:end]) * (1 + 1e-5), "losses above the fallback's"
    return f"{kind.__name__}{' that raised' * bool(raised)}"


def rewound(rng: random.Random) -> str:
    """A run of ``Rewind``, with hostile steps and losses."""
    every, rho = rng.choice((1, 4, 16)), rng.choice((0.0, 0.1, 0.5))
    excess, infinite, _ = hostile_run(rng.randrange(2**31), every, steps=600, rho=rho)
    assert infinite == 0, "a model that isn't finite"
    assert excess <= 0, "more discarded than the budget"
    return "Rewind"


def points(model: nn.Module) -> list[torch.Tensor]:
    """Copies of parameters and buffers."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two points are the same, bit by bit."""
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


def assert_clean(model: nn.Module) -> None:
    """What a call may not leave behind."""
    probe = torch.ones(2, requires_grad=True)
    probe.sum().backward()  # does nothing while a check's mode is on
    assert torch.is_grad_enabled() and probe.grad is not None, "a mode is left on"
    assert all(p.grad is None for p in model.parameters()), "gradients are left"

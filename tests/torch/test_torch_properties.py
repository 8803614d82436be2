"""Whatever the learned optimizer does, the guard's promises hold after every cycle."""

import copy
import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import loss_fn, mlp, run, spiral
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lossguard.torch import (
    LossGuard,
    always,
    backoff,
    mean_criterion,
    paired_criterion,
    sequential_criterion,
    track_record,
)


def _nothing(optimizer, p):
    pass


def _plain(optimizer, p):
    p.add_(p.grad, alpha=-0.5)


def _nan(optimizer, p):
    p.fill_(math.nan)


def _inf(optimizer, p):
    p.view(-1)[0] = math.inf


def _huge(optimizer, p):
    p.mul_(1e30)


def _wider(optimizer, p):
    p.data = p.data.double() - 0.1 * p.grad


def _narrower(optimizer, p):
    p.data = p.data.half()


def _complex(optimizer, p):
    p.data = p.data.to(torch.complex64)


def _other_storage(optimizer, p):
    p.data = p.data.clone() - 0.1 * p.grad


def _other_shape(optimizer, p):
    p.data = torch.zeros(3)


def _other_strides(optimizer, p):
    p.data = p.data.t().contiguous().t() if p.ndim == 2 else p.data


def _view(optimizer, p):
    p.data = torch.zeros(2 * p.numel())[: p.numel()].view_as(p)


def _in_place(optimizer, p):
    p.data.mul_(0.9)


def _gradients(optimizer, p):
    p.grad.fill_(math.nan)


def _drops_gradients(optimizer, p):
    p.grad = None


def _nan_state(optimizer, p):
    optimizer.state.setdefault(p, {})["memory"] = torch.tensor(math.nan)


def _inf_state(optimizer, p):
    optimizer.state.setdefault(p, {})["memory"] = [
        {"deep": torch.full((2,), math.inf, dtype=torch.float16)}
    ]


def _replaced_state(optimizer, p):
    optimizer.state = {p: {"step": 1}}


def _options(optimizer, p):
    optimizer.param_groups[0]["secret"] = optimizer.param_groups[0].get("secret", 1.0) * 1e200


def _draws(optimizer, p):
    p.add_(torch.randn_like(p))


def _no_grad_mode(optimizer, p):
    torch.set_grad_enabled(False)


DEEDS = {
    deed.__name__.strip("_"): deed
    for deed in (
        _nothing, _plain, _nan, _inf, _huge, _wider, _narrower, _complex, _other_storage,
        _other_shape, _other_strides, _view, _in_place, _gradients, _drops_gradients, _nan_state,
        _inf_state, _replaced_state, _options, _draws, _no_grad_mode,
    )
}  # fmt: skip


class Rogue(Optimizer):
    """Does one deed per step, from a list."""

    def __init__(self, params, deeds):
        super().__init__(params, {})
        self.deeds = iter(deeds)

    def step(self, closure):
        loss = closure()
        deed = DEEDS[next(self.deeds)]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    deed(self, p)
        return loss


NT, NC, CYCLES = 2, 2, 3


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    deeds=st.lists(st.sampled_from(sorted(DEEDS)), min_size=NT * CYCLES, max_size=NT * CYCLES),
    loser=st.sampled_from(["keep", "rollback", "reset"]),
    hedge=st.sampled_from([False, True, "only", track_record(decay=0.5)]),
    criterion=st.sampled_from(
        [mean_criterion(), paired_criterion(confidence=0.8), sequential_criterion(first=2, most=4)]
    ),
    probing=st.sampled_from([always(), backoff(patience=1, most=1)]),
    several=st.booleans(),
    offload=st.sampled_from([None, "cpu"]),
    fallback=st.sampled_from(["sgd", "adam"]),
)
def test_promises(deeds, loser, hedge, criterion, probing, several, offload, fallback):
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(16))
    make = {"sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9), "adam": lambda ps: Adam(ps, lr=0.01)}
    alone = copy.deepcopy(model)
    optimizer = make[fallback](alone.parameters())
    rogue = Rogue(model.parameters(), deeds)
    guard = LossGuard(
        [SGD(model.parameters(), lr=0.5), rogue] if several else rogue,
        make[fallback](model.parameters()),
        nt=NT,
        nc=NC,
        loser=loser,
        hedge=hedge,
        criterion=criterion,
        probing=probing,
        offload=offload,
        model=model,
    )
    shapes = [(p.shape, p.dtype, p.stride(), p.data_ptr()) for p in model.parameters()]
    lanes = (2 if several else 1) + (2 if hedge and hedge != "only" else 1)
    for _ in range(CYCLES):
        batches = [spiral(8) for _ in range(NT)]
        probe, cycles = guard._probe, len(guard.history)
        with torch.enable_grad():  # a rogue may have left gradients off
            run(guard, model, batches)
            while len(guard.history) == cycles:
                batches.append(spiral(8))
                run(guard, model, batches[-1:])
        decision = guard.last_decision
        nc = len(batches) - NT
        assert nc == (decision.forwards > 0) * nc and nc in ((2, 4) if probe else (0,))
        assert decision.gradients <= NT * lanes and bool(decision.learned_updates) == probe

        # The parameters are finite, and still what and where they were.
        assert all(p.isfinite().all() for p in model.parameters())
        assert [(p.shape, p.dtype, p.stride(), p.data_ptr()) for p in model.parameters()] == shapes

        # The fallback's state is sound.
        for state in guard.fallback.state.values():
            assert all(v is None or torch.as_tensor(v).isfinite().all() for v in state.values())

        # The check loss of what was kept, computed anew, is at most the fallback's; or x has gone
        # back to s, and the training losses say so wherever it hasn't.
        assert decision.winner >= 0
        by_record = hedge not in (False, True, "only")
        excess = guard._lanes.excess
        assert not by_record or excess.total <= excess.worst
        if probe and not (by_record and decision.winner == lanes - 1):
            with torch.no_grad():
                losses = [loss_fn(copy.deepcopy(model), batch).item() for batch in batches[NT:]]
            assert sum(losses) / nc <= decision.fallback_loss * (1 + 1e-6)

        # A fallback that hasn't lost yet took exactly its own steps, unhurt by the other branch.
        if guard.history == [decision]:
            for batch in batches[:NT]:
                optimizer.zero_grad()
                loss_fn(alone, batch).backward()
                optimizer.step()
            fallback_loss = sum(
                loss_fn(copy.deepcopy(alone), batch).item() for batch in batches[NT:]
            )
            assert abs(fallback_loss / nc - decision.fallback_loss) <= 1e-6

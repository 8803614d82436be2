"""Algorithm 2 by the letter: a model and an optimizer of its own for every branch.

It shares no code with the guard: nothing is swapped in and out of one model, so there is nothing
that could leak from one branch into another.
"""

import copy
import math

import torch
from models import assert_same_state, closure_for


def algorithm2(
    model, learned, fallback, batches, loss_fn, *, nt, nc, loser="keep", hedge=False, decay=None,
    share=0.0, schedule=None, hold=None, training=0,
):  # fmt: skip
    """The model given out after each cycle, its winner, check losses, training losses, and excess.

    ``learned`` and ``fallback`` build an optimizer on parameters. ``schedule`` builds a scheduler,
    stepped once per train minibatch, on the fallback of each branch. With ``hedge`` the third
    branch goes on from where it is, and z takes its optimizer's state over wherever x is there. By
    ``decay`` x goes back there on a track record, whose sum, worst term, sum with the shortest
    memory and cycles are the excess; while that memory is of the third branch's lead, it is given
    out. By ``hold``, cycles and a tolerance, x goes back to the best that it has been, as a
    ratchet has it; the winner is then -1. The last ``training`` of each branch's training losses
    count as check losses too.
    """
    x = copy.deepcopy(model)
    branches = [copy.deepcopy(model) for _ in range(3 if hedge else 2)]
    makers = [learned, fallback, fallback][: len(branches)]
    optimizers = [make(b.parameters()) for make, b in zip(makers, branches, strict=True)]
    fresh = [copy.deepcopy(o.state_dict()) for o in optimizers]
    schedules = [schedule(o) for o in optimizers[1:]] if schedule else []
    stream = iter(batches)
    on_own, excess, worst, recent, cycles = True, 0.0, 0.0, 0.0, 0
    best, anew, sums, since = copy.deepcopy((x, optimizers[1].state_dict())), False, [0.0, 0.0], 0
    at_own = hedge
    for _ in range(len(batches) // (nt + nc)):
        for branch in branches[:2]:
            branch.load_state_dict(x.state_dict())
        if anew:
            start_over(optimizers[0], fresh[0])
        anew, held, was_own = False, [], at_own
        before = [copy.deepcopy(o.state_dict()["state"]) for o in optimizers]
        train = [[] for _ in branches]
        for _ in range(nt):
            batch = next(stream)
            seed = int(torch.randint(1 << 30, ()))
            for branch, optimizer, losses in zip(branches, optimizers, train, strict=True):
                torch.manual_seed(seed)
                optimizer.zero_grad()
                loss = loss_fn(branch, batch)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            if hold and not was_own:
                torch.manual_seed(seed)
                held.append(loss_fn(copy.deepcopy(best[0]), batch).item())
            for scheduler in schedules:
                scheduler.step()
        checks = [[] for _ in branches]
        trained = [copy.deepcopy(b.state_dict()) for b in branches]
        for _ in range(nc):
            batch = next(stream)
            seed = int(torch.randint(1 << 30, ()))
            for branch, losses in zip(branches, checks, strict=True):
                torch.manual_seed(seed)
                losses.append(loss_fn(branch, batch).item())
        for branch, state in zip(branches, trained, strict=True):
            branch.load_state_dict(state)
        late = [t[nt - training :] for t in train]
        means = [sum(t + c) / (training + nc) for t, c in zip(late, checks, strict=True)]
        finite = [
            math.isfinite(m) and all(p.isfinite().all() for p in b.parameters())
            for m, b in zip(means, branches, strict=True)
        ]
        winner = winner_of(means, finite)
        if decay is not None:
            winner = winner_of(means[:2], finite[:2])
            if on_own and winner == 1:  # z and s are the same there
                winner = 2
            d = sum(train[winner]) - sum(train[2])
            cycles += 1
            rho = max(decay, 1 - 1 / max(share * cycles, 1))
            excess, worst, recent = rho * excess + d, max(rho * worst, d), decay * recent + d
            if excess > (0 if on_own else worst):
                winner = 2
            on_own = winner == 2
            if on_own:
                excess, worst, recent, cycles = 0.0, 0.0, 0.0, 0
        if winner >= 0:
            x.load_state_dict(branches[winner].state_dict())
        for lane in (0, 1):
            if lane == 1 and winner == 2:
                continue
            state = optimizers[lane].state_dict()
            groups = state["param_groups"]
            if lane != winner and loser == "rollback":
                optimizers[lane].load_state_dict({"state": before[lane], "param_groups": groups})
            if lane != winner and loser == "reset":
                start_over(optimizers[lane], fresh[lane])
        if hedge and (winner == 2 or not all(p.isfinite().all() for p in branches[2].parameters())):
            if winner != 2:  # s begins again at x
                branches[2].load_state_dict(x.state_dict())
                start_over(optimizers[2], fresh[2])
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[2].state_dict()))
        kept = train[winner if winner >= 0 else 1]
        at_own = bool(hedge) and winner == 2
        if hold:
            since += 1
            sums = [sums[0] + (0 if was_own else sum(kept)), sums[1] + sum(held)]
            due, own = since == hold[0], was_own or at_own
            if due and not own and sums[0] > sums[1] + hold[1] * abs(sums[1]):
                x.load_state_dict(best[0].state_dict())
                groups = optimizers[1].state_dict()["param_groups"]
                optimizers[1].load_state_dict({**copy.deepcopy(best[1]), "param_groups": groups})
                winner, anew = -1, True
            elif own or (due and sums[0] <= sums[1]):
                best = copy.deepcopy((x, optimizers[1].state_dict()))
            if due or own:
                sums, since = [0.0, 0.0], 0
        given = x
        if recent > 0:
            given, winner, kept = branches[2], 2, train[2]
        record = (excess, worst, recent, cycles)
        yield copy.deepcopy(given.state_dict()), winner, means, kept, record


def follow(guard, model, batches, expected):
    """Run a guard on the reference's minibatches: after each cycle its winner, losses and x are so.

    Yields its decision, and the reference's check losses and excess.
    """
    expected = iter(expected)
    for batch in batches:
        guard.step(closure_for(guard, model, batch))
        if guard._cycle.phase == 0:
            state, winner, means, losses, excess = next(expected)
            decision = guard.last_decision
            assert (decision.winner, decision.losses) == (winner, losses)
            assert_same_state(model.state_dict(), state)
            yield decision, means, excess


def assert_same_run(guard, model, expected):
    """The guard's winners, and what the model holds at the end, are the reference's."""
    assert [d.winner for d in guard.history] == [winner for _, winner, *_ in expected]
    assert_same_state(model.state_dict(), expected[-1][0])


def start_over(optimizer, fresh):
    """As it was built, but for the rates: entries that its steps have made of a group are gone."""
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {key: value for key, value in group.items() if key in before}
        for group, before in zip(now, fresh["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**copy.deepcopy(fresh), "param_groups": groups})


def winner_of(means, finite):
    """The rule in words: the learned lane only if strictly best; the hedge wins its ties."""
    candidates = [m for m, ok in zip(means, finite, strict=True) if ok]
    if not candidates:
        return -1
    best = [i for i, m in enumerate(means) if finite[i] and m == min(candidates)]
    return max(best)

"""Guards side by side, of which the best is followed: a guard of guards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..rules import HEAD_START
from ..validation import check_decay, check_kind, check_nc, check_part
from . import trial as trials
from .cycle import LONGEST, Cycle, as_arrays, check_objective, check_state, own_buffers
from .lanes import losses_at
from .protocol import NEITHER, Decision, Guard, GuardState, Objective, Params, advance, following
from .soundness import advance_schedules, check_schedules, is_sound, renew, select, sound
from .stacked import stacked


class BestOfState(NamedTuple):
    """What the guards are at, each on its own path."""

    members: tuple[GuardState, ...]
    records: Float[Array, " members"]
    """D of each."""
    weights: Float[Array, " members"]
    """W of each."""
    lowest: Float[Array, " members"]
    """The lowest D of each, since it began."""
    against: trials.Trial
    """The leader on trial against each; leaves have an axis of members."""
    spent: Int[Array, " members"]
    """Steps of each beside the leader, from the end of the head start on."""
    leader: Int[Array, ""]
    """The number of the guard that is followed."""
    checked: Int[Array, ""]
    """The number of the next check minibatch."""
    GOES_ON = ("spent", "checked")


def best_of(
    guards: Sequence[Guard],
    *,
    share: float | None = None,
    check: Objective | None = None,
    nc: int | None = None,
    decay: float = 0.9,
) -> Guard:
    """Run several guards, each on its own path, and follow the one whose recent losses are lowest.

    On the same minibatches, for each guard j that runs in a cycle:

        d[j] <- mean_t F(path of j, i+t)          its training losses
        W[j] <- decay W[j] + 1
        D[j] <- D[j] + (d[j] - D[j]) / W[j]        their mean, of which each cycle forgets a part
        x <- x[j] of the lowest D[j]

    With ``share=None`` all run in every cycle. Then for any guards and at any time

        sum_c decay^(C-c) d[followed in c](c)  <=  min_j sum_c decay^(C-c) d[j](c)

    over the guards that were not ruined, if all stay finite ("be the leader": Kalai and Vempala,
    2005): with hindsight, d being known before the leader is chosen. With ``share`` only who runs
    can be it. Who isn't finite, or is ruined (``docs/guards.md``), begins again at x, with its
    schedules and the record of who is followed.

    Args:
        guards: guards of the same nt. The first is followed where all are level. Give optimizers
            each by itself: guards over one fallback would each run it.
        share: of the cycles, for each guard that doesn't lead, after 100 steps in which all run; 50
            steps after the start D begins anew: a bad start is forgotten by then. None: all run in
            each cycle. Schedules follow the steps of the run, also of who doesn't run.
        check: where data repeat, training losses are lower for whoever overfits. Then d[j] is the
            mean of this objective of x[j] over nc minibatches of its own, 0, 1, 2, ...
        nc: check minibatches a cycle, with a ``check``; None for two.
        decay: D remembers about 1 / (1 - decay) cycles.

    ``decision.winner`` numbers the guards, -1 where x goes back to where the cycle began;
    ``gradients``, ``forwards`` and ``learned_updates`` are sums, the rest is of who is followed.
    Memory: that of the guards, and one copy of the parameters. Cost: that of the guards; with a
    check nc forward passes of each that runs.

    Raises:
        ValueError: if an argument isn't one of the above; in ``init``, if with ``share`` a schedule
            is inside ``optax.MultiSteps``; in the first step, if the guards' nt differ.

    >>> import optax
    >>> from lossguard import recommended, unguarded
    >>> guard = best_of([unguarded(optax.sgd(rate)) for rate in (0.1, 0.4)])
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> int(decision.winner), int(decision.gradients)
    (1, 20)
    """
    members = members_of(guards)
    if isinstance(check, stacked):
        raise ValueError("check must take minibatches 0, 1, 2, ... without end, got stacked ones")
    share = None if share is None else check_part("share", share)
    nc, decay = check_nc(nc, check, most=LONGEST), check_decay(decay)
    rules = SideBySide(members, share, check, nc, decay)
    return Guard(rules.init, rules.step)


def members_of(guards: Iterable[Guard]) -> tuple[Guard, ...]:
    """Refuse what are no guards, or none; a single one is a tuple of functions."""
    check_kind("guards", guards, Iterable, "[unguarded(optax.sgd(0.1))]")
    members = tuple(guards)
    if not members:
        raise ValueError("guards must be a sequence of at least one guard, got none")
    for one in members:
        check_kind("each of guards", one, Guard, "unguarded(optimizer)")
    return members


@dataclass(frozen=True)
class SideBySide:
    """The rules.

    Where the leader isn't finite at the end of a cycle that began well, that cycle counts as its D:
    so x goes back to where the cycle began, unless another D is lower. A minibatch that is lost on
    all doesn't count.
    """

    members: tuple[Guard, ...]
    share: float | None
    check: Objective | None
    nc: int
    decay: float

    def init(self, params: Params) -> GuardState:
        """All are at the parameters, and nothing is known of them."""
        params = as_arrays(params)
        unknown = jnp.full(len(self.members), jnp.nan, float)
        members = tuple(guard.init(params) for guard in self.members)
        if self.share is not None:
            check_schedules("each of guards", members)
        inner = BestOfState(
            members=members,
            records=unknown,
            weights=jnp.zeros_like(unknown),
            lowest=unknown,
            against=jax.tree.map(lambda leaf: jnp.full(unknown.shape, leaf), trials.unbounded()),
            spent=jnp.zeros(len(self.members), jnp.int32),
            leader=jnp.int32(0),
            checked=jnp.int32(0),
        )
        return own_buffers(GuardState(params, jnp.int32(0), jnp.int32(0), inner))

    def step(self, state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        """A cycle of those that are due."""
        check_state(state, self.init)
        objective, inner, i = sound(objective), state.inner, state.minibatches
        runs, after = self.are_due(inner, state.steps), []
        for j, (guard, at) in enumerate(zip(self.members, inner.members, strict=True)):
            edited = select(inner.leader == j, state.params, at.params)  # x may have been edited
            at = at._replace(params=edited, minibatches=i)
            after.append(self.step_if(runs[j], guard, at, objective, inner.checked))
        states, decisions, rows = zip(*after, strict=True)
        lengths = {len(decision.losses) for decision in decisions}
        if len(lengths) > 1:
            raise ValueError(f"guards must have the same nt, got {sorted(lengths)}")
        nt = lengths.pop()

        losses, d = jnp.stack([decision.losses for decision in decisions]), means(jnp.stack(rows))
        ran = jnp.array(runs)
        finite = jnp.stack([is_sound(at.params, lambda: state.params) for at in states])
        beside = ran & (jnp.arange(len(d), dtype=jnp.int32) != inner.leader)
        inner, fine, again = self.settle(inner, losses, d, ran, finite)
        if self.share is not None:
            inner = head_start(inner, beside, state.steps, nt)
        ends = [select(ok, at.params, state.params) for ok, at in zip(fine, states, strict=True)]
        x, decision = jax.tree.map(
            lambda *leaves: jnp.stack(leaves)[inner.leader], *zip(ends, decisions, strict=True)
        )
        stays = fine[inner.leader]
        decision = decision._replace(
            losses=jnp.where(stays, decision.losses, jnp.inf),
            winner=jnp.where(stays, inner.leader, NEITHER),
            gradients=sum(one.gradients for one in decisions),
            forwards=sum(one.forwards for one in decisions),
            learned_updates=sum(one.learned_updates for one in decisions),
        )
        members = tuple(
            jax.lax.cond(begins, partial(renew, guard, x), lambda at: at, at)
            for begins, guard, at in zip(again, self.members, states, strict=True)
        )
        inner = inner._replace(members=members, checked=following(inner.checked, self.nc))
        minibatches = jnp.stack([at.minibatches for at in states])
        begins = (minibatches < i).any()  # at minibatch 0 again, for all of them
        i = jnp.where(begins, 0, minibatches.max())
        return GuardState(x, advance(state.steps, nt), i, inner), decision

    def are_due(self, inner: BestOfState, k: Int[Array, ""]) -> Sequence[Bool[Array, ""] | bool]:
        """Which guards run in the cycle after k steps."""
        if self.share is None:
            return [True] * len(self.members)
        spent, k = (count.astype(float) for count in (inner.spent, k))
        due = (k < HEAD_START) | (spent <= self.share * (k - HEAD_START))
        return [*(due | (jnp.arange(len(spent), dtype=jnp.int32) == inner.leader))]

    def step_if(
        self,
        runs: Bool[Array, ""] | bool,
        guard: Guard,
        at: GuardState,
        objective: Objective,
        checked: Int[Array, ""],
    ) -> tuple[GuardState, Decision, Float[Array, " minibatches"]]:
        """A cycle of a guard, and losses that d is the mean of; where it doesn't run nothing is
        spent, and nothing known."""

        def step(at: GuardState) -> tuple[GuardState, Decision, Array]:
            at, decision = guard.step(at, objective)
            if self.check is None:
                return at, decision, decision.losses
            check_objective(self.check, at.params, checked, name="check")
            held_out = Cycle(self.check, checked, at.steps, self.nc)
            decision = decision._replace(forwards=decision.forwards + self.nc)
            return at, decision, losses_at([at.params], held_out)[:, 0]

        def idle(at: GuardState) -> tuple[GuardState, Decision, Array]:
            _, decision, d = jax.tree.map(jnp.zeros_like, jax.eval_shape(step, at))
            at = at._replace(inner=advance_schedules(at.inner, len(decision.losses)))
            return at, decision, jnp.full_like(d, jnp.nan)

        return step(at) if runs is True else jax.lax.cond(runs, step, idle, at)

    def settle(
        self,
        inner: BestOfState,
        losses: Float[Array, "members nt"],
        d: Float[Array, " members"],
        ran: Bool[Array, " members"],
        finite: Bool[Array, " members"],
    ) -> tuple[BestOfState, Bool[Array, " members"], Bool[Array, " members"]]:
        """What is known after a cycle, and of each whether it is fine, and whether it begins again.

        ``finite`` are those whose parameters are.
        """
        numbers = jnp.arange(len(d), dtype=jnp.int32)
        leads = numbers == inner.leader
        lost = ~(jnp.isfinite(d) & ran).any()  # all minibatches are, on all
        fine = ~ran | (finite & (jnp.isfinite(d) | lost))
        goes_back = leads & ~fine & jnp.isfinite(losses[:, 0]) & ~jnp.isnan(inner.records)
        d = jnp.where(goes_back, inner.records, d)
        counts = ran & ~lost & (fine | goes_back)
        weights = jnp.where(counts, self.decay * inner.weights + 1, inner.weights)
        known = jnp.where(jnp.isnan(inner.records), d, inner.records)
        records = jnp.where(counts, known + (d - known) / weights, inner.records)
        lowest = jnp.fmin(inner.lowest, records)
        may_lead = ran & (fine | goes_back) & ~jnp.isnan(records)
        best = jnp.argmin(jnp.where(may_lead, records, jnp.inf)).astype(jnp.int32)
        best = jnp.where(may_lead.any(), best, inner.leader)

        compared = counts & fine & ~leads & fine[inner.leader]
        leading = jnp.broadcast_to(losses[inner.leader], losses.shape)
        tried, won, over = jax.vmap(trials.play)(inner.against, leading, losses)
        was_as_good = 2 * lowest < records + records[inner.leader]
        again = ~fine | (compared & won & was_as_good & (numbers != best))
        restarts = again | (compared & (won | over)) | (best != inner.leader)
        against = jax.vmap(select)(compared, tried, inner.against)
        after = inner._replace(
            records=jnp.where(again, records[best], records),
            weights=jnp.where(again, weights[best], weights),
            lowest=jnp.where(again, records[best], lowest),
            against=jax.vmap(select, (0, None, 0))(restarts, trials.unbounded(), against),
            leader=best,
        )
        return after, fine, again


def means(losses: Float[Array, "members minibatches"]) -> Float[Array, " members"]:
    """Of each over the minibatches on which any has a finite loss: the others tell nothing."""
    known = jnp.isfinite(losses).any(axis=0)
    own = jax.vmap(trials.finite_mean)(losses)
    return jnp.where(known, losses, own[:, None]).mean(axis=1)


def head_start(
    inner: BestOfState, beside: Bool[Array, " members"], k: Int[Array, ""], nt: int
) -> BestOfState:
    """After a cycle of nt steps from step k: turns count from the end of the head start on.

    Who leads then is told by its second half: D begins anew after the first.
    """
    half, after = HEAD_START // 2, advance(k, nt)
    anew = (k < half) & (half <= after) & (after < HEAD_START)
    shared = beside & (after >= HEAD_START)
    return inner._replace(
        weights=jnp.where(anew, 0, inner.weights),
        spent=jnp.where(shared, advance(inner.spent, nt), inner.spent),
    )

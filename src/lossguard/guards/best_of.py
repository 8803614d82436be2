"""Guards side by side, of which the best is followed: a guard of guards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..rules import HEAD_START
from ..validation import check_decay, check_kind, check_nc, check_part
from . import trial as trials
from .clocks import advance_schedules, check_schedules, keep_schedules, typed_as
from .cycle import LONGEST, as_arrays, check_state, numbers_of, of_cycle, own_buffers
from .lanes import losses_at
from .losses import Point, check_loss, sound
from .protocol import NEITHER, Decision, Guard, GuardState, Loss, Params, advance, following
from .soundness import is_sound, select


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
    check: Loss | None = None,
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
            mean of this loss of x[j] over nc minibatches of its own, whose numbers it is given: 0,
            1, 2, ...; with model state it takes that, too, and what it returns of it isn't kept.
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
    share = None if share is None else check_part("share", share)
    nc, decay = check_nc(nc, check, most=LONGEST), check_decay(decay)
    rules = SideBySide(members, share, check, nc, decay)
    return Guard(rules.init, rules.step, max(guard.per_cycle for guard in members))


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
    check: Loss | None
    nc: int
    decay: float

    def init(self, params: Params, extra: PyTree = None) -> GuardState:
        """All are at the parameters, and nothing is known of them."""
        params, extra = as_arrays(params), numbers_of(extra)
        unknown = jnp.full(len(self.members), jnp.nan, float)
        members = tuple(begun(guard, Point(params, extra)) for guard in self.members)
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
        return own_buffers(GuardState(params, jnp.int32(0), jnp.int32(0), inner, extra))

    def step(
        self, state: GuardState, loss: Loss, minibatches: Any = None
    ) -> tuple[GuardState, Decision]:
        """A cycle of those that are due."""
        check_state(state, self.init)
        per_cycle = max(guard.per_cycle for guard in self.members)
        minibatches = of_cycle(state, minibatches, per_cycle)
        inner, x = state.inner, Point(state.params, state.extra)
        runs, after = self.are_due(inner, state.steps), []
        for j, (guard, at) in enumerate(zip(self.members, inner.members, strict=True)):
            # x may have been edited
            edited = select(inner.leader == j, x, Point(at.params, at.extra))
            at = at._replace(**edited._asdict(), minibatches=state.minibatches)
            own = jax.tree.map(lambda leaf, n=guard.per_cycle: leaf[:n], minibatches)
            step = partial(guard.step, loss=sound(loss), minibatches=own)
            after.append(self.step_if(runs[j], step, at, inner.checked))
        states, decisions, rows = zip(*after, strict=True)
        lengths = {len(decision.losses) for decision in decisions}
        if len(lengths) > 1:
            raise ValueError(f"guards must have the same nt, got {sorted(lengths)}")
        nt = lengths.pop()

        losses, d = jnp.stack([decision.losses for decision in decisions]), means(jnp.stack(rows))
        ran = jnp.array(runs)
        points = [Point(at.params, at.extra) for at in states]
        finite = jnp.stack([is_sound(point, lambda: x) for point in points])
        beside = ran & (jnp.arange(len(d), dtype=jnp.int32) != inner.leader)
        inner, fine, again = self.settle(inner, losses, d, ran, finite)
        if self.share is not None:
            inner = head_start(inner, beside, state.steps, nt)
        ends = [select(ok, point, x) for ok, point in zip(fine, points, strict=True)]
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
            jax.lax.cond(begins, partial(begin_again, guard, x), lambda at: at, at)
            for begins, guard, at in zip(again, self.members, states, strict=True)
        )
        inner = inner._replace(members=members, checked=following(inner.checked, self.nc))
        steps, number = advance(state.steps, nt), following(state.minibatches, per_cycle)
        return GuardState(x.params, steps, number, inner, x.extra), decision

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
        step: Callable[[GuardState], tuple[GuardState, Decision]],
        at: GuardState,
        checked: Int[Array, ""],
    ) -> tuple[GuardState, Decision, Float[Array, " minibatches"]]:
        """A cycle of a guard, and losses that d is the mean of; where it doesn't run nothing is
        spent, and nothing known."""

        def run(at: GuardState) -> tuple[GuardState, Decision, Array]:
            at, decision = step(at)
            if self.check is None:
                return at, decision, decision.losses
            point, numbers = (
                Point(at.params, at.extra),
                checked + jnp.arange(self.nc, dtype=jnp.int32),
            )
            check_loss(self.check, point, checked, name="check")
            decision = decision._replace(forwards=decision.forwards + self.nc)
            return at, decision, losses_at([point], self.check, numbers, name="check")[:, 0]

        def idle(at: GuardState) -> tuple[GuardState, Decision, Array]:
            _, decision, d = jax.tree.map(jnp.zeros_like, jax.eval_shape(run, at))
            at = at._replace(inner=advance_schedules(at.inner, len(decision.losses)))
            return at, decision, jnp.full_like(d, jnp.nan)

        return run(at) if runs is True else jax.lax.cond(runs, run, idle, at)

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


def begun(guard: Guard, x: Point) -> GuardState:
    """A guard at a point. One without model state needs no argument for it."""
    return guard.init(x.params) if x.extra is None else guard.init(*x)


def begin_again(guard: Guard, x: Point, at: GuardState) -> GuardState:
    """A guard at a point, with the schedules and counts that it had."""
    return typed_as(at, keep_schedules(begun(guard, x), at))


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

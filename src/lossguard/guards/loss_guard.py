"""The loss guard: Algorithm 2 of the paper (LGL2O), over lanes.

A lane is an optimizer, and where its next nt steps start from. The paper's guard has two, both of
which start from x: y, the learned optimizer's, and z, the fallback's. More may compete: further
learned optimizers from x, and s, the fallback on its own path, which no decision touches.

``cycle`` is the algorithm, line by line; what surrounds it are its options.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..validation import check_choice, check_count, check_enough, check_kind
from .branch import Branch, check, train
from .criteria import Criterion, mean_criterion
from .lanes import Lanes, LanesState, Loser
from .probing import Probing, ProbingState, always, init_probing
from .protocol import (
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    are_several,
    as_arrays,
    check_state,
    loss_dtype,
    start,
    sum_dtype,
    with_extra_args,
)
from .ratchet import Ratchet, RatchetState, init_ratchet
from .soundness import is_sound, select
from .stacked import check_stacked, stacked
from .track_record import Excess, TrackRecord
from .verdict import NEITHER, Verdict, follow_first, judge
from .windows import Windows, fixed

Hedge = Literal["only"] | bool | TrackRecord
Checks = Literal["next", "apart"]


class LossGuardState(NamedTuple):
    """What the loss guard keeps beside x."""

    lanes: LanesState
    x: Params | None
    """x, by a track record, which may have s given out; None without: it is ``params`` then."""
    excess: Excess
    """Of x's training losses over those of s, where a track record is kept."""
    factor: Int[Array, ""]
    """Of nt and nc, where windows adapt."""
    drawn: Int[Array, ""]
    """Check minibatches so far, where they are numbered apart."""
    probing: ProbingState
    ratchet: RatchetState | None
    """Of x against its best, where one holds."""


def loss_guard(
    learned: Any,
    fallback: Any,
    *,
    nt: int = 10,
    nc: int = 10,
    loser: Loser = "keep",
    hedge: Hedge = False,
    criterion: Criterion = mean_criterion(),
    windows: Windows = fixed(),
    probing: Probing = always(),
    ratchet: Ratchet | None = None,
    checks: Checks = "next",
) -> Guard:
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

    From x, on minibatches i .. i+nt-1 and then i+nt .. i+nt+nc-1:

        y <- nt steps of learned;   z <- nt steps of fallback
        x <- y   if mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j)   else z

    With ``hedge`` a third lane runs on the same minibatches, s <- nt steps of the fallback from s,
    and x becomes s where that is better: never worse than the fallback alone, up to the error of
    the decision. While x lies on the fallback's own path, z is s and costs nothing. When x goes
    back, to that path or to its own best, ``track_record`` and ``ratchet`` say. By a track record
    the guard gives out s, and x goes on beside it, while the recent losses of s are lower.

    A lane whose parameters or check losses are not finite can't win (parameters may be infinite
    where they are so in x, as masks are), nor one with such a training loss among those that the
    criterion counts; if none can, x stays. Where a track record spares s the check, its training
    losses count instead. So x is finite for ever if it begins so. An optimizer state that is no
    longer finite is made anew, and a lane s that is no longer finite begins again at x. Ties go to
    s, then z.

    Args:
        learned: the optimizer that is not trusted, an optax transformation; or several, of which
            the best competes.
        fallback: the one that is trusted, likewise.
        nt: optimizer steps a cycle.
        nc: check minibatches a cycle; sequential criteria have their own numbers. 0, where the
            criterion counts training losses: all minibatches train.
        loser: what becomes of the optimizer state of a branch from x that lost. "keep": it runs on
            from its own nt steps; "rollback": as before the cycle; "reset": as at the start. The
            learning-rate schedule of the fallback advances by nt a cycle under each, but one that
            an optimizer counts in a state of its own (Prodigy, schedule-free) goes with that state.
        hedge: whether the fallback also runs on its own path. True: x goes back to it where its
            check mean is no higher, which forfeits what was gained; ``track_record()``: where x's
            training losses have been higher for a while; s is given out while they are, without
            delay. "only" is True without z, which costs what the paper's guard does.
        criterion: when a learned lane is better than the fallback's from x; by default
            ``mean_criterion()``, the paper's.
        windows: how nt and nc change; by default not at all.
        probing: how often the learned lanes run; by default always.
        ratchet: when x goes back to its best; by default never. The learned optimizers begin anew
            there.
        checks: which minibatches are checked on. "next": those that follow the cycle's training
            ones, so that they are not trained on; "apart": numbers -1, -2, ..., so that training
            takes 0, 1, 2, ... as without a guard, and lane s is just what the fallback alone does.

    ``decision.winner`` numbers the lanes: the learned ones from 0 in their order, then z, then s.
    It is -1 where x went back to its best.

    Memory: x, a copy of the parameters a lane, an optimizer state a lane (two under "rollback");
    with a ratchet one copy of the parameters and of the fallback's state; with a track record one
    copy of the parameters.
    Cost a cycle with m learned lanes: (m + 1) nt gradients, m nt learned updates, (m + 1) nc
    forward passes; one lane more where hedged and x is off the fallback's own path (gradients only,
    by a track record). With a ratchet nt forward passes, where x is off that path.

    Raises:
        ValueError: if an argument is not among those allowed, or nc too small for the criterion; in
            a step, if the objective is ``stacked`` and check minibatches are apart, or too few.

    Source: the paper's Algorithm 2; with nt = nc = 1 and a deterministic objective, Algorithm 1.
    Several candidates and all options but nt, nc and loser go beyond it. In plain loops it is in
    tests/guards/numpy_guards.py.

    >>> import optax
    >>> guard = loss_guard(optax.sgd(3.0), optax.sgd(0.1))  # the first one diverges
    >>> state = guard.init(jnp.array([1.0, 2.0]))
    >>> state, decision = guard.step(state, lambda params, i: jnp.sum(params**2))
    >>> int(state.steps), int(state.minibatches), bool(decision.used_learned.any())
    (10, 20, False)
    """
    check_choice("loser", loser, get_args(Loser))
    check_choice("checks", checks, get_args(Checks))
    if hedge not in (False, True, "only") and not isinstance(hedge, TrackRecord):
        raise ValueError(f"hedge must be False, True, 'only' or track_record(), got {hedge!r}")
    several = list(learned) if are_several(learned) else [learned]
    check_count("the number of learned optimizers", len(several))
    lanes = Lanes(
        learned=tuple(with_extra_args("learned", one) for one in several),
        trusted=with_extra_args("fallback", fallback),
        loser=loser,
        has_z=hedge != "only",
        has_s=bool(hedge),
    )
    m = lanes.m
    record = hedge if isinstance(hedge, TrackRecord) else None
    check_kind("criterion", criterion, Criterion, "mean_criterion()")
    check_kind("windows", windows, Windows, "adaptive()")
    check_kind("probing", probing, Probing, "backoff()")
    if ratchet is not None:
        check_kind("ratchet", ratchet, Ratchet, "ratchet()")
    looks, training = criterion.looks, criterion.training
    nt = check_enough("nt", nt, max(training, 1))
    nc = check_enough("nc", nc, criterion.least if looks is None else 1)
    if windows.most > 1 and looks is None and nc < 2:
        raise ValueError(f"nc must be at least 2 where windows adapt, got {nc}")
    nt_most, nc_most = nt * windows.most, max(looks or (nc * windows.most,))

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        zero = jnp.zeros((), sum_dtype(params))
        at_start = lanes.init(params)
        inner = LossGuardState(
            lanes=at_start,
            x=None if record is None else params,
            excess=Excess(zero, zero, zero, jnp.int32(0)),
            factor=jnp.int32(1),
            drawn=jnp.int32(0),
            probing=init_probing(),
            ratchet=None
            if ratchet is None
            else init_ratchet(Branch(params, at_start.fallback), zero),
        )
        return start(params, inner)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, LossGuardState)
        if checks == "apart" and isinstance(objective, stacked):
            raise ValueError(
                "checks must be 'next' for stacked minibatches, got 'apart': "
                "recommended(..., most=nc) is so"
            )
        check_stacked(objective, nt_most + nc_most)

        def run(probe: bool, state: GuardState) -> tuple[GuardState, Decision]:
            """A cycle with the fallback's lanes, but not z where it is s."""
            of = partial(cycle, objective, probe)
            if len(lanes.fallbacks) < 2:
                return of(lanes.fallbacks, state)
            on_own = state.inner.lanes.on_own
            one, both = partial(of, lanes.fallbacks[1:]), partial(of, lanes.fallbacks)
            return jax.lax.cond(on_own, one, both, state)

        if not probing.ever_skips:
            return run(True, state)
        now = state.inner.probing.left == 0
        return jax.lax.cond(now, partial(run, True), partial(run, False), state)

    def cycle(
        objective: Objective, probe: bool, fallbacks: tuple[int, ...], state: GuardState
    ) -> tuple[GuardState, Decision]:
        """One cycle of these lanes of the fallback's and, in a ``probe``, of the learned ones.

        Without a probe nothing is checked: x follows z.
        """
        i, inner = state.minibatches, state.inner
        x = state.params if inner.x is None else inner.x
        dtype = loss_dtype(objective, x, i)
        steps = nt * factor_of(inner)

        ran = [*(range(m) if probe else ()), *fallbacks]
        before = lanes.branches(x, inner.lanes, begin_anew(inner))  # lines 10 and 11
        trained, losses = train(  # lines 12 to 15
            [lanes.optimizer(lane) for lane in ran],
            [before[lane] for lane in ran],
            objective,
            i,
            steps=steps,
            most=nt_most,
            dtype=dtype,
        )
        sound = jnp.stack([is_sound(branch.params, x) for branch in trained])

        # By a track record, s is judged by its training losses, and takes no check minibatches.
        checked = len(ran) - (record is not None and len(fallbacks) == 2)
        if probe:  # line 16
            verdict, n, factor = compare(
                trained[:checked], losses[:checked], sound[:checked], objective, i, steps, inner
            )
        else:
            verdict, n, factor = follow_first(sound, losses.dtype), jnp.int32(0), inner.factor
        excess, row, given = against_own(inner, verdict, losses, sound, steps, checked)
        lane_of = jnp.array([*ran, NEITHER], jnp.int32)  # NEITHER is row -1 too
        winner, given_out = lane_of[row], lane_of[given]
        for lane, branch in zip(ran, trained, strict=True):  # lines 17 and 19
            x = select(winner == lane, branch.params, x)

        won = (winner >= 0) & (winner < m)
        of_x, reported = (
            losses[jnp.where(at < 0, verdict.best_fallback, at)] for at in (row, given)
        )
        settled, reset_learned, reset_fallback = lanes.settle(
            inner.lanes, x, ran, before, trained, sound, winner
        )
        excess = Excess(*(jnp.where(settled.on_own, 0, value) for value in excess))
        best, at_x = inner.ratchet, Branch(x, settled.fallback)
        undone, held = jnp.array(False), jnp.int32(0)
        if ratchet is not None and best is not None:
            best, at_x, undone, held = ratchet.update(
                best._replace(anew=best.anew & (not probe)),  # the learned lanes have, in a probe
                at_x,
                of_x,
                objective,
                i,
                steps,
                was_own=inner.lanes.on_own,
                is_own=settled.on_own,
                stayed=row < 0,
            )
        out = at_x.params
        if record is not None:
            out = select(given == len(ran) - 1, trained[-1].params, out)
        given_out = jnp.where(undone & (given == row), NEITHER, given_out)
        inner = LossGuardState(
            lanes=settled._replace(fallback=at_x.state),
            x=None if record is None else at_x.params,
            excess=excess,
            factor=factor,
            drawn=inner.drawn + (n if checks == "apart" else 0),
            probing=probing.update(inner.probing, jnp.array(probe), won),
            ratchet=best,
        )
        decision = Decision(
            used_learned=(given_out >= 0) & (given_out < m) & (jnp.arange(nt_most) < steps),
            losses=reported,
            steps=jnp.int32(steps),
            learned_loss=verdict.learned_loss,
            fallback_loss=verdict.fallback_loss,
            finite_learned=verdict.finite_learned,
            finite_fallback=verdict.finite_fallback,
            reset_learned=reset_learned,
            reset_fallback=reset_fallback,
            winner=given_out.astype(jnp.int32),
            gradients=jnp.int32(len(ran) * steps),
            forwards=jnp.int32(checked * n + held),
            learned_updates=jnp.int32((m if probe else 0) * steps),
        )
        i += steps + (n if checks == "next" else 0)  # line 21
        return GuardState(out, state.steps + steps, i, inner), decision

    def compare(
        trained: Sequence[Branch],
        losses: Float[Array, "checked nt_most"],
        sound: Bool[Array, " checked"],
        objective: Objective,
        i: Int[Array, ""],
        steps: Int[Array, ""] | int,
        inner: LossGuardState,
    ) -> tuple[Verdict, Int[Array, ""], Int[Array, ""]]:
        """Line 16: what the check says of the lanes, its minibatches, and the windows' factor."""
        late = jax.lax.dynamic_slice_in_dim(losses, steps - training, training, axis=1)

        def verdict_by(fresh: Float[Array, "checked most"], n: Int[Array, ""]) -> Verdict:
            return judge(criterion, jnp.concatenate([late, fresh], 1), n + training, sound, m)

        fresh, n = check(
            [branch.params for branch in trained],
            objective,
            i + steps if checks == "next" else -1 - inner.drawn,
            stride=1 if checks == "next" else -1,
            looks=looks or (nc * factor_of(inner),),
            most=nc_most,
            settled=lambda fresh, n: verdict_by(fresh, n).settled,
            dtype=late.dtype,
        )
        verdict = verdict_by(fresh, n)
        learned, fallback = fresh[verdict.best_learned], fresh[verdict.best_fallback]
        return verdict, n, windows.update(inner.factor, learned, fallback, n)

    def factor_of(inner: LossGuardState) -> Int[Array, ""] | int:
        """Of nt and nc; a plain number where windows don't adapt: loops have fixed lengths."""
        return inner.factor if windows.most > 1 else 1

    def against_own(
        inner: LossGuardState,
        verdict: Verdict,
        losses: Float[Array, "lanes most"],
        sound: Bool[Array, " lanes"],
        steps: Int[Array, ""] | int,
        checked: int,
    ) -> tuple[Excess, Int[Array, ""], Int[Array, ""]]:
        """The record after this cycle, the row that x becomes, and the one that is given out.

        Without a record both are the verdict's.
        """
        if record is None:
            return inner.excess, verdict.row, verdict.row
        own = len(losses) - 1
        # Where the check is lost on all, x may stay for the minibatches' fault: z speaks for it.
        row = jnp.where(verdict.row < 0, verdict.best_fallback, verdict.row)
        followed = jnp.where(sound[row], losses[row], jnp.nan)
        excess, back = record.update(inner.excess, followed, losses[own], steps, inner.lanes.on_own)
        fit = sound[own] if checked < len(losses) else verdict.finite_fallback
        row = jnp.where(back & fit, own, verdict.row)
        return excess, row, jnp.where((excess.recent > 0) & fit, own, row)

    def begin_anew(inner: LossGuardState) -> Bool[Array, ""]:
        """Whether the learned lanes start from fresh optimizer states."""
        waited = (inner.probing.wait > 0) & (probing.start == "reset")
        return waited if inner.ratchet is None else waited | inner.ratchet.anew

    return Guard(init, step)

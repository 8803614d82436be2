"""The loss guard: Algorithm 2 of the paper (LGL2O), over lanes.

The paper's guard is two lanes that both start from x: the learned optimizer's, which ends at y, and
the fallback's, which ends at z.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .lanes import Branch, all_finite, check, keep_schedules, renew_if_unsound, select, train
from .protocol import (
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    as_arrays,
    check_count,
    loss_dtype,
    start,
    with_extra_args,
)

Loser = Literal["keep", "rollback", "reset"]
LEARNED, FALLBACK, NEITHER = 0, 1, -1


class LossGuardState(NamedTuple):
    """What the loss guard keeps beside x: the optimizer state of each lane."""

    learned: PyTree
    fallback: PyTree


def loss_guard(
    learned: Any, fallback: Any, *, nt: int = 10, nc: int = 10, loser: Loser = "keep"
) -> Guard:
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

    From x, on minibatches i .. i+nt-1 and then i+nt .. i+nt+nc-1:

        y <- nt steps of learned;   z <- nt steps of fallback
        x <- y   if mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j)   else z

    A branch whose parameters or check losses are not finite can't win; if neither can, x stays. So
    x is finite for ever if it begins so. An optimizer state that is no longer finite is made anew.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is, likewise.
        nt: optimizer steps a cycle.
        nc: check minibatches a cycle.
        loser: what becomes of the optimizer state of the branch that lost. "keep": it runs on from
            its own nt steps; "rollback": as before the cycle; "reset": as at the start. The
            learning-rate schedule of the fallback advances by nt a cycle under each.

    Memory: three copies of the parameters (x, y, z) and one of each optimizer's state, two under
    "rollback". Cost a cycle: 2 nt gradients, nt learned updates, 2 nc forward passes.

    Raises:
        ValueError: if nt or nc is below 1, or loser is none of the three.

    Source: the paper's Algorithm 2; with nt = nc = 1 and a deterministic objective, Algorithm 1.

    >>> import jax, optax
    >>> guard = loss_guard(optax.sgd(3.0), optax.sgd(0.1))  # the first one diverges
    >>> state = guard.init(jnp.array([1.0, 2.0]))
    >>> state, decision = guard.step(state, lambda params, i: jnp.sum(params**2))
    >>> int(state.steps), int(state.minibatches), bool(decision.used_learned.any())
    (10, 20, False)
    """
    check_count("nt", nt)
    check_count("nc", nc)
    if loser not in get_args(Loser):
        raise ValueError(f"loser must be one of {', '.join(get_args(Loser))}, got {loser!r}")
    optimizers = (with_extra_args("learned", learned), with_extra_args("fallback", fallback))

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        return start(params, LossGuardState(*(optimizer.init(params) for optimizer in optimizers)))

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        x, i = state.params, state.minibatches
        dtype = loss_dtype(objective, x, i)

        branches = tuple(Branch(x, lane) for lane in state.inner)  # lines 10 and 11
        branches, losses = train(optimizers, branches, objective, i, nt=nt, dtype=dtype)  # 12 to 15
        y, z = (branch.params for branch in branches)
        checks = check((y, z), objective, i + nt, nc=nc, dtype=dtype)
        learned_loss, fallback_loss = checks.mean(axis=1)

        finite_learned = all_finite((y, learned_loss))
        finite_fallback = all_finite((z, fallback_loss))
        better = (learned_loss < fallback_loss) | ~finite_fallback  # line 16
        learned_won = finite_learned & better
        fallback_won = finite_fallback & ~learned_won
        x = select(learned_won, y, select(fallback_won, z, x))  # lines 17 and 19

        inner, reset = [], []
        for optimizer, branch, before, won in zip(
            optimizers, branches, state.inner, (learned_won, fallback_won), strict=True
        ):
            kept, was_reset = after_cycle(optimizer, x, before, branch.state, won, loser)
            inner.append(kept)
            reset.append(was_reset)

        decision = Decision(
            used_learned=jnp.full(nt, learned_won),
            losses=jnp.where(learned_won, losses[LEARNED], losses[FALLBACK]),
            steps=jnp.int32(nt),
            learned_loss=learned_loss,
            fallback_loss=fallback_loss,
            finite_learned=finite_learned,
            finite_fallback=finite_fallback,
            reset_learned=reset[LEARNED],
            reset_fallback=reset[FALLBACK],
            winner=jnp.where(learned_won, LEARNED, jnp.where(fallback_won, FALLBACK, NEITHER)),
            gradients=jnp.int32(2 * nt),
            forwards=jnp.int32(2 * nc),
            learned_updates=jnp.int32(nt),
        )
        state = GuardState(x, state.steps + nt, i + nt + nc, LossGuardState(*inner))  # line 21
        return state, decision

    return Guard(init, step)


def after_cycle(
    optimizer: optax.GradientTransformationExtraArgs,
    x: Params,
    before: PyTree,
    after: PyTree,
    won: Bool[Array, ""],
    loser: Loser,
) -> tuple[PyTree, Bool[Array, ""]]:
    """The state with which a lane's optimizer enters the next cycle, and whether it was unsound.

    Whatever becomes of the state, its learning-rate schedules have advanced.
    """
    if loser == "keep":
        kept = after
    else:
        lost = before if loser == "rollback" else optimizer.init(x)
        kept = select(won, after, keep_schedules(lost, after))
    return renew_if_unsound(optimizer, x, kept)

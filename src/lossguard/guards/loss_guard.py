"""The paper's guard: Algorithm 2 (LGL2O).

Letters: x the kept iterate, y the learned branch, z the fallback branch, nt optimizer steps a
cycle, nc check minibatches, i the number of a minibatch.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from ..validation import check_choice, check_count
from .clocks import renew, renew_if_unsound
from .cycle import LONGEST, Cycle, guard_of
from .lanes import Lane, Optimizer, losses_at, train, with_extra_args
from .losses import Point
from .protocol import FALLBACK, LEARNED, NEITHER, Decision, Guard, Params
from .soundness import is_sound, select

Loser = Literal["keep", "reset"]


class LossGuardState(NamedTuple):
    """The optimizer states of both branches."""

    learned: PyTree
    fallback: PyTree


def loss_guard(
    learned: Any, fallback: Any, *, nt: int = 10, nc: int = 10, loser: Loser = "keep"
) -> Guard:
    """LGL2O: keep whichever of two optimizers is better on fresh minibatches after nt steps.

        y <- x;  z <- x
        for t in 0 .. nt-1:  y <- learned(y, grad F(y, i+t));  z <- fallback(z, grad F(z, i+t))
        x <- y   if mean_j F(y, i+nt+j) < mean_j F(z, i+nt+j),  j in 0 .. nc-1,   else z
        i <- i + nt + nc

    Where the paper is silent: a branch whose parameters or check losses are not finite can't win,
    and if neither can, x stays; an optimizer state that is no longer finite is made new; the
    fallback's learning-rate schedule advances by nt a cycle, whoever wins.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is trusted, likewise.
        nt: optimizer steps a cycle.
        nc: check minibatches a cycle.
        loser: the optimizer state of the branch that lost. "keep": it runs on from its own nt
            steps; "reset": as at the start.

    Memory: three copies of the parameters and both optimizer states. Cost a cycle: 2 nt gradients,
    nt learned updates, 2 nc forward passes.

    Raises:
        ValueError: if nt or nc is not an integer of at least 1, or loser neither of the two; in a
            step, if there aren't nt + nc minibatches.

    Source: the paper's Algorithm 2; with nt = nc = 1 and a deterministic objective, Algorithm 1.

    >>> import optax
    >>> guard = loss_guard(optax.sgd(0.4), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> bool(decision.used_learned.all()), round(float(decision.price()), 1)
    (True, 26.7)
    """
    nc = check_count("nc", nc, most=LONGEST)
    check_choice("loser", loser, get_args(Loser))
    optimizers = with_extra_args("learned", learned), with_extra_args("fallback", fallback)

    def begin(x: Point) -> LossGuardState:
        return LossGuardState(*(one.init(x.params) for one in optimizers))

    return guard_of(begin, partial(algorithm_2, optimizers, nc, loser), nt=nt, nc=nc)


def algorithm_2(
    optimizers: tuple[Optimizer, Optimizer],
    nc: int,
    loser: Loser,
    x: Point,
    inner: LossGuardState,
    now: Cycle,
) -> tuple[Point, LossGuardState, Decision]:
    """Lines 10 to 19. Line 21 is where ``guard_of`` goes on to the next minibatches."""
    branches = Lane(x, inner.learned), Lane(x, inner.fallback)  # lines 10, 11
    (y, z), (of_y, of_z) = train(optimizers, branches, now)  # lines 12 to 15
    checks = losses_at((y.at, z.at), now.loss, now.fresh).mean(axis=0)
    sound = jnp.stack([is_sound(branch.at, lambda: x) for branch in (y, z)])
    f_y, f_z = jnp.where(sound & jnp.isfinite(checks), checks, jnp.inf)
    keep_y, finite_z = f_y < f_z, jnp.isfinite(f_z)  # line 16
    x = select(keep_y, y.at, select(finite_z, z.at, x))  # lines 17, 19

    inner = LossGuardState(
        after(optimizers[0], loser, x.params, y.state, keep_y),
        after(optimizers[1], loser, x.params, z.state, ~keep_y),
    )
    decision = Decision(
        used_learned=jnp.full(now.nt, keep_y),
        losses=jnp.where(keep_y, of_y.losses, jnp.where(finite_z, of_z.losses, jnp.inf)),
        winner=jnp.where(keep_y, LEARNED, jnp.where(finite_z, FALLBACK, NEITHER)),
        gradients=jnp.int32(2 * now.nt),
        learned_loss=checks[0],
        fallback_loss=checks[1],
        forwards=jnp.int32(2 * nc),
        learned_updates=jnp.int32(now.nt),
        aux=select(keep_y, of_y.aux, of_z.aux),
    )
    return x, inner, decision


def after(
    optimizer: Optimizer, loser: Loser, params: Params, state: PyTree, won: Bool[Array, ""]
) -> PyTree:
    """The state with which an optimizer goes on. Its schedules go on in any case."""
    if loser == "reset":
        state = select(won, state, renew(optimizer, params, state))
    return renew_if_unsound(optimizer, params, state)

"""The residual guard (GL2O, Safe-L2O): the paper's rival, from Heaton, Chen, Wang and Yin 2020.

Letters: T the fallback's operator, S(x) = x - T(x) its residual, r the residual's norm at the
learned proposal y, mu the bound that a tracking sequence makes of the residuals accepted so far.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ..validation import check_choice, check_count, check_fraction, check_kind
from .lanes import Lane, propose
from .protocol import (
    FALLBACK,
    LEARNED,
    NEITHER,
    Decision,
    Guard,
    GuardState,
    Objective,
    Params,
    advance,
    as_arrays,
    check_state,
    following,
    loss_dtype,
    start,
    sum_dtype,
    with_extra_args,
)
from .sequences import TrackingSequence, ema
from .soundness import is_sound, renew_if_unsound, select
from .stacked import check_stacked

Residual = Literal["step", "gradient"]


class ResidualGuardState(NamedTuple):
    """What the residual guard keeps beside x."""

    learned: PyTree
    fallback: PyTree
    memory: PyTree
    """Of the tracking sequence; NaN before the first step."""


def residual_guard(
    learned: Any,
    fallback: Any,
    *,
    alpha: float = 0.99,
    sequence: TrackingSequence = ema(0.9),
    residual: Residual = "step",
    nt: int = 10,
) -> Guard:
    """GL2O: keep the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   if ok: mu <- update(mu, r)

    All of a step is on one minibatch; ||.|| is over all parameters. One step of the guard is nt of
    these optimizer steps. The test at y uses a copy of the fallback's state, which itself advances
    once a step, from x, whatever was kept; the learned state runs on likewise. A proposal that is
    not finite is rejected; if the fallback's step isn't finite either, x stays. Nothing is accepted
    until ||S(x)|| was finite once: then it becomes mu_1; nor while mu is 0, as it is where steps
    are lost in rounding.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is, likewise.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        sequence: how mu follows the residuals accepted; ``ema(0.9)`` by default.
        residual: "step", S(y) is the fallback's update (for SGD: the rate times the gradient), or
            "gradient", the gradient without the rate.
        nt: optimizer steps a cycle.

    Cost a step: 2 gradients, the second after the learned update, which came after the first.

    Raises:
        ValueError: if nt is below 1, alpha not above 0 and at most 1, or residual neither of the
            two.

    Source: Heaton et al., "Safeguarded learned convex optimization", 2020, arXiv 2003.01880; the
    paper's GL2O and appendix E (alpha = 0.99, EMA with theta = 0.9).

    >>> import optax
    >>> guard = residual_guard(optax.sgd(0.2), optax.sgd(0.1))
    >>> state, decision = guard.step(guard.init(jnp.ones(2)), lambda params, i: jnp.sum(params**2))
    >>> bool(decision.used_learned.all()), int(decision.gradients)
    (True, 20)
    """
    nt, alpha = check_count("nt", nt), check_fraction("alpha", alpha)
    check_choice("residual", residual, get_args(Residual))
    check_kind("sequence", sequence, TrackingSequence, "ema(0.9)")
    learned = with_extra_args("learned", learned)
    fallback = with_extra_args("fallback", fallback)

    def init(params: Params) -> GuardState:
        params = as_arrays(params)
        dtype = sum_dtype(params)
        memory = sequence.init(jnp.array(jnp.nan, dtype))
        return start(
            params, ResidualGuardState(learned.init(params), fallback.init(params), memory)
        )

    def optimizer_step(
        x: Params, inner: ResidualGuardState, objective: Objective, i: Array
    ) -> tuple[Params, ResidualGuardState, StepReport]:
        loss, gradient = jax.value_and_grad(objective)(x, i)
        at = Lane(x, inner.learned), Lane(x, inner.fallback)
        y, learned_state = propose(learned, at[0], objective, i, loss, gradient)
        z, fallback_state = propose(fallback, at[1], objective, i, loss, gradient)

        loss_y, gradient_y = jax.value_and_grad(objective)(y, i)
        if residual == "step":
            at_y = Lane(y, inner.fallback)
            after_y, _ = propose(fallback, at_y, objective, i, loss_y, gradient_y)
            s_x, s_y = optax.tree.sub(x, z), optax.tree.sub(y, after_y)
        else:
            s_x, s_y = gradient, gradient_y
        bound_type = jax.tree.leaves(inner.memory)[0].dtype
        mu_1, r = (optax.tree.norm(optax.tree.cast(s, bound_type)) for s in (s_x, s_y))

        # mu_1 is that of the first step, or of the first whose residual is finite.
        memory = select(
            jnp.isfinite(sequence.bound(inner.memory)), inner.memory, sequence.init(mu_1)
        )
        mu = sequence.bound(memory)
        finite_y, finite_z = is_sound(y, x) & jnp.isfinite(r), is_sound(z, x)
        ok = finite_y & jnp.isfinite(mu) & (r <= alpha * mu) & (mu > 0)
        memory = select(ok, sequence.update(memory, r), memory)

        x = select(ok, y, select(finite_z, z, x))
        learned_state = renew_if_unsound(learned, x, learned_state)
        fallback_state = renew_if_unsound(fallback, x, fallback_state)
        inner = ResidualGuardState(learned_state, fallback_state, memory)
        return x, inner, StepReport(ok, loss, finite_y, finite_z)

    def step(state: GuardState, objective: Objective) -> tuple[GuardState, Decision]:
        check_state(state, ResidualGuardState)
        check_stacked(objective, nt)
        dtype = loss_dtype(objective, state.params, state.minibatches)

        def body(carry: tuple, t: Any) -> tuple[tuple, StepReport]:
            x, inner = carry
            x, inner, report = optimizer_step(x, inner, objective, state.minibatches + t)
            return (x, inner), report

        (x, inner), report = jax.lax.scan(body, (state.params, state.inner), jnp.arange(nt))
        nan = jnp.array(jnp.nan, dtype)
        kept = jnp.where(
            report.ok[-1], LEARNED, jnp.where(report.finite_fallback[-1], FALLBACK, NEITHER)
        )
        decision = Decision(
            used_learned=report.ok,
            losses=report.loss.astype(dtype),
            learned_loss=nan,
            fallback_loss=nan,
            finite_learned=report.finite_learned.all(),
            finite_fallback=report.finite_fallback.all(),
            winner=kept,
            gradients=jnp.int32(2 * nt),
            forwards=jnp.int32(0),
            learned_updates=jnp.int32(nt),
        )
        return GuardState(
            x, advance(state.steps, nt), following(state.minibatches, nt), inner
        ), decision

    return Guard(init, step)


class StepReport(NamedTuple):
    """What one optimizer step of the residual guard did."""

    ok: Bool[Array, ""]
    loss: Float[Array, ""]
    finite_learned: Bool[Array, ""]
    finite_fallback: Bool[Array, ""]

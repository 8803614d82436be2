"""The residual guard (GL2O, Safe-L2O): the paper's rival, from Heaton, Chen, Wang and Yin 2020.

Letters: T the fallback's operator, S(x) = x - T(x) its residual, r the residual's norm at the
learned proposal y, mu the bound that a tracking sequence makes of the residuals accepted so far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..validation import check_choice, check_fraction, check_kind
from .clocks import renew_if_unsound
from .cycle import Cycle, guard_of
from .lanes import Lane, Optimizer, propose, with_extra_args
from .losses import Forward, Point, evaluate
from .protocol import FALLBACK, LEARNED, NEITHER, Decision, Guard, Loss
from .soundness import is_sound, select

Residual = Literal["step", "gradient"]


class TrackingSequence(NamedTuple):
    """The rule for mu, which in theirs follows the accepted residuals only.

    Source: Heaton et al., 2020, table 1.
    """

    init: Callable[[Array], PyTree]
    """The memory from mu_1."""
    update: Callable[[PyTree, Array], PyTree]
    """The memory after one more accepted residual r."""
    bound: Callable[[PyTree], Array]
    """mu."""
    reject: Callable[[PyTree, Array], PyTree] = lambda memory, _: memory
    """The memory after a rejected step, of the fallback's residual ||S(x)|| there, if finite."""


def ema(theta: float) -> TrackingSequence:
    """EMA(theta): mu <- theta r + (1 - theta) mu; theta weights the new residual.

    The paper's setting is theta = 0.9; read as a decay it is ``ema(0.1)``. ``ema(1.0)`` is the
    residual accepted last.

    Raises:
        ValueError: if theta is not above 0 and at most 1.

    >>> import jax.numpy as jnp
    >>> float(ema(0.75).update(jnp.array(1.0), jnp.array(3.0)))
    2.5
    """
    theta = check_fraction("theta", theta)
    return TrackingSequence(
        lambda mu: mu, lambda mu, r: theta * r + (1 - theta) * mu, lambda mu: mu
    )


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
    sequence: TrackingSequence = ema(0.9),  # noqa: B008
    residual: Residual = "step",
    nt: int = 10,
) -> Guard:
    """GL2O: keep the learned step where the fallback's next step from there would be small.

        mu_1 = ||S(x_1)||
        y = learned(x);  r = ||S(y)||;  ok = r <= alpha mu
        x <- y if ok else T(x);   mu <- update(mu, r) if ok else reject(mu, ||S(x)||)

    All of a step is on one minibatch; ||.|| is over all parameters. One step of the guard is nt of
    these optimizer steps. The test at y uses a copy of the fallback's state, which itself advances
    once a step, from x, whatever was kept; the learned state runs on likewise. A proposal that is
    not finite is rejected; if the fallback's step isn't finite either, x stays. Nothing is accepted
    until ||S(x)|| is finite and above 0, as it isn't in a warm-up's first step: then it is mu_1.

    Args:
        learned: the optimizer that is not trusted, an optax transformation.
        fallback: the one that is, likewise.
        alpha: 1 - delta, how much smaller than mu a residual has to be.
        sequence: how mu follows residuals, by default those accepted; ``ema(0.9)`` by default.
        residual: "step", S(y) is the fallback's update (for SGD: the rate times the gradient), or
            "gradient", the gradient without the rate, for a fallback that rests in some steps, as
            one in ``optax.MultiSteps`` does.
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
    alpha = check_fraction("alpha", alpha)
    check_choice("residual", residual, get_args(Residual))
    check_kind("sequence", sequence, TrackingSequence, "ema(0.9)")
    learned, fallback = with_extra_args("learned", learned), with_extra_args("fallback", fallback)
    rules = SafeL2O(learned, fallback, alpha, sequence, residual)
    return guard_of(rules.begin, rules.cycle, nt=nt)


@dataclass(frozen=True)
class SafeL2O:
    """The rules: of a cycle, and of each of its steps."""

    learned: Optimizer
    fallback: Optimizer
    alpha: float
    sequence: TrackingSequence
    residual: Residual

    def begin(self, x: Point) -> ResidualGuardState:
        """Nothing is known of mu."""
        memory = self.sequence.init(jnp.array(jnp.nan, float))
        return ResidualGuardState(self.learned.init(x.params), self.fallback.init(x.params), memory)

    def cycle(
        self, x: Point, inner: ResidualGuardState, now: Cycle
    ) -> tuple[Point, ResidualGuardState, Decision]:
        """nt steps."""
        step = partial(self.step, now.loss)
        (x, inner), (ok, seen, finite_z) = jax.lax.scan(step, (x, inner), now.training)
        decision = Decision(
            used_learned=ok,
            losses=seen.loss.astype(float),
            winner=jnp.where(ok[-1], LEARNED, jnp.where(finite_z[-1], FALLBACK, NEITHER)),
            gradients=jnp.int32(2 * now.nt),
            learned_updates=jnp.int32(now.nt),
            aux=seen.aux,
        )
        return x, inner, decision

    def step(
        self, loss: Loss, carry: tuple[Point, ResidualGuardState], minibatch: Any
    ) -> tuple[tuple[Point, ResidualGuardState], tuple[Array, Forward, Array]]:
        """One step; and whether y is kept, what was seen at x, and whether z is finite."""
        x, inner = carry
        seen, gradient = evaluate(loss, x, minibatch)
        at = Lane(x, inner.learned), Lane(x, inner.fallback)
        y, learned_state = propose(self.learned, at[0], loss, minibatch, seen, gradient)
        z, fallback_state = propose(self.fallback, at[1], loss, minibatch, seen, gradient)

        seen_y, gradient_y = evaluate(loss, y, minibatch)
        if self.residual == "step":
            at_y = Lane(y, inner.fallback)
            after_y, _ = propose(self.fallback, at_y, loss, minibatch, seen_y, gradient_y)
            s_x = optax.tree.sub(x.params, z.params)
            s_y = optax.tree.sub(y.params, after_y.params)
        else:
            s_x, s_y = gradient, gradient_y
        own, r = (optax.tree.norm(optax.tree.cast(s, float)) for s in (s_x, s_y))

        # mu_1 is that of the first step whose residual is finite and above 0.
        bound = self.sequence.bound(inner.memory)
        known = jnp.isfinite(bound) & (bound > 0)
        memory = select(known, inner.memory, self.sequence.init(own))
        mu = self.sequence.bound(memory)
        finite_y, finite_z = is_sound(y, lambda: x) & jnp.isfinite(r), is_sound(z, lambda: x)
        ok = finite_y & jnp.isfinite(mu) & (r <= self.alpha * mu) & (mu > 0)

        passed = self.sequence.reject(memory, own)
        x = select(ok, y, select(finite_z, z, x))
        inner = ResidualGuardState(
            renew_if_unsound(self.learned, x.params, learned_state),
            renew_if_unsound(self.fallback, x.params, fallback_state),
            select(ok, self.sequence.update(memory, r), select(jnp.isfinite(own), passed, memory)),
        )
        return (x, inner), (ok, seen, finite_z)

"""Algorithm 1 as an optax transformation, for deterministic problems."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from .clocks import renew_if_unsound
from .cycle import as_arrays
from .lanes import with_extra_args
from .losses import Point, forward
from .protocol import Params
from .soundness import is_sound, select


class GuardedState(NamedTuple):
    """The states of both optimizers, and which of them made the last update."""

    learned: PyTree
    fallback: PyTree
    used_learned: Bool[Array, ""]


def guarded(learned: Any, fallback: Any) -> optax.GradientTransformationExtraArgs:
    """Whichever of two updates leads to the lower value: Algorithm 1.

        y = x + learned(x);  z = x + fallback(x);   update = y - x if F(y) < F(z) else z - x

    An update that leads to parameters or a value that aren't finite is not taken; if both do, the
    update is zero. Any optax loop can use it: ``update(grads, state, params, value_fn=F)``, where
    ``value_fn(params)`` is the deterministic objective. Other extra arguments go to both. Don't
    compute gradients by ``optax.value_and_grad_from_state``: a line search that lost remembers the
    gradient of where it would have gone.

    Raises:
        ValueError: on update, if ``params`` or ``value_fn`` is missing, or ``value_fn`` returns
            anything but one floating-point number.

    Source: the paper's Algorithm 1.

    >>> value_fn = lambda x: jnp.sum(x**2)
    >>> optimizer = guarded(optax.sgd(0.5), optax.sgd(0.1))
    >>> x = jnp.ones(2)
    >>> updates, state = optimizer.update(2 * x, optimizer.init(x), x, value_fn=value_fn)
    >>> optax.apply_updates(x, updates), bool(state.used_learned)
    (Array([0., 0.], dtype=float32), True)
    """
    learned = with_extra_args("learned", learned)
    fallback = with_extra_args("fallback", fallback)

    def init(params: Params) -> GuardedState:
        params = as_arrays(params)
        return GuardedState(learned.init(params), fallback.init(params), jnp.array(False))

    def update(
        updates: PyTree,
        state: Any,
        params: Params | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GuardedState]:
        if value_fn is None:
            raise ValueError("guarded(...).update needs value_fn, which was not given")
        start: Params = as_arrays(params)
        extra_args["value_fn"] = value_fn
        to_y, learned_state = learned.update(updates, state.learned, start, **extra_args)
        to_z, fallback_state = fallback.update(updates, state.fallback, start, **extra_args)
        y, z = optax.apply_updates(start, to_y), optax.apply_updates(start, to_z)
        value_y, value_z = (
            forward(lambda params, _: value_fn(params), Point(to, None), None, name="value_fn").loss
            for to in (y, z)
        )

        finite_y = is_sound(y, lambda: start) & jnp.isfinite(value_y)
        finite_z = is_sound(z, lambda: start) & jnp.isfinite(value_z)
        use_y = finite_y & ((value_y < value_z) | ~finite_z)
        chosen = select(use_y, to_y, select(finite_z, to_z, optax.tree.zeros_like(to_z)))
        x = optax.apply_updates(start, chosen)
        learned_state = renew_if_unsound(learned, x, learned_state)
        fallback_state = renew_if_unsound(fallback, x, fallback_state)
        return chosen, GuardedState(learned_state, fallback_state, use_y)

    return optax.GradientTransformationExtraArgs(init, update)

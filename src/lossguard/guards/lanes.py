"""A lane: an optimizer's run. Guards run several, and compare their losses."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .cycle import Cycle
from .protocol import Guard, Objective, Params
from .soundness import evaluate, is_sound, renew_if_unsound, select, typed_as

Optimizer = optax.GradientTransformationExtraArgs


def with_extra_args(name: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer in the form that accepts ``value=`` and the like, and drops what it can't use.

    ``grad_fn=`` goes to optimizers that name it, such as optax's opaque SAM, and to no others: the
    line searches of optax refuse it.
    """
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        got = "a guard (give its optimizer)" if isinstance(optimizer, Guard) else repr(optimizer)
        raise ValueError(f"{name} must be an optax GradientTransformation, got {got}")
    given = inspect.signature(optimizer.update).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in given.values())
    places = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [key for key, one in given.items() if one.kind in places][:3]
    named = given.keys() - first  # these are updates, state and params, whatever they are called

    def update(
        updates: PyTree, state: PyTree, params: Params | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        usable = {
            key: value
            for key, value in extra_args.items()
            if key in named or (open_ended and key != "grad_fn" and key not in first)
        }
        made, after = optimizer.update(updates, state, params, **usable)
        given, got = ([jnp.shape(leaf) for leaf in jax.tree.leaves(t)] for t in (updates, made))
        if got != given:  # which might be broadcast where they are added
            raise ValueError(
                f"{name} must return updates of the shapes of its gradients, {given}, got {got}"
            )
        return made, after

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


class Lane(NamedTuple):
    """Where an optimizer is, and what it remembers."""

    params: Params
    state: PyTree


def propose(
    optimizer: Optimizer,
    lane: Lane,
    objective: Objective,
    i: Int[Array, ""],
    loss: Float[Array, ""],
    gradient: Params,
    part: Float[Array, ""] | None = None,
) -> Lane:
    """One optimizer step, or a part of it, from the loss and its gradient on minibatch number i.

    Optimizers that want more than the gradient find it under optax's names: ``value``, ``grad``,
    ``value_fn(params)`` and ``grad_fn(params, _)``, all on this minibatch.
    """
    updates, state = optimizer.update(
        gradient,
        lane.state,
        lane.params,
        value=loss,
        grad=gradient,
        value_fn=lambda params: objective(params, i),
        grad_fn=lambda params, _: evaluate(objective, params, i)[1],
    )
    if part is not None:
        updates = jax.tree.map(lambda u: u * part.astype(u.dtype), updates)
    return Lane(optax.apply_updates(lane.params, updates), typed_as(lane.state, state))


def train(
    optimizers: Sequence[Optimizer],
    lanes: Sequence[Lane],
    now: Cycle,
    warms_up: Bool[Array, ""] | None = None,
) -> tuple[tuple[Lane, ...], Float[Array, "lanes nt"]]:
    """nt steps of every lane on the minibatches of a cycle, and the losses before each step.

    In a warm-up step t, from 1 on, is t / nt of what the optimizer proposes.
    """

    def step(lanes: tuple[Lane, ...], t: Any) -> tuple[tuple[Lane, ...], Array]:
        after, losses = [], []
        grown = (t + 1).astype(float) / now.nt
        part = None if warms_up is None else jnp.where(warms_up, grown, 1.0)
        for optimizer, lane in zip(optimizers, lanes, strict=True):
            loss, gradient = evaluate(now.objective, lane.params, now.i + t)
            after.append(propose(optimizer, lane, now.objective, now.i + t, loss, gradient, part))
            losses.append(jnp.asarray(loss, float))
        return tuple(after), jnp.stack(losses)

    lanes, losses = jax.lax.scan(step, tuple(lanes), jnp.arange(now.nt, dtype=jnp.int32))
    return lanes, losses.T


def run_if(
    runs: Bool[Array, ""],
    optimizer: Optimizer,
    lane: Lane,
    now: Cycle,
    warms_up: Bool[Array, ""] | None = None,
) -> tuple[Lane, Float[Array, " nt"]]:
    """nt steps of a lane, and its losses.

    If its parameters end up not finite they stay where they were, and all its losses are infinite.
    Where it doesn't run nothing is computed, and they are NaN.
    """

    def run(lane: Lane) -> tuple[Lane, Array]:
        (after,), (losses,) = train([optimizer], [lane], now, warms_up)
        fine = is_sound(after.params, lambda: lane.params)
        params = select(fine, after.params, lane.params)
        state = renew_if_unsound(optimizer, params, after.state)
        return Lane(params, state), jnp.where(fine, losses, jnp.inf)

    return jax.lax.cond(runs, run, lambda lane: (lane, jnp.full(now.nt, jnp.nan, float)), lane)


def losses_at(points: Sequence[Params], now: Cycle) -> Float[Array, "nt points"]:
    """The loss of each point on each minibatch of a cycle: forward passes only."""

    def at(t: Any) -> Array:
        return jnp.stack([jnp.asarray(now.objective(w, now.i + t), float) for w in points])

    return jax.lax.map(at, jnp.arange(now.nt, dtype=jnp.int32))

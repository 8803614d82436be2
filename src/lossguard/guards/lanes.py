"""A lane: an optimizer's run. Guards run several, and compare their losses."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from .clocks import renew_if_unsound, typed_as
from .cycle import Cycle
from .losses import Forward, Point, evaluate, forward
from .protocol import Guard, Loss, Params
from .soundness import is_sound, select

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

    at: Point
    state: PyTree


class Report(NamedTuple):
    """What a lane's loss was before each step of a cycle, and what it told beside."""

    losses: Float[Array, " nt"]
    aux: PyTree


def propose(
    optimizer: Optimizer,
    lane: Lane,
    loss: Loss,
    minibatch: Any,
    seen: Forward,
    gradient: Params,
    part: Float[Array, ""] | None = None,
) -> Lane:
    """One optimizer step, or a part of it, from what ``evaluate`` gives at the lane's point.

    Optimizers that want more than the gradient find it under optax's names: ``value``, ``grad``,
    ``value_fn(params)`` and ``grad_fn(params, _)``, all on this minibatch.
    """
    params, extra = lane.at
    updates, state = optimizer.update(
        gradient,
        lane.state,
        params,
        value=seen.loss,
        grad=gradient,
        value_fn=lambda params: forward(loss, Point(params, extra), minibatch).loss,
        grad_fn=lambda params, _: evaluate(loss, Point(params, extra), minibatch)[1],
    )
    if part is not None:
        updates = jax.tree.map(lambda u: u * part.astype(u.dtype), updates)
    to = Point(optax.apply_updates(params, updates), seen.extra)
    return Lane(to, typed_as(lane.state, state))


def train(
    optimizers: Sequence[Optimizer],
    lanes: Sequence[Lane],
    now: Cycle,
    warms_up: Bool[Array, ""] | None = None,
) -> tuple[tuple[Lane, ...], tuple[Report, ...]]:
    """nt steps of every lane on the training minibatches of a cycle, and their reports.

    In a warm-up step t, from 1 on, is t / nt of what the optimizer proposes.
    """

    def step(lanes: tuple[Lane, ...], of_step: Any) -> tuple[tuple[Lane, ...], Any]:
        t, minibatch = of_step
        after, reports = [], []
        grown = (t + 1).astype(float) / now.nt
        part = None if warms_up is None else jnp.where(warms_up, grown, 1.0)
        for optimizer, lane in zip(optimizers, lanes, strict=True):
            seen, gradient = evaluate(now.loss, lane.at, minibatch)
            after.append(propose(optimizer, lane, now.loss, minibatch, seen, gradient, part))
            reports.append(Report(jnp.asarray(seen.loss, float), seen.aux))
        return tuple(after), tuple(reports)

    steps = jnp.arange(now.nt, dtype=jnp.int32), now.training
    return jax.lax.scan(step, tuple(lanes), steps)


def run_if(
    runs: Bool[Array, ""],
    optimizer: Optimizer,
    lane: Lane,
    now: Cycle,
    warms_up: Bool[Array, ""] | None = None,
) -> tuple[Lane, Report]:
    """nt steps of a lane, and its report.

    If its parameters end up not finite they stay where they were, and all its losses are infinite.
    Where it doesn't run nothing is computed, its losses are NaN, and what it tells is 0.
    """

    def run(lane: Lane) -> tuple[Lane, Report]:
        (after,), (report,) = train([optimizer], [lane], now, warms_up)
        fine = is_sound(after.at, lambda: lane.at)
        at = select(fine, after.at, lane.at)
        state = renew_if_unsound(optimizer, at.params, after.state)
        return Lane(at, state), report._replace(losses=jnp.where(fine, report.losses, jnp.inf))

    def rest(lane: Lane) -> tuple[Lane, Report]:
        aux = jax.tree.map(lambda one: jnp.zeros((now.nt, *one.shape), one.dtype), now.told)
        return lane, Report(jnp.full(now.nt, jnp.nan, float), aux)

    return jax.lax.cond(runs, run, rest, lane)


def losses_at(
    points: Sequence[Point], loss: Loss, minibatches: Any, *, name: str = "loss"
) -> Float[Array, "minibatches points"]:
    """The loss of each point on each minibatch: forward passes only.

    Model state goes on from one minibatch to the next, as a random key must, and isn't kept.
    """

    def at(extras: tuple[PyTree, ...], minibatch: Any) -> tuple[tuple[PyTree, ...], Array]:
        passes = [
            forward(loss, Point(point.params, extra), minibatch, name=name)
            for point, extra in zip(points, extras, strict=True)
        ]
        losses = jnp.stack([jnp.asarray(seen.loss, float) for seen in passes])
        return tuple(seen.extra for seen in passes), losses

    return jax.lax.scan(at, tuple(point.extra for point in points), minibatches)[1]

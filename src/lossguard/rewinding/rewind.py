"""A run that spikes or diverges goes back to where it was good, and goes on more carefully.

A composition of two parts: the alarm says when the run has become worse, snapshots where to go
back to. Letters: T calls of ``update``, B = window / 4 steps a block.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..guards.clocks import keep_schedules, typed_as
from ..guards.cycle import as_arrays, kinds, own_buffers
from ..guards.lanes import with_extra_args
from ..guards.protocol import Params, advance, wide
from ..guards.soundness import all_finite, is_sound, select
from ..rules import DEEPEST, IN_A_ROW, SOON
from ..validation import check_count, check_fraction, check_kind, check_part, told
from . import alarm as alarms
from . import snapshot
from .alarm import Alarm
from .snapshot import Snapshots


class RewindState(NamedTuple):
    """The state of ``rewind``, and what it has done so far."""

    inner: PyTree
    """The optimizer's state."""
    snapshots: Snapshots
    """Parameters and optimizer states to go back to, as pairs."""
    alarm: Alarm
    """What it needs to tell a rise of the loss from noise."""
    calls: Int[Array, ""]
    """T, calls of ``update`` (int32; stays at 2^31 - 1)."""
    age: Int[Array, ""]
    """Steps taken since the trusted snapshot: what a return would throw away."""
    thrown: Int[Array, ""]
    """Steps that were taken and thrown away. In every run at most rho T + window."""
    returns: Int[Array, ""]
    """Times that it went back."""
    skipped: Int[Array, ""]
    """Steps that were not taken, since a number was not finite."""
    last_return: Int[Array, ""]
    """The call that went back last, from 1; 0 if none did."""
    unanswered: Int[Array, ""]
    """Alarms at which it didn't go back, by its budget or after three returns in a row."""
    in_a_row: Int[Array, ""]
    """Returns to the trusted snapshot."""
    ramp: Int[Array, ""]
    """Steps taken since the last alarm, at most B; B if there was none."""
    cap: Float[Array, ""]
    """What ``scale`` rises to: 1, times ``factor`` for each return soon after another one."""
    scale: Float[Array, ""]
    """What updates were multiplied by in this call."""
    landing: Bool[Array, ""]
    """Whether the last call went back and missed the snapshot by rounding. The next one corrects
    that, and does nothing else."""


def rewind(
    optimizer: Any, *, window: int = 256, rho: float = 0.1, factor: float = 0.5, rise: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation: the optimizer's steps, until the loss rises and stays high.

    ``update(updates, state, params, value=loss)``, where ``loss`` and ``updates`` are the loss and
    its gradients at ``params``. The update that it returns leads to where the run goes on: after
    the optimizer's step times ``state.scale``; where it is, if that step isn't finite; or back at
    the trusted snapshot. It needs no further gradient, and no forward pass. ``Rules`` says when it
    goes back, where to, and how it goes on: steps thrown away are at most ``rho * T + window``.

    It goes around a chain, or last after stages that remember nothing, such as clipping: what it
    returns has to be what is added to the parameters, and only what is inside goes back.
    ``optax.MultiSteps`` around it tells it the loss of the last minibatch of each step. Compute
    gradients yourself, not by ``optax.value_and_grad_from_state``: a line search remembers those of
    where it would have gone. Schedules of the optimizer go on; a return doesn't set them back. A
    return takes a second call if rounding has missed the snapshot in the first. Updates are in
    float32 at least, which ``optax.apply_if_finite`` refuses for narrower parameters; with
    ``rewind`` there is no need of it.

    Parameters and the optimizer's state are finite after every call if they were at the start, and
    no parameter that moves was above half of its type's largest number then.

    Args:
        optimizer: an optax transformation. ``value`` and other arguments by name are passed on.
        window: steps; a multiple of 8, at least 64. A snapshot is trusted after a quarter to half
            of it.
        rho: which share of all steps may be thrown away, beside one window.
        factor: what the step is multiplied by after a return.
        rise: which share of the progress since the start has to be lost.

    Memory: two copies of the parameters and of the optimizer's state, and window / 4 numbers; while
    a step is computed one copy more, and two of the parameters.

    Raises:
        ValueError: if the optimizer is no transformation, a number is out of range, params is
            missing or not floating-point, or value is missing or not a scalar.

    >>> optimizer = rewind(optax.adam(0.1))
    >>> params = jnp.ones(2)
    >>> state = optimizer.init(params)
    >>> loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
    >>> updates, state = optimizer.update(grads, state, params, value=loss)
    >>> params = optax.apply_updates(params, updates)
    >>> int(state.calls), int(state.returns), float(state.scale)
    (1, 0, 1.0)
    """
    if check_count("window", window, least=64) % 8:
        raise ValueError(f"window must be a multiple of 8, got {window!r}")
    rho, rise = check_part("rho", rho), check_part("rise", rise)
    factor = check_fraction("factor", factor)
    rules = Rules(with_extra_args("optimizer", optimizer), int(window), rho, factor, rise)
    return optax.GradientTransformationExtraArgs(rules.init, rules.update)


@dataclass(frozen=True)
class Rules:
    """The rules, beside those of ``alarm.py``.

    - **Snapshots.** Every B steps there is a candidate. After B more it is trusted, if of their
      losses those above the threshold are by B / 8 more than those below it at most.
    - **Afterwards** the scale is ``factor`` and rises to 1 within B steps. Each return less than
      ten windows after another one multiplies both by ``factor``, for good, five times at most.
    - **Budget.** Steps thrown away are at most ``rho * T + window`` in every run. An alarm beyond
      that, or after three returns in a row, lowers the scale and begins another reference.
    - An alarm at a loss or a gradient that isn't finite, where no step was taken since the
      snapshot, does nothing: the minibatches are to blame.
    """

    optimizer: optax.GradientTransformationExtraArgs
    window: int
    rho: float
    factor: float
    rise: float

    def init(self, params: Params) -> RewindState:
        """The start is trusted, and there is no candidate."""
        params = as_arrays(params)
        inner, block = self.optimizer.init(params), self.window // 4
        point = params, inner
        none, whole = jnp.int32(0), jnp.float32(1)
        state = RewindState(
            inner=inner,
            snapshots=Snapshots((point, point), jnp.array(False), jnp.array(False)),
            alarm=alarms.silent(block),
            calls=none,
            age=none,
            thrown=none,
            returns=none,
            skipped=none,
            last_return=none,
            unanswered=none,
            in_a_row=none,
            ramp=jnp.int32(block),
            cap=whole,
            scale=whole,
            landing=jnp.array(False),
        )
        return own_buffers(state)

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: Params | None = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, RewindState]:
        """The update that leads to where the run goes on."""
        check_kind("state", state, RewindState, "optimizer.init(params)")
        x, loss = check_arguments(params, extra_args.get("value"))
        fresh = partial(self.optimizer.init, x)
        if (given := kinds(x)) != kinds(state.snapshots.slots[0][0]):
            raise ValueError(
                "params must keep the structure, shapes and types that they had in init, got "
                f"{given}"
            )
        if kinds(state.inner) != kinds(jax.eval_shape(fresh)):
            raise ValueError("state must be of this optimizer's own init(params), got another one")
        if grad_fn is not None:  # which the optimizer has asked for
            extra_args["grad_fn"] = grad_fn
        loss = loss.astype(float)
        risen = (state.ramp / state.alarm.block).astype(jnp.float32)
        scale = state.cap * (self.factor + (1 - self.factor) * risen)
        steps, advanced = self.optimizer.update(updates, state.inner, x, **extra_args)
        advanced = typed_as(state.inner, advanced)
        steps = jax.tree.map(lambda u, p: scaled(u, scale, p), steps, x)
        # At most half of the largest number: the way between two such points is finite.
        twice = jax.tree.map(
            lambda new, old: jnp.where(new == old, old, 2 * new), optax.apply_updates(x, steps), x
        )
        sound = jnp.isfinite(loss) & is_sound(twice, lambda: x) & is_sound(advanced, fresh)
        before = state._replace(calls=advance(state.calls, 1), scale=scale)
        state, takes, returns, ends, promotes = self.decide(before, loss, sound, updates)
        back, was = returns | before.landing, state.snapshots
        ends &= ~back
        second = was.second ^ (promotes & ends)

        def candidate(_: PyTree, x: Params, steps: PyTree, advanced: PyTree) -> PyTree:
            return optax.apply_updates(x, steps), advanced

        slots = tuple(  # a loop each: together they would be copied in every step
            snapshot.only_if(ends & other, candidate, slot, x, steps, advanced)
            for other, slot in zip((second, ~second), was.slots, strict=True)
        )
        snapshots = Snapshots(slots, second, was.pending | ends)

        def stays_or_goes_back(now: tuple, x: Params, inner: PyTree, snapshots: Snapshots) -> tuple:
            point, memory = snapshots.trusted
            move, lands = snapshot.way_back(point, x, now[0])
            move = jax.tree.map(lambda way: jnp.where(back, way, 0), move)
            return move, select(back, keep_schedules(memory, inner), inner), back & ~lands

        now = steps, advanced, jnp.array(False)
        move, inner, misses = snapshot.only_if(
            ~takes, stays_or_goes_back, now, x, before.inner, snapshots
        )
        landing = misses & ~before.landing
        return move, state._replace(inner=inner, snapshots=snapshots, landing=landing)

    def decide(
        self, state: RewindState, loss: Float[Array, ""], sound: Bool[Array, ""], gradients: PyTree
    ) -> tuple[RewindState, Array, Array, Array, Array]:
        """The counts after a step, and whether it is taken, goes back, ends a block, promotes.

        One that lands hears nothing and takes nothing.
        """
        block, hears = state.alarm.block, ~state.landing
        alarm = select(hears, alarms.hear(state.alarm, loss, sound, self.rise), state.alarm)
        rang = alarm.rings & hears
        no_step = rang & (state.age == 0)  # since the snapshot: is there anything to mend?
        given = jax.lax.cond(no_step, all_finite, lambda _: jnp.array(True), (loss, gradients))
        rings = rang & (~no_step | given)
        affordable = state.age <= allowance(state.calls, self.rho, self.window) - state.thrown
        returns = rings & affordable & (state.in_a_row < IN_A_ROW)
        takes = sound & ~returns & hears
        alarm = select(rang, alarms.quiet(alarm, forget=rings & ~returns), alarm)
        alarm = select(takes, alarms.keep(alarm, loss), alarm)
        ends = alarm.filled == block
        promotes = ends & alarm.is_calm & state.snapshots.pending

        again = (state.returns > 0) & (state.calls - state.last_return <= SOON * self.window)
        lower = jnp.maximum(state.cap * self.factor, self.factor**DEEPEST)
        in_a_row = jnp.where(rings, jnp.where(returns, state.in_a_row + 1, 0), state.in_a_row)
        pending = state.snapshots.pending & ~rings
        after = state._replace(
            snapshots=state.snapshots._replace(pending=pending),
            alarm=snapshot.only_if(ends, alarms.end_block, alarm),
            age=jnp.where(promotes, block, jnp.where(returns, 0, advance(state.age, takes))),
            thrown=state.thrown + jnp.where(returns, state.age, 0),
            returns=advance(state.returns, returns),
            skipped=advance(state.skipped, ~(takes | returns | state.landing)),
            last_return=jnp.where(returns, state.calls, state.last_return),
            unanswered=advance(state.unanswered, rings & ~returns),
            in_a_row=jnp.where(promotes, 0, in_a_row),
            ramp=jnp.minimum(advance(jnp.where(rings, 0, state.ramp), takes), block),
            cap=jnp.where(returns & again, lower, state.cap),
        )
        return after, takes, returns, ends, promotes


def allowance(calls: Int[Array, ""], rho: float, window: int) -> Int[Array, ""]:
    """Steps that may be thrown away in so many calls; rounded down, as float32 may round up."""
    return window + jnp.floor(rho * (1 - 1e-6) * calls.astype(jnp.float32)).astype(jnp.int32)


def scaled(step: Array, scale: Float[Array, ""], param: Array) -> Array:
    """A step times the scale, in a dtype that holds the way back as well.

    Of fewer than 32 bits it wouldn't: within a compiled program such differences aren't rounded.
    """
    return jnp.asarray(step, wide(step, param)) * scale.astype(wide(step, param))


def check_arguments(params: Params | None, value: Any) -> tuple[Params, Float[Array, ""]]:
    """Refuse what ``update`` can't do without."""
    for name, given in (("params", params), ("value", value)):
        if given is None:
            raise ValueError(
                f"{name} must be given: update(updates, state, params, value=loss) (Flax's "
                "TrainState.apply_gradients drops value: override it)"
            )
    is_number = isinstance(value, jax.Array | np.ndarray | np.generic | float)
    is_scalar = is_number and not jnp.shape(value)
    if not (is_scalar and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
        raise ValueError(f"value must be a scalar floating-point loss, got {told(value)}")
    return as_arrays(params), jnp.asarray(value)

"""The lanes of a loss guard: where each starts from, and what it remembers of a cycle.

y    the learned lanes, numbered from 0 in their order
z    the fallback from x, the next; not with ``hedge="only"``
s    the fallback on its own path, the last; only if hedged
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from .branch import Branch
from .protocol import Params
from .soundness import keep_schedules, renew_if_unsound, select

Loser = Literal["keep", "rollback", "reset"]


class LanesState(NamedTuple):
    """What the lanes remember between cycles, beside x."""

    learned: tuple[PyTree, ...]
    """Optimizer states of the learned lanes."""
    fallback: PyTree
    """Optimizer state of lane z; None without z."""
    own: Branch | None
    """Lane s: the fallback's own path and its optimizer state; None unless hedged."""
    on_own: Bool[Array, ""]
    """Whether x lies on the fallback's own path, where z and s coincide."""


@dataclass(frozen=True)
class Lanes:
    """The optimizers that run, by the numbers of their lanes."""

    learned: tuple[optax.GradientTransformationExtraArgs, ...]
    trusted: optax.GradientTransformationExtraArgs
    loser: Loser
    has_z: bool
    has_s: bool

    @property
    def m(self) -> int:
        """How many are learned."""
        return len(self.learned)

    @property
    def fallbacks(self) -> tuple[int, ...]:
        """The numbers of z and s, as far as there are such lanes."""
        return tuple(range(self.m, self.m + self.has_z + self.has_s))

    def optimizer(self, lane: int) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a lane."""
        return self.learned[lane] if lane < self.m else self.trusted

    def init(self, params: Params) -> LanesState:
        """The state before the first cycle."""
        fresh = self.trusted.init(params)
        return LanesState(
            learned=tuple(one.init(params) for one in self.learned),
            fallback=fresh if self.has_z else None,
            own=Branch(params, fresh) if self.has_s else None,
            on_own=jnp.array(self.has_s),
        )

    def branches(self, x: Params, state: LanesState, anew: Bool[Array, ""]) -> tuple[Branch, ...]:
        """Where each lane starts from; ``anew``: the learned ones from fresh optimizer states."""
        branches = [
            Branch(x, select(anew, keep_schedules(one.init(x), old), old))
            for one, old in zip(self.learned, state.learned, strict=True)
        ]
        if self.has_z:
            branches.append(Branch(x, state.fallback))
        if state.own is not None:
            branches.append(state.own)
        return tuple(branches)

    def settle(
        self,
        state: LanesState,
        x: Params,
        ran: Sequence[int],
        before: Sequence[Branch],
        trained: Sequence[Branch],
        sound: Bool[Array, " ran"],
        winner: Int[Array, ""],
    ) -> tuple[LanesState, Bool[Array, ""], Bool[Array, ""]]:
        """What is remembered of a cycle, and whether a state of either side was unsound.

        Args:
            state: before it.
            x: after it.
            ran: numbers of the lanes that ran: learned ones first and s, if there is one, last.
            before: where each lane started from.
            trained: the lanes that ran.
            sound: whether their parameters are finite.
            winner: number of the lane that was kept, or -1.
        """
        learned, reset_learned = list(state.learned), jnp.array(False)
        probed = [lane for lane in ran if lane < self.m]
        for lane in probed:
            learned[lane], reset = self._after_cycle(
                lane, x, before[lane].state, trained[lane].state, winner == lane
            )
            reset_learned |= reset
        state, reset_fallback = state._replace(learned=tuple(learned)), jnp.array(False)
        if self.has_z:
            z_state, reset_fallback = self._after_cycle(
                self.m, x, before[self.m].state, trained[len(probed)].state, winner >= self.m
            )
            state = state._replace(fallback=z_state)
        if self.has_s:
            s_state, reset = renew_if_unsound(self.trusted, *trained[-1])
            s_state = select(sound[-1], s_state, keep_schedules(self.trusted.init(x), s_state))
            own = Branch(select(sound[-1], trained[-1].params, x), s_state)
            on_own = (winner == self.fallbacks[-1]) | ~sound[-1]
            reset_fallback |= reset | ~sound[-1]
            state = state._replace(own=own, on_own=on_own)
            if self.has_z:  # z goes on from s, wherever x is s
                state = state._replace(fallback=select(on_own, s_state, state.fallback))
        return state, reset_learned, reset_fallback

    def _after_cycle(
        self, lane: int, x: Params, before: PyTree, after: PyTree, won: Bool[Array, ""]
    ) -> tuple[PyTree, Bool[Array, ""]]:
        """The state with which a lane's optimizer goes on, and whether it was unsound.

        Whatever becomes of the state, its learning-rate schedules have advanced.
        """
        optimizer, kept = self.optimizer(lane), after
        if self.loser != "keep":
            lost = before if self.loser == "rollback" else optimizer.init(x)
            kept = select(won, after, keep_schedules(lost, after))
        return renew_if_unsound(optimizer, x, kept)

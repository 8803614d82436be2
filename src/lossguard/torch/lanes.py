"""The lanes of a loss guard: which of them run in a cycle, and what they remember after it.

y    the learned lanes, numbered from 0 in their order
z    the fallback from x; not with ``hedge="only"``
s    the fallback on its own path; only if hedged
"""

import math
from collections.abc import Sequence

from torch.amp.grad_scaler import GradScaler

from lossguard.torch.consensus import Outcome
from lossguard.torch.decision import NEITHER
from lossguard.torch.inner import Inner
from lossguard.torch.lane import Lane, Loser
from lossguard.torch.ratchet import Best, Ratchet
from lossguard.torch.tensors import clone
from lossguard.torch.track_record import Excess, TrackRecord
from lossguard.torch.verdict import Verdict
from lossguard.torch.weights import Copy, Weights


class Lanes:
    """All lanes, by their numbers.

    Args:
        inners: the learned optimizers, and the fallback.
        loser, hedge, ratchet, scaler: as LossGuard takes them.
        weights: of the model.

    Attributes:
        all: the learned lanes, z, s.
        kept: the number of the one that x became last; of the last one before the first decision.
        m: how many are learned.
        z, s: the numbers of these two, if there are such lanes.
        on_own: whether x lies on the fallback's own path, where z is s.
        record: the rule by which x goes back there, if it isn't the check's.
        excess: of x's training losses over those of s, where a record is kept.
        s_leads: whether the record has s given out.
        aside: x, while the model holds s instead, since the record says so; None: the model has x.
        best: b, where a ratchet holds x to it.
    """

    def __init__(
        self,
        inners: Sequence[Inner],
        *,
        loser: Loser,
        hedge: object,
        ratchet: Ratchet | None,
        scaler: GradScaler | None,
        weights: Weights,
    ) -> None:
        *learned, trusted = inners
        self.m = len(learned)
        self.z = None if hedge == "only" else self.m
        self.s = self.m + (self.z is not None) if hedge else None
        self.on_own = bool(hedge)
        self.record = hedge if isinstance(hedge, TrackRecord) else None
        self.excess = Excess()
        self.s_leads = False
        self.aside: Copy | None = None

        def common() -> tuple[GradScaler | None, Copy]:
            return clone(scaler), weights.copy()

        self.all = [Lane("learned", one, loser, *common()) for one in learned]
        if self.z is not None:
            self.all.append(Lane("fallback", trusted, loser, *common()))
        if self.s is not None:
            shared = self.z is not None
            self.all.append(
                Lane("fallback", trusted, "keep", *common(), own_path=True, makes_way=shared)
            )
        self.kept = len(self.all) - 1
        memory = None if self.z is None else trusted.remember()
        self.best = None if ratchet is None else Best(ratchet, weights.copy(), memory)

    @property
    def fallback(self) -> Inner:
        """The fallback."""
        return self.all[-1].inner

    @property
    def names(self) -> list[str]:
        """The letter of each lane."""
        letters = {self.z: "z", self.s: "s"}
        return [letters.get(number, "y") for number in range(len(self.all))]

    def active(self, *, probe: bool) -> list[int]:
        """The numbers of the lanes that run in a cycle; the learned ones only in a ``probe``."""
        z_is_s = self.s is not None and self.on_own
        trusted = [k for k in (self.z, self.s) if k is not None and not (k == self.z and z_is_s)]
        return [*(range(self.m) if probe else ()), *trusted]

    def checked(self, active: Sequence[int]) -> list[int]:
        """Those of the active lanes that take check minibatches: not s, if a record judges it."""
        judged = self.record is not None and not self.on_own
        return [k for k in active if not (judged and k == self.s)]

    @property
    def watched(self) -> Best | None:
        """b, if its training losses are asked for: on the fallback's own path x is its best."""
        return None if self.on_own else self.best

    @property
    def given(self) -> int:
        """The number of the lane that the model has got."""
        return self.kept if self.aside is None else len(self.all) - 1

    def begins_at_x(self, number: int) -> bool:
        """Whether a lane starts from x; s where x lies on its path, and may have been set there."""
        return self.on_own or not self.all[number].own_path

    def follow_record(self, verdict: Verdict, seen: Outcome, checked: int) -> int:
        """The row that x becomes, by the record if there is one, or by the verdict; s is the last.

        Args:
            verdict: of the check, or without one.
            seen: what the cycle has shown of the lanes that ran.
            checked: how many of them take check minibatches; s may be the one that doesn't.
        """
        if self.record is None:
            return verdict.row
        trains, sound = seen.trains, seen.sound
        # Where the check is lost on all, x may stay for the minibatches' fault: z speaks for it.
        row = verdict.best_fallback if verdict.row == NEITHER else verdict.row
        kept = trains[row] if sound[row] else [math.nan]
        self.excess, back = self.record.update(self.excess, kept, trains[-1], self.on_own)
        fit = verdict.finite_fallback if checked == len(trains) else sound[-1]
        self.s_leads = fit and self.excess.recent > 0
        return len(trains) - 1 if back and fit else verdict.row

    def settle(
        self, winner: int, active: Sequence[int], seen: Outcome, x: Weights
    ) -> tuple[bool, bool]:
        """Settle what the lanes that ran remember, after x has become the winner's.

        Args:
            winner: number of the lane that was kept, or -1.
            active: numbers of the lanes that ran.
            seen: what the cycle has shown of them.
            x: the model, which holds x.

        Returns:
            Whether a learned lane's memory, and whether one of the fallback's, or s itself, had to
            be made anew.
        """
        sound, broken = (dict(zip(active, of, strict=True)) for of in (seen.sound, seen.broken))
        learned = [
            self.all[k].settle(won=k == winner, broken=broken[k]) for k in active if k < self.m
        ]
        fallback = []
        if self.z is not None:
            fallback.append(self._settle_z(self.all[self.z], winner in (self.z, self.s), broken))
        if self.s is not None:
            fallback.append(self._settle_s(self.all[self.s], sound[self.s], broken[self.s], x))
            self.on_own = winner == self.s or not sound[self.s]
            if self.on_own:
                if self.z is not None:  # z goes on from s, wherever x is s
                    self.all[self.s].hand_over(self.all[self.z])
                self.excess, self.s_leads = Excess(), False
        for number, losses in zip(active, seen.trains, strict=True):
            if number < self.m and not (sound[number] and all(map(math.isfinite, losses))):
                self.all[number].take_scale(self.all[self.kept])
        return any(learned), any(fallback)

    def hold(self, kept: Sequence[float], held: Sequence[float], was_own: bool, x: Weights) -> bool:
        """Ask the ratchet, once lanes are settled; whether x, in the model, went back to b.

        Args:
            kept: training losses of the branch that was kept; none where x stayed.
            held: those of b.
            was_own: whether x was on the fallback's own path before the cycle.
            x: the model.
        """
        best = self.best
        if best is None:
            return False
        take, back = best.update(kept, held, was_own, self.on_own)
        z = None if self.z is None else self.all[self.z].inner
        if take:
            x.copy_to(best.copy)
            best.memory = None if z is None else z.remember()
        if back:
            x.copy_from(best.copy)
            best.anew = True
            if z is not None and best.memory is not None:
                z.restore(best.memory)
        return back

    def take_in(self, x: Weights) -> None:
        """Have the model hold x."""
        if self.aside is not None:
            x.copy_from(self.aside)
            self.aside = None

    def give_out(self, x: Weights) -> None:
        """Have the model, which holds x, hold s instead while that leads."""
        if self.s_leads:
            self.aside = x.copy()
            x.copy_from(self.all[-1].copy)

    def _settle_z(self, z: Lane, won: bool, broken: dict[int, bool]) -> bool:
        if self.z in broken:
            return z.settle(won=won, broken=broken[self.z])
        assert self.s is not None
        return z.settle_as(self.all[self.s], won=won, broken=broken[self.s])

    def _settle_s(self, s: Lane, sound: bool, broken: bool, x: Weights) -> bool:
        if not sound:  # it begins again at x
            x.copy_to(s.copy)
        if broken or not sound:
            s.forget()
        return broken or not sound

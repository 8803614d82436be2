"""What is decided of a run at each read: a return on trial, whether it stays, and copies."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lossguard.torch.rewind.audit import is_better
from lossguard.torch.rewind.detector import Detector
from lossguard.torch.rewind.response import Response
from lossguard.torch.rewind.store import EVERY, Live, Snapshot, Store
from lossguard.torch.rewind.trial import Trial

MARGIN = 8
"""Steps before the first loss that was suspected, in which the run may have been hurt already."""
COMPARED = 24, 64
"""Losses at least and at most, of those since the rise began, with which a trial's are compared."""


class RewindEvent(NamedTuple):
    """What ``Rewind`` did; each is logged as a warning of the logger ``lossguard.torch.rewind``.

    Attributes:
        kind: "trial" when it went back on trial, "return" if that stays, "forward" if it helped
            nothing and the run is where it was before; "unanswered" if it suspects and can't go
            back, or only logs; "skipped" for the 1st, 2nd, 4th, 8th, ... step that was left out;
            "buffers" if they alone weren't finite, and were set back.
        cause: "loss", "audit" where an audit decided, "model" if parameters, buffers or the
            optimizer's memory weren't finite, "gradients" of skipped steps.
        call: of ``observe``, from 1.
        since: the call after which the model was as it is set back to. The minibatches at fault
            are among those of the calls from ``since + 1`` to ``call``.
        thrown: steps that a return has thrown away, or a trial that came to nothing has cost.
        scale: what rates are multiplied by from now on.
        means: what else is done: "memory", the optimizer's is as before its first step;
            "clipping", gradients are clipped to their usual norm.
        skipped: steps so far that were left out.
    """

    kind: Literal["trial", "return", "forward", "unanswered", "skipped", "buffers"]
    cause: Literal["loss", "audit", "model", "gradients"]
    call: int
    since: int
    thrown: int
    scale: float
    means: tuple[str, ...] = ()
    skipped: int = 0

    def __str__(self) -> str:
        """One line, for a log."""
        goes_on = f"goes on at {self.scale:.3g} of the rate"
        did = {
            "trial": f"went back to call {self.since} on trial and {goes_on}",
            "return": f"threw {self.thrown} steps since call {self.since} away and {goes_on}",
            "forward": f"is forward again, as {self.thrown} steps of a trial were no better",
            "unanswered": "suspects that the model has got worse, and goes on with it",
            "skipped": f"left out {self.skipped} steps so far, the last for its gradients",
            "buffers": "set back the buffers, which were not finite",
        }[self.kind]
        more = "".join(f", {one}" for one in self.means)
        return f"Rewind {did}{more} (cause: {self.cause}, call {self.call})"


@dataclass
class _OnTrial:
    trial: Trial
    suspect: Snapshot
    """Where the run was, which is where it goes if the trial comes to nothing."""
    snapshot: Snapshot
    """Where it went back to."""
    means: tuple[str, ...]

    def numbers(self) -> list[Any]:
        return [self.trial.numbers(), self.snapshot.step, self.means]

    @classmethod
    def of(cls, saved: list[Any], suspect: Snapshot, snapshots: list[Snapshot]) -> "_OnTrial":
        numbers, at, means = saved
        trial = Trial([], 0.0)
        trial.load(numbers)
        (snapshot,) = (one for one in snapshots if one.step == at)
        return cls(trial, suspect, snapshot, tuple(means))


class Run:
    """A run whose losses are heard, and which goes back."""

    def __init__(
        self, live: Live, store: Store, response: Response, *, acts: bool, audit: Any, group: Any
    ) -> None:
        self.events: list[RewindEvent] = []
        self.skipped = 0
        """Steps that were left out."""
        self.on_trial: _OnTrial | None = None
        self.detector, self.response, self.store = Detector(), response, store
        self._live, self._acts = live, acts
        self._audit: Callable[[int], Any] | None = audit
        self._group = group
        self._recent: deque[float] = deque(maxlen=COMPARED[1])
        self._step = 0
        """Steps that led to where the run is, without those that were thrown away."""
        self._breaks = 0
        """How often in a row the model wasn't finite, without a copy in between."""
        self._memory_lost = False
        if acts:  # a forward pass may spoil the buffers before the first step
            self.store.save(0, 0, 0)

    @property
    def scale(self) -> float:
        return self.response.scale * (0.5 if self.on_trial else 1.0)

    @property
    def clips(self) -> bool:
        return "clipping" in self.on_trial.means if self.on_trial else self.response.clips

    def begin(self, unheard: int) -> None:
        """Before the first step, after others that it hasn't heard of: weights may be loaded."""
        self._live.note()
        if self._acts and all(map(bool, self._live.are_finite())):
            step = self._step + unheard
            self.store.become([], 0)
            self.store.save(step, self.response.calls + unheard, step)

    def is_due(self, taken: int) -> bool:
        """Whether it is time for a copy after so many more steps, or one lacks what is trained."""
        if not self._acts or self.on_trial:
            return False
        youngest = self.store.youngest
        return self._step + taken - youngest.step >= EVERY or not self._live.fits(youngest.content)

    def hear(
        self, losses: Sequence[float], skipped: int, *, sound: bool, kept: bool, remembers: bool
    ) -> None:
        """The losses of steps, of which some were left out; and whether the model, its buffers and
        what the optimizers remember are finite after them."""
        due = self.is_due(len(losses))
        self._step += len(losses)
        self.response.pass_by(len(losses))
        self._count(skipped)
        if not sound:
            self._break()
        elif not kept and self._acts:
            self._live.set_buffers_back(self.store.youngest.content)
            self._tell("buffers", "model", self.store.youngest.call)
        if self.on_trial:
            self._judge(losses)
        elif sound:
            self._watch(losses)
        if due and self.is_due(0):
            self._save(lost=not remembers)

    def numbers(self, *, snapshots: bool) -> dict[str, Any]:
        """What ``load`` takes."""
        numbers = {
            "detector": self.detector.numbers(),
            "response": self.response.numbers(),
            "recent": list(self._recent),
            "rest": [self._step, self._breaks, self._memory_lost, self.skipped],
        }
        if not snapshots:
            return numbers
        now = self.on_trial
        store = self.store.numbers(now and now.suspect)
        return {**numbers, "store": store, "trial": now and now.numbers()}

    def load(self, state: dict[str, Any]) -> None:
        """What ``numbers`` were, whole or not at all."""
        detector, response = Detector(), Response(self.response.rho)
        detector.load(state["detector"])
        response.load(state["response"])
        recent = deque(state["recent"], maxlen=COMPARED[1])
        step, breaks, memory_lost, skipped = state["rest"]
        snapshots, suspect, saves = self.store.opened(state.get("store"))
        on_trial = suspect and _OnTrial.of(state["trial"], suspect, snapshots)
        self.detector, self.response, self.on_trial = detector, response, on_trial
        self._recent, self._step, self._breaks = recent, step, breaks
        self._memory_lost, self.skipped = memory_lost, skipped
        self.store.become(snapshots, saves)
        self._live.note()

    def _count(self, skipped: int) -> None:
        before = self.skipped
        self.skipped += skipped
        if self.skipped.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th, ...
            self._tell("skipped", "gradients", self.response.calls)

    def _watch(self, losses: Sequence[float]) -> None:
        self._recent.extend(losses)
        suspected = [self.detector.hear(loss) for loss in losses]
        if any(suspected):
            self._suspect()

    def _good(self) -> int:
        """The last step before what raises the losses now."""
        rising = self.detector.score > 0
        return self._step - (self.detector.risen + MARGIN if rising else 0)

    def _suspect(self) -> None:
        snapshot = self.store.before(self._good()) if self._acts else None
        thrown = self._step - snapshot.step if snapshot else 0
        longest = self.response.longest_trial
        may_try = self._audit or longest > 0
        if snapshot is None or not may_try or not self.response.may_return(thrown):
            self.detector.learn(list(self._recent)[-COMPARED[0] :], confirmed=False)
            self._tell("unanswered", "loss", self.response.calls)
            return
        suspect = Snapshot(self._step, self.response.calls, 0, self._live.copy())
        before = list(self._recent)[-max(COMPARED[0], self.detector.risen) :]
        trial, means = Trial(before, self.detector.deviation, longest), self.response.means
        self.on_trial = _OnTrial(trial, suspect, snapshot, means)
        if self._audit is None:
            self._go_back(snapshot, means)
            self._tell("trial", "loss", snapshot.call, means=means)
            return
        better = is_better(self._audit, self._live, suspect, snapshot, self._group)
        self._go_back(snapshot, means)
        self._end_trial(stays=better, cause="audit", losses=[])

    def _go_back(self, snapshot: Snapshot, means: Sequence[str]) -> None:
        self._live.set_back(snapshot.content, forget="memory" in means)
        self._step = snapshot.step

    def _judge(self, losses: Sequence[float]) -> None:
        assert self.on_trial is not None
        for loss in losses:
            verdict = self.on_trial.trial.hear(loss)
            if verdict is not None:
                self._end_trial(stays=verdict, cause="loss", losses=losses)
                return

    def _end_trial(self, *, stays: bool, cause: Any, losses: Sequence[float]) -> None:
        assert self.on_trial is not None
        now, self.on_trial = self.on_trial, None
        suspect, snapshot = now.suspect, now.snapshot
        if stays:
            thrown = suspect.step - snapshot.step
            self.response.stayed(thrown)
            self._stay(snapshot, cause, thrown, now.means, losses)
        else:
            taken = self._step - snapshot.step
            self._go_back(suspect, ())
            self.response.failed(taken)
            heard = now.trial.before[-COMPARED[0] :] + now.trial.since  # both at today's level
            self.detector.learn(heard, confirmed=False)
            self._tell("forward", cause, snapshot.call, taken)

    def _break(self) -> None:
        """The model isn't finite: the run goes back, further each time."""
        if self.on_trial:
            self._end_trial(stays=False, cause="model", losses=[])
        elif self._acts:
            self._return_broken(self.store.nth_youngest(self._breaks))
        elif not self._breaks:
            self._tell("unanswered", "model", self.response.calls)
        self._breaks += 1

    def _return_broken(self, snapshot: Snapshot) -> None:
        thrown, means = self._step - snapshot.step, self.response.means
        self._go_back(snapshot, means)
        self.response.broke(thrown)
        self._stay(snapshot, "model", thrown, means, [])

    def _stay(self, at: Snapshot, cause: Any, thrown: int, means: Any, losses: Any) -> None:
        """What was after a snapshot is forgotten, but for ``losses`` since the return."""
        self.store.forget_after(at)
        self.detector.learn(losses, confirmed=True)
        self._recent.clear()
        self._tell("return", cause, at.call, thrown, means)

    def _save(self, *, lost: bool) -> None:
        """A copy; but where the optimizer's memory is no longer finite the run goes back, once."""
        if lost and not self._memory_lost:  # its steps are 0 from now on, or soon NaN
            self._return_broken(self.store.youngest)
        else:
            self._live.check_still()
            self.store.save(self._step, self.response.calls, self._good())
            self._breaks = 0
        self._memory_lost = lost

    def _tell(
        self, kind: Any, cause: Any, since: int, thrown: int = 0, means: Sequence[str] = ()
    ) -> None:
        numbers = self.response.calls, since, thrown, self.scale, tuple(means), self.skipped
        self.events.append(RewindEvent(kind, cause, *numbers))

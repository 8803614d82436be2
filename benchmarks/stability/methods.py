"""The rows: what people do, as few lines each; defaults of the packages, unless a comment says so.

Letters: r the rate that the user set.
"""

import contextlib
import copy
import io
import logging
import math
import statistics
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from lossguard.torch import BestOf, Recommended, Rewind

Gradient = Callable[[], Tensor]
"""Evaluates the minibatch's gradients into the model; returns its loss."""


class Schedule:
    """The user's rates: constant, but for a factor in a jump. Its names are those of others' code.

    Attributes:
        base_lrs: of each group of the optimizer, without the factor.
        halved: how often ``reduce_lr`` was called.
    """

    def __init__(self, optimizer: Any, factor: Callable[[], float]) -> None:
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.halved = 0
        self._optimizer, self._factor = optimizer, factor

    def step(self) -> None:
        """Set the rates of the next minibatch."""
        for group, rate in zip(self._optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * self._factor()

    def reduce_lr(self) -> None:
        """Half the rates, from the next minibatch on."""
        self.halved += 1
        self.base_lrs = [rate / 2 for rate in self.base_lrs]


Scheduled = Callable[[Any], Schedule]
"""Makes the schedule of an optimizer."""


class Method(NamedTuple):
    """The body of a training loop.

    Attributes:
        schedule: the user's, stepped before each minibatch.
        step: takes one minibatch.
        acted: how often it has intervened so far, if that is counted.
        average: an optimizer that is switched to averaged parameters for evaluation, and back.
    """

    schedule: Schedule
    step: Callable[[Gradient], object]
    acted: Callable[[], int | None] = lambda: None
    average: Any = None


def _nothing(_: Tensor) -> None: ...


def _loop(
    optimizer: Optimizer,
    scheduled: Scheduled,
    *,
    before: Callable[[Tensor], object] = _nothing,
    takes: Callable[[Tensor], bool] = lambda _: True,
    after: Callable[[Tensor], object] = _nothing,
    acted: Callable[[], int | None] = lambda: None,
) -> Method:
    """The usual one; each function is called with the minibatch's loss, where it says."""

    def step(gradient: Gradient) -> None:
        loss = gradient()
        before(loss)
        if takes(loss):
            optimizer.step()
        after(loss)

    return Method(scheduled(optimizer), step, acted)


def adamw(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW alone."""
    return _loop(AdamW(model.parameters(), r), scheduled)


def careful(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW alone at r / 10."""
    return adamw(model, r / 10, scheduled)


def clipping(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Gradients have a norm of at most 1."""
    optimizer = AdamW(model.parameters(), r)
    return _loop(optimizer, scheduled, before=lambda _: clip_grad_norm_(model.parameters(), 1.0))


def skip_step(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """No step whose loss or gradient norm is 6 deviations above the mean of the last 128."""
    seen: tuple[deque[float], deque[float]] = (deque(maxlen=128), deque(maxlen=128))
    skipped = 0

    def takes(loss: Tensor) -> bool:
        nonlocal skipped
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        numbers = (loss.item(), norm.item())
        sound = all(map(math.isfinite, numbers))
        for value, earlier in zip(numbers, seen, strict=True):
            if len(earlier) >= 64:
                limit = statistics.fmean(earlier) + 6 * statistics.pstdev(earlier)
                sound = sound and value <= limit
            if math.isfinite(value):
                earlier.append(value)
        skipped += not sound
        return sound

    optimizer = AdamW(model.parameters(), r)
    return _loop(optimizer, scheduled, takes=takes, acted=lambda: skipped)


def zclip(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Gradients clipped where their norm is unusual (Kumar et al., 2025)."""
    from zclip import ZClip

    clip = ZClip()
    return _loop(AdamW(model.parameters(), r), scheduled, before=lambda _: clip.step(model))


def prodigy(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Finds the rate by itself (Mishchenko and Defazio, 2023): r isn't used."""
    from prodigyopt import Prodigy

    return _loop(Prodigy(model.parameters()), scheduled)


def schedule_free(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW that averages (Defazio et al., 2024); r is tuned for it, after 50 steps of warm-up."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(model.parameters(), r, warmup_steps=50)
    optimizer.train()
    return _loop(optimizer, scheduled)._replace(average=optimizer)


def arc(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """The controller of arc-training."""
    from arc import Controller

    optimizer = AdamW(model.parameters(), r)
    schedule = scheduled(optimizer)
    controller = Controller(model, optimizer, scheduler=schedule, verbose=False)
    return _loop(
        optimizer,
        lambda _: schedule,
        takes=lambda loss: not controller.step(loss).should_skip,
        acted=lambda: controller.total_rollbacks + controller.total_skips,
    )


def stabilityguard(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """The optimizer of stabilityguard, which prints and writes what it sees."""
    from stabilityguard import GuardedOptimizer

    optimizer, folder = AdamW(model.parameters(), r), tempfile.TemporaryDirectory()
    guarded = GuardedOptimizer(optimizer, model, verbose=False, log_dir=folder.name)

    def step(gradient: Gradient) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            guarded.step(loss=gradient().item())
        assert folder  # lives as long as this

    return Method(scheduled(optimizer), step, lambda: guarded.total_spikes)


def selgis(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """The core of selgis' trainer, which clips as well; states in memory, not on disk."""
    from selgis import SelgisConfig
    from selgis.core import SelgisCore

    logging.getLogger("selgis").setLevel(logging.ERROR)
    optimizer = AdamW(model.parameters(), r)
    schedule = scheduled(optimizer)
    config = SelgisConfig(state_storage="memory")
    core = SelgisCore(model, optimizer, schedule, config, torch.device("cpu"))

    def step(gradient: Gradient) -> None:
        if core.check_loss(gradient()):
            core.optimizer_step()

    return Method(schedule, step, lambda: schedule.halved)


def restart(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """By hand: if 20 losses are twice as high as they were, back by 50 to 100 steps at r / 2."""
    optimizer = AdamW(model.parameters(), r)
    schedule = scheduled(optimizer)
    recent: deque[float] = deque(maxlen=20)
    best, steps = math.inf, 0

    def copied() -> Any:
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    saved: deque[Any] = deque([copied()], maxlen=2)

    def after(loss: Tensor) -> None:
        nonlocal best, steps
        recent.append(loss.item())
        steps += 1
        mean = statistics.fmean(recent)
        if len(recent) == 20 and not mean <= 2 * best:
            weights, state = copy.deepcopy(saved[0])
            model.load_state_dict(weights)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            schedule.reduce_lr()
            recent.clear()
            return
        if len(recent) == 20:
            best = min(best, mean)
        if steps % 50 == 0 and all(p.isfinite().all() for p in model.parameters()):
            saved.append(copied())

    return _loop(optimizer, lambda _: schedule, after=after, acted=lambda: schedule.halved)


def rewind(
    model: nn.Module, r: float, scheduled: Scheduled, before: Callable[[Tensor], object] = _nothing
) -> Method:
    """``Rewind`` with its defaults."""
    optimizer = AdamW(model.parameters(), r)
    watch = Rewind(model, optimizer)
    return _loop(
        optimizer, scheduled, before=before, after=watch.observe, acted=lambda: watch.returns
    )


def clipped_rewind(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """``Rewind`` and clipping to 1."""
    return rewind(model, r, scheduled, lambda _: clip_grad_norm_(model.parameters(), 1.0))


def _guarded(guard: Any, scheduled: Scheduled) -> Method:
    """A guard over several AdamW."""
    return Method(scheduled(guard), guard.step, lambda: sum(d.jumped for d in guard.history))


def recommended(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Rates r over r / 10."""
    bold, careful = (AdamW(model.parameters(), rate) for rate in (r, r / 10))
    return _guarded(Recommended(bold, careful, model=model), scheduled)


def best_of(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Rates r, r / 10 and r / 100; those that don't lead run in a tenth of the cycles."""
    rates = [AdamW(model.parameters(), rate) for rate in (r, r / 10, r / 100)]
    return _guarded(BestOf(rates, share=0.1, model=model), scheduled)


METHODS: dict[str, Callable[[nn.Module, float, Scheduled], Method]] = {
    "AdamW": adamw,
    "AdamW at r / 10": careful,
    "clipping": clipping,
    "skip at 6 sigma": skip_step,
    "ZClip": zclip,
    "Prodigy": prodigy,
    "schedule-free": schedule_free,
    "arc-training": arc,
    "stabilityguard": stabilityguard,
    "selgis": selgis,
    "restart by hand": restart,
    "Rewind": rewind,
    "clipping + Rewind": clipped_rewind,
    "Recommended": recommended,
    "BestOf": best_of,
}
TUNED = ("AdamW", "schedule-free")
"""Methods with a good rate of their own; AdamW's is that of all others."""
OURS = ("Rewind", "clipping + Rewind", "Recommended", "BestOf")

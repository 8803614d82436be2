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
from torch.optim.lr_scheduler import LambdaLR

from lossguard.torch import BestOf, Hedged, Recommended, Rewind

Gradient = Callable[[], Tensor]
"""Evaluates the minibatch's gradients into the model; returns its loss."""
Scheduled = Callable[[Optimizer], LambdaLR]
"""Makes the user's schedule of rates, which is constant except in a jump."""


class Method(NamedTuple):
    """A training loop's body.

    Attributes:
        schedule: the user's, stepped after each minibatch.
        step: takes one minibatch.
        acted: how often it has intervened so far.
        optimizer: what is switched to evaluation and back, if it knows that.
    """

    schedule: LambdaLR
    step: Callable[[Gradient], object]
    acted: Callable[[], int] = int
    optimizer: Any = None


def adamw(model: nn.Module, r: float, scheduled: Scheduled, most: float = math.inf) -> Method:
    """AdamW alone, or with gradients of a norm of at most ``most``."""
    optimizer = AdamW(model.parameters(), r)

    def step(gradient: Gradient) -> None:
        gradient()
        if most < math.inf:
            clip_grad_norm_(model.parameters(), most)
        optimizer.step()

    return Method(scheduled(optimizer), step)


def clipping(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Gradients have a norm of at most 1."""
    return adamw(model, r, scheduled, most=1.0)


def skip_step(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """No step whose loss or gradient norm is 6 deviations above the mean of the last 128."""
    optimizer = AdamW(model.parameters(), r)
    seen: tuple[deque[float], deque[float]] = (deque(maxlen=128), deque(maxlen=128))
    skipped = 0

    def step(gradient: Gradient) -> None:
        nonlocal skipped
        loss = gradient()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        numbers = (loss.item(), norm.item())
        sound = all(map(math.isfinite, numbers))
        for value, earlier in zip(numbers, seen, strict=True):
            if len(earlier) >= 64:
                limit = statistics.fmean(earlier) + 6 * statistics.pstdev(earlier)
                sound = sound and value <= limit
            if math.isfinite(value):
                earlier.append(value)
        if sound:
            optimizer.step()
        else:
            skipped += 1

    return Method(scheduled(optimizer), step, lambda: skipped)


def zclip(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Gradients clipped where their norm is unusual (Kumar et al., 2025)."""
    from zclip import ZClip

    optimizer, clip = AdamW(model.parameters(), r), ZClip()

    def step(gradient: Gradient) -> None:
        gradient()
        clip.step(model)
        optimizer.step()

    return Method(scheduled(optimizer), step)


def prodigy(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """Finds the rate by itself (Mishchenko and Defazio, 2023): r isn't used."""
    from prodigyopt import Prodigy

    optimizer = Prodigy(model.parameters())

    def step(gradient: Gradient) -> None:
        gradient()
        optimizer.step()

    return Method(scheduled(optimizer), step)


def schedule_free(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW that averages (Defazio et al., 2024); r is tuned for it, after 50 steps of warm-up."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(model.parameters(), r, warmup_steps=50)
    optimizer.train()

    def step(gradient: Gradient) -> None:
        gradient()
        optimizer.step()

    return Method(scheduled(optimizer), step, optimizer=optimizer)


def arc(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """The controller of arc-training."""
    from arc import Controller

    optimizer = AdamW(model.parameters(), r)
    schedule = scheduled(optimizer)
    controller = Controller(model, optimizer, scheduler=schedule, verbose=False)

    def step(gradient: Gradient) -> None:
        if not controller.step(gradient()).should_skip:
            optimizer.step()

    return Method(schedule, step, lambda: controller.total_rollbacks + controller.total_skips)


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


class Halving:
    """What ``reduce_lr`` of selgis' scheduler is to the user's own schedule."""

    def __init__(self, schedule: LambdaLR) -> None:
        self.schedule, self.times = schedule, 0

    def reduce_lr(self) -> float:
        """Half the rate, from the next minibatch on."""
        self.times += 1
        self.schedule.base_lrs = [rate / 2 for rate in self.schedule.base_lrs]
        return 0.5**self.times


def selgis(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """The core of selgis' trainer, which clips as well; states in memory, not on disk."""
    from selgis import SelgisConfig
    from selgis.core import SelgisCore

    logging.getLogger("selgis").setLevel(logging.ERROR)
    optimizer = AdamW(model.parameters(), r)
    halving = Halving(scheduled(optimizer))
    config = SelgisConfig(state_storage="memory")
    core = SelgisCore(model, optimizer, halving, config, torch.device("cpu"))

    def step(gradient: Gradient) -> None:
        if core.check_loss(gradient()):
            core.optimizer_step()

    return Method(halving.schedule, step, lambda: halving.times)


def restart(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """By hand: if 20 losses are twice as high as they were, back by 50 to 100 steps at r / 2."""
    optimizer = AdamW(model.parameters(), r)
    halving = Halving(scheduled(optimizer))
    recent: deque[float] = deque(maxlen=20)
    best, steps = math.inf, 0

    def copied() -> Any:
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    saved: deque[Any] = deque([copied()], maxlen=2)

    def step(gradient: Gradient) -> None:
        nonlocal best, steps
        recent.append(gradient().item())
        optimizer.step()
        steps += 1
        if len(recent) == 20:
            mean = statistics.fmean(recent)
            if not mean <= 2 * best:
                weights, state = copy.deepcopy(saved[0])
                model.load_state_dict(weights)
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
                halving.reduce_lr()
                recent.clear()
                return
            best = min(best, mean)
        if steps % 50 == 0:
            saved.append(copied())

    return Method(halving.schedule, step, lambda: halving.times)


def rewind(model: nn.Module, r: float, scheduled: Scheduled, most: float = math.inf) -> Method:
    """``Rewind`` with its defaults."""
    optimizer = AdamW(model.parameters(), r)
    watch = Rewind(model, optimizer)

    def step(gradient: Gradient) -> None:
        loss = gradient()
        if most < math.inf:
            clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        watch.observe(loss)

    return Method(scheduled(optimizer), step, lambda: watch.returns)


def clipped_rewind(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """``Rewind`` and clipping to 1."""
    return rewind(model, r, scheduled, most=1.0)


def _guarded(guard: Any, scheduled: Scheduled) -> Method:
    def jumps() -> int:
        return sum(decision.jumped for decision in guard.history)

    return Method(scheduled(guard), guard.step, jumps, guard)


def recommended(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW at r over AdamW at r / 10."""
    bold, careful = AdamW(model.parameters(), r), AdamW(model.parameters(), r / 10)
    return _guarded(Recommended(bold, careful, model=model), scheduled)


def hedged(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW at r over AdamW at r / 10."""
    bold, careful = AdamW(model.parameters(), r), AdamW(model.parameters(), r / 10)
    return _guarded(Hedged(bold, careful, model=model), scheduled)


def best_of(model: nn.Module, r: float, scheduled: Scheduled) -> Method:
    """AdamW at r, r / 10 and r / 100, where those that don't lead run in a tenth of the cycles."""
    rates = [AdamW(model.parameters(), rate) for rate in (r, r / 10, r / 100)]
    return _guarded(BestOf(rates, share=0.1, model=model), scheduled)


METHODS: dict[str, Callable[[nn.Module, float, Scheduled], Method]] = {
    "AdamW": adamw,
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
    "Hedged": hedged,
}
TUNED = ("AdamW", "schedule-free")
"""Methods with a good rate of their own; AdamW's is that of all others."""
OURS = ("Rewind", "clipping + Rewind", "Recommended", "BestOf", "Hedged")

"""PyTorch: Ctrl-C at a random bytecode of a call, of all Python code that the call runs.

Held: the model is what it was before the call or is after it, bit by bit; gradients, modes of
torch and the handler of the signal are as before; training goes on.
"""

import copy
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from models import KINDS, closure_for, minibatches, mlp, run, two
from torch import nn
from torch.optim import SGD, Adam

from lossguard.torch import LossGuard, Rewind

from .torch_guards import assert_clean, points, same

MANY, OURS = 12, "lossguard"


class Stop:
    """Traces bytecodes, and raises a signal at number ``at``; half of the time only in our code."""

    def __init__(self, at: int, everywhere: bool) -> None:
        self.at, self.everywhere, self.seen = at, everywhere, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not self.everywhere and OURS not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.seen += 1
            if self.seen == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


def attempt(seed: int, folder: Path) -> Counter[str]:
    """``MANY`` interrupts of one call; or of ``Rewind.observe``, where it reads."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind, everywhere = rng.choice([*KINDS, Rewind]), rng.random() < 0.5
    model = mlp(nn.BatchNorm1d(16))
    batches = minibatches(80)
    options = {"nt": rng.choice((1, 2, 3))} | ({"nc": 1} if kind is LossGuard else {})
    if kind is Rewind:
        optimizer = Adam(model.parameters(), lr=0.05)
        guard: Any = Rewind(model, optimizer, window=64, every=1)
        done = 0
        with torch.no_grad():
            model[0].bias.fill_(torch.nan)  # so that it goes back
    else:
        faster = rng.choice((lambda ps: Adam(ps, lr=0.05), lambda ps: SGD(ps, lr=0.01)))
        guard, done = two(kind, model, faster, **options), rng.randrange(1, 30)
        run(guard, model, batches[:done])
    start = copy.deepcopy(guard.state_dict()), copy.deepcopy(model.state_dict())
    handler = signal.getsignal(signal.SIGINT)

    def go(at: int) -> tuple[int, bool]:
        """One call; how many bytecodes it ran, and whether it was interrupted."""
        model.load_state_dict(start[1])
        guard.load_state_dict(start[0])
        torch.manual_seed(seed)
        stop, interrupted = Stop(at, everywhere), False
        closure = closure_for(guard, model, batches[done]) if kind is not Rewind else None
        sys.settrace(stop)
        try:
            guard.step(closure) if closure else guard.observe(float("nan"))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        return stop.seen, interrupted

    total, _ = go(-1)
    after = points(model)
    model.load_state_dict(start[1])
    guard.load_state_dict(start[0])
    before, tried = points(model), Counter[str]()
    for _ in range(MANY):
        at = rng.randint(1, total)
        _, interrupted = go(at)
        now = points(model)
        told = f"{kind.__name__} {options} after {done}, at {at} of {total}, {everywhere}"
        assert interrupted, f"no KeyboardInterrupt came out: {told}"
        assert same(now, before) or same(now, after), f"a model between two states: {told}"
        assert signal.getsignal(signal.SIGINT) is handler, f"another handler is left: {told}"
        if kind is not Rewind:
            assert_clean(model)
            run(guard, model, batches[done : done + 3])
        tried["before the call" if same(now, before) else "after it"] += 1
    return tried

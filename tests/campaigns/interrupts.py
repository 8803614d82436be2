"""PyTorch: Ctrl-C at a random bytecode of a call, of all Python code that the call runs.

Held: the model is finite, and the last checkpoint loads, from which the call does what it would
have done.
"""

import copy
import dis
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from models import KINDS, closure_for, loss_fn, minibatches, mlp, run, two
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lossguard.torch import Rewind

from .torch_guards import points, same

MANY, OURS = 12, "lossguard"
NOTICED = ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
"""The bytecodes after which Python looks for signals."""
CODES = {dis.opmap[name] for name in NOTICED if name in dis.opmap}


class Stop:
    """Traces bytecodes, and raises a signal after number ``at`` of those where Python heeds one.

    Half of the time these are of our code only.
    """

    def __init__(self, at: int, everywhere: bool) -> None:
        self.at, self.everywhere, self.seen = at, everywhere, 0
        self.last: dict[int, int] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not self.everywhere and OURS not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self.last.get(id(frame))
            self.last[id(frame)] = frame.f_code.co_code[frame.f_lasti]
            self.seen += before in CODES
            if before in CODES and self.seen == self.at:
                signal.raise_signal(signal.SIGINT)
        if event in ("exception", "return"):  # a call that raised isn't followed by a signal
            self.last.pop(id(frame), None)
        return self


def attempt(seed: int, folder: Path) -> Counter[str]:
    """``MANY`` interrupts of one call; or of ``Rewind.observe``, where it reads."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    torch.manual_seed(seed)
    kind, everywhere = rng.choice([*KINDS, Rewind]), rng.random() < 0.5
    model = mlp(nn.BatchNorm1d(16))
    batches = minibatches(80)
    options = {"nt": rng.choice((1, 2, 3))}
    optimizer, done = None, rng.randrange(1, 30)
    if kind is Rewind:
        optimizer = Adam(model.parameters(), lr=0.05)
        guard: Any = Rewind(model, optimizer, every=1)
        done += 40
        learn(guard, model, optimizer, batches[:done])
        with torch.no_grad():
            model[0].bias.fill_(torch.nan)  # so that it goes back
    else:
        faster = rng.choice((lambda ps: Adam(ps, lr=0.05), lambda ps: SGD(ps, lr=0.01)))
        guard = two(kind, model, faster, **options)
        run(guard, model, batches[:done])

    def call() -> None:
        if optimizer:
            guard.observe(float("nan"))
        else:
            guard.step(closure_for(guard, model, batches[done]))

    def places(total: int) -> list[int]:
        return [rng.randint(1, total) for _ in range(MANY)]

    parts = [part for part in (model, optimizer, guard) if part is not None]
    try:
        came = [*interrupted(parts, model, call, places, everywhere)]
    except Exception as error:
        error.add_note(f"{kind.__name__} {options} after {done}")
        raise
    return Counter("interrupted" if one else "too late" for one in came)


def learn(rewind: Rewind, model: nn.Module, optimizer: Optimizer, batches: Iterable[Any]) -> None:
    """A few steps of a plain optimizer, watched."""
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewind.observe(loss)


def interrupted(
    parts: list[Any],
    model: nn.Module,
    call: Callable[[], None],
    places: Callable[[int], Iterable[int]],
    everywhere: bool = False,
) -> Iterator[bool]:
    """Interrupt a call, each time from the same states, at places out of so many bytecodes.

    Yields, where all is held, whether it was interrupted.
    """
    start = [copy.deepcopy(part.state_dict()) for part in parts]
    finite = all(tensor.isfinite().all() for tensor in points(model))

    def go(at: int) -> tuple[int, bool]:
        """One call; how many bytecodes it ran that count, and whether it was interrupted."""
        for part, state in zip(parts, start, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        stop, came = Stop(at, everywhere), False
        sys.settrace(stop)
        try:
            with torch.enable_grad():  # which PyTorch's own contexts leave off
                call()
        except KeyboardInterrupt:
            came = True
        finally:
            sys.settrace(None)
        return stop.seen, came

    total, _ = go(-1)
    after = points(model)
    for at in places(total):
        _, came = go(at)
        now = points(model)
        if finite:
            assert all(tensor.isfinite().all() for tensor in now), f"not finite, at {at} of {total}"
        go(-1)
        assert same(points(model), after), f"another run after loading, at {at} of {total}"
        yield came

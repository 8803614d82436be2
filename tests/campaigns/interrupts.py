"""PyTorch: Ctrl-C or SIGTERM at a random bytecode of a call, of all Python code that the call runs.

Held: the model, and the memory of a plain optimizer, are what they were before the call or are
after it, bit by bit; gradients, modes of torch and the handler of the signal are as before;
training goes on.
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

from .torch_guards import assert_clean, points, same

MANY, OURS = 12, "lossguard"


NOTICED = ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME")
"""The bytecodes after which Python looks for signals."""
CODES = {dis.opmap[name] for name in NOTICED if name in dis.opmap}


class Stop:
    """Traces bytecodes, and raises a signal after number ``at`` of those where Python heeds one.

    Half of the time these are of our code only.
    """

    def __init__(self, at: int, everywhere: bool, which: signal.Signals) -> None:
        self.at, self.everywhere, self.which, self.seen = at, everywhere, which, 0
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
                signal.raise_signal(self.which)
        if event in ("exception", "return"):  # a call that raised isn't followed by a signal
            self.last.pop(id(frame), None)
        return self


def attempt(seed: int, folder: Path) -> Counter[str]:
    """``MANY`` interrupts of one call; or of ``Rewind.observe``, where it reads."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    which = rng.choice((signal.SIGINT, signal.SIGTERM))
    signal.signal(which, signal.default_int_handler)  # a shell may have it ignored
    torch.manual_seed(seed)
    kind, everywhere = rng.choice([*KINDS, Rewind]), rng.random() < 0.5
    model = mlp(nn.BatchNorm1d(16))
    batches = minibatches(80)
    options = {"nt": rng.choice((1, 2, 3))}
    optimizer, done = None, rng.randrange(1, 30)
    if kind is Rewind:
        optimizer = Adam(model.parameters(), lr=0.05)
        guard: Any = Rewind(model, optimizer, window=64, every=1)
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

    tried = Counter[str]()
    try:
        for came, is_before in interrupted(
            guard, model, call, which, places, everywhere, optimizer
        ):
            if optimizer:
                learn(guard, model, optimizer, batches[done : done + 3])
            else:
                run(guard, model, batches[done : done + 3])
            where = "before the call" if is_before else "after it"
            tried[where if came else "too late"] += 1
    except Exception as error:
        error.add_note(f"{kind.__name__} {options} after {done}")
        raise
    return tried


def learn(rewind: Rewind, model: nn.Module, optimizer: Optimizer, batches: Iterable[Any]) -> None:
    """A few steps of a plain optimizer, watched."""
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewind.observe(loss)


def memory(optimizer: Optimizer | None) -> list[torch.Tensor]:
    """Copies of what it remembers."""
    state = optimizer.state.values() if optimizer else ()
    return [t.clone() for one in state for t in one.values()]


def interrupted(
    guard: Any,
    model: nn.Module,
    call: Callable[[], None],
    which: signal.Signals,
    places: Callable[[int], Iterable[int]],
    everywhere: bool = False,
    optimizer: Optimizer | None = None,
) -> Iterator[tuple[KeyboardInterrupt | None, bool]]:
    """Interrupt a call, each time from the same state, at places out of so many bytecodes.

    ``optimizer`` is one that isn't a part of the guard. Yields, where all is held, what interrupted
    it and whether the model is as before the call.
    """
    parts = [part for part in (model, optimizer, guard) if part is not None]
    start = [copy.deepcopy(part.state_dict()) for part in parts]
    handler = signal.getsignal(which)

    def begin() -> None:
        for part, state in zip(parts, start, strict=True):
            part.load_state_dict(copy.deepcopy(state))

    def now() -> list[torch.Tensor]:
        return points(model) + memory(optimizer)

    def go(at: int) -> tuple[int, KeyboardInterrupt | None]:
        """One call; how many bytecodes it ran that count, and what interrupted it."""
        begin()
        stop, came = Stop(at, everywhere, which), None
        sys.settrace(stop)
        try:
            call()
        except KeyboardInterrupt as interrupt:
            came = interrupt
        finally:
            sys.settrace(None)
        assert came or stop.seen < at or at < 0, f"no KeyboardInterrupt came out, at {at}"
        return stop.seen, came

    total, _ = go(-1)
    after = now()
    begin()
    before = now()
    for at in places(total):
        _, came = go(at)
        found = now()
        try:
            assert same(found, before) or same(found, after), "a model between two states"
            assert signal.getsignal(which) is handler, "another handler is left"
            assert_clean(model)
        except (AssertionError, RuntimeError) as error:
            error.add_note(f"{which.name} at {at} of {total}")
            raise error from came
        yield came, same(found, before)

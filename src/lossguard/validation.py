"""What arguments may be, and the sentences that refuse the rest: in JAX and PyTorch the same.

Imports neither, as who uses the one may not have the other. A number that is returned is a plain
one: NumPy's carries a type, which a compiled loop or a checkpoint may not take.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Integral
from typing import Any, SupportsFloat

MOST = 2**31 - 1
"""What is counted in 32 bits."""
MOST_SEEDS = 10_000
"""Of runs side by side, of any kind."""
MOST_HIDDEN, MOST_LAYERS = 10_000, 100
"""Of a learned optimizer: XLA ends the process over arrays whose size it can't count."""


def check_count(name: str, value: int, least: int = 1, most: int = MOST) -> int:
    """Require an integer of at least 1, or ``least``, and at most 2^31 - 1, or ``most``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value > most:
        told = repr(value) if value < 10**80 else "one of many digits"
        raise ValueError(f"{name} must be at most {most}, got {told}")
    return int(value)


def check_nc(nc: int | None, check: Any, most: int = MOST) -> int:
    """Require minibatches of a check, two if ``nc`` is None; none where there is no check."""
    if not (check is None or callable(check)):
        raise ValueError(f"check must be None or a function, got {check!r}")
    if check is None and nc is not None:
        raise ValueError(f"nc must go with check=, whose minibatches it counts, got {nc!r}")
    if check is None:
        return 0
    return check_count("nc", 2 if nc is None else nc, most=most)


def check_seed(seed: int, seeds: int = 1) -> None:
    """Require that JAX takes no seed from this one on modulo 2^32, and memory for all of them."""
    seeds = check_count("seeds", seeds, most=MOST_SEEDS)
    check_count("seed", seed, least=0, most=2**32 - seeds)


def check_network(hidden: int, layers: int) -> None:
    """Require sizes of a learned optimizer that can be compiled."""
    check_count("hidden", hidden, most=MOST_HIDDEN)
    check_count("layers", layers, most=MOST_LAYERS)


def check_lstm(scale: float, p: float) -> None:
    """Require numbers of an LSTM optimizer; exp(p) and exp(-p) are float32."""
    check_positive(scale=scale)
    check_real("p", p, "above 0 and at most 80", lambda v: 0 < v <= 80)


def check_positive(**values: float) -> None:
    """Require positive and finite numbers."""
    for name, value in values.items():
        check_real(name, value, "positive and finite", lambda v: 0 < v < math.inf)


def check_fraction(name: str, value: float) -> float:
    """Require 0 < value <= 1."""
    return check_real(name, value, "above 0 and at most 1", lambda v: 0 < v <= 1)


def check_decay(decay: float) -> float:
    """Require 0 < decay < 1."""
    return check_real("decay", decay, "above 0 and below 1", lambda v: 0 < v < 1)


def check_part(name: str, value: float) -> float:
    """Require 0 <= value < 1."""
    return check_real(name, value, "at least 0 and below 1", lambda v: 0 <= v < 1)


def check_real(name: str, value: Any, allowed: str, fits: Callable[[Any], bool]) -> float:
    """Require a number that fits what is allowed, in words."""
    with contextlib.suppress(OverflowError):  # of an integer beyond all floats
        if isinstance(value, SupportsFloat) and fits(value):
            return float(value)
    number = "a number " * isinstance(value, str)
    raise ValueError(f"{name} must be {number}{allowed}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is not one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be {one_of(choices, value)}")


def check_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Refuse what is not of a kind, such as a function that makes one and was not called."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {named(kind)} such as {example}, got {told(value)}")


def check_function(name: str, value: Any, example: str) -> None:
    """Refuse what can't be called."""
    if not callable(value):
        raise ValueError(f"{name} must be a function {example}, got {told(value)}")


def told(value: Any) -> str:
    """A value in a message: its type, and its shape if it has one, where the value fills lines.

    >>> import numpy as np
    >>> told([1, 2]), told(np.ones((3, 4)))
    ('[1, 2]', 'a ndarray of shape [3, 4]')
    """
    text, shape = repr(value), getattr(value, "shape", None)
    if len(text) <= 80 and "\n" not in text:
        return text
    return named(type(value)) + (f" of shape {list(shape)}" if shape else "")


def named(kind: type) -> str:
    """A type with its article, as it is spoken.

    >>> class SGD: ...
    >>> named(SGD), named(dict), named(int)
    ('an SGD', 'a dict', 'an int')
    """
    name = kind.__name__
    vowels = "AEFHILMNORSX" if name[:2].isupper() else "AEIOUaeiou"
    return f"{'an' if name[0] in vowels else 'a'} {name}"


def freeze_lists(owner: Any) -> None:
    """Tuples in place of the lists in the fields of a frozen dataclass, for it to hash."""
    for field in fields(owner):
        if isinstance(value := getattr(owner, field.name), list):
            object.__setattr__(owner, field.name, tuple(value))


def one_of(known: Collection[str], name: Any) -> str:
    """What may be named, for a message: all of it, what was given, and the nearest.

    >>> one_of(("fig04", "fig05"), "fig5")
    "one of fig04, fig05, got 'fig5' (did you mean fig05?)"
    """
    return f"one of {', '.join(known)}, got {name!r}{nearest(known, name)}"


def nearest(known: Collection[str], name: Any) -> str:
    """Of what may be named, what comes nearest, for the end of a message; or nothing."""
    plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(str(name)), plain, n=1)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(name: str) -> str:
    """What ``SGDnm`` and ``sgdnm`` have in common, and ``fig05`` and ``fig5``."""
    return re.sub(r"(?<![\d.])0+(?=\d)", "", name.lower())

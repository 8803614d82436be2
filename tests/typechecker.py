"""Beartype, asked once for what it would make again and again."""

from collections.abc import Callable

import beartype

# An int where a float is asked for is right, as type checkers have it too.
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_made: dict[tuple, Callable] = {}


def checked(stub: Callable) -> Callable:
    """A stub of jaxtyping's: a function of no content, with the signature whose types to check.

    Jaxtyping makes one whenever a function is defined, and those within functions are defined at
    every call; it takes longer to make their checks than to run them.
    """
    key = stub.__module__, stub.__qualname__, stub.__code__, *stub.__annotations__.items()
    if key not in _made:
        _made[key] = _beartype(stub)
    return _made[key]

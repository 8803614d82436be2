"""What a name may be, for those who mistype it."""

import difflib
import re
from collections.abc import Iterable


def one_of(known: Iterable[str], name: str) -> str:
    """What may be named, for a message: all of it, what was given, and the nearest.

    >>> one_of(("fig04", "fig05"), "fig5")
    "one of fig04, fig05, got 'fig5' (did you mean fig05?)"
    """
    plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(name), plain, n=1)
    hint = f" (did you mean {plain[near[0]]}?)" if near else ""
    return f"one of {', '.join(plain.values())}, got {name!r}{hint}"


def _plain(name: str) -> str:
    """What ``SGDnm`` and ``sgdnm`` have in common, and ``fig05`` and ``fig5``."""
    return re.sub(r"(?<![\d.])0+(?=\d)", "", name.lower())

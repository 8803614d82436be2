"""What is shown on a terminal: names are data, and none of their letters is obeyed by it."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


class PlainConsole(Console):
    """One that shows text as it is: square brackets, names of emoji and control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore
        """All text goes through here, cells of tables too."""
        return super().render_str(shown(text), **options)


def shown(text: str) -> str:
    r"""Text in which what a terminal would obey, or not show, is escaped; lines stay lines.

    >>> print(shown("Adam\x1b[2J\u202e, naïve"))
    Adam\x1b[2J\u202e, naïve
    """
    if text.isprintable():  # most are, and some are images of a report
        return text
    seen = (
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(seen)


def tell(text: str) -> None:
    """On stderr."""
    print(shown(text), file=sys.stderr)


def console() -> PlainConsole:
    """Of stdout, which may be closed; what is piped has room for wide tables."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return PlainConsole(width=None if is_terminal else 160)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    justify: Literal["left", "right"] = "left",
    **options: Any,
) -> Table:
    """Of text and numbers, with nothing where one is missing; the first column is not wrapped."""
    first, *others = columns
    heads = (Column(name, justify=justify) for name in others)
    made = Table(Column(first, no_wrap=True), *heads, **options)
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def print_summary(title: str, rows: Mapping[str, Sequence[str]]) -> None:
    """Columns by name; in two parts, losses and costs, where the terminal has no room for all."""
    out, (first, *others) = console(), rows
    losses = [name for name in others if name.startswith("loss")]
    parts = []
    for names in (others, losses, [name for name in others if name not in losses]):
        columns = zip(*(rows[name] for name in (first, *names)), strict=True)
        parts.append(table((first, *names), columns, "right", title=title, padding=0))
    with out.capture() as whole:
        out.print(parts[0])
    for part in parts[1:] if "…" in whole.get() else parts[:1]:
        out.print(part)

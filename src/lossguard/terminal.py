"""What is shown on a terminal: names are data, and none of their letters is obeyed by it."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
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
    seen = (
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(seen)


def tell(text: str) -> None:
    """On stderr."""
    print(shown(text), file=sys.stderr)


def console() -> PlainConsole:
    """Of stdout; what is piped has room for wide tables."""
    return PlainConsole(width=None if sys.stdout.isatty() else 160)


def print_summary(table: Table) -> None:
    """A summary; in two parts, losses and costs, where the terminal has no room for its numbers."""
    out = console()
    with out.capture() as whole:
        out.print(table)
    if "…" not in whole.get():
        out.print(table)
        return
    losses = 1 + sum(str(column.header).startswith("loss") for column in table.columns)
    for columns in (table.columns[:losses], [table.columns[0], *table.columns[losses:]]):
        part = Table(*(column.copy() for column in columns), title=table.title, padding=0)
        for row in zip(*(column.cells for column in columns), strict=True):
            part.add_row(*row)
        out.print(part)

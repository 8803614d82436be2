"""Names reach a terminal, and what could make it do something doesn't."""

import io
import sys

import pytest
from rich.table import Table

from lossguard.cli.terminal import PlainConsole, console, shown
from lossguard.runs.progress_bar import Progress

NAME = "Adam\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202e"
ESCAPED = r"Adam\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202e"


def test_control_characters_are_escaped_and_letters_are_not() -> None:
    assert shown(NAME) == ESCAPED
    assert shown("naïve Ω 名 [/-] :x:\nnext") == "naïve Ω 名 [/-] :x:\nnext"


def test_a_table_shows_them_escaped() -> None:
    out = io.StringIO()
    table = Table(f"{NAME}1", title=f"{NAME}2")
    table.add_row(f"{NAME}3")
    PlainConsole(file=out, width=200).print(table, f"{NAME}4")
    told = out.getvalue()
    assert all(f"{ESCAPED}{k}" in told for k in (1, 2, 3, 4))
    assert not {*"\x1b\x07\x9b\r\x00\u202e"} & {*told}


def test_a_closed_stdout_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console().print("a table")


def test_progress_shows_them_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(NAME, total=1, first="compiling"):
        pass
    assert sys.stderr.getvalue() == f"{ESCAPED}: compiling\n"

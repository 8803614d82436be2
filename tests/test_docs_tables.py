"""Losses in the documentation's tables are those of the records that they name.

A comment ahead of a table says which: ``<!-- of RECORD RECORD; GROUP: RECORD -->``. A row is of the
first that has its method, or of the one that it names itself, in backticks. Groups are the first of
two columns of labels. Marks are steps, or minibatches where the table's first cell says so, checked
on or trained on.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lossguard.curves import last_step, mark_loss
from lossguard.experiments.claims import judge_claims
from lossguard.experiments.folders import read_runs
from lossguard.records import CURVES

ROOT = Path(__file__).parents[1]
if not (ROOT / "results").is_dir():
    pytest.skip("there are no records here", allow_module_level=True)
TABLES = [
    (page, *found)
    for page in ("results", "choices", "reproduction")
    for found in re.findall(
        r"<!-- of ([^>]+) -->\n((?:\|.*\n)+)", (ROOT / "docs" / f"{page}.md").read_text()
    )
]
CHECKS = {"the paper's": 1.0, "recommended, stream, nc 10": 1.0, "recommended, stream": 0.1}
"""nc / nt: check minibatches for each learned update, since a cycle without these has none."""


def in_minibatches(table: str) -> bool:
    return table.startswith("| minibatches |")


def cells(table: str) -> Iterator[tuple[str, str, int, str]]:
    """Group and label of a row, a mark, and how the loss there is written."""
    lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    head, _, *rows = lines
    marks = [int(cell.replace(",", "")) if cell[:1].isdigit() else 0 for cell in head]
    labels = next(column for column, mark in enumerate(marks) if mark)
    group = ""
    for row in rows:
        group = row[0] if labels == 2 and row[0] else group
        for mark, cell in zip(marks[labels:], row[labels:], strict=True):
            if mark and cell:
                yield group, row[labels - 1], mark, cell


def records_of(comment: str, group: str, label: str) -> list[str]:
    """Where to look for a row, in this order."""
    if named := re.findall(r"`(.+?)`", label):
        return [folder.name for folder in (ROOT / "results").glob(f"*{named[0]}")]
    parts = (part.rpartition(": ")[::2] for part in comment.split("; "))
    return dict(parts)[group if f"{group}: " in comment else ""].split()


def method_of(label: str) -> str:
    """The method's name in records, of a label such as ``Adam (0.01)``."""
    if label.startswith("GL2O, theta as decay"):
        return "GL2O (theta as decay)"
    plain = re.sub(r" \(.*\)$", "", label)
    names = {
        "the paper's guard": "LGL2O",
        "Adam at 10, guarded": "Adam, rate too high guarded",
        "SGDnm, the guard's": "SGDnm",
        "Recommended, keep": "Recommended (keep)",
        "Recommended, keep, over Adam": "Recommended (keep) over Adam",
    }
    return names.get(plain, plain)


@cache
def curves(record: str, method: str) -> pl.DataFrame:
    table = pl.read_parquet(ROOT / "results" / record / CURVES)
    return table.filter(pl.col("method") == method)


def loss_after(table: pl.DataFrame, minibatches: int, checks: float) -> float:
    """Mean over seeds of the loss at the step that each has reached by then."""
    losses = []
    for _, seed in table.sort("step").group_by("seed"):
        taken = pl.col("step") + checks * pl.col("learned_updates")
        before = seed.filter(taken <= minibatches)
        trained = before.select(pl.col("step") / taken)["step"][-1]  # the share of them that train
        losses.append(mark_loss(seed, int(minibatches * trained + 1e-9))["loss"].item())
    return float(np.mean(losses))


def is_rounded(written: str, value: float) -> bool:
    """Whether a number is another one, to the digits that it is written with."""
    shown = Decimal(written.replace(",", ""))
    last = Decimal(1).scaleb(int(shown.as_tuple().exponent))
    return abs(shown - Decimal(value)) <= last / 2


@pytest.mark.parametrize(("page", "comment", "table"), TABLES)
def test_losses_are_those_of_the_records(page: str, comment: str, table: str) -> None:
    wrong = []
    for group, label, mark, written in cells(table):
        of_method = (curves(r, method_of(label)) for r in records_of(comment, group, label))
        its_own = next((c for c in of_method if c.height and last_step(c) >= mark), None)
        checks = CHECKS.get(label, 0.0) if in_minibatches(table) else 0.0
        loss = None if its_own is None else loss_after(its_own, mark, checks)
        if loss is None or not is_rounded(written, loss):
            wrong.append(f"{group} {label} at {mark}: {written}, recorded {loss}")
    assert not wrong, f"docs/{page}.md\n" + "\n".join(wrong)


def test_verdicts_are_those_of_the_records() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text()
    told = dict(re.findall(r"^\| (C\d+\w?) \|[^|]*\|[^|]*\| ([a-z ]+) \|", page, re.M))
    judged = judge_claims(read_runs([ROOT / "results"])[0])
    assert told == {verdict.id: verdict.outcome for verdict in judged}


def test_most_tables_are_checked() -> None:
    assert sum(len([*cells(table)]) for *_, table in TABLES) > 900


@pytest.mark.parametrize(
    ("written", "value", "same"),
    [
        ("0.0147", 0.014749, True),
        ("0.0147", 0.014751, False),
        ("5.4e-4", 5.449e-4, True),
        ("5.4e-4", 5.451e-4, False),
        ("1,514", 1514.4, True),
        ("1,514", 1514.6, False),
        ("0", 0.4, True),
    ],
)
def test_rounding(written: str, value: float, same: bool) -> None:
    assert is_rounded(written, value) is same

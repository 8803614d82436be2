"""The names of the records in ``results`` are those that its README explains."""

import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "results"
if not RESULTS.is_dir():
    pytest.skip("there are no records here", allow_module_level=True)
NAMES = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


def explained(head: str) -> list[str]:
    """Parts of names, as patterns: the first column of the table that begins with ``head``."""
    _, table = (RESULTS / "README.md").read_text().split(f"| {head} |")
    first = re.findall(r"^\| (`.+?) \|", table.partition("\n\n")[0], re.MULTILINE)
    parts = re.findall("`(.+?)`", " ".join(first))
    return [re.escape(part).replace(r"\*", "[^_]+") for part in parts]


BEGIN, THEN = explained("begins with"), explained("then")


def test_names_are_explained() -> None:
    begin, then = "|".join(BEGIN), "|".join(THEN)
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d_({begin})({then})*")
    assert [name for name in NAMES if not pattern.fullmatch(name)] == []


def test_what_is_explained_is_there() -> None:
    parts = [*(f"_{part}" for part in BEGIN), *THEN]
    used = [part for part in parts if any(re.search(rf"{part}(_|$)", name) for name in NAMES)]
    assert used == parts

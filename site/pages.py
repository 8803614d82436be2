"""The pages of the site, in ``build/docs``: those of docs/ with what they show of other folders.

Where a tag is built they say how a release is installed, else what works in a checkout.
``python site/pages.py README.md URL TAG`` makes a file one for an index, which shows it without the
repository at that address.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"


def gather() -> None:
    """Copy them, the changelog, and the records' figures; make a page of all records."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    shutil.copy(ROOT / "CHANGELOG.md", PAGES / "changelog.md")
    for file in ROOT.glob("results/*/figure.png"):
        copy = PAGES / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (PAGES / "results.md").write_text("\n\n".join(results()))
    for page in PAGES.glob("*.md"):
        text = page.read_text().replace("](../results/", "](results/")
        text = released(text) if os.environ.get("GITHUB_REF_TYPE") == "tag" else text
        if page.stem.startswith("gallery"):
            page.with_suffix(".ipynb").write_text(notebook(text))
            title, rest = text.split("\n", 1)
            text = f"{title}\n\n[As a notebook]({page.stem}.ipynb)\n{rest}"
        page.write_text(text)


def notebook(page: str) -> str:
    """A page to run: its code in cells, between its text."""
    cells = []
    for k, part in enumerate(re.split(r"```python\n(.*?)```\n", page, flags=re.DOTALL)):
        cell = {"metadata": {}, "source": part.strip()}
        if k % 2:
            cells.append(cell | {"cell_type": "code", "execution_count": None, "outputs": []})
        else:
            cells.append(cell | {"cell_type": "markdown"})
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4})


def results() -> Iterator[str]:
    """Of each folder what its README says, and its figure."""
    yield "# What is in the records?"
    yield "The folder `results` of the repository holds the numbers behind these pages."
    for readme in sorted(ROOT.glob("results/*/README.md")):
        name, text = readme.parent.name, readme.read_text().removeprefix("# ")
        about = text.removeprefix(name).strip()
        first = " ".join(about.split("\n\n")[0].split())
        title = re.split(r"(?<=[a-zP])[.,:;]\s", first)[0].rstrip(".")
        yield f"## {title} (`{name}`)"
        yield about
        yield f"![{name}](results/{name}/figure.png)"


def released(text: str) -> str:
    """With an installation from an index in place of one from a checkout."""
    text = text.replace("In a checkout of the repository, with", "With")
    text = text.replace("' in this repository", "'").replace("| `.` |", "| `lossguard` |")
    return re.sub(r"(pip install |`)'\.\[([a-z,]+)\]'", r"\1'lossguard[\2]'", text)


def indexed(text: str, address: str, tag: str) -> str:
    """The same, with links and images by absolute addresses."""
    text = re.sub(r"(!\[[^]]*\]\()([^:)]+\))", rf"\1{address}/raw/{tag}/\2", text)
    return released(re.sub(r"(\]\()([^:)]+\))", rf"\1{address}/blob/{tag}/\2", text))


if __name__ == "__main__":
    if sys.argv[1:]:
        name, *where = sys.argv[1:]
        Path(name).write_text(indexed(Path(name).read_text(), *where))
    else:
        gather()

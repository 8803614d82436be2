"""The pages of the site, in ``build/docs``: those of docs/ with what they show of other folders."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"
SHOWN = ("results/*/figure.png", "examples/*.py")


def gather() -> None:
    """Copy them, the changelog, and the figures and examples that they link to."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    shutil.copy(ROOT / "CHANGELOG.md", PAGES / "changelog.md")
    for file in (path for pattern in SHOWN for path in ROOT.glob(pattern)):
        copy = PAGES / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for page in PAGES.glob("*.md"):
        page.write_text(re.sub(r"\]\(\.\./(results|examples)/", r"](\1/", page.read_text()))


if __name__ == "__main__":
    gather()

"""The pages of the site, in ``build/docs``: those of docs/ with what they show of other folders."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"


def gather() -> None:
    """Copy them, the changelog, and the figures that they show."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    shutil.copy(ROOT / "CHANGELOG.md", PAGES / "changelog.md")
    for file in ROOT.glob("results/*/figure.png"):
        copy = PAGES / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for page in PAGES.glob("*.md"):
        page.write_text(page.read_text().replace("](../results/", "](results/"))


if __name__ == "__main__":
    gather()

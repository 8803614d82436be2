"""The site of the documentation builds without a warning, and needs nothing from elsewhere."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("docs", "results", "site", "src", "CHANGELOG.md", "zensical.toml")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("zensical")
    if not (ROOT / "results").is_dir():
        pytest.skip("there are no figures here")
    folder = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part)
        else:
            shutil.copy(ROOT / part, folder)
    for program in (["site/pages.py"], ["-m", "zensical", "build", "--strict", "--clean"]):
        done = subprocess.run(
            [sys.executable, *program], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "griffe: " not in done.stdout + done.stderr
    return folder / "build" / "site"


def test_all_that_it_shows_is_there(site: Path) -> None:
    """Links, images and scripts lead to files of the site, and to places on its pages."""
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    assert len(pages) >= 15
    missing = []
    for page, text in pages.items():
        for tag, link in re.findall(r"<(\w+)[^>]*?\s(?:href|src)=\"([^\"]*)\"", text):
            url = urlsplit(html.unescape(link))
            if url.scheme or url.netloc:
                if tag != "a":
                    missing.append((page, link))
                continue
            base = site if url.path.startswith("/") else page.parent
            target = (base / unquote(url.path).lstrip("/")).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            anchor = f'id="{unquote(url.fragment)}"'
            if not target.exists() or (url.fragment and anchor not in target.read_text()):
                missing.append((page, link))
    assert missing == []


def test_all_records_are_on_it(site: Path) -> None:
    """Each with its figure."""
    text = (site / "results" / "index.html").read_text()
    folders = [path.parent.name for path in (ROOT / "results").glob("*/figure.png")]
    assert len(folders) > 20 and all(f"results/{name}/figure.png" in text for name in folders)


@pytest.mark.parametrize("name", ["gallery", "gallery_torch"])
def test_a_gallery_is_a_notebook_too(site: Path, name: str) -> None:
    """Of the same code, which other tests run."""
    book = json.loads((site / f"{name}.ipynb").read_text())
    code = [cell["source"] for cell in book["cells"] if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert code == [block.strip() for block in re.findall(r"```python\n(.*?)```", page, re.S)]
    assert len(code) >= 4 and f'href="../{name}.ipynb"' in (site / name / "index.html").read_text()


def test_it_says_how_a_release_is_installed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As does the README of a release, whose links lead to the repository."""
    readme, address = tmp_path / "README.md", "https://example.org/lossguard"
    shutil.copy(ROOT / "README.md", readme)
    program = [sys.executable, ROOT / "site" / "pages.py", readme, address, "v1"]
    subprocess.run(program, check=True)
    text = readme.read_text()
    links = re.findall(r"(!?)\[[^][]*\]\(([^)]*)\)", text)
    assert len(links) > 20 and not re.search(r"\]\((?!https://)", text)
    for mark, link in links:
        kind, place = ("raw", "results/") if mark else ("blob", "")
        if link.startswith(address):
            assert link.startswith(f"{address}/{kind}/v1/{place}")
            assert (ROOT / link.partition("/v1/")[2].partition("#")[0]).exists(), link
    assert "pip install '.[torch]'" in (site.parent / "docs" / "index.md").read_text()
    monkeypatch.setenv("GITHUB_REF_TYPE", "tag")
    subprocess.run([sys.executable, "site/pages.py"], check=True, cwd=site.parents[1])
    pages = [readme, *(site.parent / "docs").glob("*.md")]
    told = {page.stem: page.read_text() for page in pages}
    assert [
        name for name, text in told.items() if re.search(r"(pip install |`)'?\.[`\[]", text)
    ] == []
    for name in ("README", "index", "torch", "rewind"):
        assert "'lossguard[torch]'" in told[name]


def test_docstrings_are_on_it(site: Path) -> None:
    """With their examples as code."""
    text = (site / "api" / "index.html").read_text()
    assert 'id="lossguard.rollout"' in text
    assert text.count("&gt;&gt;&gt; ") > 50 and "<blockquote>" not in text


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.stem)
def test_a_page_asks_one_question(page: Path) -> None:
    """In its title; it is short enough to be read, and in the navigation once."""
    text = page.read_text()
    assert re.match(r"# .*\?\n", text) and len(re.findall(r"^# ", text, re.M)) == 1
    assert (ROOT / "zensical.toml").read_text().count(f'"{page.name}"') == 1

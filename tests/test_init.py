"""The public names: listed once, there when asked for, and imported no sooner."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import lossguard


def imported(file: str) -> list[str]:
    """The names that a file of the package imports."""
    body = ast.parse(resources.files("lossguard").joinpath(file).read_text()).body
    return [name.name for node in body if isinstance(node, ast.ImportFrom) for name in node.names]


NAMED_IN_THE_STUB = imported("__init__.pyi")


@pytest.mark.parametrize("name", NAMED_IN_THE_STUB)
def test_every_public_name_is_there_and_documented(name) -> None:
    doc = getattr(lossguard, name).__doc__
    assert doc and not doc.startswith(f"{name}(")  # which named tuples and dataclasses make


def test_the_list_is_the_stub() -> None:
    assert sorted(dir(lossguard)) == sorted(NAMED_IN_THE_STUB)


@pytest.mark.parametrize(
    ("page", "package", "names"),
    [
        ("api.md", "lossguard", NAMED_IN_THE_STUB),
        ("api_torch.md", "lossguard.torch", imported("torch/__init__.py")),
    ],
)
def test_the_documentation_lists_each_name_once(page, package, names) -> None:
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    found = re.findall(rf"^::: {re.escape(package)}\.(\w+)$", text, re.M)
    assert sorted(found) == sorted(names)


def test_version() -> None:
    assert lossguard.__version__ == metadata.version("lossguard")


def test_other_files_name_the_version_of_pyproject() -> None:
    root = Path(__file__).parents[1]
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    latest = re.search(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.M)
    assert latest and latest[1] == version


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("no_such_guard_of_all", ""),
        ("recomended", r" \(did you mean recommended\?\)"),
        ("Rewind", r" \(lossguard.torch has it\)"),
    ],
)
def test_a_name_that_is_not_there(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"^lossguard has no '{name}'{hint}$"):
        getattr(lossguard, name)


@pytest.mark.parametrize("package", ["lossguard", "lossguard.torch"])
def test_importing_a_package_imports_no_other_framework(package: str) -> None:
    """Each takes a second or more, and users of one may not have the other."""
    heavy = {"jax", "torch", "equinox", "optax", "scipy", "polars", "matplotlib", "rich"}
    if package == "lossguard.torch":
        pytest.importorskip("torch")
        heavy.remove("torch")
    program = f"import sys, {package}\nfound = {heavy} & {{*sys.modules}}\nassert not found\n"
    program += "import lossguard; lossguard.torch.Rewind"  # which is imported where it is used
    subprocess.run([sys.executable, "-c", program], check=True)

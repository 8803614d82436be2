"""The public names: listed once, there when asked for, and imported no sooner."""

import ast
import re
import subprocess
import sys
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
    assert name in dir(lossguard)
    assert getattr(lossguard, name).__doc__


def test_the_list_is_the_stub() -> None:
    assert sorted(dir(lossguard)) == sorted(NAMED_IN_THE_STUB)


@pytest.mark.parametrize(
    ("column", "names"), [(1, NAMED_IN_THE_STUB), (2, imported("torch/__init__.py"))]
)
def test_the_documentation_lists_each_name_once(column, names) -> None:
    docs = Path(__file__).parents[1] / "docs"
    lines = (docs / "api.md").read_text().splitlines()
    cells = [line.split("|")[column] for line in lines if line.startswith("|")]
    found = re.findall(r"\[`(\w+)`\]\((.+?)\)", " ".join(cells))
    assert sorted(name for name, _ in found) == sorted(names)
    for name, file in found:
        assert re.search(rf"^(def|class) {name}\b", (docs / file).read_text(), re.MULTILINE)


def test_version() -> None:
    assert lossguard.__version__ == metadata.version("lossguard")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no_such_guard"):
        getattr(lossguard, "no_such_guard")  # noqa: B009


def test_importing_the_package_imports_no_framework() -> None:
    """Each takes a second or more, and users of one may not have the other."""
    program = (
        "import sys, lossguard\n"
        "heavy = {'jax', 'torch', 'equinox', 'optax', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

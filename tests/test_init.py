"""The public names: listed once, there when asked for, and imported no sooner."""

import ast
import subprocess
import sys
from importlib import resources

import pytest

import lossguard

NAMED_IN_THE_STUB = [
    name.name
    for node in ast.parse(resources.files("lossguard").joinpath("__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for name in node.names
]


@pytest.mark.parametrize("name", NAMED_IN_THE_STUB)
def test_every_public_name_is_there_and_documented(name) -> None:
    assert name in dir(lossguard)
    assert getattr(lossguard, name).__doc__


def test_the_list_is_the_stub() -> None:
    assert sorted(dir(lossguard)) == sorted(NAMED_IN_THE_STUB)


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

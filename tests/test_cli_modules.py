"""Recipes in modules of one's own: how a command reads them, and tells what is wrong with them."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from lossguard.command_line import check_beside, find_recipe
from lossguard.config import as_config
from lossguard.experiments import Experiment


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def recipe(:", "invalid syntax"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("x = '\0'", "null bytes"),
        ("x = 1\ny = z\n", "mine.py, line 2)"),
    ],
)
def test_unreadable_module(refused, tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    refused(("run", "mine.py:recipe"), "mine.py:recipe can't be read", reason)


@pytest.mark.parametrize("name", ["json", "sys"])
def test_module_named_like_another_leaves_that_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text("def recipe():\n    return 'mine'\n")
    before = sys.modules[name]
    for _ in range(2):  # the second time it is there already
        assert find_recipe(f"{path}:recipe", {}, "run", str) == ("recipe", "mine")
    assert sys.modules[name] is before
    del sys.modules[str(path)]


def test_a_field_that_there_is_not_is_told_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "misspelt.py"
    path.write_text(
        "from lossguard.experiments import Experiment\n"
        "def recipe():\n    return Experiment(name='mine', datset='moons')\n"
    )
    reason = r"misspelt\.py:recipe gives datset, but there is no such field \(did you mean dataset"
    with pytest.raises(ValueError, match=reason):
        find_recipe(f"{path}:recipe", {}, "run", Experiment)
    path.write_text("def recipe():\n    return dict(int(bases=3))\n")
    del sys.modules["misspelt"]
    with pytest.raises(TypeError, match=r"'bases'"):  # not a recipe's field
        find_recipe(f"{path}:recipe", {}, "run", Experiment)
    del sys.modules["misspelt"]


def test_a_module_with_the_name_of_a_library_does_not_hide_it(tmp_path: Path) -> None:
    """One that isn't loaded yet. What a record says of the module is its file's name."""
    path = tmp_path / "telnetlib3000.py"
    library = tmp_path / "site"
    library.mkdir()
    (library / path.name).write_text("THEIRS = True\n")
    path.write_text("def recipe():\n    return 'mine'\ndef function(): pass\n")
    sys.path.insert(0, str(library))
    try:
        assert find_recipe(f"{path}:recipe", {}, "run", str) == ("recipe", "mine")
        assert importlib.import_module(path.stem).THEIRS
        function = sys.modules[str(path)].function
        assert as_config(Named(function)) == {"function": f"{path.stem}:function"}
    finally:
        sys.path.remove(str(library))
        del sys.modules[str(path)], sys.modules[path.stem]


@dataclasses.dataclass
class Named:
    function: Any


def test_a_recipe_may_define_dataclasses_whatever_its_file_is_called(tmp_path: Path) -> None:
    """Their annotations are looked up by the name of the module."""
    for name in ("json.py", "my.v2.py"):
        (tmp_path / name).write_text(
            "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n"
            "@dataclass\nclass Mine:\n    a: int = 0\n    _: KW_ONLY\n    b: int\n"
            "def recipe(): return str(Mine(b=1))\n"
        )
        found = find_recipe(f"{tmp_path / name}:recipe", {}, "run", str)
        assert found == ("recipe", "Mine(a=0, b=1)")
        del sys.modules[str(tmp_path / name)]


def test_modules_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin.py").write_text(f"def recipe():\n    return {folder!r}\n")
    found = [
        find_recipe(f"{tmp_path / f / 'twin.py'}:recipe", {}, "run", str)
        for f in ("a", "b", "b/../a")
    ]
    assert [recipe for _, recipe in found] == ["a", "b", "a"]
    del sys.modules["twin"], sys.modules[str(tmp_path / "b" / "twin.py")]


def test_module_may_import_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "besides.py").write_text("MINE = 'mine'\n")
    (tmp_path / "importing.py").write_text("import besides\ndef recipe(): return besides.MINE\n")
    found = find_recipe(f"{tmp_path / 'importing.py'}:recipe", {}, "run", str)
    assert found == ("recipe", "mine")
    del sys.modules["besides"], sys.modules["importing"]


def test_two_recipes_cannot_import_modules_of_one_name(refused, tmp_path, monkeypatch) -> None:
    """From different folders: the second would get the first one's. Their own names may be one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "titles.py").write_text(f"TITLE = {folder!r}\n")
        (tmp_path / folder / "twins.py").write_text(
            "import titles\nfrom lossguard.experiments import Experiment\n"
            f"def {folder}():\n    return Experiment({folder!r}, title=titles.TITLE)\n"
        )
    both = "a/twins.py:a", "b/twins.py:b"
    told = f"beside them are {tmp_path}/a/titles.py and {tmp_path}/b/titles.py: run them one by one"
    refused(("sweep", *both), told)
    assert not (tmp_path / "runs").exists()
    check_beside(both[:1])
    (tmp_path / "b" / "titles.py").unlink()
    check_beside(both)
    del sys.modules["titles"], sys.modules["twins"]
    del sys.modules[str((tmp_path / "b" / "twins.py").resolve())]


def test_bug_in_a_users_module_shows_its_traceback(main, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def recipe():\n    return {}['x']\n")
    with pytest.raises(KeyError):
        main("run", "mine.py:recipe")

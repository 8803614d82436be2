"""Recipes in modules of one's own: how a command reads them, and tells what is wrong with them."""

import sys
from pathlib import Path

import pytest

from lossguard.cli.command_line import find_recipe


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


@pytest.mark.parametrize("name", ["json", "sys", "telnetlib3000", "my.v2"])
def test_a_file_with_the_name_of_another_module_is_refused(refused, tmp_path, name: str) -> None:
    """Whether that is loaded already or not; the other one stays what it is."""
    library = tmp_path / "site"
    library.mkdir()
    (library / "telnetlib3000.py").write_text("THEIRS = True\n")
    sys.path.insert(0, str(library))
    path, before = tmp_path / f"{name}.py", sys.modules.get(name)
    path.write_text("def recipe():\n    return 'mine'\n")
    reason = "have no other dots" if "." in name else "be one that no other module has"
    for _ in range(2):
        refused(("run", f"{path}:recipe"), f"can't be imported: its file's name must {reason}\n")
    assert before is None or sys.modules[name] is before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("Experiment(name='mine', datset='moons')", "unexpected keyword argument 'datset'"),
        ("dict(int(bases=3))", "'bases'"),
        ("Experiment()", "missing 1 required positional argument: 'name'"),
    ],
)
def test_arguments_that_there_are_not_are_told_with_their_line(
    refused, tmp_path: Path, code: str, reason: str
) -> None:
    path = tmp_path / "misspelt.py"
    path.write_text(
        f"from lossguard.experiments import Experiment\ndef recipe():\n    return {code}\n"
    )
    refused(("run", f"{path}:recipe"), "misspelt.py:recipe: ", reason, f"({path}, line 3)\n")


@pytest.mark.parametrize("place", ["file", "recipe", "methods"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise KeyError('rate')", "KeyError: 'rate'"),
        ("raise OSError('no disk')", "no disk"),
        ("deeper()", "RecursionError: maximum recursion depth exceeded"),
        ("import sys; sys.exit()", "a recipe must return, but its file calls sys.exit"),
    ],
)
def test_what_a_file_raises_is_a_sentence_with_its_line(
    refused, tmp_path: Path, place: str, code: str, reason: str
) -> None:
    path = tmp_path / "raising.py"
    raising = {name: code if name == place else "pass" for name in ("file", "recipe", "methods")}
    path.write_text(
        "from lossguard.experiments import Experiment\n"
        "def deeper(): deeper()\n"
        f"{raising['file']}\n"
        f"def methods(experiment): {raising['methods']}\n"
        "def recipe():\n"
        f"    {raising['recipe']}\n"
        "    return Experiment('mine', dataset='moons', methods=('a',), make_methods=methods)\n"
    )
    line = {"file": 3, "recipe": 6, "methods": 4}[place]
    line = 2 if "deeper" in code else line
    refused(
        ("run", f"{path}:recipe", "--out", str(tmp_path / "run")), reason, f"{path}, line {line})"
    )


@pytest.mark.usefixtures("own_modules")
def test_two_recipes_of_a_file_share_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "both.py"
    path.write_text("IT = ['mine']\ndef one(): return IT\ndef two(): return IT\n")
    (tmp_path / "a").mkdir()
    (_, one), (_, two) = (
        find_recipe(f"{name}:{function}", {}, "run", list)
        for name, function in ((path, "one"), (tmp_path / "a" / ".." / "both.py", "two"))
    )
    assert one is two


@pytest.mark.usefixtures("own_modules")
def test_module_may_import_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "besides.py").write_text("MINE = 'mine'\n")
    (tmp_path / "importing.py").write_text("import besides\ndef recipe(): return besides.MINE\n")
    found = find_recipe(f"{tmp_path / 'importing.py'}:recipe", {}, "run", str)
    assert found == ("recipe", "mine")


def test_recipes_of_a_sweep_are_of_one_folder(refused, tmp_path) -> None:
    """The second would get the modules of the first, if they have the same names."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "titles.py").write_text(f"TITLE = {folder!r}\n")
        (tmp_path / folder / f"my_{folder}.py").write_text(
            "import titles\nfrom lossguard.experiments import Experiment\n"
            f"def {folder}():\n    return Experiment({folder!r}, title=titles.TITLE)\n"
        )
    both = "a/my_a.py:a", "b/my_b.py:b"
    refused(("sweep", *both), f"files of one folder, got {tmp_path}/a and {tmp_path}/b\n")
    assert not (tmp_path / "runs").exists()

"""Whole files, in places where somebody else has put something."""

import errno
import secrets
from pathlib import Path

import pytest

from lossguard.runs.files import PARTS, write_whole


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that nothing here may change."""
    (tmp_path / "outside").mkdir()
    file = tmp_path / "outside" / "precious"
    file.write_bytes(b"precious")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_a_link_in_its_place_is_replaced(folder: Path, outside: Path) -> None:
    (folder / "figure.png").symlink_to(outside)
    write_whole(folder / "figure.png", b"new", "a figure")
    assert (folder / "figure.png").read_bytes() == b"new"
    assert not (folder / "figure.png").is_symlink()
    assert outside.read_bytes() == b"precious"
    assert [entry.name for entry in folder.iterdir()] == ["figure.png"]


def test_a_link_with_the_name_of_its_part_is_not_followed(folder, outside, monkeypatch) -> None:
    """Even if somebody guesses it."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    (folder / f".{'0' * 16}.part").symlink_to(outside)
    with pytest.raises(OSError, match="can't write a figure: ") as caught:
        write_whole(folder / "figure.png", b"new", "a figure")
    assert caught.value.errno in (errno.EEXIST, errno.ELOOP)
    assert outside.read_bytes() == b"precious"


def test_nobody_can_guess_the_name_of_a_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(self: Path, target: Path) -> Path:
        names.append(self.name)
        return replace(self, target)

    names, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", seen)
    for _ in range(3):
        write_whole(folder / "figure.png", b"new", "a figure")
    assert len({*names}) == 3
    assert all(Path(name).match(PARTS) for name in names)


def test_names_may_be_as_long_as_the_system_allows(folder: Path) -> None:
    write_whole(folder / ("x" * 255), b"new", "a record")
    assert (folder / ("x" * 255)).read_bytes() == b"new"

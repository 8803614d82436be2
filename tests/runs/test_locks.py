"""One process at a time, whatever becomes of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lossguard.runs.locks import LOCK, FolderInUseError, locked

HOLDER = """
import sys
from pathlib import Path
from lossguard.runs.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    program = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                FolderInUseError,
                match=r"^folder must be used by one run at a time, but .* is in use by another "
                "process: wait until that ends, or stop it$",
            ),
            locked(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK).exists()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr("fcntl.flock", none)
    reason = r"can't lock the folder: No locks available: .*lock'$"
    with pytest.raises(OSError, match=reason), locked(tmp_path):
        pass

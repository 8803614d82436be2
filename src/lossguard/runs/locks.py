"""A folder that one process at a time may write to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
"""A file of this name is in the folder from when it is locked first.

It stays when the lock is let go: who deletes it must have left the folder such that others who
then lock it, by this file or by a new one, have nothing to write to it."""


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder; the system lets go of it when the process ends, however it ends.

    Raises:
        FolderInUseError: if another process holds it.
        OSError: if it can't be locked, for example on a disk that knows no locks, or if a link
            stands where the lock belongs.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)), locked(Path(folder)):
    ...     pass
    Traceback (most recent call last):
    lossguard.runs.locks.FolderInUseError: folder must be used by one run at a time, ...
    """
    file = _lock(folder / LOCK)
    try:
        yield
    finally:
        os.close(file)


def _lock(path: Path) -> int:
    """The descriptor of the file, locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise FolderInUseError(
            f"folder must be used by one run at a time, but {path.parent} is in use by another "
            "process: wait until that ends, or stop it"
        ) from error
    except OSError as error:
        os.close(file)
        raise OSError(error.errno, f"can't lock the folder: {error.strerror}", str(path)) from error
    return file

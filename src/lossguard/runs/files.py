"""Files that are whole or not there."""

import contextlib
import os
import secrets
from pathlib import Path

EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
"""A new file, never one that is there already or that a link leads to."""
PARTS = f".{'[0-9a-f]' * 16}.part"
"""The names of files that aren't whole yet, for a glob: a process that is killed leaves one."""


def write_whole(path: Path, content: bytes, what: str, *, make_folder: bool = False) -> None:
    """Write a new file beside the target, then rename it: nobody ever sees half a file.

    The new file has a name that nobody can guess, and a link in the target's place is replaced: so
    nothing is written where a link leads.

    Raises:
        OSError: if ``what`` can't be written, for example on a full disk; an old file is left.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, EXCLUSIVE, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"can't write {what}: {reason}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)

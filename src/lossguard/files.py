"""Files that are whole or not there."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes, what: str, *, make_folder: bool = False) -> None:
    """Write beside the target, then rename: nobody ever sees half a file.

    Raises:
        OSError: if ``what`` can't be written, for example on a full disk; an old file is left.
    """
    part = part_of(path)
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
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


def part_of(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.part")

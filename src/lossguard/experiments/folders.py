"""Which finished runs there are in some folders."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..progress import Progress
from ..records import CONFIG, MANIFEST, Record, read_run
from .sweep import FAILED


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Finished runs, each named or in a named folder of runs.

    Returns:
        Their folders; and those in a folder of runs that are not finished, with the reason of the
        ones that failed (else "").

    Raises:
        ValueError: if a named folder holds neither a finished run nor folders of runs, or none of
            all is finished.
    """
    finished, others = [], {}
    for folder in folders:
        inside = [] if (folder / CONFIG).exists() else sorted(folder.glob(f"*/{CONFIG}"))
        if not inside:
            read_run(folder)  # says what is missing
            finished.append(folder)
        for run in (config.parent for config in inside):
            if (run / MANIFEST).exists():
                finished.append(run)
            else:
                failed = run / FAILED
                others[run] = json.loads(failed.read_text())["reason"] if failed.exists() else ""
    if not finished:
        raise ValueError(f"no run in {', '.join(map(str, folders))} is finished")
    return finished, others


def read_runs(folders: Sequence[Path]) -> dict[Path, Record]:
    """The records of finished runs, by their folders.

    Raises:
        ValueError: if a folder holds no finished run, or a file of it is damaged.
    """
    found, total = {}, len(folders)
    with Progress("reading", total=total, unit="runs", first=f"{total} runs") as progress:
        for folder in folders:
            found[folder] = read_run(folder)
            progress.advance(1)
    return found

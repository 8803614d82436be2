"""The records of the finished runs in some folders."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from ..progress import Progress
from ..records import CONFIG, MANIFEST, Record, read_json, read_run
from ..run_folder import FAILED


def read_runs(folders: Sequence[Path]) -> tuple[dict[Path, Record], list[str]]:
    """The records of finished runs, each named or in a named folder of runs.

    Returns:
        Records, by the folder of the run; and why others in a folder of runs have none: a sentence
        for each that is not finished, damaged, or a link, in whose place nothing is drawn.

    Raises:
        ValueError: if there is none, or a named folder doesn't exist, or holds neither a finished
            run nor folders of runs, or a file of it is damaged, or no run can be read.
    """
    if not folders:
        raise ValueError("name the folder of a run, or several")
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"there is no folder {folder}")
    inside = {folder: _runs_in(folder) for folder in folders}
    found = {folder: read_run(folder) for folder, runs in inside.items() if not runs}
    others, total = [], sum(map(len, inside.values()))
    first = f"{total} runs" if total else ""
    with Progress("reading", total=total, unit="runs", first=first) as progress:
        for run in itertools.chain.from_iterable(inside.values()):
            try:
                if run.is_symlink():
                    raise ValueError(f"{run} is a link: name the folder that it leads to")
                if not (run / MANIFEST).exists():
                    raise ValueError(_unfinished(run))
                found[run] = read_run(run)
            except ValueError as error:
                others.append(str(error))
            progress.advance(1)
    if not found:
        told = "; ".join([f"no run in {', '.join(map(str, folders))} can be read", *others])
        raise ValueError(told)
    as_given = (run for folder, runs in inside.items() for run in runs or [folder])
    return {run: found[run] for run in as_given if run in found}, others


def _runs_in(folder: Path) -> list[Path]:
    """The folders of runs in a folder that isn't one itself."""
    if (folder / CONFIG).exists():
        return []
    return [config.parent for config in sorted(folder.glob(f"*/{CONFIG}"))]


def _unfinished(run: Path) -> str:
    told, failed = f"{run} is not finished", run / FAILED
    return f"{told}: {read_json(failed).get('reason', 'it failed')}" if failed.exists() else told

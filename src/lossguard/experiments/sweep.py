"""Several experiments one after another, or spread over a Ray cluster; failures are recorded.

Each goes into a folder of its own, named after its recipe. The same sweep again goes on where it
stopped: what is complete is skipped, what is half done is resumed, what failed is tried again.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..runs.config import as_config
from ..runs.folder import check_folder, is_finished
from ..runs.locks import FolderInUseError
from ..runs.records import FAILED, write_json
from .experiment import Experiment
from .run import check, run


class Outcome(NamedTuple):
    """What became of one experiment of a sweep."""

    name: str
    """Of its recipe."""
    folder: Path
    state: Literal["skipped", "complete", "failed"]
    reason: str = ""
    """Of a failure: one line."""


def sweep(
    experiments: Mapping[str, Experiment], out: Path, *, ray: str | None = None
) -> Iterator[Outcome]:
    """Run the experiments; yields what became of each as soon as it is known.

    One that fails leaves ``failed.json`` (``reason``, ``traceback``) in its folder, and the others
    go on.

    Args:
        experiments: by the names that their folders get.
        out: the folder for these folders. All machines of a cluster must see it, and the modules
            of recipes of the user's own, under the same paths.
        ray: address of a Ray cluster as ``ray.init`` takes it ("auto", "local", "ray://..."); None
            runs them here, one after another.

    Raises:
        ValueError: before anything is run, as ``check`` and ``check_folder``, or if a folder is a
            link, or Ray is asked for and not installed.
    """
    folders = {name: (out / name).absolute() for name in experiments}
    for name, experiment in experiments.items():
        check(experiment)
        if folders[name].is_symlink():
            raise ValueError(f"folder must be no link in a sweep, but {folders[name]} is one")
        check_folder(folders[name], as_config(experiment), resume=True)
    spread = _one_after_another if ray is None else _on_ray(ray)

    left: dict[str, tuple[Experiment, Path]] = {}
    for name, experiment in experiments.items():
        if is_finished(folders[name]):
            yield Outcome(name, out / name, "skipped")
        else:
            left[name] = experiment, folders[name]
    for name, reason in spread(left):
        yield Outcome(name, out / name, "failed" if reason else "complete", reason)


Runs = Mapping[str, tuple[Experiment, Path]]
Reasons = Iterator[tuple[str, str]]
"""Name, and why it failed: empty if it did not."""


def _one_after_another(runs: Runs) -> Reasons:
    for name, (experiment, folder) in runs.items():
        yield name, attempt(experiment, folder)


def attempt(experiment: Experiment, folder: Path) -> str:
    """Run or resume one experiment; returns why it failed, or nothing, and records that.

    In a folder that another process holds it leaves nothing.
    """
    try:
        run(experiment, folder, resume=True)
    except FolderInUseError as error:
        return str(error)
    except Exception as error:
        return _failed(folder, error)
    return ""


def _failed(folder: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = "".join(traceback.format_exception(error))
    with suppress(OSError):  # which may be the reason
        write_json(folder / FAILED, {"reason": reason, "traceback": lines})
    return reason


def _on_ray(address: str) -> Callable[[Runs], Reasons]:
    """The same on a cluster, one task an experiment, in the order in which they end.

    A task takes a GPU if the cluster has any. One whose machine is lost is resumed by Ray on
    another.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("ray needs a package: pip install 'lossguard[ray]'") from error

    def attempt_there(experiment: Experiment, folder: Path, command: list[str]) -> str:
        sys.argv = command  # for the manifest
        return attempt(experiment, folder)

    def spread(runs: Runs) -> Reasons:
        found = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}}
        with ray.init(address=address, runtime_env=found, log_to_driver=False):
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
            task = ray.remote(num_gpus=gpus)(attempt_there)
            waiting: dict[Any, str] = {}
            for name, (experiment, folder) in runs.items():
                waiting[task.remote(experiment, folder, sys.argv)] = name
            while waiting:
                (done, *_), _ = ray.wait(list(waiting))
                name = waiting.pop(done)
                try:
                    yield name, ray.get(done)
                except RayError as error:  # its worker died, again and again
                    yield name, _failed(runs[name][1], error)

    return spread

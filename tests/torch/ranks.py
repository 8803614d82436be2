"""Runs a function in several processes that talk by gloo."""

import datetime
import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed


def spawn(scenario: str, size: int, folder: Path, timeout: float = 1800.0) -> list[int]:
    """Run ``scenario``, a module and its function, on every rank; return the exit statuses.

    One process imports everything once, and the ranks are forked from it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    code = f"import ranks; ranks.launch({scenario!r}, {size}, {str(folder)!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
            raise
    return [int(status) for status in said.split()[-size:]]


def launch(scenario: str, size: int, folder: str) -> None:
    """Fork the ranks, wait for each, and print their exit statuses."""
    module, name = scenario.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    torch.set_num_threads(1)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(function, rank, folder)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*statuses)


def run(scenario, rank: int, folder: str) -> None:
    """One rank."""
    os.environ["RANK"] = str(rank)
    torch.manual_seed(0)
    wait = float(os.environ.get("RANKS_TIMEOUT", "600"))
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=wait))
    try:
        torch.save(scenario(rank), Path(folder) / f"{rank}.pt")
        distributed.destroy_process_group()
    except Exception as error:
        Path(folder, f"{rank}.error").write_text(str(error))
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        raise

"""Runs functions and scripts in new processes, several of them joined by gloo, and reads what they have found.

Each is forked from one process that has imported everything and computed nothing: an import of torch and Lightning
takes longer than most of what they run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import TCPStore

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
SECONDS = 240
GRACE = 20
IMPORTED = ("killed", "torch.distributed.fsdp", "torchmetrics.classification")


@cache
def server() -> Any:
    """What processes are forked from: one for all tests of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    # By the environment: a server of Python 3.11 has not its parent's path, and says nothing of what it can't import.
    path = os.pathsep.join([str(ROOT), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


def started(target: Callable[..., Any], *args: Any) -> Any:
    """A process that calls this."""
    process = server().Process(target=target, args=args)
    process.start()
    return process


def ended(*processes: Any) -> list[int | None]:
    """Their exit codes. Once one has failed the others are not waited for much longer."""
    until = time.monotonic() + SECONDS
    while running := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + GRACE)
        if not connection.wait([process.sentinel for process in running], until - time.monotonic()):
            for process in running:
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def launched(script: str, processes: int, folder: Path) -> SimpleNamespace:
    """Run ``script folder`` in so many processes: what each rank has saved as ``folder/rank.pt``, and how it ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    joined = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    codes = ended(*(started(_run, script, folder, rank, joined) for rank in range(processes)))
    stderr = "".join((folder / f"{rank}.stderr").read_text() for rank in range(processes))
    found = [folder / f"{rank}.pt" for rank in range(processes)]
    assert all(path.exists() for path in found), stderr[-5000:]
    ranks = [torch.load(path, weights_only=True) for path in found]
    return SimpleNamespace(ranks=ranks, codes=codes, stderr=stderr, folder=folder)


def _run(script: str, folder: Path, rank: int, joined: dict[str, str]) -> None:
    """As ``python -m torch.distributed.run`` would, which starts each process anew."""
    with (folder / f"{rank}.stderr").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    os.environ |= {**joined, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    run_script(SUPPORT / script, str(folder))


def run_script(path: Path, *options: str) -> None:
    """As ``python path options``."""
    sys.argv = [str(path), *options]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


@contextmanager
def one_thread():
    """As the processes: sums in another order would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def assert_same_records(found: dict, alone: dict) -> None:
    """That records made in several processes are those of one, bit by bit."""
    for name, record in found.items():
        for key in ("cutoff", "accuracy", "subnetwork_accuracy", "samples", "evaluations", "cuts", "notes", "head"):
            assert record[key] == alone[name][key], (name, key)
        for layer, mask in alone[name]["relevant"].items():
            assert torch.equal(record["relevant"][layer], mask), name
            assert torch.equal(record["relevance"][layer], alone[name]["relevance"][layer]), name
        for key, value in alone[name]["fitted"].items():
            assert torch.equal(record["fitted"][key], value), (name, key)
        for key, value in alone[name]["norm_statistics"].items():
            assert value.dtype == torch.int64 or torch.equal(record["norm_statistics"][key], value), (name, key)
        assert record["conservation"] == pytest.approx(alone[name]["conservation"])

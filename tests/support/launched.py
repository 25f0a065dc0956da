"""Starts a script of this folder in several gloo processes, and reads what each of them has found."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
SECONDS = 240


def launched(script: str, processes: int, folder: Path) -> SimpleNamespace:
    """Run ``script folder`` in so many processes: what each rank has saved as ``folder/rank.pt``, and how it ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), str(SUPPORT / script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = [folder / f"{rank}.pt" for rank in range(processes)]
    assert all(path.exists() for path in found), ended.stderr[-5000:]
    ranks = [torch.load(path, weights_only=True) for path in found]
    return SimpleNamespace(ranks=ranks, ended=ended, folder=folder)


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
    """That records made in several processes are those of one: bit by bit but for sums over norms' statistics."""
    for name, record in found.items():
        for key in ("cutoff", "accuracy", "subnetwork_accuracy", "samples", "evaluations", "cuts", "notes", "head"):
            assert record[key] == alone[name][key], (name, key)
        for layer, mask in alone[name]["relevant"].items():
            assert torch.equal(record["relevant"][layer], mask), name
            assert torch.equal(record["relevance"][layer], alone[name]["relevance"][layer]), name
        assert record["conservation"] == pytest.approx(alone[name]["conservation"])
        for key, value in alone[name]["norm_statistics"].items():
            assert value.dtype == torch.int64 or torch.allclose(record["norm_statistics"][key], value), (name, key)

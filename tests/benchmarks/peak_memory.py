"""How much memory tensors take at once: above what was there before, and apart before and after a mark."""

from __future__ import annotations

import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path
from threading import Event, Thread

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "the mark"


class PeakMemory:
    """A context. On a CPU torch's profiler counts, which takes time: measure times apart.

    Args:
        device: whose memory.
        resident: on a CPU, look at the process's resident memory all the time, every hundredth of a second: a
            profiler's events of a network of 10⁹ weights take more memory than the network.

    Attributes:
        before: bytes, the peak until the last call of `mark`.
        after: the peak from there on.
        by: what counts.
    """

    before = after = 0

    def __init__(self, device: torch.device, *, resident: bool = False) -> None:
        self.device = device
        on_cpu = "the process's resident memory" if resident else "torch's profiler"
        self.by = "the allocator" if device.type == "cuda" else on_cpu
        self.looking = _Looking() if resident and device.type != "cuda" else None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        elif self.looking:
            self.looking.start()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self.profile.__enter__()
        return self

    def mark(self) -> None:
        """Tell apart what comes from here on."""
        if self.device.type == "cuda":
            self.before = max(self.before, self._peak_of_gpu())
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.looking:
            self.before = max(self.before, self.looking.most())
        else:
            with record_function(MARK):
                pass

    def __exit__(self, *args: object) -> None:
        if self.device.type == "cuda":
            self.after = self._peak_of_gpu()
            return
        if self.looking:
            self.after = self.looking.most()
            self.looking.stop()
            return
        self.profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        del self.profile
        marked = max((event["ts"] for event in events if event["name"] == MARK), default=0.0)
        # What was there before is let go unseen, so the sum starts at 0 and counts what was made in here only.
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        alive = list(zip((when for when, _ in changes), accumulate(size for _, size in changes), strict=True))
        self.before = max((size for when, size in alive if when <= marked), default=0)
        self.after = max((size for when, size in alive if when > marked), default=0)

    def _peak_of_gpu(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.start


class _Looking:
    """A thread that looks at the resident memory of its process (Linux), above what it was at the start."""

    def start(self) -> None:
        self.first = self.largest = _resident()
        self.ended = Event()
        self.thread = Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(0.01):
            self.largest = max(self.largest, _resident())

    def most(self) -> int:
        """Since the start, or since this was asked before."""
        most, self.largest = max(self.largest, _resident()) - self.first, _resident()
        return most

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

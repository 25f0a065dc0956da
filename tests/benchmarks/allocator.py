"""The environment in which times on a CPU can be compared; a process has it from its start or not at all."""

from __future__ import annotations

import os
import sys

SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "OMP_NUM_THREADS": "1",
}

REASON = (
    "By default glibc's malloc gives large blocks back to the system and faults them in anew, now and then, depending "
    "on whatever else is allocated: that alone moves a step of the MLP by 15 % in either direction. With these "
    "settings it keeps them. One thread, so that no other process is waited for."
)


def restart_with_settings() -> None:
    """Run the same command again with those of `SETTINGS` that are not set; return if all are."""
    if SETTINGS.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], SETTINGS | os.environ)


def settings() -> dict[str, str | None]:
    """What is set."""
    return {name: os.environ.get(name) for name in SETTINGS}

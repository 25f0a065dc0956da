"""Processes of tests cost what they run, and one that hangs is not waited for."""

from __future__ import annotations

import signal

import launched
from launched import IMPORTED, ended, started


def test_a_new_process_has_imported_everything_before_it_begins():
    assert ended(started(exec, f"import sys; assert {{*{IMPORTED!r}}} <= {{*sys.modules}}")) == [0]


def test_once_one_has_failed_the_others_are_not_waited_for_much_longer(monkeypatch):
    monkeypatch.setattr(launched, "GRACE", 0.1)
    hanging = started(exec, "import time; time.sleep(600)")
    assert ended(started(exec, "raise SystemExit(3)"), hanging) == [3, -signal.SIGKILL]

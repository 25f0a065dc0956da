"""Where the time of a task's end goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch

REST = "rest"

METHODS = {
    "attribution": ("lightning_rnf.tasks.selection:Selection.attribute",),
    "statistics": ("lightning_rnf.tasks.reference:ReferenceData.run",),
    "heads": ("lightning_rnf.tasks.fitting:Fitting.fit",),
    "rows": ("lightning_rnf.tasks.refitting:Refitting.look", "lightning_rnf.tasks.refitting:Refitting._fit"),
    "measuring": ("lightning_rnf.tasks.reference:ReferenceData.measure",),
    "audit": ("lightning_rnf.tasks.ending:Ending._audit",),
}


class TimeSplit:
    """A context, also several times. Time in a method that another one has called is counted for the inner one only.

    Attributes:
        seconds: by part, those of `METHODS` and `REST`; one whose methods the package has not is left out. In all they
            are the time inside the context.
    """

    def __init__(self) -> None:
        self.seconds = {REST: 0.0}
        self.part = REST

    def __enter__(self) -> TimeSplit:
        with ExitStack() as stack:
            for part, methods in METHODS.items():
                for method in methods:
                    # The package may be of another build, by `run.py --against`.
                    with suppress(ImportError, AttributeError):
                        function = resolve_name(method)
                        owner, _, name = method.rpartition(".")
                        stack.enter_context(patch.object(resolve_name(owner), name, self._timed(part, function)))
                        self.seconds.setdefault(part, 0.0)
            self.undo = stack.pop_all()
        self.since = time.perf_counter()
        return self

    def __exit__(self, *args: object) -> None:
        self._go_on(REST)
        self.undo.close()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._go_on(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._go_on(before)

        return timed

    def _go_on(self, part: str) -> str:
        """What comes from here on is for this part; returns the one before."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.since, before, self.part = now, self.part, part
        return before

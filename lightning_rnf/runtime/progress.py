"""How far attribution and search have come, as one more bar of Lightning's own progress bar."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_rnf.packages import Tqdm, Trainer, callbacks, either

Show = Callable[[str, int, int, str], None]
"""Called with what is done, how many steps of it are done, of about how many, and more in words."""


def silent(what: str, done: int, total: int, more: str) -> None:
    """Show nothing."""


@contextmanager
def shown(trainer: Trainer) -> Iterator[Show]:
    """Inside the context steps are shown where the Trainer shows its own; in rank 0, and nowhere if it shows none."""
    bar: Any = trainer.progress_bar_callback
    shows = trainer.is_global_zero and getattr(bar, "is_enabled", False)
    if shows and isinstance(bar, either(callbacks.RichProgressBar)) and bar.progress is not None:
        view: _Rich | _Tqdm = _Rich(bar)
    elif shows and isinstance(bar, either(callbacks.TQDMProgressBar)):
        view = _Tqdm(bar)
    else:
        yield silent
        return
    try:
        yield view.show
    finally:
        view.close()


class _Tqdm:
    """A bar under the training's."""

    def __init__(self, bar: callbacks.TQDMProgressBar) -> None:
        self.owner = bar
        self.what = ""
        self.bar: Any = None

    def show(self, what: str, done: int, total: int, more: str) -> None:
        if what != self.what:
            self.close()
            self.what = what
            self.bar = Tqdm(
                desc=what,
                total=total,
                position=2 * self.owner.process_position + 1,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format=self.owner.BAR_FORMAT,
            )
        self.bar.total = max(total, done)
        self.bar.n = done
        self.bar.set_postfix_str(more, refresh=False)
        self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Rich:
    """A task of the bar's live display: it is hidden at its end, as Lightning finds its own by their places."""

    def __init__(self, bar: callbacks.RichProgressBar) -> None:
        self.owner = bar
        self.what = ""
        self.task: Any = None

    def show(self, what: str, done: int, total: int, more: str) -> None:
        assert self.owner.progress is not None
        if what != self.what:
            self.close()
            self.what = what
            self.task = self.owner.progress.add_task(what, total=total)
        # The column of descriptions is as wide as the longest line in it, and every bar gets what is left.
        told = textwrap.fill(f"{what}: {more}" if more else what, max(self.owner.progress.console.width // 4, 20))
        self.owner.progress.update(self.task, completed=done, total=max(total, done), description=told)
        self.owner.refresh(hard=True)

    def close(self) -> None:
        if self.task is not None and self.owner.progress is not None:
            self.owner.progress.update(self.task, visible=False)
            self.owner.refresh(hard=True)
        self.task = None

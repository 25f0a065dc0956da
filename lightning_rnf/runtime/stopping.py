"""A fit that is asked to end (SIGTERM) in the middle of a task's end, which takes longer than a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_rnf.packages import SIGTERMException, Trainer, like
from lightning_rnf.runtime.progress import Show, shown


@contextmanager
def steps(trainer: Trainer) -> Iterator[Show]:
    """Inside the context steps are shown, see `shown`, and after each of them the fit ends if SIGTERM has come.

    Lightning's handler notes the signal, its loops look at the note after a batch and an epoch, and nobody does once
    the last epoch is over: the search would go on until the machine is taken away, and the fit be called finished
    (Lightning 2.6.6). Of several processes each would end at another step and let the others wait, so they go on.

    Raises:
        SIGTERMException: in the step, a ``SystemExit``, as Lightning's loops raise it. What the task's end has begun
            is not there afterwards, and a resumed fit makes it anew.
    """
    with shown(trainer) as show:

        def step(what: str, done: int, total: int, more: str) -> None:
            show(what, done, total, more)
            if trainer.received_sigterm and trainer.world_size == 1:
                raise like(SIGTERMException, trainer.lightning_module)

        yield step

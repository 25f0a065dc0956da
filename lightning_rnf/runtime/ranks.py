"""Several processes (ranks) with a share of the data each, and one result: what they tell each other on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_MISSING: Any = object()

# What a failure is raised as in the other ranks: the first of these that it is, so that whoever catches it, catches it
# in all of them.
_KINDS = (KeyError, IndexError, AttributeError, TypeError, ValueError, FileNotFoundError, OSError, RuntimeError)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them; alone, all verbs are free of charge.

    Every rank has to call the same verbs in the same order, and none inside of another one's work. Work that may fail
    in one rank only (on its share of the data) goes through `agreed`, `each` or `decided`: its exception ends all
    ranks, where a rank that just stopped would leave the others waiting.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gather(self, value: T) -> list[T]:
        """What each rank has to say, by rank. Tensors should be on the CPU: they are pickled."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def agreed(self, work: Callable[[], T]) -> T:
        """Let each rank do its work, and go on with its own result if no rank has failed.

        Raises:
            Exception: what the work raised in this rank; or one of the nearest built-in type, with the first failed
                rank's message and number.
        """
        if self.size == 1:
            return work()
        failure: Exception | None = None
        result: T = _MISSING
        try:
            result = work()
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else (_kind(failure), f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, found in enumerate(failures):
            if found is not None:
                raise found[0](f"process {rank} of {self.size} has failed: {found[1]}")
        return result

    def each(self, work: Callable[[], T]) -> list[T]:
        """What each rank's work gives, by rank.

        Raises:
            Exception: as `agreed`.
        """
        return self.gather(self.agreed(work))

    def decided(self, work: Callable[[], T]) -> T:
        """What rank 0's work gives; the others do none.

        Raises:
            Exception: as `agreed`.
        """
        return self.each(lambda: work() if self.rank == 0 else _nothing())[0]

    def share(self, items: Sequence[T], before: int = 0) -> list[T]:
        """Every ``size``-th of the items, another share for each rank: no item twice, none left out.

        Args:
            items: the same in all ranks; if they are fewer than ranks, some get none.
            before: how many items were dealt before these.
        """
        return list(items[(self.rank - before) % self.size :: self.size])


ALONE = Ranks()
"""One process."""


def joined(shares: Iterable[Sequence[T]]) -> list[T]:
    """The items of `Ranks.share` in their old order.

    >>> joined(Ranks(rank, 3).share("abcdefg") for rank in range(3))
    ['a', 'b', 'c', 'd', 'e', 'f', 'g']
    """
    rounds = zip_longest(*shares, fillvalue=_MISSING)
    return [item for dealt in rounds for item in dealt if item is not _MISSING]


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in type(error).__mro__ if kind in _KINDS), RuntimeError)


def _nothing() -> Any:
    return None

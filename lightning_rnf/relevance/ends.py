"""Where relevance ends: at what the network reads, found in the graph of its forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Ends:
    """Where relevance ends in a batch: leaves that layers read, themselves or through what the forward made of them.

    What layers in between read is no end: what arrives there would be kept until the backward is over.

    Attributes:
        found: the leaves, in the order in which they were met.
    """

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self._seen: set[Any] = set()

    def clear(self) -> None:
        """Before a batch, and after it: what has been seen of the graph is held."""
        self.found.clear()
        self._seen.clear()

    def note(self, read: Tensor) -> None:
        """What a layer reads, of the graph."""
        pending = [read.grad_fn]
        if read.is_leaf:
            self._add(read)
        while pending:
            node: Any = pending.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):  # of a graph of the user's own
                self._add(leaf)
            pending.extend(following for following, _ in node.next_functions)
        if not self.found:
            self._add(read)

    def _add(self, leaf: Tensor) -> None:
        if not any(one is leaf for one in self.found):
            self.found.append(leaf)

"""What a search need not compute again: layers that read the same in every candidate sub-network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.freezing import can_choose_rows

FEWEST_WEIGHTS = 256
"""Of a row: with fewer, copying the output takes about as long as working it out (measured on a CPU)."""

MOST_MISSES = 1
"""Norms of the whole network differ from those of all candidates: an input may change once."""


class Prefix:
    """Outputs of the layers that no candidate touches, as long as their inputs are the same bits.

    No graph has to be known: whatever lies before a layer, if nothing of it has changed then its input is the same.
    A layer whose input goes on changing lies behind one that candidates do touch, and is given up. Zeros of either sign
    count as the same.

    Args:
        module: the model, whose weights stay as they are meanwhile.
        layers: names of those whose units are silent in no candidate. Others would not be the same bits as in recall,
            which computes their relevant rows alone.
        limit: of what is kept, in bytes; the rest is worked out anew.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str], limit: int = 2**28) -> None:
        self._layers = {name: module.get_submodule(name) for name in layers}
        self._layers = {name: layer for name, layer in self._layers.items() if _pays(layer)}
        self._known: dict[tuple[str, str, int], tuple[Tensor, Tensor]] = {}
        self._misses: Counter[tuple[str, str, int]] = Counter()
        self._room = limit
        self.hits: Counter[str] = Counter()
        """How often each layer was spared."""

    @contextmanager
    def spared(self, walk: str) -> Iterator[None]:
        """Inside the context, without gradients, a layer whose input is that of the last such walk gives its output.

        Args:
            walk: names the batches that go through, always from the first on.
        """
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                if "forward" not in vars(layer):  # nobody's own
                    layer.forward = self._sparing(name, layer, walk)
                    stack.callback(layer.__dict__.pop, "forward")
            yield

    def _sparing(self, name: str, layer: nn.Module, walk: str) -> Any:
        compute = layer.forward
        calls = 0

        def forward(input: Tensor) -> Tensor:
            nonlocal calls
            key, calls = (name, walk, calls), calls + 1
            if torch.is_grad_enabled() or input.is_inference():
                return compute(input)  # type: ignore[no-any-return]
            known = self._known.pop(key, None)
            if known is not None:
                if _same(known[0], input):
                    self._known[key] = known
                    self.hits[name] += 1
                    return known[1].clone()  # what follows may write to it
                self._room += _size(known)
                self._misses[key] += 1
            output: Tensor = compute(input)
            if self._misses[key] <= MOST_MISSES and self._room >= _size((input, output)):
                copies = input.clone(), output.clone()
                if copies[0].stride() == input.stride():  # not of a part of something larger
                    self._known[key] = copies
                    self._room -= _size(copies)
            return output

        return forward


def _pays(layer: Any) -> bool:
    if not can_choose_rows(layer):
        return False
    weight: Tensor = layer.weight
    return weight.device.type == "cpu" and weight[0].numel() >= FEWEST_WEIGHTS  # elsewhere it was not measured


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


def _size(tensors: tuple[Tensor, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)

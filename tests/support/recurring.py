"""Networks around recurrent layers, and sequences to try them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

FEATURES, HIDDEN, STEPS, SAMPLES, CLASSES = 3, 4, 5, 6, 3
KINDS: tuple[type[nn.RNNBase], ...] = (nn.LSTM, nn.GRU, nn.RNN)


FORMS: list[dict[str, Any]] = [
    *(
        {"batch_first": batch_first, "num_layers": layers, "bidirectional": bidirectional}
        for batch_first in (True, False)
        for layers in (1, 2)
        for bidirectional in (False, True)
    ),
    {"bias": False, "batch_first": True},
]
"""Options of a recurrent layer: both orders of the batch, one and two layers, one and two directions, no biases."""


def made(kind: type[nn.RNNBase], seed: int = 0, **options: Any) -> Any:
    """A layer in double precision."""
    torch.manual_seed(seed)
    return kind(FEATURES, HIDDEN, **options).double().eval()


def sequences(*, batch_first: bool = True, seed: int = 0) -> Tensor:
    """``(N, T, features)`` or ``(T, N, features)``."""
    x = torch.randn(SAMPLES, STEPS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x if batch_first else x.transpose(0, 1)


def packed(x: Tensor, *, batch_first: bool, ordered: bool) -> PackedSequence:
    """Sequences of one to `STEPS` steps."""
    lengths = torch.tensor([5, 5, 4, 2, 1, 1]) if ordered else torch.tensor([1, 5, 2, 1, 5, 4])
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=ordered)


def states(layer: Any, seed: int = 1) -> Any:
    """An initial state that is not zero."""
    cells = layer.num_layers * (1 + layer.bidirectional)
    generator = torch.Generator().manual_seed(seed)
    h, c = torch.randn(2, cells, SAMPLES, layer.hidden_size, dtype=torch.float64, generator=generator)
    return (h, c) if isinstance(layer, nn.LSTM) else h


class Tagger(nn.Module):
    """A classifier of sequences: layers around a recurrent one of which it reads the output and the last state."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        width = HIDDEN * (1 + bool(options.get("bidirectional")))
        self.before = nn.Linear(FEATURES, 5)
        self.memory = kind(5, HIDDEN, **options)
        self.behind = nn.Linear(width, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        output, last = self.memory(self.before(x).relu(), state)
        last = last[0] if isinstance(last, tuple) else last
        pooled = output.mean(1 if self.memory.batch_first else 0)
        return self.head(self.behind(pooled + last[-1].repeat(1, pooled.shape[1] // HIDDEN)).relu())


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences in single precision, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(SAMPLES, STEPS, FEATURES, generator=generator),
        torch.randint(CLASSES, (SAMPLES,), generator=generator),
    )

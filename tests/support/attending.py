"""Networks around torch's attention, and the same ones written with linear layers: what a test compares them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEATURES, WIDTH, HEADS, LENGTH, OTHER, SAMPLES, CLASSES = 3, 8, 2, 5, 7, 6, 3

FORMS: dict[str, dict[str, Any]] = {
    "packed": {},
    "positions first": {"batch_first": False},
    "three weights": {"kdim": 5, "vdim": 4},
    "zeros to look at": {"add_zero_attn": True},
    "no biases": {"bias": False},
}
"""Options of the module."""


def module(seed: int = 0, **options: Any) -> Any:
    """In double precision, with biases that are not zero."""
    torch.manual_seed(seed)
    made = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}).double().eval()
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return made


def padding() -> Tensor:
    """``(N, OTHER)``: True is not looked at."""
    return torch.arange(OTHER) >= torch.tensor([7, 6, 2, 7, 1, 5])[:, None]


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "added": {"attn_mask": torch.linspace(-1, 1, LENGTH * OTHER, dtype=torch.float64).view(LENGTH, OTHER)},
    "both": {"key_padding_mask": padding(), "attn_mask": (torch.arange(OTHER) == 1).expand(LENGTH, OTHER)},
    "of heads": {"attn_mask": torch.randn(SAMPLES * HEADS, LENGTH, OTHER).double(), "key_padding_mask": padding()},
}
"""What may be looked at."""


def inputs(made: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What reads and what is read, as the module takes them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((LENGTH, WIDTH), (OTHER, made.kdim), (OTHER, made.vdim))
    query, key, value = (torch.randn(SAMPLES, *size, dtype=torch.float64, generator=generator) for size in sizes)
    if made.batch_first:
        return query, key, value
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


class Tagger(nn.Module):
    """A classifier of sequences that looks at them from elsewhere: cross-attention between linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(FEATURES, WIDTH)
        self.beside = nn.Linear(FEATURES, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
        self.behind = nn.Linear(WIDTH, 6)
        self.head = nn.Linear(6, CLASSES)

    def attend(self, x: Tensor, other: Tensor) -> Tensor:
        if self.attention.batch_first:
            return self.attention(x, other, other)[0]
        x, other = x.transpose(0, 1), other.transpose(0, 1)
        return self.attention(x, other, other, need_weights=False)[0].transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        said = self.attend(self.before(x).relu(), self.beside(x[:, 1:]).relu())
        return self.head(self.behind(said.mean(1)).relu())


class Written(Tagger):
    """The same network, with a linear layer for each part of the attention of another."""

    def __init__(self, other: Tagger) -> None:
        super().__init__()
        del self.attention
        own: Any = other.attention
        self.load_state_dict({k: v for k, v in other.state_dict().items() if "attention" not in k}, strict=False)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        weights = [*own.in_proj_weight.chunk(3), own.out_proj.weight]
        biases = [*own.in_proj_bias.chunk(3), own.out_proj.bias]
        with torch.no_grad():
            for layer, weight, bias in zip(self.parts(), weights, biases, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def parts(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.output

    def attend(self, x: Tensor, other: Tensor) -> Tensor:
        given = self.query(x), self.key(other), self.value(other)
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in given)
        weights = (q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.output((weights @ v).transpose(1, 2).flatten(2))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences in single precision, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return torch.randn(SAMPLES, LENGTH, FEATURES, generator=generator), labels

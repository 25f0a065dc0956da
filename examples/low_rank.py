"""Adapters of low rank (LoRA, Hu et al. 2021) in few lines: one for all tasks, or one for each, as PEFT has them.

With the package `peft` it is the same: `peft.get_peft_model(model, LoraConfig(...))` puts modules of these names in the
same places. The examples do without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

SCALE = 2.0
"""What an adapter says counts so often: peft's ``lora_alpha`` of twice the rank."""


class LowRank(nn.Module):
    """A linear layer, and what the adapter that is asked for adds to it: ``B(A(x))``, at first nothing.

    Args:
        base: the layer.
        rank: of the adapters.
        names: theirs.
        which: tells the one that is to speak; None: none.
    """

    def __init__(self, base: nn.Linear, rank: int, names: Iterable[str], which: Callable[[], str | None]) -> None:
        super().__init__()
        self.base_layer, self.which = base, which
        names = list(names)
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=False) for name in names})
        for adapter in self.lora_B.values():
            nn.init.zeros_(adapter.weight)

    def forward(self, x: Tensor) -> Tensor:
        name = self.which()
        said = self.base_layer(x)
        return said if name is None else said + SCALE * self.lora_B[name](self.lora_A[name](x))


def adapt(module: nn.Module, rank: int, names: Iterable[str], which: Callable[[], str | None]) -> None:
    """Put adapters beside every linear layer in a module."""
    names = list(names)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(name, LowRank(layer, rank, names, which))


def adapter(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter."""
    parts = [part for part in module.modules() if isinstance(part, LowRank)]
    return [one[name].weight for part in parts for one in (part.lora_A, part.lora_B)]

"""A layer with an adapter of low rank beside it, as LoRA has it, in few lines; and a classifier of such layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from training import Classifier

RANK = 8


class Lora(nn.Module):
    """What a layer says, which is kept from training, and what two small ones add to it: ``B(A(x))``."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](self.dropout(x))) * 2.0


class Adapted(Classifier):
    """Two hidden layers of 40 units that stay as they are, an adapter at each, and a norm that stays, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        layers = [Lora(nn.Linear(6, 40)), Lora(nn.Linear(40, 40))]
        norm = nn.LayerNorm(40).requires_grad_(False)
        self.body = nn.Sequential(layers[0], nn.ReLU(), norm, layers[1], nn.ReLU())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((one for one in self.parameters() if one.requires_grad), 1e-2)


ADAPTERS = [f"body.{index}.lora_{kind}.default" for index in (0, 3) for kind in "AB"]
BASE = [f"body.{index}.base_layer.{kind}" for index in (0, 3) for kind in ("weight", "bias")]

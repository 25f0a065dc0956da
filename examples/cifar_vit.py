"""CIFAR-100 in ten tasks of ten classes, a small vision transformer trained from scratch.

    python examples/cifar_vit.py --data FOLDER          # shards as in FOLDER/cifar100/train_00.avif

The stream is that of `cifar_resnet.py`. The network is a ViT in small: patches, a class token, pre-norm blocks with
fused queries, keys and values, as in timm. A peer of another kind is `lora`: the first task trains the network, which
stays as it is from then on, and each later task has an adapter of low rank of its own beside every linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cifar_resnet import stream
from experiment import Experiment
from images import crop_and_flip
from lightning.pytorch import LightningModule
from low_rank import adapt, adapter
from torch import Tensor, nn

from lightning_rnf import MultiHead

SIDE = 32


class Block(nn.Module):
    """Attention and two layers with GELU, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_norm(x))


class SmallViT(LightningModule):
    """A ViT; AdamW with one cycle a task.

    Args:
        width: of the tokens.
        depth: blocks.
        patch: side of a patch, in pixels.
        learning_rate: the largest of the cycle.
        rank: of an adapter for each task after the first, which alone learns then, with its head; 0: there are none.
    """

    def __init__(self, *, width: int, depth: int, patch: int, learning_rate: float, rank: int = 0) -> None:
        super().__init__()
        self.learning_rate, self.rank = learning_rate, rank
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.heads = MultiHead(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.heads(self.norm(self.blocks(tokens))[:, 0])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        return (crop_and_flip(x) if self.trainer.training else x), y

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        name = self.own_adapter()
        own = self.parameters() if name is None else [*adapter(self, name), *self.heads.tasks[name].parameters()]
        optimizer = torch.optim.AdamW(own, self.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def own_adapter(self) -> str | None:
        """The adapter of the active task; None: it has none."""
        return self.heads.active if self.rank and self.heads.active != next(iter(self.heads.tasks)) else None

    def add_adapters(self) -> None:
        """An adapter for each task after the first, if there are any."""
        if self.rank:
            adapt(self.blocks, self.rank, list(self.heads.tasks)[1:], self.own_adapter)


EXPERIMENT = Experiment(stream, SmallViT, pretrained=lambda model, data: model.add_adapters())


def main(arguments: Sequence[str] | None = None) -> dict:
    return EXPERIMENT.main(__file__, __doc__, arguments)


if __name__ == "__main__":
    main()

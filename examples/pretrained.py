"""Networks of torchvision with weights from ImageNet, fine-tuned; a head for each task in the old one's place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from images import Data
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchvision.models import squeezenet1_0, vgg16

from lightning_rnf import MultiHead


def _convolution_and_pooling(features: int, classes: int) -> nn.Module:
    """SqueezeNet's head without its last ReLU, which would keep a class whose logit it has cut off from learning."""
    return nn.Sequential(nn.Dropout(0.5), nn.Conv2d(features, classes, 1), nn.AdaptiveAvgPool2d(1))


HEADS: dict[str, tuple[Callable[[], nn.Module], str, int, Callable[[int, int], nn.Module]]] = {
    "vgg16": (vgg16, "classifier.6", 4096, nn.Linear),
    "squeezenet1_0": (squeezenet1_0, "classifier", 512, _convolution_and_pooling),
}
"""By architecture: how to build it, where its head is, what that reads, and how one for a new task is made."""


class Pretrained(LightningModule):
    """VGG-16 or SqueezeNet 1.0, trained with Adam and L2 regularization.

    Args:
        architecture: a key of `HEADS`.
        weights: file of a state dict of torchvision's, in the data's folder; null: none.
        learning_rate: of Adam.
        weight_decay: factor of the L2 regularization.
        keep: the task whose head the old one is; null: it goes.
    """

    def __init__(
        self,
        *,
        architecture: str,
        weights: str | None,
        learning_rate: float,
        weight_decay: float,
        keep: str | None = None,
    ) -> None:
        super().__init__()
        if architecture not in HEADS:
            raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(HEADS)}")
        build, self.head, features, make_head = HEADS[architecture]
        self.weights, self.keep = weights, keep
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.net = build()
        old = {keep: self.net.get_submodule(self.head)} if keep else {}
        self.net.set_submodule(self.head, MultiHead(features, old, make_head))
        self.to(memory_format=torch.channels_last)

    @property
    def heads(self) -> MultiHead:
        """In the place of the network's own head."""
        return self.net.get_submodule(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, height, width)`` to the active task's logits."""
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a state dict of torchvision's; the old head's only if it is kept.

        Raises:
            ValueError: if they are those of another network.
        """
        before, after = f"{self.head}.", f"{self.head}.tasks.{self.keep}."
        renamed = {
            after + name.removeprefix(before) if name.startswith(before) else name: value
            for name, value in state.items()
            if self.keep is not None or not name.startswith(before)
        }
        missing, unexpected = self.net.load_state_dict(renamed, strict=False)
        missing = [name for name in missing if not name.startswith(f"{before}tasks.") or name.startswith(after)]
        if missing or unexpected:
            raise ValueError(f"{self.weights} holds other weights: without {missing[:3]}, with {unexpected[:3]}")


def load(model: Pretrained, data: Data) -> None:
    """Give a new network its pretrained weights, from the data's folder."""
    if model.weights is not None:
        model.take(torch.load(data.folder / model.weights, map_location="cpu", weights_only=True))


def averaged(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and labels; of several crops an image, ``(N, crops, 3, …)``, the log of the mean of their softmax."""
    x, y = batch
    if x.ndim == 4:
        return module(x), y
    of_crops = module(x.flatten(0, 1)).log_softmax(dim=1).unflatten(0, x.shape[:2])
    return of_crops.logsumexp(dim=1) - math.log(x.shape[1]), y  # finite even where all crops are sure of another class

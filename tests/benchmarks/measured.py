"""The networks that are measured, and states in which a share of their units is frozen."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from cifar_resnet import ResNet18
from lightning.pytorch import LightningModule
from records import bare_record
from torch import Tensor, nn

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap

TASKS = ("old", "new")


class Network(LightningModule):
    """A body and a head of ten classes for each task."""

    def __init__(self, body: nn.Module, features: int, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.body = body
        self.heads = MultiHead(features, dict.fromkeys(TASKS, 10))
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


ADAM = partial(torch.optim.Adam, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def mlp(width: int = 1000) -> Network:
    """The paper's network for MNIST."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return Network(body, width, ADAM)


def zenke() -> Network:
    """The convolutional network of Zenke et al. 2017, for 32 × 32 images."""
    body = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 36, 512),
        nn.ReLU(),
        nn.Dropout(0.5),
    )
    return Network(body, 512, ADAM)


def resnet18(width: int = 64) -> LightningModule:
    """For 32 × 32 images."""
    model = ResNet18(width=width, stem_stride=1, learning_rate=0.05)
    for task in TASKS:
        model.heads.add(task, 10)
    return model


def _of_torchvision(name: str) -> Network:
    model = getattr(torchvision.models, name)()
    if name.startswith("vgg"):
        features, model.classifier[6] = 4096, nn.Identity()
    elif name.startswith("vit"):
        features, model.heads = 768, nn.Identity()
    else:
        features, model.fc = 2048, nn.Identity()
    return Network(model, features, SGD)


class _Read(nn.Module):
    """Inputs, drawn as all networks are shown them, are tokens: each number's place between the least and the largest.

    Args:
        reader: of transformers.
        place: of the token whose features are the sample's.
    """

    def __init__(self, reader: nn.Module, place: int) -> None:
        super().__init__()
        self.reader, self.place = reader, place

    def forward(self, x: Tensor) -> Tensor:
        tokens = (torch.special.ndtr(x) * (self.reader.config.vocab_size - 1)).long()
        return self.reader(tokens).last_hidden_state[:, self.place]


def bert_base() -> Network:
    """BERT-base with random weights; its class comes from the first token."""
    from transformers import BertConfig, BertModel  # which this one and the next alone want

    return Network(_Read(BertModel(BertConfig()), 0), 768, SGD)


def decoder() -> Network:
    """A decoder of 1.03 · 10⁹ random weights, built like Llama; its class comes from the last token."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=4, use_cache=False)
    return Network(_Read(LlamaModel(config), -1), 2048, partial(torch.optim.SGD, lr=0.01))


NETWORKS: dict[str, tuple[Callable[[], LightningModule], tuple[int, ...]]] = {
    "mlp": (mlp, (1, 28, 28)),
    "zenke": (zenke, (3, 32, 32)),
    "resnet18": (resnet18, (3, 32, 32)),
    "resnet18-narrow": (partial(resnet18, 16), (3, 32, 32)),
    **{name: (partial(_of_torchvision, name), (3, 224, 224)) for name in ("resnet50", "vgg16", "vit_b_16")},
    "bert_base": (bert_base, (128,)),
    "decoder": (decoder, (16,)),
}

_OF_SMALL = Namespace(samples=4500, reference=500, attributed=500, batch_size=128)
_OF_LARGE = Namespace(samples=384, reference=128, attributed=128, batch_size=32)
SIZES: dict[str, Namespace] = {
    **{name: _OF_LARGE if shape[-1] == 224 else _OF_SMALL for name, (_, shape) in NETWORKS.items()},
    "mlp": Namespace(samples=50_000, reference=5000, attributed=1000, batch_size=128),
    "bert_base": _OF_LARGE,
    "decoder": Namespace(samples=64, reference=64, attributed=64, batch_size=4),
}
"""A task of each network: samples trained on in an epoch, for accuracy, of them for relevance, and in a batch."""

FIRST_TWO = "first two layers"


def freeze(rnf: RelevanceFreezing, model: LightningModule, batch: tuple[Tensor, Tensor], frozen: float | str) -> None:
    """Let ``rnf`` have a finished task that needs this share of each layer, or the first two layers whole."""
    model.heads.activate(TASKS[0])
    units = UnitMap.of(model.eval(), batch)
    relevant = {
        layer.name: torch.full((layer.units,), place < 2)
        if frozen == FIRST_TWO
        else torch.randperm(layer.units) < float(frozen) * layer.units
        for place, layer in enumerate(units.layers)
    }
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    rnf.state.add(bare_record(units, relevant, statistics), units)
    model.train().heads.activate(TASKS[1])

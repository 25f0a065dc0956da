"""Well-known architectures, unchanged, and two of torch's modules: three short tasks each; the last one diverges.

Those that are wide take a minute and are marked slow; narrow ones of the same classes stand for them every day, and for
VGG-16, whose hundred million weights would take as long as three others, always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from architectures import narrow, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import frozen_entries, trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.search.criteria import FreeCapacity

TASKS = ("a", "b", "c")
CLASSES = 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:no free units are left"),  # some layers have but a few
    pytest.mark.filterwarnings("ignore:.*relevance is not conserved"),  # layer norms have no rule
    pytest.mark.filterwarnings("ignore:.*belong to no unit and will be frozen whole"),  # attention
]


class Learner(pl.LightningModule):
    """A backbone that puts out features, and a head per task.

    Args:
        backbone: as its library builds it, without its last layer.
        features: how many.
    """

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = MultiHead(features, dict.fromkeys(TASKS, CLASSES))
        self.lr = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.backbone(x))

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        size = sum(parameter.numel() for parameter in self.parameters())
        if size > 5e7:  # two moments of each of 100 million parameters cost more time than all else
            return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.1)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def without(net: nn.Module, last: str) -> tuple[nn.Module, int]:
    """A model with nothing but its last layer taken off. Its features: the inputs of that layer."""
    parent, _, key = last.rpartition(".")
    layer = net.get_submodule(last)
    setattr(net.get_submodule(parent), key, nn.Identity())
    return net, layer.in_features


def squeezenet() -> tuple[nn.Module, int]:
    """Its classifier is a convolution before the pooling."""
    net = whole("squeezenet1_0")
    net.classifier = nn.AdaptiveAvgPool2d(1)
    return net, 512


class Sentences(nn.Module):
    """Tokens to features by ``nn.TransformerEncoder``; shorter sentences are padded with zeros.

    Its layers meet every condition of torch's fast path for inference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(12, 32))
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(self.embedding(tokens) + self.positions, src_key_padding_mask=padding)
        return x.masked_fill(padding[..., None], 0.0).sum(dim=1)


def autoencoder() -> tuple[nn.Module, int]:
    """Down and up again, with a norm or slopes of every kind that belongs to units."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, groups=3),
        nn.BatchNorm2d(12),
        nn.PReLU(12),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.InstanceNorm2d(24, affine=True),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(24, 12, 3, stride=2, groups=2, bias=False),
        nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        nn.PReLU(),
        nn.ConvTranspose2d(12, 12, 3, stride=2, groups=12),
        nn.PReLU(12),
        nn.ConvTranspose2d(12, 6, 3),
        nn.SyncBatchNorm(6),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
    ), 96


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "squeezenet1_0": squeezenet,
    "transformer": lambda: (Sentences(), 32),
    "autoencoder": autoencoder,
}
LAST = {
    "resnet18": "fc",
    "resnet50": "fc",
    "vgg16_bn": "classifier.6",
    "mobilenet_v2": "classifier.1",
    "densenet121": "classifier",
    "regnet_y_400mf": "fc",
    "convnext_tiny": "classifier.2",
    "efficientnet_b0": "classifier.1",
    "vit_b_16": "heads.head",
}
"""The last layer of each of torchvision's that there is a narrow one of."""


def data(architecture: str, task: str) -> DataLoader:
    generator = torch.Generator().manual_seed(TASKS.index(task))
    if architecture == "transformer":
        x = torch.randint(1, 50, (8, 12), generator=generator)
        x[::2, 9:] = 0
    else:
        x = torch.randn(8, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(8) % CLASSES), batch_size=4)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in LAST if name != "vgg16_bn")],
)
def test_three_tasks_on_an_unchanged_architecture(architecture):
    torch.manual_seed(0)
    if architecture in LAST:
        options = {"image_size": 32} if architecture == "vit_b_16" else {}
        learn_three_tasks(architecture, *without(whole(architecture, **options), LAST[architecture]))
    else:
        learn_three_tasks(architecture, *ARCHITECTURES[architecture]())


@pytest.mark.parametrize("architecture", LAST)
def test_three_tasks_on_a_narrow_architecture(architecture):
    torch.manual_seed(0)
    learn_three_tasks(architecture, *without(narrow(architecture, CLASSES), LAST[architecture]))


def learn_three_tasks(architecture: str, backbone: nn.Module, features: int) -> None:
    """What was frozen stays bit-equal, and so do recalled logits, whatever comes after."""
    model = Learner(backbone, features)
    units = UnitMap.of(model, next(iter(data(architecture, "a")))).with_own_norms(model)
    leave = {"a": FreeCapacity(0.5), "b": FreeCapacity(0.3), "c": FreeCapacity(0.1)}
    rnf = RelevanceFreezing(
        criterion=lambda score: leave[model.heads.active](score),
        resolution=sum(layer.units for layer in units.layers) // 50,
        attribution_samples=4,
        recalibrate_norm=False,  # four images are too few to estimate statistics from
        task=lambda trainer, module: module.heads.active,
    )
    x = next(iter(data(architecture, "a")))[0]

    def learn(task: str) -> None:
        model.heads.activate(task)
        loader = data(architecture, task)
        trainer(rnf, max_epochs=1, num_sanity_val_steps=0).fit(model, loader, loader)

    def recalled(task: str) -> Tensor:
        with rnf.recall(task, model), torch.no_grad():
            return model(x)

    # Every parameter belongs to exactly one.
    of_units = [name for layer in units.layers for name in layer.parameters]
    parts = [*of_units, *units.head_parameters, *units.shared, *units.own, *units.embeddings, *units.idle]
    assert Counter(parts) == Counter(list(values(model)))
    assert set(units.reasons) == set(units.shared)

    learn("a")
    assert rnf.state.layers == units.layers
    assert 0.5 <= rnf.free_capacity < 0.6
    before, logits = values(model), recalled("a")
    frozen = frozen_entries(rnf, model)

    learn("b")
    assert torch.equal(recalled("a"), logits)
    assert 0.3 <= rnf.free_capacity < 0.4
    of_b = recalled("b")

    model.lr = 1e30
    with pytest.raises(ValueError, match="not finite"):
        learn("c")
    after = values(model)
    assert any(value.isnan().any() or value.isinf().any() or value.abs().max() > 1e20 for value in after.values())
    assert torch.equal(recalled("a"), logits)
    assert torch.equal(recalled("b"), of_b)

    assert frozen.keys() == {*of_units, *units.embeddings}
    for name, mask in frozen.items():
        assert torch.equal(after[name][mask], before[name][mask]), name
    for name in (*units.shared, *rnf.state.tasks["a"].head_parameters):
        assert torch.equal(after[name], before[name]), name

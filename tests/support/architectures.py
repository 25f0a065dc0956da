"""Torchvision's architectures as they are, and built by the same classes of fewer and narrower layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

EIGHTH = 8


def whole(name: str, **options: Any) -> nn.Module:
    """As torchvision builds it."""
    return pytest.importorskip("torchvision.models").get_model(name, weights=None, **options)


def narrow(name: str, classes: int) -> nn.Module:
    """With every kind of part that the whole one has, and of a hundred thousand parameters at most."""
    pytest.importorskip("torchvision.models")
    return NARROW[name](classes)


def _resnet(block: str) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        from torchvision.models import resnet

        class Narrow(resnet.ResNet):
            def _make_layer(self, block, planes, *args, **options):
                return super()._make_layer(block, planes // EIGHTH, *args, **options)

        kind = getattr(resnet, block)
        net = Narrow(kind, [2, 2, 1, 1])
        net.fc = nn.Linear(512 * kind.expansion // EIGHTH, classes)
        return net

    return build


def _vgg(classes: int) -> nn.Module:
    from torchvision.models import vgg

    features = vgg.make_layers([8, 8, "M", 16, 16, "M", 24, 24, "M", 32, 32, "M"], batch_norm=True)
    with torch.device("meta"):  # of 120 million parameters, which are left out
        net = vgg.VGG(features, init_weights=False)
    for place, (inputs, outputs) in {0: (32 * 49, 48), 3: (48, 48), 6: (48, classes)}.items():
        net.classifier[place] = nn.Linear(inputs, outputs)
    return net


def _mobilenet(classes: int) -> nn.Module:
    from torchvision.models import MobileNetV2

    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 2]]
    return MobileNetV2(classes, width_mult=0.25, inverted_residual_setting=blocks)


def _densenet(classes: int) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2, 2), 16, num_classes=classes)


def _regnet(classes: int) -> nn.Module:
    from torchvision.models import regnet

    blocks = regnet.BlockParams.from_init_params(depth=6, w_0=16, w_a=16.0, w_m=2.5, group_width=8, se_ratio=0.25)
    return regnet.RegNet(blocks, num_classes=classes, stem_width=16)


def _convnext(classes: int) -> nn.Module:
    from torchvision.models import convnext

    shapes = ((16, 24, 1), (24, 32, 2), (32, None, 1))
    return convnext.ConvNeXt([convnext.CNBlockConfig(*shape) for shape in shapes], num_classes=classes)


def _efficientnet(classes: int) -> nn.Module:
    from torchvision.models import efficientnet

    shapes = ((1, 3, 1, 8, 8, 1), (6, 3, 2, 8, 16, 2), (6, 5, 2, 16, 24, 2))
    blocks = [efficientnet.MBConvConfig(*shape) for shape in shapes]
    return efficientnet.EfficientNet(blocks, dropout=0.2, num_classes=classes)


def _vit(classes: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=96, num_classes=classes)


NARROW: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": _resnet("BasicBlock"),
    "resnet50": _resnet("Bottleneck"),
    "vgg16_bn": _vgg,
    "mobilenet_v2": _mobilenet,
    "densenet121": _densenet,
    "regnet_y_400mf": _regnet,
    "convnext_tiny": _convnext,
    "efficientnet_b0": _efficientnet,
    "vit_b_16": _vit,
}

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from architectures import NARROW, narrow, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSES, Built, convnet, mlp
from records import bare_record
from snapshot import changes, snapshot
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everybody's name for it
from training import Classifier, ConvClassifier, inputs, train

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy.graph import Traced
from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.freezing.rows import learning
from lightning_rnf.recall.export import export
from lightning_rnf.recall.sizes import Size, SubnetworkFlops, size_of
from lightning_rnf.recall.subnetwork import recall, silence, statistics
from lightning_rnf.recall.whole import whole as copied_whole

IMAGE = (3, 12, 12)

# Half of the units at random: much stays in networks that mix channels, and tests of their own see to what is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units")


def stir(net: nn.Module, x: Tensor, layers: tuple[UnitLayer, ...], relevant: dict[str, Tensor]) -> None:
    """Norms whose statistics and affine matter, and that hand a signal on although units are silent."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with silence(net, layers, relevant):
            net.train()(x)
        for norm in norms:
            norm.momentum = 0.1
            if norm.track_running_stats:
                norm.running_mean.add_(torch.randn_like(norm.running_mean) * norm.running_var.sqrt() * 0.2)
                norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5).clamp_(min=1e-3)


def random_masks(layers: tuple[UnitLayer, ...], share: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.rand(layer.units, generator=generator) < share for layer in layers}


class Task:
    """A model, made ready, and the record of a task whose sub-network is the given or a random half of its units."""

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, ...],
        relevant: dict[str, Tensor] | None = None,
        *,
        share: float = 0.5,
        double: bool = True,
        units: str | list[str] | None = None,
    ) -> None:
        # In double precision a mistake can't pass as rounding.
        self.dtype = torch.float64 if double else torch.float32
        self.net = net.to(self.dtype)
        self.x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        example = (self.x, torch.zeros(6, dtype=torch.int64))
        self.units = UnitMap.of(self.net, example, units=units)
        self.layers = self.units.layers
        self.relevant = random_masks(self.layers, share) | (relevant or {})
        stir(self.net, self.x, self.layers, self.relevant)
        self.record = bare_record(self.units, self.relevant, statistics(self.net, self.units))

    def logits(self) -> Tensor:
        with torch.no_grad(), recall(self.net, self.layers, self.record):
            return self.net(self.x)

    def exported(self) -> nn.Module:
        return export(self.net, self.layers, self.record)

    def check(self) -> nn.Module:
        """Export; the logits are recall's, and the sizes are those that were foretold."""
        expected = self.logits()
        small = self.exported()
        assert_same_logits(small, self.x, expected)
        size = size_of(small, self.x)
        assert SubnetworkFlops(self.net, self.layers, self.x)(self.relevant) == size.flops
        for part in small.modules():
            assert not type(part).__module__.startswith(("lightning", "tests", "networks")), type(part)
        return small


def assert_same_logits(small: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        found = small(x)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- small networks, each with something that has to be handled -------------------------------------------------------


class Residual(nn.Module):
    """Two basic blocks, the second with a downsample; ReLUs in place and used twice."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = (
                nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                if stride > 1
                else nn.Identity()
            )

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += self.downsample(x)
            return self.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 12, 2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.blocks(self.stem(x)), 1))


def normalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10, affine=False), nn.SiLU(), nn.AvgPool2d(2, padding=1)),
        *(nn.Flatten(), nn.Linear(90, 14, bias=False), nn.BatchNorm1d(14), nn.Hardswish(), nn.Dropout(0.2)),
        nn.Linear(14, CLASSES),
    )


def dense() -> nn.Module:
    """Norms read what was concatenated, so silent units become constants there."""

    def forward(self: Built, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = self.one(self.bn1(first).relu())
        third = self.two(F.relu(self.bn2(torch.cat([first, second], 1)), inplace=True))
        fourth = self.transition(self.bn3(torch.cat([first, second, third], dim=-3)).relu())
        return self.head(self.pool(fourth).sigmoid().flatten(1))

    return Built(
        forward,
        stem=nn.Conv2d(3, 6, 3, padding=1),
        bn1=nn.BatchNorm2d(6),
        one=nn.Conv2d(6, 4, 3, padding=1),
        bn2=nn.BatchNorm2d(10),
        two=nn.Conv2d(10, 4, 1, bias=False),
        bn3=nn.BatchNorm2d(14),
        transition=nn.Conv2d(14, 7, 1, bias=False),
        pool=nn.AvgPool2d(2, stride=2),
        head=nn.Linear(7 * 36, CLASSES),
    )


def fire() -> nn.Module:
    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        x = torch.cat((self.narrow(x).relu(), self.wide(x).relu()), 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return Built(
        forward,
        squeeze=nn.Conv2d(3, 6, 1),
        narrow=nn.Conv2d(6, 8, 1),
        wide=nn.Conv2d(6, 8, 3, padding=1),
        head=nn.Linear(16, CLASSES),
    )


def separable() -> nn.Module:
    """Expansion, depthwise, projection, and a sum around them."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean([2, 3]))

    return Built(
        forward,
        stem=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        block=nn.Sequential(
            *(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)),
        ),
        head=nn.Linear(8, CLASSES),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.LeakyReLU()),
        *(nn.Conv2d(12, 18, 3, groups=3), nn.PReLU(18), nn.Conv2d(18, 36, 3, padding=1, groups=18), nn.PReLU()),
        *(nn.Conv2d(36, 8, 1, groups=2), nn.GELU(), nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def gated(classic: bool) -> nn.Module:
    """Squeeze and excitation: with 1x1 convolutions, or with the sizes taken apart and put together."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.stem(x)
        if classic:
            b, c, _, _ = x.size()
            scale = self.gate(self.pool(x).view(b, c)).view(b, c, 1, 1)
            x = x * scale.expand_as(x)
        else:
            x = self.gate(self.pool(x)) * x
        return self.head(self.last(x).relu().mean((-2, -1)))

    kind: Callable[..., nn.Module] = nn.Linear if classic else lambda n, m: nn.Conv2d(n, m, 1)
    return Built(
        forward,
        stem=nn.Sequential(nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.SiLU(inplace=True)),
        pool=nn.AdaptiveAvgPool2d(1),
        gate=nn.Sequential(kind(10, 6), nn.ReLU(), kind(6, 10), nn.Sigmoid()),
        last=nn.Conv2d(10, 8, 3),
        head=nn.Linear(8, CLASSES),
    )


def viewing(*sizes: int) -> nn.Module:
    """Flattens with ``view``, by literal sizes or by asking for the number of samples."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.conv(x).tanh()
        return self.head(self.fc(x.view(*sizes) if sizes else x.reshape(x.shape[0], -1)).relu())

    return Built(forward, conv=nn.Conv2d(3, 6, 3), fc=nn.Linear(600, 10), head=nn.Linear(10, CLASSES))


def mixing() -> nn.Module:
    """Norms and an attention that read all channels of a stream: only what is between two linear layers can go."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))

    return Built(
        forward,
        patches=nn.Conv2d(3, 8, 4, 4),
        positions=nn.Parameter(torch.randn(9, 8)),
        norm1=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        norm2=nn.LayerNorm(8),
        mlp=nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 8)),
        head=nn.Linear(8, CLASSES),
    )


def encoder() -> nn.Module:
    """Unit layers inside a module of torch that is not taken apart."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    return Built(lambda self, x: self.head(self.layer(x.flatten(2)).mean(1)), layer=layer, head=nn.Linear(12, CLASSES))


class Squashed(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 2 * self.weight.tanh(), self.bias)


class Inherited(nn.Conv2d):
    """A convolution in all but name."""


class Standardised(nn.Conv2d):
    """As timm's ``ScaledStdConv2d``: each row of the weight that it uses has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        weight = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


def standardised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), Standardised(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, 3)),
        *(nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, CLASSES)),
    )


def custom() -> nn.Module:
    return nn.Sequential(
        *(Inherited(3, 8, 3), nn.ReLU(), Squashed(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), Inherited(10, 6, 3)),
        *(nn.ReLU(), Inherited(6, 8, 3), nn.GroupNorm(2, 8), nn.ELU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES)),
    )


def aliased() -> nn.Module:
    """An in-place ReLU changes what is read again later: silent units are constants after the norm, and clipped."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.bn(torch.cat([self.one(x), self.two(x)], 1))
        y = self.relu(x)
        return self.head(self.last(x + 2 * y).mean((2, 3)))

    return Built(
        forward,
        one=nn.Conv2d(3, 6, 3),
        two=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(12),
        relu=nn.ReLU(inplace=True),
        last=nn.Conv2d(12, 8, 1),
        head=nn.Linear(8, CLASSES),
    )


def written_through_a_view() -> nn.Module:
    """What is added to a view is there in the tensor, too."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.bn(torch.cat([self.one(x), self.two(x)], 1))
        x.flatten(1).add_(1.0)
        return self.head(self.last(x.relu()).relu().sum((2, 3)))

    return Built(
        forward,
        one=nn.Conv2d(3, 6, 3),
        two=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(12),
        last=nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        head=nn.Linear(8, CLASSES),
    )


def memoryless() -> nn.Module:
    """Norms that keep no statistics, and have no parameters; axes of one element that are squeezed away."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.norm2(self.two(self.norm1(self.one(x)).relu())).relu()
        return self.head(self.pool(self.three(x).relu()).squeeze(-1).squeeze(2)[:, :, None].transpose(1, 2).sum(1))

    return Built(
        forward,
        one=nn.Conv2d(3, 8, 3),
        norm1=nn.BatchNorm2d(8, track_running_stats=False),
        two=nn.Conv2d(8, 10, 3),
        norm2=nn.BatchNorm2d(10, affine=False, track_running_stats=False),
        three=nn.Conv2d(10, 6, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(6, CLASSES),
    )


def transposed() -> nn.Module:
    """Transposed convolutions count their inputs first; constants do not stay constant through them."""
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2),
            nn.BatchNorm2d(12),
        ),
        *(nn.Tanh(), nn.ConvTranspose2d(12, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, CLASSES)),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(2), nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(8, 6, 3)),
        *(nn.InstanceNorm1d(6, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 33, CLASSES)),
    )


def resized() -> nn.Module:
    """Positions that are put between others and at the borders, and one of them alone."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        y = self.up(self.two(F.max_pool2d(x, 2)).relu())
        y = F.pad(y, [1, 0, 0, 1])[:, :]
        x = self.three(torch.cat([x, F.interpolate(y, size=12, mode="bilinear")], 1)).sigmoid()
        x = self.four(F.pad(x, (1, 1), value=0.5) + F.pad(x, (1, 1, 0, 0), mode="replicate"))
        return self.head(x.select(3, 2).select(-1, 1))

    return Built(
        forward,
        one=nn.Conv2d(3, 8, 3, padding=1),
        two=nn.Conv2d(8, 10, 3, padding=1),
        up=nn.Upsample(scale_factor=2),
        three=nn.Conv2d(18, 8, 1),
        four=nn.Conv2d(8, 6, 3),
        head=nn.Linear(6, CLASSES),
    )


class NormAct(nn.BatchNorm2d):
    """A batch norm whose own forward goes on with an activation: timm's, with the steps of its forward."""

    def __init__(self, channels: int, act: nn.Module, **options: bool) -> None:
        super().__init__(channels, **options)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Going(nn.BatchNorm2d):
    """A batch norm that goes on where its base ends."""

    def __init__(self, channels: int, act: nn.Module, **options: bool) -> None:
        super().__init__(channels, **options)
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


MIXED = (nn.ReLU(inplace=True), nn.Sigmoid(), nn.Softplus(), nn.Hardswish())


def activated(
    kind: Callable[..., nn.Module], acts: tuple[nn.Module, ...] = MIXED, *, tracked: bool = True
) -> nn.Module:
    """Norms with activations, that are 0 at 0 or not, before convolutions, a concatenation and a sum."""

    def forward(self: Built, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x))
        x = x + self.bn2(self.one(x))
        x = torch.cat([x, self.bn3(self.two(x))], 1)
        return self.head(self.bn4(self.last(x)).mean((2, 3)))

    return Built(
        forward,
        stem=nn.Conv2d(3, 8, 3, bias=False),
        bn1=kind(8, acts[0]),
        one=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        bn2=kind(8, acts[1]),
        two=nn.Conv2d(8, 6, 1),
        bn3=kind(6, acts[2], affine=False),
        last=nn.Conv2d(14, 10, 3, padding=1),
        bn4=kind(10, acts[3], track_running_stats=tracked),
        head=nn.Linear(10, CLASSES),
    )


def apart(channels: int, act: nn.Module, **options: bool) -> nn.Module:
    """The same in two modules."""
    return nn.Sequential(nn.BatchNorm2d(channels, **options), act)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "mlp-without-bias": (lambda: mlp(bias=False), (4,)),
    "convnet": (lambda: convnet(inplace=True), (2, 6, 6)),
    "normalised": (normalised, IMAGE),
    "residual": (Residual, IMAGE),
    "dense": (dense, IMAGE),
    "fire": (fire, IMAGE),
    "separable": (separable, IMAGE),
    "grouped": (grouped, IMAGE),
    "gated": (lambda: gated(False), IMAGE),
    "gated-by-views": (lambda: gated(True), IMAGE),
    "view": (lambda: viewing(-1, 600), IMAGE),
    "reshape": (viewing, IMAGE),
    "mixing": (mixing, IMAGE),
    "encoder": (encoder, (5, 3, 4)),
    "custom": (custom, IMAGE),
    "standardised": (standardised, IMAGE),
    "aliased": (aliased, IMAGE),
    "written-through-a-view": (written_through_a_view, IMAGE),
    "memoryless": (memoryless, IMAGE),
    "transposed": (transposed, IMAGE),
    "conv1d": (conv1d, IMAGE),
    "resized": (resized, IMAGE),
    "norm-and-act": (lambda: activated(NormAct, tracked=False), IMAGE),
    "norm-goes-on": (lambda: activated(Going), IMAGE),
}
each_net = pytest.mark.parametrize("name", NETS)


def task_of(name: str, *args: object, **options: object) -> Task:
    torch.manual_seed(0)
    make, shape = NETS[name]
    return Task(make(), shape, *args, **options)  # type: ignore[arg-type]


# -- logits -----------------------------------------------------------------------------------------------------------


@each_net
def test_logits_are_those_of_recall(name):
    task = task_of(name)
    expected = task.logits()
    assert float((expected - expected[0]).abs().max()) > 1e-4  # they tell the samples apart
    small = task.check()
    if name != "encoder":
        assert parameters(small) < parameters(task.net)


@each_net
@pytest.mark.parametrize("silent", [0, 1, 2, -1, "all"])
def test_a_layer_may_be_silent_as_a_whole(name, silent):
    task = task_of(name)
    layers = task.layers if silent == "all" else task.layers[silent : silent + 1 or None]
    task.relevant.update({layer.name: torch.zeros(layer.units, dtype=torch.bool) for layer in layers})
    task.check()


@each_net
def test_nothing_goes_if_all_units_are_relevant(name):
    task = task_of(name, share=1.1)
    small = task.check()
    assert parameters(small) == parameters(task.net)
    assert size_of(small, task.x) == size_of(task.net, task.x)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 2**20), st.sampled_from([0.05, 0.3, 0.7, 0.95]))
def test_any_masks(name, seed, share):
    make, shape = NETS[name]
    torch.manual_seed(seed)
    task = Task(make(), shape, share=share)
    task.relevant.update(random_masks(task.layers, share, seed))
    task.check()


@each_net
def test_what_later_tasks_did_to_irrelevant_units_is_not_in_it(name):
    task = task_of(name)
    expected = task.logits()
    with torch.no_grad():
        for layer in task.layers:
            for key in layer.parameters:
                task.net.get_parameter(key)[layer.spread(key, ~task.relevant[layer.name])] = torch.nan
        for buffer in task.net.buffers():
            buffer.fill_(3)
    small = task.exported()
    assert_same_logits(small, task.x, expected)
    # A forward of the user's own may need its whole weight.
    assert name in {"custom", "standardised"} or all(value.isfinite().all() for value in small.state_dict().values())


# -- how small --------------------------------------------------------------------------------------------------------


def test_a_multilayer_perceptron_keeps_exactly_its_relevant_units():
    task = task_of("mlp", {"0": torch.arange(8) < 3, "2": torch.arange(6) < 2})
    small = task.check()
    assert size_of(task.net, task.x) == Size(4 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3, 2 * (4 * 8 + 8 * 6 + 6 * 3))
    assert size_of(small, task.x) == Size(4 * 3 + 3 + 3 * 2 + 2 + 2 * 3 + 3, 2 * (4 * 3 + 3 * 2 + 2 * 3))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def first(count: int, units: int) -> Tensor:
    return torch.arange(units) < count


def test_flattened_channels_go_as_blocks():
    task = task_of("convnet", {"0": first(2, 4), "2": first(3, 5), "6": first(1, 6)})
    assert shapes(task.check()) == {
        "0.weight": (2, 2, 3, 3),
        "0.bias": (2,),
        "2.weight": (3, 2, 3, 3),
        "2.bias": (3,),
        "6.weight": (1, 12),
        "6.bias": (1,),
        "8.weight": (CLASSES, 1),
        "8.bias": (CLASSES,),
    }


def test_a_sum_keeps_what_any_of_its_parts_needs():
    names = ["stem.0", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.downsample.0"]
    units = dict(zip(names, (8, 8, 8, 12, 12, 12), strict=True))
    relevant = {name: torch.zeros(count, dtype=torch.bool) for name, count in units.items()}
    relevant["stem.0"][[0, 1]] = True
    relevant["blocks.0.conv1"][3] = True
    relevant["blocks.0.conv2"][[1, 4]] = True
    relevant["blocks.1.conv1"][[5, 6]] = True
    relevant["blocks.1.conv2"][7] = True
    relevant["blocks.1.downsample.0"][[8, 7]] = True
    task = task_of("residual", relevant)
    found = shapes(task.check())
    assert found["stem.0.weight"] == (3, 3, 3, 3)
    assert found["blocks.0.conv1.weight"] == (1, 3, 3, 3)
    assert found["blocks.0.conv2.weight"] == (3, 1, 3, 3)
    assert found["blocks.1.conv1.weight"] == (2, 3, 3, 3)
    assert found["blocks.1.conv2.weight"] == (2, 2, 3, 3)
    assert found["blocks.1.downsample.0.weight"] == (2, 3, 1, 1)
    assert found["head.weight"] == (CLASSES, 2)


def test_constants_that_are_not_zero_go_into_the_bias():
    task = task_of("dense", {"stem": first(2, 6), "one": first(1, 4), "two": first(3, 4), "transition": first(4, 7)})
    found = shapes(task.check())
    # A padded convolution reads the stem's constants, which have borders there: they stay.
    constants = task.net.eval().bn1(torch.zeros(1, 6, 1, 1, dtype=torch.float64)).flatten()[2:]
    stem = 2 + int((constants > 0).sum())
    assert 2 < stem < 6
    assert found["one.weight"] == (1, stem, 3, 3)
    assert found["two.weight"] == (3, stem + 1, 1, 1)
    assert found["transition.weight"] == (4, stem + 1 + 3, 1, 1)
    assert found["head.weight"] == (CLASSES, 4 * 36)


def test_what_only_silent_units_read_goes_too():
    task = task_of("fire", {"squeeze": first(6, 6), "narrow": first(0, 8), "wide": first(0, 8)})
    task.net.wide = nn.Conv2d(6, 8, 3, padding=1).double()
    found = shapes(task.check())
    assert found["squeeze.weight"] == (1, 3, 1, 1)
    task = task_of("separable", {"block.0": first(24, 24), "block.3": first(5, 24)})
    found = shapes(task.check())
    assert found["block.0.weight"][0] == 5
    assert found["block.3.weight"] == (5, 1, 3, 3)


def test_groups_keep_an_equal_number():
    relevant = {"0": torch.zeros(12, dtype=torch.bool), "3": torch.zeros(18, dtype=torch.bool)}
    relevant["0"][[0, 1, 4]] = True  # two, one, none of four
    relevant["3"][[0, 6, 7, 8]] = True  # one, three, none of six
    small = task_of("grouped", relevant | {"5": first(36, 36), "7": first(8, 8)}).check()
    assert shapes(small) | {"0.weight": (4, 3, 3, 3)} == shapes(small)
    module, depthwise, last = (small.get_submodule(name) for name in ("3", "5", "7"))
    assert (module.groups, module.in_channels, module.out_channels) == (2, 4, 6)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (6, 6, 12)
    # The second half of the last convolution reads biases only, and is one itself.
    assert (last.groups, last.in_channels, last.out_channels) == (1, 12, 4)


def test_a_gate_goes_with_what_it_gates():
    for name in ("gated", "gated-by-views"):
        task = task_of(name, {"stem.0": first(4, 10), "gate.0": first(2, 6), "gate.2": first(10, 10)})
        found = shapes(task.check())
        assert found["stem.0.weight"][0] == 4
        assert found["gate.0.weight"][:2] == (2, 4)
        assert found["gate.2.weight"][:2] == (4, 2)
        assert found["last.weight"][1] == 4


@pytest.mark.parametrize("kind", [NormAct, Going])
def test_a_norm_with_an_activation_of_its_own_costs_nothing(kind):
    sizes = []
    for each in (kind, apart):
        torch.manual_seed(0)
        task = Task(activated(each, (nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh(), nn.Hardswish())), IMAGE)
        small = task.check()
        assert not any(node.target == "masked_fill" for node in small.graph.nodes)  # zeros stay zeros
        sizes.append(size_of(small, task.x))
    assert sizes[0] == sizes[1]


def test_a_norm_of_its_own_that_is_called_twice_stays_whole():
    def forward(self: Built, x: Tensor) -> Tensor:
        return self.head(self.bn(self.two(self.bn(self.one(x)))).mean((2, 3)))

    kinds = {"one": nn.Conv2d(3, 8, 3), "two": nn.Conv2d(8, 8, 3), "bn": NormAct(8, nn.SiLU())}
    task = Task(Built(forward, **kinds, head=nn.Linear(8, CLASSES)), IMAGE)
    small = task.check()
    assert shapes(small)["bn.weight"] == (8,)
    assert any("bn (BatchNorm2d) runs several times" in reason for reason in small.kept["reasons"])


# -- what is left, and why --------------------------------------------------------------------------------------------


@each_net
def test_what_is_left_is_what_is_there(name):
    task = task_of(name)
    small = task.check()
    kept = small.kept
    assert kept["task"] == "task"
    assert kept["parameters"] == parameters(small)
    assert kept["parameters_before"] == parameters(task.net)  # there are no other heads
    stay = 0
    for layer in task.layers:
        counts = kept["layers"][layer.name]
        silent = int((~task.relevant[layer.name]).sum())
        assert (counts["units"], counts["silent"]) == (layer.units, silent)
        stay += max(0, counts["kept"] - (layer.units - silent))
        if not name.startswith("trans"):
            assert counts["kept"] == len(small.get_parameter(layer.weight))
    assert sum(kept["reasons"].values()) >= stay
    assert (kept["of_silent_units"] == 0) == (not kept["reasons"])
    assert json.loads(json.dumps(kept)) == kept


REASONS = {
    "residual": "add in blocks.1 makes them one with what has to stay",
    "dense": "one (Conv2d) reads constants of them that are not 0",
    "grouped": "a layer keeps one unit at least, and groups an equal number",
    "encoder": "layer (TransformerEncoderLayer) is not taken apart",
    "written-through-a-view": "bn (BatchNorm2d): its output is written to in place, and read again",
    "mixing": "attention (MultiheadAttention) mixes channels",
    "gated": "mul in the forward makes them one with what has to stay",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_stops_the_cut_is_named(name):
    assert next(iter(task_of(name).exported().kept["reasons"])) == REASONS[name]


def test_each_reason_counts_the_units_that_stay_for_it():
    relevant = {"stem": first(4, 6), "one": first(1, 4), "two": first(0, 4), "transition": first(4, 7)}
    task = task_of("dense", relevant)
    constants = task.net.eval().bn1(torch.zeros(1, 6, 1, 1, dtype=torch.float64)).flatten()[4:]
    assert task.exported().kept["reasons"] == {
        "one (Conv2d) reads constants of them that are not 0": int((constants > 0).sum()),
        "a layer keeps one unit at least, and groups an equal number": 1,
    }


def test_every_reason_of_a_network_is_named():
    assert task_of("custom").exported().kept["reasons"] == {
        "2 has a forward of its own": 4,
        "conv2d in 2 uses a weight as a function does": 3,
        "8 (GroupNorm) mixes channels": 3,
    }


def test_an_export_that_cuts_little_of_much_is_a_warning():
    def built(norm: nn.Module) -> Task:
        parts = {"one": nn.Conv2d(3, 16, 3), "norm": norm, "head": nn.Linear(16, CLASSES)}
        return Task(Built(lambda self, x: self.head(self.norm(self.one(x)).relu().mean((2, 3))), **parts), IMAGE)

    task = built(nn.GroupNorm(4, 16))
    silent = int((~task.relevant["one"]).sum())
    with pytest.warns(UserWarning, match="silent units") as said:
        small = task.exported()
    (warning,) = (str(one.message) for one in said)  # nothing else is said
    assert warning.startswith("task: 100% of the parameters of its silent units are still there, 531 of 531")
    assert warning.endswith(f"norm (GroupNorm) mixes channels ({silent} units)")
    assert small.kept["of_silent_units"] == small.kept["of_silent_units_before"] == silent * (27 + 1 + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(nn.BatchNorm2d(16)).exported()  # goes
        few = built(nn.GroupNorm(4, 16))
        few.relevant["one"] = torch.arange(16) > 0  # all that is silent stays, and it is little
        few.exported()
        few.relevant["one"] = torch.arange(16) >= 0
        few.exported()


def test_what_is_left_is_in_files_and_copies(tmp_path):
    small = task_of("grouped").exported()
    for number, one in enumerate((small, copy.deepcopy(small), copy.deepcopy(copy.deepcopy(small)))):
        torch.save(one, tmp_path / f"{number}.pt")
        loaded = torch.load(tmp_path / f"{number}.pt", weights_only=False)
        assert small.kept == one.kept == loaded.kept
    assert "kept" not in small.state_dict()


# -- nothing of ours, nothing of the user's --------------------------------------------------------------------------


@each_net
def test_the_model_stays_as_it_is(name):
    task = task_of(name)
    for number, module in enumerate(task.net.modules()):
        module.training = number % 3 > 0
    task.net(task.x).sum().backward()
    next(task.net.parameters()).requires_grad_(False)
    heard = next(layer.name for layer in task.layers if "attn" not in layer.name)  # with a hook it can't be followed
    handle = task.net.get_submodule(heard).register_forward_hook(lambda *_: None)
    before = snapshot(task.net)
    small = task.exported()
    size_of(task.net, task.x)
    SubnetworkFlops(task.net, task.layers, task.x)(task.relevant)
    assert changes(before, snapshot(task.net)) == []
    handle.remove()
    own = {tensor.data_ptr() for tensor in task.net.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in small.state_dict().values())
    assert not any(part.training or part._forward_hooks for part in small.modules())


def test_it_is_stored_and_loaded_without_this_package(tmp_path):
    expected = {}
    for name in NETS:
        task = task_of(name)
        expected[name] = (task.x, task.logits())
        torch.save(task.exported(), tmp_path / f"{name}.pt")
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import pathlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning_rnf", "lightning", "networks", "test_export", "torchvision", "zennit"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
folder = pathlib.Path({str(tmp_path)!r})
for name, (x, logits) in torch.load(folder / "expected.pt").items():
    small = torch.load(folder / f"{{name}}.pt", weights_only=False)
    torch.testing.assert_close(small(x).detach(), logits, rtol=1e-9, atol=1e-9)
    assert not small.training
    assert small.kept["layers"]
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_can_be_copied_and_trained():
    task = task_of("normalised")
    small = copy.deepcopy(task.exported())
    small.train()
    small(task.x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_what_others_left_on_a_layer_is_not_in_it(tmp_path):
    task = task_of("mlp")
    task.net[0].owner = task.net[0].note = lambda: None
    task.net[0].register_forward_hook(lambda *_: None)
    small = task.exported()
    torch.save(small, tmp_path / "small.pt")  # a lambda can't be stored
    assert not hasattr(small.get_submodule("0"), "owner")


# -- with the callback ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:no free units")
@pytest.mark.parametrize("kind", [Classifier, ConvClassifier])
def test_tasks_that_were_trained_one_after_the_other(kind, tmp_path, caplog):
    torch.manual_seed(0)
    model, rnf = kind(), RelevanceFreezing()
    train(model, rnf, "a")
    early = rnf.export(model, "a")
    train(model, rnf, "b", "c")
    x = inputs()
    for task in ("a", "b", "c"):
        with torch.no_grad(), rnf.recall(task):
            expected = model(x)
        before = snapshot(model)
        with caplog.at_level(logging.INFO, "lightning_rnf"):
            small = rnf.export(model, task)
        assert changes(before, snapshot(model)) == []
        assert f"{task}: exported with {parameters(small)} of the model's {parameters(model)}" in caplog.text
        assert_same_logits(small, x, expected)
        assert [name for name in shapes(small) if name.startswith("heads")] == [
            f"heads.tasks.{task}.weight",
            f"heads.tasks.{task}.bias",
        ]
        relevant = rnf.state.tasks[task].relevant["body.0" if kind is Classifier else "body.1"]
        assert len(next(small.parameters())) == max(1, int(relevant.sum())) < len(relevant)
        if task == "a":
            assert all(torch.equal(value, early.state_dict()[key]) for key, value in small.state_dict().items())
    assert model.heads.active == "c"
    assert model.trainer is not None


@pytest.mark.filterwarnings("ignore:no free units")
def test_as_in_recall_the_whole_network_speaks_in_the_paper_s_retention():
    torch.manual_seed(0)
    model, rnf = ConvClassifier(), RelevanceFreezing.paper()
    train(model, rnf, "a")
    train(model, rnf, "b")
    with torch.no_grad(), rnf.recall("a"):
        expected = model(inputs())
    small = rnf.export(model, "a")
    assert_same_logits(small, inputs(), expected)
    assert len(next(small.parameters())) == 16


def test_a_copy_of_a_whole_model_is_without_its_trainer():
    class NotCopied:
        def __deepcopy__(self, memo):
            raise TypeError("a Trainer holds loaders and loggers")

    model = Classifier()
    model._trainer = trainer = NotCopied()
    twin, _ = copied_whole(model, [], {}, "it can't be followed")
    assert twin._trainer is None
    assert model._trainer is trainer
    model.held = NotCopied()
    with pytest.raises(ValueError, match=r"^it can't be followed; nor can Classifier be copied"):
        copied_whole(model, [], {}, "it can't be followed")


def test_compiled_models():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a")
    with torch.no_grad(), rnf.recall("a"):
        expected = model(inputs())
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(inputs())
    assert_same_logits(rnf.export(compiled, "a"), inputs(), expected)
    model.body[3].compile(backend="eager")
    with torch.no_grad():
        model.eval()(inputs())
    assert_same_logits(rnf.export(model, "a"), inputs(), expected)
    torch.compiler.reset()


def test_a_compiled_part():
    torch.manual_seed(0)
    net = nn.Sequential(torch.compile(mlp(), backend="eager"), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
    task = Task(net, (4,))
    task.check()
    torch.compiler.reset()


def test_an_encoder_with_padding_at_the_end_keeps_off_the_fast_path_as_recall_does():
    net = Built(
        lambda self, x: self.head(self.encoder(x, src_key_padding_mask=0 * x[..., 0] + self.padding > 0).mean(1)),
        encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True), 2),
        head=nn.Linear(16, CLASSES),
    )
    net.register_buffer("padding", torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    Task(net, (5, 16)).check()


@pytest.mark.parametrize("place", ["0", "1", "2", "4"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_the_user_that_change_what_goes_in_or_comes_out_are_followed(place, before):
    net = mlp()
    part = net.get_submodule(place)
    if before:
        part.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    else:
        part.register_forward_hook(lambda module, args, output: output * 1.5)
    Task(net, (4,)).check()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_forward_that_decides_by_values_can_not_be_traced():
    net = Built(lambda self, x: self.net(x if x.sum() > 0 else -x), net=mlp())
    task = Task(net, (4,))
    with pytest.raises(ValueError, match=r"forward of Built can't be traced by torch.fx .*control flow.*__init__"):
        task.exported()


def test_another_head_than_the_task_s():
    net = Built(
        lambda self, x: self.heads[self.active](self.fc(x).relu()),
        fc=nn.Linear(4, 6),
        heads=nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)]),
    )
    net.active = 0
    task = Task(net, (4,))
    task.check()
    net.active = 1
    with pytest.raises(ValueError, match=r"runs another head than 'heads\.0'"):
        task.exported()


def test_a_layer_that_did_not_run():
    net = Built(lambda self, x: self.head(self.fc(x) if self.deep else x), fc=nn.Linear(4, 4), head=nn.Linear(4, 2))
    net.deep = True
    task = Task(net, (4,))
    net.deep = False
    with pytest.raises(ValueError, match="unit layer 'fc' did not run"):
        task.exported()


def test_an_unknown_task():
    with pytest.raises(KeyError, match="no finished task 'a'"):
        RelevanceFreezing().export(Classifier(), "a")


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_are_of_one_sample():
    net = convnet()
    by_hand = 2 * (6 * 6 * 4 * 2 * 9 + 4 * 4 * 5 * 4 * 9 + 20 * 6 + 6 * CLASSES)
    for samples in (1, 5):
        assert size_of(net, torch.randn(samples, 2, 6, 6)) == Size(parameters(net), by_hand)


def test_examples_may_be_tuples_and_dicts():
    net = nn.Bilinear(3, 4, 5)
    two = {"input1": torch.randn(6, 3), "input2": torch.randn(6, 4)}
    assert size_of(net, two) == size_of(net, tuple(two.values()))


def test_fewer_units_are_fewer_operations():
    task = task_of("residual")
    count = SubnetworkFlops(task.net, task.layers, task.x)
    order = torch.randperm(sum(layer.units for layer in task.layers), generator=torch.Generator().manual_seed(0))
    sizes = [layer.units for layer in task.layers]
    flops = [
        count(dict(zip((layer.name for layer in task.layers), (order >= cutoff).split(sizes), strict=True)))
        for cutoff in range(0, len(order), 7)
    ]
    assert flops[0] == count.total == size_of(task.net, task.x).flops
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < flops[0] / 20


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(
    "name", ["convnet", "residual", "dense", "gated-by-views", "separable", "mixing", "norm-goes-on"]
)
def test_onnx_gives_the_logits_of_recall(name, tmp_path):
    if torch.__version__ < (2, 9):
        pytest.skip("today's onnxscript needs torch 2.9, the first that exports with it by default")
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    task = task_of(name, double=False)
    path = tmp_path / "small.onnx"
    torch.onnx.export(task.exported(), (task.x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("samples")},))
    session = onnxruntime.InferenceSession(path)
    for samples in (6, 3):
        (found,) = session.run(None, {session.get_inputs()[0].name: task.x[:samples].numpy()})
        expected = task.logits()[:samples]
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * max(scale, 1.0))


# -- torchvision ------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "resnet18": 0.6,
    "vgg11_bn": 0.4,
    "mobilenet_v2": 0.4,
    "squeezenet1_0": 0.4,
    "densenet121": 0.4,
    "efficientnet_b0": 0.4,
    "regnet_y_400mf": 0.85,
    "googlenet": 0.4,
    "convnext_tiny": 0.6,
    "vit_b_16": 0.7,
}
"""The largest share of the parameters that may be left with a random half of the units."""
WIDE = [
    pytest.param(name, marks=pytest.mark.slow) if name in NARROW or "vgg" in name else name for name in ARCHITECTURES
]


@pytest.mark.parametrize("name", WIDE)
def test_torchvision(name):
    torch.manual_seed(0)
    options = {"vit_b_16": {"image_size": 32}, "googlenet": {"aux_logits": False, "init_weights": False}}
    check_architecture(whole(name, num_classes=CLASSES, **options.get(name, {})), ARCHITECTURES[name])


@pytest.mark.parametrize("name", NARROW)
def test_narrow_networks_of_torchvision(name):
    torch.manual_seed(0)
    check_architecture(narrow(name, CLASSES), {"vit_b_16": 0.85}.get(name, 0.7))


def check_architecture(net: nn.Module, share: float) -> None:
    for part in net.modules():
        if isinstance(part, nn.Linear):  # some heads begin at zero, and some layers are made for millions of images
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    task = Task(net, (3, 32, 32))
    small = task.check()
    assert parameters(small) < share * parameters(net)


def test_a_network_is_exported_and_counted_while_its_frozen_rows_are_spared():
    layer = nn.Linear(6, 10)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(10, 2))
    with learning(layer, torch.arange(10) < 5)[1]:
        traced = Traced.of(model, ())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]

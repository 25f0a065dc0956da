"""More networks than `zoo` has, in tiny forms with random weights, and for all of them two tasks.

Of timm, transformers, torchvision, torch-geometric and plain torch. Each entry says what its data are. Not part of the
test environment, but for what is plain torch: `table.py` says what to install.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from zoo import CLASSES, SIDE, TOKENS, VOCABULARY, of_timm, of_transformers

Batch = tuple[Any, Tensor]
TASKS = ("first", "second")


@dataclass(frozen=True)
class Specimen:
    """A network and what it is fed.

    Attributes:
        build: makes it; its last layer of `CLASSES` outputs is the head of the first task.
        data: ``(task, samples, seed)`` to its inputs and targets.
        family: a column of the table.
        loss: of logits and targets.
        outputs: of its head.
    """

    build: Callable[[], nn.Module]
    data: Callable[[str, int, int], Batch]
    family: str
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    outputs: int = CLASSES


def images(task: str, samples: int, seed: int, side: int = SIDE) -> Batch:
    """Gratings: the first task asks for their direction, the second for their frequency."""
    if task == "first":
        x, y = zoo.images(samples, seed)
    else:
        generator = torch.Generator().manual_seed(10_000 + seed)
        y = torch.arange(samples) % CLASSES
        angle = torch.pi * torch.rand(samples, generator=generator)
        across = torch.linspace(0, 1, SIDE)
        along = across[None, :, None] * angle.cos()[:, None, None] + across[None, None] * angle.sin()[:, None, None]
        turns = torch.tensor([2.0, 10.0, 22.0, 40.0])[y]
        phase = 6.28 * torch.rand(samples, 1, 1, generator=generator)
        x = (along * turns[:, None, None] + phase).sin()[:, None]
        x = x + 0.5 * torch.randn(samples, 3, SIDE, SIDE, generator=generator)
    return (x if side == SIDE else nn.functional.interpolate(x, size=(side, side))), y


def larger_images(task: str, samples: int, seed: int) -> Batch:
    return images(task, samples, seed, 64)


def tokens(task: str, samples: int, seed: int) -> Batch:
    """Half of the tokens are of the class's own quarter of the task's words; the second task has other words."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    first, words = 2 + 30 * TASKS.index(task), 28
    y, own = torch.arange(samples) % CLASSES, words // CLASSES
    any_word = torch.randint(words, (samples, TOKENS), generator=generator)
    of_class = y[:, None] * own + torch.randint(own, (samples, TOKENS), generator=generator)
    return first + torch.where(torch.rand(samples, TOKENS, generator=generator) < 0.5, of_class, any_word), y


def ended(task: str, samples: int, seed: int) -> Batch:
    """As `tokens`, the last one always the same."""
    x, y = tokens(task, samples, seed)
    return torch.cat([x[:, :-1], torch.ones(samples, 1, dtype=x.dtype)], 1), y


def sequences(task: str, samples: int, seed: int) -> Batch:
    """Two channels have a pulse, and the class says which two, and which came first; other channels in each task."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    y = torch.arange(samples) % CLASSES
    x = 0.2 * torch.randn(samples, TOKENS, 8, generator=generator)
    start, apart = (torch.randint(0, most, (samples,), generator=generator) for most in (5, 8))
    first = 2 * (y // 2) + 4 * TASKS.index(task)
    rows, late = torch.arange(samples), start + apart + 1
    x[rows, start, first + y % 2] += 2
    x[rows, late, first + 1 - y % 2] += 2
    return x, y


def channels_first(task: str, samples: int, seed: int) -> Batch:
    x, y = sequences(task, samples, seed)
    return x.transpose(1, 2).contiguous(), y


def table(task: str, samples: int, seed: int) -> Batch:
    """Sixteen columns; the class is in which quarter the angle of two projections lies, others for each task."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    x = torch.randn(samples, 16, generator=generator)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(TASKS.index(task)))).Q
    first, second = (x @ plane).unbind(1)
    return x, 2 * (first > 0).long() + (second > 0).long()


def several_labels(task: str, samples: int, seed: int) -> Batch:
    x, y = table(task, samples, seed)
    return x, torch.stack([y > 1, y % 2 == 1, (x[:, 0] > 0) ^ (task == "second"), x[:, 1] > x[:, 2]], 1).float()


def numbers(task: str, samples: int, seed: int) -> Batch:
    """Two numbers: a product and a sine of projections."""
    x, _ = table(task, samples, seed)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(5 + TASKS.index(task)))).Q
    first, second = (x @ plane).unbind(1)
    return x, torch.stack([first + second.tanh(), (2 * first).sin()], 1)


def points(task: str, samples: int, seed: int) -> Batch:
    """Clouds of 32 points: sphere, cube, disk or line, ``(N, 32, 3)``; the second task asks for their centre."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    y = torch.arange(samples) % CLASSES
    kind = y if task == "first" else torch.randint(CLASSES, (samples,), generator=generator)
    x = torch.randn(samples, 32, 3, generator=generator)
    shapes = torch.stack(
        [
            nn.functional.normalize(x, dim=-1),
            x.clamp(-0.7, 0.7),
            x * torch.tensor([1, 1, 0]),
            x * torch.tensor([1, 0, 0]),
        ]
    )
    x = shapes[kind, torch.arange(samples)]
    if task == "second":
        x = x + torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]])[y][:, None]
    return x, y


def pixels(task: str, samples: int, seed: int) -> Batch:
    """Rectangles on noise, and of each pixel of which of three kinds it is, or background."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    x = 0.3 * torch.randn(samples, 3, SIDE, SIDE, generator=generator)
    y = torch.zeros(samples, SIDE, SIDE, dtype=torch.long)
    signs = torch.tensor([[[1, 1, 0], [0, 1, 1], [1, 0, 1]], [[-1, 1, 0], [0, -1, 1], [1, 0, -1]]])[TASKS.index(task)]
    for sample in range(samples):
        for kind in range(1, CLASSES):
            top, left = torch.randint(0, SIDE - 12, (2,), generator=generator).tolist()
            x[sample, :, top : top + 12, left : left + 12] = signs[kind - 1, :, None, None].float()
            y[sample, top : top + 12, left : left + 12] = kind
        x[sample] += 0.3 * torch.randn(3, SIDE, SIDE, generator=generator)
    return x, y


def next_tokens(task: str, samples: int, seed: int) -> Batch:
    """Counting in steps, of another size in each task: ``(N, TOKENS)`` and the next token of each."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    start = torch.randint(VOCABULARY, (samples, 1), generator=generator)
    step = 1 + 2 * TASKS.index(task) + 2 * torch.randint(2, (samples, 1), generator=generator)
    text = (start + step * torch.arange(TOKENS + 1)) % VOCABULARY
    return text[:, :-1], text[:, 1:]


def of_positions(logits: Tensor, target: Tensor) -> Tensor:
    """Classes last, as language models have them."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


# ---- plain torch


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 32, batch_first=True, **options)
        self.head = nn.Linear(32 * (1 + self.layer.bidirectional), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


class Cell(nn.Module):
    """Unrolled by hand: its layers run once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.say = nn.Linear(8, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 32)
        for step in x.unbind(1):
            state = torch.tanh(self.hear(step) + self.say(state))
        return self.head(state)


class Residual1d(nn.Module):
    """A step of a temporal convolutional network: causal, dilated, weight norm."""

    def __init__(self, inputs: int, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, width, 3, dilation=dilation))
        self.skip = nn.Conv1d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(self.pad(x)).relu() + self.skip(x)).relu()


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, 32), nn.Parameter(0.1 * torch.randn(TOKENS, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.places).mean(1))


class Bags(nn.Module):
    """fastText's: a mean of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(VOCABULARY, 32)
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(x)).relu())


class UNet(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.down, self.bottom = block(3, width), block(width, 2 * width)
        self.up, self.join = nn.ConvTranspose2d(2 * width, width, 2, 2), block(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        below = self.bottom(nn.functional.max_pool2d(skip, 2))
        return self.head(self.join(torch.cat([skip, self.up(below)], 1)))


class Points(nn.Module):
    """PointNet's core: the same layers for each point, the largest of all."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU())
        self.all = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.all(self.each(x).amax(1)))


class Experts(nn.Module):
    """Two of four experts for each sample, weighed by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(16, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        weights, chosen = self.gate(x).softmax(1).topk(2, 1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(1, keepdim=True)
            out = out + weight * expert(x)
        return self.head(out)


class Cross(nn.Module):
    """Deep and cross: products with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for layer in self.cross:
            crossed = x * layer(crossed) + crossed
        return self.head(torch.cat([crossed, self.deep(x)], 1))


class FTTransformer(nn.Module):
    """A token for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(17, 24) / 5) for _ in range(2))
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.new_ones(len(x), 1), x], 1)[..., None] * self.scale + self.shift
        return self.head(self.norm(self.encoder(x)[:, 0]))


class Snake(nn.Module):
    """A learnt activation: a slope for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin() ** 2 / (self.alpha + 1e-6)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer on Gaussian bumps: a linear layer of what each input is in each bump."""

    def __init__(self, inputs: int, outputs: int, bumps: int = 6) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, bumps))
        self.mix = nn.Linear(inputs * bumps, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix((-((x[..., None] - self.centres) ** 2) * 2).exp().flatten(1))


class Twins(nn.Module):
    """Both halves of the input by one tower, and what they differ by."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.tower(x[:, :8]), self.tower(x[:, 8:])
        return self.head(torch.cat([left, right, (left - right).abs()], 1))


class Dilated(nn.Module):
    """The same filters at three dilations, in three layers that have one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 24, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv1d(24, 24, 3, padding=size, dilation=size) for size in (1, 2, 4))
        for branch in self.branches:
            branch.weight = self.branches[0].weight
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        return self.head(torch.cat([branch(stem).relu().amax(2) for branch in self.branches], 1))


class Weighted(nn.Module):
    """A small network that makes the weights of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16 * 8))
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        made = self.maker(x).unflatten(1, (8, 16))
        return self.head(self.body((made @ x[..., None])[..., 0]))


class Tied(nn.Module):
    """Logits of tokens by the embeddings' own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layer, self.out = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 32)
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.layer(self.embed(x))[0]))


def mlp(*between: Callable[[int], nn.Module], inputs: int = 16, outputs: int = CLASSES, width: int = 48) -> Any:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for size in (inputs, width):
            layers += [nn.Linear(size, width), *(make(width) for make in between)]
        return nn.Sequential(*layers, nn.Linear(width, outputs))

    return build


def convolutions(
    norm: Callable[[int], nn.Module], activation: Callable[[], nn.Module] = nn.ReLU, wrap: Any = None
) -> Any:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
            conv = nn.Conv2d(inputs, outputs, 3, 2, 1)
            layers += [wrap(conv) if wrap else conv, norm(outputs), activation()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))

    return build


def relu(_: int) -> nn.Module:
    return nn.ReLU()


# ---- others' packages


def of_torchvision(name: str, **options: Any) -> Any:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)

    return build


class FirstOf(nn.Module):
    """torchvision's segmentation models say a dict."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        options = {} if name.startswith("lraspp") else {"aux_loss": False}
        self.net = getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, num_classes=CLASSES, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["out"]


class Graphs(nn.Module):
    """Two convolutions on a graph of 12 nodes, the same for all samples: nodes of a batch are one graph's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch_geometric.nn as geometric

        if kind == "GINConv":
            self.first, self.second = (
                geometric.GINConv(nn.Sequential(nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 32))) for size in (8, 32)
            )
        else:
            self.first, self.second = (getattr(geometric, kind)(size, 32) for size in (8, 32))
        self.head = nn.Linear(32, CLASSES)
        around = torch.arange(TOKENS)
        edges = torch.stack([around[:-1], around[1:]])
        self.register_buffer("edges", torch.cat([edges, edges.flip(0)], 1))

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(0, 1)
        apart = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
        edges = (self.edges[None] + apart).permute(1, 0, 2).flatten(1)
        nodes = self.second(self.first(nodes, edges).relu(), edges).relu()
        return self.head(nodes.unflatten(0, (len(x), -1)).amax(1))


class OnWaves(nn.Module):
    """A speech model: its logits alone, of waves of 400 samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{kind}Config")(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            num_labels=CLASSES,
            classifier_proj_size=32,
            apply_spec_augment=False,
        )
        self.model = getattr(transformers, f"{kind}ForSequenceClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def waves(task: str, samples: int, seed: int) -> Batch:
    """Tones: the first task asks for the pitch, the second for how fast the loudness swells."""
    generator = torch.Generator().manual_seed(seed + (task == "second") * 10_000)
    y = torch.arange(samples) % CLASSES
    time = torch.arange(400) / 400
    pitch = torch.tensor([8.0, 20, 40, 80])[y if task == "first" else torch.randint(4, (samples,), generator=generator)]
    swell = torch.tensor([0.0, 2, 5, 10])[y if task == "second" else torch.randint(4, (samples,), generator=generator)]
    phase = 6.28 * torch.rand(samples, 1, generator=generator)
    wave = (6.28 * pitch[:, None] * time + phase).sin() * (1 + (6.28 * swell[:, None] * time).cos())
    return wave + 0.2 * torch.randn(samples, 400, generator=generator), y


class Backbone(nn.Module):
    """A model of transformers that has no classifier: a layer on the mean of what it says."""

    def __init__(self, kind: str, config: str, width: int = 32, **sizes: Any) -> None:
        super().__init__()
        import transformers

        self.model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x).last_hidden_state.mean(1))


class Adapted(nn.Module):
    """A model of transformers under an adapter of PEFT; all but adapter and head stay."""

    def __init__(self, build: Callable[[], nn.Module], **options: Any) -> None:
        super().__init__()
        import peft

        net = build()
        self.model = peft.get_peft_model(net.model, peft.LoraConfig(r=8, **options))
        for parameter in self.model.base_model.model.classifier.parameters():
            parameter.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class NextToken(nn.Module):
    def __init__(self, kind: str, **sizes: Any) -> None:
        super().__init__()
        self.model = of_transformers(kind, "ForCausalLM", **sizes)().model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


PLAIN: dict[str, Specimen] = {
    "MLP": Specimen(mlp(relu), table, "torch"),
    "MLP, GELU and layer norm": Specimen(mlp(nn.LayerNorm, lambda _: nn.GELU()), table, "torch"),
    "MLP, batch norm before its ReLU": Specimen(mlp(nn.BatchNorm1d, relu), table, "torch"),
    "MLP, batch norm behind its ReLU": Specimen(mlp(relu, nn.BatchNorm1d), table, "torch"),
    "MLP, several labels": Specimen(mlp(relu), several_labels, "torch", nn.functional.binary_cross_entropy_with_logits),
    "MLP, two numbers": Specimen(mlp(relu, outputs=2), numbers, "torch", nn.functional.mse_loss, 2),
    "MLP, SELU": Specimen(mlp(lambda _: nn.SELU()), table, "torch"),
    "MLP, PReLU a channel": Specimen(mlp(nn.PReLU), table, "torch"),
    "MLP, sines of its own": Specimen(mlp(Snake), table, "torch"),
    "deep and cross": Specimen(Cross, table, "torch"),
    "FT-Transformer": Specimen(FTTransformer, table, "torch"),
    "Kolmogorov-Arnold": Specimen(
        lambda: nn.Sequential(Splines(16, 24), Splines(24, 24), nn.Linear(24, CLASSES)), table, "torch"
    ),
    "experts, two of four": Specimen(Experts, table, "torch"),
    "siamese towers": Specimen(Twins, table, "torch"),
    "one weight at three dilations": Specimen(Dilated, channels_first, "torch"),
    "hypernetwork": Specimen(Weighted, table, "torch"),
    "CNN, batch norm": Specimen(convolutions(nn.BatchNorm2d), images, "torch"),
    "CNN, group norm": Specimen(convolutions(lambda width: nn.GroupNorm(4, width)), images, "torch"),
    "CNN, instance norm": Specimen(convolutions(nn.InstanceNorm2d), images, "torch"),
    "CNN, spectral norm": Specimen(
        convolutions(lambda _: nn.Identity(), wrap=nn.utils.parametrizations.spectral_norm), images, "torch"
    ),
    "CNN, weight norm": Specimen(
        convolutions(lambda _: nn.Identity(), wrap=nn.utils.parametrizations.weight_norm), images, "torch"
    ),
    "CNN, sines": Specimen(convolutions(nn.BatchNorm2d, Sine), images, "torch"),
    "U-Net, pixels": Specimen(UNet, pixels, "torch"),
    "LSTM": Specimen(lambda: Recurrent(nn.LSTM), sequences, "torch"),
    "LSTM, two layers, both ways": Specimen(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sequences, "torch"
    ),
    "GRU": Specimen(lambda: Recurrent(nn.GRU), sequences, "torch"),
    "RNN, tanh": Specimen(lambda: Recurrent(nn.RNN), sequences, "torch"),
    "cell unrolled by hand": Specimen(Cell, sequences, "torch"),
    "TCN, weight norm": Specimen(
        lambda: nn.Sequential(
            Residual1d(8, 24, 1),
            Residual1d(24, 24, 2),
            Residual1d(24, 24, 4),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ),
        channels_first,
        "torch",
    ),
    "transformer encoder": Specimen(Encoder, tokens, "torch"),
    "transformer encoder, norm first": Specimen(lambda: Encoder(norm_first=True, activation="gelu"), tokens, "torch"),
    "embedding bag": Specimen(Bags, tokens, "torch"),
    "GRU of tokens, tied weights": Specimen(Tied, next_tokens, "torch", of_positions, VOCABULARY),
    "PointNet": Specimen(Points, points, "torch"),
}


VISION: dict[str, Specimen] = {
    name: Specimen(of_torchvision(name, **options), data, "torchvision")
    for name, data, options in (
        ("squeezenet1_1", larger_images, {}),
        ("shufflenet_v2_x0_5", larger_images, {}),
        ("mnasnet0_5", images, {}),
        ("googlenet", larger_images, {"init_weights": False, "aux_logits": False}),
        ("regnet_x_400mf", images, {}),
    )
} | {
    name: Specimen(lambda name=name: FirstOf(name), pixels, "torchvision")
    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
}

GRAPHS = {
    kind: Specimen(lambda kind=kind: Graphs(kind), sequences, "torch-geometric")
    for kind in ("GCNConv", "GATConv", "GATv2Conv", "SAGEConv", "GINConv", "TransformerConv", "GraphConv")
}

_V = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def resmlp() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer, ResBlock

    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "num_blocks": 2, "mlp_ratio": 4}
    return MlpMixer(num_classes=CLASSES, block_layer=ResBlock, **sizes)


MORE_IMAGES = {
    name: Specimen(of_timm(kind, **options), data, "timm")
    for name, kind, data, options in (
        ("res2net50d", "res2net50d", images, {"layers": (1, 1, 1, 1)}),
        ("resnest14d", "resnest14d", images, {}),
        ("skresnet18", "skresnet18", images, {}),
        ("ecaresnet26t", "ecaresnet26t", images, {"layers": (1, 1, 1, 1)}),
        ("mobilenetv2_050", "mobilenetv2_050", images, {}),
        ("lcnet_050", "lcnet_050", images, {}),
        ("tinynet_e", "tinynet_e", images, {}),
        ("rexnetr_100", "rexnetr_100", images, {}),
        ("mobileone_s0", "mobileone_s0", images, {}),
        ("repghostnet_050", "repghostnet_050", images, {}),
        ("nf_resnet26", "nf_resnet26", images, {}),
        ("hrnet_w18_small", "hrnet_w18_small", larger_images, {}),
        ("convmixer", "convmixer.ConvMixer", images, {"dim": 48, "depth": 4, "patch_size": 4}),
        ("cait", "cait_xxs24_224", images, {**_V, "num_heads": 4}),
        ("xcit", "xcit_nano_12_p16_224", images, {**_V, "num_heads": 4}),
        (
            "twins",
            "twins_svt_small",
            larger_images,
            {"img_size": 64, "embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
        ),
        (
            "pvt_v2",
            "pvt_v2_b0",
            larger_images,
            {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
        ),
        (
            "levit_128s",
            "levit_128s",
            larger_images,
            {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 8},
        ),
        ("mobilevit_xxs", "mobilevit_xxs", larger_images, {}),
        ("beit", "beit_base_patch16_224", images, _V),
        (
            "sequencer2d",
            "sequencer2d_s",
            larger_images,
            {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
        ),
        ("mambaout", "mambaout_femto", images, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
        ("starnet_s1", "starnet_s1", images, {"depths": (1, 1, 1, 1)}),
        (
            "nest",
            "nest.Nest",
            larger_images,
            {
                "img_size": 64,
                "num_levels": 3,
                "patch_size": 4,
                "embed_dims": (16, 32, 48),
                "num_heads": (1, 2, 3),
                "depths": (1, 1, 1),
            },
        ),
        (
            "davit",
            "davit_tiny",
            larger_images,
            {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 4, 4)},
        ),
        ("focalnet", "focalnet.FocalNet", larger_images, {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
        (
            "tiny_vit",
            "tiny_vit.TinyVit",
            larger_images,
            {
                "embed_dims": (16, 32, 48, 64),
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 2, 3, 4),
                "window_sizes": (4, 4, 4, 4),
            },
        ),
        ("efficientvit_b0", "efficientvit_b0", larger_images, {}),
        ("inception_next", "inception_next_atto", images, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
    )
}

MORE_IMAGES |= {
    "resmlp": Specimen(resmlp, images, "timm"),
}

_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_OF_TEXT: dict[str, Callable[[], nn.Module]] = {
    "ALBERT": of_transformers("Albert", embedding_size=16),
    "DeBERTa v2": of_transformers("DebertaV2", relative_attention=True, position_buckets=8),
    "MPNet": of_transformers("MPNet"),
    "Nyströmformer": of_transformers("Nystromformer", num_landmarks=4, segment_means_seq_len=16),
    "FNet": of_transformers("FNet"),
    "MobileBERT": of_transformers("MobileBert", intra_bottleneck_size=16, true_hidden_size=16, embedding_size=16),
    "SqueezeBERT": of_transformers("SqueezeBert", embedding_size=32),
    "I-BERT": of_transformers("IBert"),
    "RoFormer": of_transformers("RoFormer", embedding_size=32),
    "OPT": of_transformers("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "GPT-NeoX": of_transformers("GPTNeoX"),
    "Falcon": of_transformers("Falcon"),
    "BLOOM": of_transformers("Bloom", n_layer=2, n_head=4),
    "Mistral": of_transformers("Mistral", num_key_value_heads=2),
    "Mixtral": of_transformers("Mixtral", num_key_value_heads=2, num_local_experts=4),
    "Gemma": of_transformers("Gemma", num_key_value_heads=2, head_dim=8),
    "Phi": of_transformers("Phi", num_key_value_heads=2),
    "GPT-2 whole": of_transformers("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Mamba": lambda: Backbone(
        "MambaModel", "MambaConfig", hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8
    ),
    "T5 encoder": lambda: Backbone(
        "T5EncoderModel", "T5Config", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY
    ),
    "LoRA on BERT": lambda: Adapted(
        of_transformers("Bert"), target_modules="all-linear", exclude_modules=["classifier"]
    ),
}
MORE_TEXTS = {name: Specimen(build, tokens, "transformers") for name, build in _OF_TEXT.items()} | {
    name: Specimen(
        lambda name=name, sizes=sizes: NextToken(name, **sizes), next_tokens, "transformers", of_positions, VOCABULARY
    )
    for name, sizes in (("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),)
}
MORE_TEXTS["BART"] = Specimen(of_transformers("Bart", **_BART), ended, "transformers")
MORE_TEXTS["wav2vec2"] = Specimen(lambda: OnWaves("Wav2Vec2"), waves, "transformers")
MORE_TEXTS["HuBERT"] = Specimen(lambda: OnWaves("Hubert"), waves, "transformers")

_OF_PIXELS = {
    "HF BEiT": of_transformers("Beit", **zoo._PATCHES, patch_size=8),
    "HF ResNet": of_transformers(
        "ResNet", **zoo._PATCHES, embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]
    ),
    "HF PoolFormer": of_transformers("PoolFormer", **zoo._PATCHES, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 48]),
    "HF MobileViT": of_transformers(
        "MobileViT", **zoo._PATCHES, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64]
    ),
}
MORE_OF_PIXELS = {name: Specimen(build, images, "transformers") for name, build in _OF_PIXELS.items()}

OF_ZOO = {
    name: Specimen(
        build,
        tokens if name in zoo.TEXTS else larger_images if name in {"maxvit", "hiera"} else images,
        "timm" if name in zoo.IMAGES else "transformers",
    )
    for name, build in zoo.BUILD.items()
}
ALL: dict[str, Specimen] = {**PLAIN, **VISION, **GRAPHS, **OF_ZOO, **MORE_IMAGES, **MORE_TEXTS, **MORE_OF_PIXELS}

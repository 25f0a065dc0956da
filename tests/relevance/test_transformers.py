"""Norms, attention, gates and smooth activations: rules by hand, and what arrives in networks made of them."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager

import pytest
import torch
from launched import ROOT
from networks import CLASSES, Built, convnet, labelled, mlp
from torch import Tensor, nn
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance import attribution
from lightning_rnf.relevance.attribution import Attribution, attribute
from lightning_rnf.relevance.conservation import BIAS, INPUT
from lightning_rnf.relevance.functions import FunctionRules
from lightning_rnf.relevance.heatmaps import heatmaps
from lightning_rnf.relevance.layers import by_sign

WIDTH, HEADS, LENGTH = 8, 2, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def attributed(net: nn.Module, batch: tuple[Tensor, Tensor], **options) -> Attribution:
    return attribute(net, UnitMap.of(net, batch).layers, [batch], **options)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def relevance_of(function, *tensors: Tensor, relevance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of each tensor, where the function's value has its own as relevance or this."""
    with FunctionRules():
        value = function(*tensors)
    torch.testing.assert_close(value, function(*tensors))
    return torch.autograd.grad(value, tensors, value.detach() if relevance is None else relevance)


def close(found, expected, tolerance: float = 1e-5):
    torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


# -- two blocks of a transformer, by hand -----------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(bias), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12, bias=bias), nn.Linear(12, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def transformer(bias: bool = True) -> Built:
    net = Built(
        lambda net, x: net.head(net.norm(net.blocks(net.embed(x))).mean(1)),
        embed=nn.Linear(4, WIDTH, bias=bias),
        blocks=nn.Sequential(Block(bias), Block(bias)),
        norm=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, CLASSES, bias=bias),
    )
    if bias:
        for parameter in net.parameters():
            nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.3, 0.4)
    return net


def through_norm(norm: nn.LayerNorm, x: Tensor, g: Tensor) -> Tensor:
    """Of relevance over what it is of, ``g``: that of the norm's input. The normaliser is a constant."""
    g = g * norm.weight / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return g - g.mean(-1, keepdim=True)


@torch.no_grad()
def by_hand(net: Built, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """``R = z g`` at each layer's output z, with g followed through every equation of the forward."""
    inputs = [net.embed(x)]
    for block in net.blocks:
        inputs.append(block(inputs[-1]))
    found = {}

    def at(name: str, z: Tensor, g: Tensor) -> Tensor:
        found[name] = (z * g).sum((0, 1))
        return stabilised(z, g)

    def stabilised(z: Tensor, g: Tensor) -> Tensor:
        """Of the epsilon rule, for linear layers, sums and means."""
        return z * g / (z + torch.where(z < 0, -1e-6, 1e-6))

    top = inputs.pop()
    mean = net.norm(top).mean(1)
    logits = net.head(mean)
    g = stabilised(logits, nn.functional.one_hot(y, CLASSES).double()) @ net.head.weight
    g = through_norm(net.norm, top, (stabilised(mean, g) / LENGTH)[:, None].expand_as(top))
    for number in (1, 0):
        block, x_in = net.blocks[number], inputs[number]
        name, attention = f"blocks.{number}", block.attention
        middle = x_in + attention(block.norm1(x_in))
        z = block.up(block.norm2(middle))
        g = stabilised(middle + block.down(nn.functional.gelu(z)), g)
        g_z = at(f"{name}.down", block.down(nn.functional.gelu(z)), g) @ block.down.weight
        g_z = at(f"{name}.up", z, g_z * nn.functional.gelu(z) / z)
        g = g + through_norm(block.norm2, middle, g_z @ block.up.weight)
        h = block.norm1(x_in)
        q, k, v = (
            part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        s = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        a = s.softmax(-1)
        g = stabilised(middle, g)
        g_m = (
            (at(f"{name}.attention.out", attention(h), g) @ attention.out.weight)
            .unflatten(-1, (HEADS, -1))
            .transpose(1, 2)
        )
        told = a * (s - (a * s).sum(-1, keepdim=True))
        g_v = (a - told / 2).transpose(-2, -1) @ g_m
        e = g_m @ v.transpose(-2, -1)
        g_s = a * (e - (a * e).sum(-1, keepdim=True)) / 2 / math.sqrt(WIDTH // HEADS)
        g_q, g_k = g_s @ k / 2, g_s.transpose(-2, -1) @ q / 2
        g_h = 0
        for part, z, g_part in (("query", q, g_q), ("key", k, g_k), ("value", v, g_v)):
            z, g_part = (value.transpose(1, 2).flatten(2) for value in (z, g_part))
            g_part = at(f"{name}.attention.{part}", z, g_part)
            g_h = g_h + g_part @ getattr(attention, part).weight
        g = g + through_norm(block.norm1, x_in, g_h)
    at("embed", inputs[0], g)
    return found


def test_a_transformer_of_two_blocks_has_the_relevance_of_the_equations():
    net = transformer().double().eval()
    x, y = labelled(3, LENGTH, 4)
    found = attributed(net, (x.double(), y)).relevance
    expected = by_hand(net, x.double(), y)
    assert set(found) == set(expected)
    for name, relevance in found.items():
        assert relevance.abs().max() > 1e-4
        close(relevance, expected[name])


# -- norms ------------------------------------------------------------------------------------------------------------


def of_layer(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def of_root(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


NORMS = {
    "layer": (lambda x: nn.functional.layer_norm(x, (6,)), of_layer),
    "root": (lambda x: nn.functional.rms_norm(x, (6,), eps=1e-5), of_root),
    "of a scaled root": (
        lambda x: nn.functional.rms_norm(x, (6,), eps=1e-5),
        lambda x: (x.square().mean(-1, keepdim=True) + 1e-5).pow(-0.5).expand_as(x) * x,
    ),
    "groups": (
        lambda x: nn.functional.group_norm(x, 2),
        lambda x: of_layer(x.view(len(x), 2, -1)).view_as(x),
    ),
    "instances": (nn.functional.instance_norm, of_layer),
    "length": (nn.functional.normalize, lambda x: x / x.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_all_relevance_goes_through_a_norms_numerator(norm):
    function, written = NORMS[norm]
    x = leaf(3, 4, 6)
    y, g = function(x).detach(), torch.randn(3, 4, 6, dtype=torch.float64)
    (found,) = relevance_of(function, x, relevance=y * g)
    # By hand: y is linear in x, by the map that the norm is where it stands.
    scale = torch.ones_like(x) if norm in {"root", "of a scaled root", "length"} else None
    if scale is None:
        groups = x.view(3, 2, -1) if norm == "groups" else x
        spread = (groups.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        centred = (g.view_as(groups) - g.view_as(groups).mean(-1, keepdim=True)) * spread
        expected = (groups * centred).view_as(x)
    else:
        expected = y * g
    close(found, expected)
    (by_parts,) = relevance_of(written, x, relevance=y * g)
    torch.testing.assert_close(by_parts, found, rtol=1e-2, atol=1e-2)  # the parts have stabilisers


def test_the_shift_of_a_norm_takes_its_share():
    x, weight, bias = leaf(5, 6), *torch.rand(2, 6, dtype=torch.float64) + 0.5
    (found,) = relevance_of(lambda x: nn.functional.layer_norm(x, (6,), weight, bias), x)
    total = nn.functional.layer_norm(x, (6,), weight, bias).sum()
    close(found.sum(), total - 5 * bias.sum(), 1e-4)


def test_what_something_is_divided_by_takes_nothing():
    x, y = leaf(5, 7), leaf(5, 7)
    of_x, of_y = relevance_of(torch.div, x, y)
    close(of_x, x / y)
    assert not of_y.any()


def test_the_shift_of_a_batch_norm_takes_its_share_where_a_sum_is_read():
    """As in RepVGG's branch without a convolution: relevance of what the norm shifts is none of the sum's parts."""
    x, y = leaf(9, 4), leaf(9, 4)
    mean, var, weight, bias = torch.rand(4, 4, dtype=torch.float64) + 0.5

    def normed(x, y):
        return nn.functional.batch_norm((x + y).relu(), mean, var, weight, bias, False, 0.1, 1e-5)

    found = relevance_of(normed, x, y)
    for one, part in zip(found, (x, y), strict=True):
        torch.testing.assert_close(
            one, (part * (x + y > 0) * weight / (var + 1e-5).sqrt()).detach(), rtol=1e-3, atol=1e-4
        )


def test_a_batch_norm_behind_layers_lets_relevance_pass():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    nn.init.ones_(net[2].bias)
    batch = labelled(16, 4)
    found = attributed(net.eval(), batch).relevance["0"]
    assert torch.equal(found, attributed(net, batch, composite=EpsilonPlus()).relevance["0"])


# -- attention --------------------------------------------------------------------------------------------------------


def written(q, k, v, mask=None, scale=None):
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def of_einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", nn.functional.softmax(scores, dim=-1), v)


def of_batches(q, k, v):
    weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).mul(q.shape[-1] ** -0.5)
    weights = nn.functional.dropout(torch.softmax(weights, -1), 0.1, training=False)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


def test_every_form_of_attention_has_the_same_relevance_and_loses_none():
    tensors = leaf(2, 3, 5, 4), leaf(2, 3, 5, 4), leaf(2, 3, 5, 4)
    expected = relevance_of(written, *tensors)
    assert all(share.abs().max() > 1e-2 for share in expected)
    total = sum(share.sum() for share in expected)
    close(total, written(*tensors).sum(), 1e-4)
    for form in (of_einsum, of_batches, nn.functional.scaled_dot_product_attention):
        for found, share in zip(relevance_of(form, *tensors), expected, strict=True):
            close(found, share, 1e-4)


def test_masks_are_no_shares():
    tensors = leaf(2, 3, 5, 4), leaf(2, 3, 5, 4), leaf(2, 3, 5, 4)
    sees = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    smallest = mask.clamp_min(torch.finfo(torch.float64).min)
    expected = relevance_of(lambda *x: written(*x, smallest), *tensors)
    close(sum(share.sum() for share in expected), written(*tensors, mask).sum(), 1e-4)
    attention = nn.functional.scaled_dot_product_attention
    for form in (
        lambda *x: written(*x, mask),
        lambda *x: attention(*x, attn_mask=mask),
        lambda *x: attention(*x, attn_mask=sees),
        lambda *x: attention(*x, is_causal=True),
    ):
        for found, share in zip(relevance_of(form, *tensors), expected, strict=True):
            close(found, share, 1e-4)


def test_a_row_that_may_look_nowhere_has_no_relevance():
    tensors = leaf(1, 1, 3, 4), leaf(1, 1, 3, 4), leaf(1, 1, 3, 4)
    sees = torch.ones(3, 3, dtype=torch.bool)
    sees[1] = False
    found = relevance_of(lambda *x: nn.functional.scaled_dot_product_attention(*x, attn_mask=sees), *tensors)
    assert all(share.isfinite().all() for share in found)
    assert not found[0][..., 1, :].any()


def test_keys_that_several_queries_share_get_the_relevance_of_all():
    q, k, v = leaf(2, 4, 5, 4), leaf(2, 2, 5, 4), leaf(2, 2, 5, 4)
    found = relevance_of(lambda *x: nn.functional.scaled_dot_product_attention(*x, enable_gqa=True, scale=0.3), q, k, v)
    expected = relevance_of(
        lambda q, k, v: written(q, *(x.repeat_interleave(2, 1) for x in (k, v)), scale=0.3), q, k, v
    )
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-4)


def test_weights_that_were_turned_leave_all_to_the_values():
    scores, v = leaf(3, 4, 5), leaf(3, 4, 2)
    of_scores, of_values = relevance_of(lambda s, v: s.softmax(1).transpose(1, 2) @ v, scores, v)
    assert not of_scores.any()
    close(of_values.sum(), (scores.softmax(1).transpose(1, 2) @ v).sum(), 1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention_is_taken_apart(batch_first, masked):
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double().eval().requires_grad_(False)
    x = leaf(3, LENGTH, WIDTH)
    options = {}
    if masked:
        padding = torch.zeros(3, LENGTH, dtype=torch.bool)
        padding[1, 3:] = True
        options = {"key_padding_mask": padding, "attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)}

    def called(x):
        x = x if batch_first else x.transpose(0, 1)
        output = module(x, x, x, **options, need_weights=False)[0]
        return output if batch_first else output.transpose(0, 1)

    def by_parts(x):
        q, k, v = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None
        if masked:
            hidden = options["attn_mask"] | padding[:, None, None]
            mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -torch.inf)
        mixed = written(q, k, v, mask).transpose(1, 2).flatten(2)
        return nn.functional.linear(mixed, module.out_proj.weight, module.out_proj.bias)

    (found,), (expected,) = relevance_of(called, x), relevance_of(by_parts, x)
    assert found.abs().max() > 1e-2
    close(found, expected, 1e-4)
    weights = module(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[1]
    with FunctionRules():
        assert torch.allclose(module(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[1], weights)


# -- gates and activations --------------------------------------------------------------------------------------------


def test_a_gate_has_half_of_what_it_adds_to_where_it_stands_at_zero():
    x, gate = leaf(5, 7), leaf(5, 7)
    opened = gate.sigmoid().detach()

    def gated(x, gate):  # beside a sum and a smooth activation: no network of ReLUs
        return nn.functional.silu(x + gate) * 0 + x * gate.sigmoid()

    of_x, of_gate = relevance_of(gated, x, gate)
    close(of_gate, x * (opened - 0.5) / 2, 1e-4)
    close(of_x, x * (opened + 0.5) / 2, 1e-4)


def test_gates_of_relu_networks_have_half():
    x, gate = leaf(5, 7), leaf(5, 7)
    of_x, of_gate = relevance_of(lambda x, gate: x.relu() * gate.sigmoid(), x, gate)
    assert torch.equal(of_x, of_gate * (x > 0))


ACTIVATIONS = {
    "gelu by hand": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu by tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.0447 * torch.pow(x, 3.0)))),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared relu": lambda x: x.relu().square(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_written_by_hand_lose_nothing(activation):
    x, function = leaf(20, 7), ACTIVATIONS[activation]
    (found,) = relevance_of(lambda x: function(x + 0 * nn.functional.gelu(x)), x)
    close(found, function(x), 1e-3)


def test_a_gated_linear_unit_is_taken_apart():
    x = leaf(5, 8)
    (found,) = relevance_of(nn.functional.glu, x)
    (expected,) = relevance_of(lambda x: x[:, :4] * x[:, 4:].sigmoid(), x)
    close(found, expected)


def test_constants_that_are_added_take_their_share():
    x, constant = leaf(5, 7), torch.rand(7, dtype=torch.float64)
    for function, added in (
        (lambda x: x + constant, constant),
        (lambda x: constant + x, constant),
        (lambda x: x - 2, -2),
        (lambda x: torch.add(x, 3), 3),
    ):
        (found,) = relevance_of(function, x, relevance=torch.ones(5, 7, dtype=torch.float64))
        torch.testing.assert_close(found, (x / (x + added)).detach(), rtol=1e-2, atol=1e-4)


def test_a_product_after_a_constant_is_linear():
    x, weight, bias = leaf(5, 4), torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    (found,) = relevance_of(lambda x: torch.addmm(bias, x, weight), x)
    (expected,) = relevance_of(lambda x: nn.functional.linear(x, weight.T, bias), x)
    close(found, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_of_smooth_networks_split_by_the_sign_of_their_output(bias):
    conv = nn.Conv1d(6, 5, 1, bias=bias).double().requires_grad_(False)
    x, relevance = leaf(7, 6, 1), torch.randn(7, 5, 1, dtype=torch.float64)
    found = by_sign(conv, conv, x.detach(), relevance)
    z = torch.einsum("ni,oi->noi", x[..., 0], conv.weight[..., 0])
    b = conv.bias.expand(7, 5)[..., None] if bias else torch.zeros(7, 5, 1, dtype=torch.float64)
    total = z.sum(-1, keepdim=True) + b
    own = torch.where(total > 0, z.clamp(min=0), z.clamp(max=0))
    of_bias = torch.where(total > 0, b.clamp(min=0), b.clamp(max=0))
    expected = (own / (own.sum(-1, keepdim=True) + of_bias) * relevance).sum(1)
    close(found[..., 0], expected, 1e-4)
    assert found.abs().sum() <= relevance.abs().sum() + 1e-6


def test_a_smooth_network_with_sums_has_that_rule_and_a_chain_has_zennits():
    """The same layers, with and without a skip: where outputs are negative the two rules differ."""
    parts = {"first": nn.Conv1d(2, 4, 3, padding=1), "second": nn.Conv1d(4, 4, 3, padding=1)}
    batch, head = labelled(8, 2, 6), nn.Linear(4, CLASSES)
    for skip in (False, True):

        def forward(net, x, skip=skip):
            x = nn.functional.silu(net.first(x))
            y = net.second(x)
            return net.head(nn.functional.silu(x + y if skip else y).mean(2))

        net = Built(forward, **parts, head=head)
        found = attributed(net, batch).relevance["first"]
        expected = attributed(net, batch, composite=EpsilonPlus()).relevance["first"]
        assert torch.equal(found, expected) is not skip


# -- what arrives -----------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """RMS norms by hand, rotary embeddings, shared keys, gates: as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.down, self.scale = nn.Linear(12, WIDTH, bias=False), nn.Parameter(torch.rand(2, WIDTH))

    def normed(self, x: Tensor, number: int) -> Tensor:
        return self.scale[number] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.normed(x, 0)).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (q, k, v))
        q, k = self.turned(q), self.turned(k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.normed(x, 1)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Scaled(nn.Module):
    """Depthwise convolution, layer norm over channels, layer scale: as in ConvNeXt; and a gate over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, WIDTH, bias=False)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.full((WIDTH, 1, 1), 0.1))
        self.excite = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y * self.excite(y.mean((2, 3), keepdim=True)).sigmoid()


def encoder(first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.1, "gelu", norm_first=first, batch_first=True)
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    return layer


def on_sequences(*blocks: nn.Module) -> Built:
    return Built(
        lambda net, x: net.head(net.blocks(net.embed(x)).mean(1)),
        embed=nn.Linear(4, WIDTH, bias=False),
        blocks=nn.Sequential(*blocks),
        head=nn.Linear(WIDTH, CLASSES, bias=False),
    )


def on_images() -> Built:
    return Built(
        lambda net, x: net.head(net.blocks(net.embed(x)).mean((2, 3))),
        embed=nn.Conv2d(3, WIDTH, 2, stride=2, bias=False),
        blocks=nn.Sequential(*(Scaled() for _ in range(4))),
        head=nn.Linear(WIDTH, CLASSES, bias=False),
    )


STAND_INS = {
    "layer norm first": lambda: transformer(bias=False),
    "torch's encoder, norm first": lambda: on_sequences(encoder(True), encoder(True)),
    "torch's encoder, norm last": lambda: on_sequences(encoder(False), encoder(False)),
    "rotary, gated": lambda: on_sequences(*(Turned() for _ in range(4))),
    "convolutions, gated": on_images,
}


@pytest.mark.parametrize("name", STAND_INS)
def test_all_of_the_logits_relevance_arrives(name):
    net = STAND_INS[name]().eval()
    x, _ = labelled(8, 3, 8, 8) if "convolutions" in name else labelled(8, LENGTH, 4)
    found = attributed(net, (x, net(x).argmax(1))).conservation
    assert found.notes == ()
    assert found.loss() is None
    for cut in found.cuts:
        assert found.ratios[cut] == pytest.approx(1.0, abs=0.01)
    assert found.cuts[-1] == INPUT


def test_embedded_tokens_are_the_input_also_of_what_goes_past_the_first_layers():
    net = Built(
        lambda net, x: net.head(net.blocks(net.embed(x) + net.place.weight).mean(1)),
        embed=nn.Embedding(20, WIDTH),
        place=nn.Embedding(LENGTH, WIDTH),
        blocks=nn.Sequential(Block(bias=False), Block(bias=False)),
        head=nn.Linear(WIDTH, CLASSES, bias=False),
    ).eval()
    nn.init.zeros_(net.place.weight)
    x = torch.randint(20, (8, LENGTH))
    found = attributed(net, (x, net(x).argmax(1))).conservation
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=0.01)


def test_heatmaps_are_of_pixels_where_positions_are_embedded():
    net = Built(
        lambda net, x: net.head(
            net.block(net.embed(x).flatten(2).transpose(1, 2) + net.place(torch.arange(4))).mean(1)
        ),
        embed=nn.Conv2d(3, WIDTH, 4, stride=4),
        place=nn.Embedding(4, WIDTH),
        block=Block(),
        head=nn.Linear(WIDTH, CLASSES),
    ).eval()
    batch = labelled(4, 3, 8, 8)
    assert heatmaps(net, UnitMap.of(net, batch).layers, batch).shape == (4, 8, 8)


def test_what_is_added_is_a_cause_like_a_bias():
    net = on_sequences(Block(bias=False))
    net.place = nn.Parameter(torch.ones(LENGTH, WIDTH))
    net.compute = lambda net, x: net.head(net.blocks(net.embed(x) + net.place).mean(1))
    found = attributed(net.eval(), labelled(8, LENGTH, 4)).conservation
    assert BIAS in found.causes[INPUT] | found.causes["embed"]
    assert found.notes == ()


# -- what stays as it was ---------------------------------------------------------------------------------------------


def residual() -> Built:
    def forward(net: Built, x: Tensor) -> Tensor:
        x = net.norm0(net.stem(x)).relu()
        y = net.norm2(net.second(net.norm1(net.first(x)).relu()))
        y = (y + net.short(x)).relu()
        y = y * net.excite(y.mean((2, 3), keepdim=True)).sigmoid()
        return net.head(torch.cat([x, y], 1).mean((2, 3)))

    convs = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("first", "second")}
    parts = {"stem": nn.Conv2d(3, 4, 3), **convs, "short": nn.Conv2d(4, 4, 1), "excite": nn.Conv2d(4, 4, 1)}
    net = Built(forward, **parts, **{f"norm{i}": nn.BatchNorm2d(4) for i in range(3)}, head=nn.Linear(8, CLASSES))
    net(torch.randn(8, 3, 8, 8))
    return net.eval()


def normed() -> nn.Module:
    """A batch norm that is not merged."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)
    )


RELUS = {
    "mlp": (mlp, (4,)),
    "convnet": (convnet, (2, 6, 6)),
    "residual, gated": (residual, (3, 8, 8)),
    "norm that stays": (lambda: normed().eval(), (4,)),
    "smooth chain": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.SiLU(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(8, CLASSES)),
        (2, 6),
    ),
}


@pytest.mark.parametrize("name", RELUS)
def test_networks_of_relus_have_bit_by_bit_the_relevance_that_zennits_rules_give(name, monkeypatch):
    build, shape = RELUS[name]
    net, batch = build(), labelled(8, *shape)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    found = attributed(net, batch)
    zennit = EpsilonPlus()

    @contextmanager
    def hooks(module, rules, copies):
        with Composite(zennit.module_map).context(module):
            yield

    monkeypatch.setattr(attribution, "ruled", hooks)
    monkeypatch.setattr(attribution, "FunctionRules", lambda aware: FunctionRules(aware=False))
    expected = attributed(net, batch)
    for layer, relevance in expected.relevance.items():
        assert torch.equal(found.relevance[layer], relevance)
    assert found.conservation == expected.conservation


# -- networks that people have ----------------------------------------------------------------------------------------

TIMM = ("vit", "swin", "convnext", "efficientnet_b0", "repvgg_a0", "mixer", "hiera", "maxvit", "fastvit_t8")
TRANSFORMERS = ("BERT", "ModernBERT", "Llama", "Qwen3", "GPT-2", "HF ViT", "HF Swin")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM + TRANSFORMERS)
def test_all_of_it_arrives_in_networks_that_people_have(name, monkeypatch):
    pytest.importorskip("timm" if name in TIMM else "transformers")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "networks"))
    import arrives

    assert arrives.at_zero_biases(name) == pytest.approx(1.0, abs=0.05)
    assert "zoo" in sys.modules


def test_queries_and_keys_that_are_nearly_orthogonal_get_no_more_in_single_precision_than_in_double():
    """Their scores are what rounding left: what is handed to one has to be a multiple of that very number."""
    orthogonal, values = torch.linalg.qr(torch.randn(16, 16).double())[0] * 4, torch.rand(16, 5).double()

    def relevance(dtype):
        given = [one.to(dtype, copy=True)[None].requires_grad_() for one in (orthogonal, orthogonal, values)]
        with FunctionRules():
            found = nn.functional.scaled_dot_product_attention(*given)
        return torch.autograd.grad(found, given, found.detach())

    for single, double in zip(relevance(torch.float32), relevance(torch.float64), strict=True):
        assert (single.double() - double).norm() < double.norm()  # scores recovered from weights: 17 times that


@pytest.mark.parametrize("function", [torch.exp, torch.exp2, torch.cos, torch.cosh, torch.log])
def test_what_is_not_zero_at_zero_hands_on_what_a_change_of_its_size_would_make(function):
    x = (0.1 + 0.8 * torch.rand(7, 5).double()).requires_grad_()
    with FunctionRules():
        y = function(x)
    sent = torch.rand_like(y)
    slope = torch.autograd.functional.jvp(function, x.detach(), torch.ones_like(x))[1]
    (found,) = torch.autograd.grad(y, x, sent)
    torch.testing.assert_close(found, (sent / y * slope * x).detach(), rtol=1e-4, atol=1e-9)


def test_a_softmax_by_hand_hands_no_more_to_its_scores_than_their_size():
    """As graph networks have it: the largest score of each row is 0 then, and has been made from a difference."""
    scores = (3 * torch.randn(50, 8).double()).requires_grad_()
    values = torch.randn(50, 8, 4).double().requires_grad_()
    with FunctionRules():
        weights = (scores - scores.detach().amax(1, keepdim=True)).exp()
        weights = weights / (weights.sum(1, keepdim=True) + 1e-16)
        out = (weights[..., None] * values).sum(1)
    at_scores, at_values = torch.autograd.grad(out, (scores, values), out.detach())
    said = (weights[..., None] * values).sum(2)
    torch.testing.assert_close(at_values.sum(), out.sum() / 2, rtol=1e-5, atol=0)  # half is theirs
    assert (at_scores.abs() <= scores.abs() * said.abs() / 2 * 1.02 + 1e-4).all()  # some of what is said cancels

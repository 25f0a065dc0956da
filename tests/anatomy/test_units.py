from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSES, Built, labelled, mlp
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_rnf.anatomy.units import UnitLayer, UnitMap
from lightning_rnf.heads import MultiHead

ROWS = (4,)
IMAGES = (2, 4, 4)


def units_of(net: nn.Module, *shape: int, **options: Any) -> UnitMap:
    return UnitMap.of(net, labelled(4, *(shape or ROWS)), **options)


def names(units: UnitMap) -> list[str]:
    return [layer.name for layer in units.layers]


def everything(units: UnitMap) -> list[str]:
    """Each parameter as often as it is named."""
    of_units = [name for layer in units.layers for name in layer.parameters]
    return sorted([*of_units, *units.head_parameters, *units.shared, *units.idle])


def parameters(net: nn.Module) -> list[str]:
    return sorted(name for name, _ in net.named_parameters())


def two_layers(forward: Callable[[Any, Tensor], Tensor] | None = None, **more: nn.Module | nn.Parameter) -> Built:
    """Layers first and second, head, and what else is given."""
    parts = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "head": nn.Linear(4, CLASSES), **more}
    return Built(forward or (lambda net, x: net.head(net.second(net.first(x).relu()).relu())), **parts)


# -- layers -----------------------------------------------------------------------------------------------------------


def test_layers_come_in_the_order_they_run_in():
    net = Built(
        lambda net, x: net.head(net.b(net.c(net.a(x)))),
        head=nn.Linear(4, CLASSES),
        c=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        a=nn.Linear(4, 4),
    )
    assert names(units_of(net)) == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(4, 5), (4,), -1),
        (nn.Linear(4, 5), (3, 4), -1),
        (nn.Conv1d(2, 5, 3), (2, 6), -2),
        (nn.Conv2d(2, 5, 3, bias=False), (2, 6, 6), -3),
        (nn.Conv3d(2, 5, 3), (2, 4, 4, 4), -4),
        (nn.Conv2d(2, 4, 3, groups=2), (2, 6, 6), -3),
        (nn.Conv1d(3, 6, 3, groups=3), (3, 6), -2),
    ],
    ids=lambda value: str(value).replace(", ", "-") if isinstance(value, nn.Module) else None,
)
def test_a_unit_layer_says_where_its_units_are(layer, shape, axis):
    output = layer(torch.zeros(4, *shape))
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(output[0].numel(), CLASSES))

    (found,) = units_of(net, *shape).layers

    own = ("0.weight", "0.bias") if layer.bias is not None else ("0.weight",)
    assert found == UnitLayer("0", units=output.shape[axis], axis=axis, parameters=own)
    assert found.units == len(layer.weight)
    assert found.speaker == "0"


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(3, 5, 3), (3, 4)),
    "2d": (nn.ConvTranspose2d(3, 5, 3, stride=2, output_padding=1), (3, 4, 4)),
    "3d": (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
    "grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 4, 4)),
    "depthwise": (nn.ConvTranspose1d(4, 4, 3, groups=4), (4, 4)),
    "without bias": (nn.ConvTranspose2d(6, 3, 3, groups=3, bias=False), (6, 4, 4)),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_unit_of_a_transposed_convolution_owns_what_its_output_reads(case):
    layer, shape = TRANSPOSED[case]
    x = labelled(4, *shape)[0]
    output = layer(x)
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(output[0].numel(), CLASSES))

    (found,) = units_of(net, *shape).layers

    assert found.units == output.shape[found.axis] == layer.out_channels
    for name in found.parameters:
        parameter = net.get_parameter(name)
        owner = found.spread(name, torch.arange(found.units))
        assert owner.shape == parameter.shape[: owner.ndim] == found.leading_shape(name)
        for unit in range(found.units):
            (read,) = torch.autograd.grad(layer(x).select(found.axis, unit).sum(), parameter)
            entries = owner == unit
            assert read[~entries].eq(0).all()
            assert read[entries].ne(0).all()
            assert torch.equal(found.by_unit(name, parameter)[unit].flatten(), parameter[entries].flatten())


def test_units_chooses_layers_and_leaves_the_others_shared():
    net = two_layers()
    units = units_of(net, units="sec*")
    assert names(units) == ["second"]
    assert units.shared == ("first.weight", "first.bias")
    assert names(units_of(net, units=["second", "first"])) == ["first", "second"]


def test_parameters_kept_from_training_are_assigned_like_others():
    net = Built(
        lambda net, x: net.head(net.norm(net.first(net.table[0] * x)).relu()),
        first=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4),
        head=nn.Linear(4, CLASSES),
        table=nn.Parameter(torch.ones(2, 4)),
        unused=nn.Linear(4, 4),
    )
    expected = units_of(net)
    assert expected.shared == ("table",)

    found = units_of(net.requires_grad_(False))
    assert found.reasons == {"table": "kept from training"}
    assert replace(found, reasons=expected.reasons) == expected


def test_a_layer_that_is_only_used_functionally_is_shared():
    net = two_layers(lambda net, x: net.head(linear(net.first(x), net.second.weight).relu()))
    units = units_of(net)
    assert names(units) == ["first"]
    assert units.shared == ("second.weight",)
    assert units.idle == ("second.bias",)


def test_a_layer_with_more_than_rows_is_shared():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.low, self.high = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight + self.low @ self.high, self.bias)

    units = units_of(two_layers(second=Adapted()))
    assert names(units) == ["first"]
    assert units.shared == ("second.weight", "second.bias", "second.low", "second.high")


# -- norms ------------------------------------------------------------------------------------------------------------


def conv_and_norm(
    forward: Callable[[Any, Tensor], Tensor] | None = None, norm: nn.Module | None = None, **more: nn.Module
) -> Built:
    return Built(
        forward or (lambda net, x: net.head(net.norm(net.conv(x)).relu().flatten(1))),
        norm=nn.BatchNorm2d(4) if norm is None else norm,
        conv=nn.Conv2d(2, 4, 3, padding=1),
        head=nn.Linear(64, CLASSES),
        **more,
    )


def test_a_norm_that_follows_belongs_to_the_units():
    (layer,) = units_of(conv_and_norm(), *IMAGES).layers
    assert layer.norm == layer.speaker == "norm"
    assert layer.parameters == ("conv.weight", "conv.bias", "norm.weight", "norm.bias")


def test_a_norm_without_parameters_speaks_for_the_units():
    (layer,) = units_of(conv_and_norm(norm=nn.BatchNorm2d(4, affine=False)), *IMAGES).layers
    assert layer.speaker == "norm"
    assert layer.parameters == ("conv.weight", "conv.bias")


def test_norms_over_more_than_channels_are_shared():
    units = units_of(conv_and_norm(norm=nn.LayerNorm([4, 4, 4])), *IMAGES)
    assert units.layers[0].norm is None
    assert set(units.shared) == {"norm.weight", "norm.bias"}
    assert set(units.reasons.values()) == {"LayerNorm mixes channels"}


PER_CHANNEL = {
    "batch norm 1d": (nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)),
    "batch norm 2d": (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)),
    "batch norm 3d": (nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)),
    "synchronised": (nn.Conv2d(2, 4, 3, padding=1), nn.SyncBatchNorm(4)),
    "instance norm 1d": (nn.Conv1d(2, 4, 3, padding=1), nn.InstanceNorm1d(4, affine=True)),
    "instance norm 2d": (nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "instance norm 3d": (nn.Conv3d(2, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True)),
    "a group for each channel": (nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(4, 4)),
    "instance norm without parameters": (nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4)),
    "slopes": (nn.Conv2d(2, 4, 3, padding=1), nn.PReLU(4)),
    "slopes of a linear layer": (nn.Linear(4, 4), nn.PReLU(4)),
    "norm and slopes": (nn.ConvTranspose2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4)),
}


@pytest.mark.parametrize("case", PER_CHANNEL)
def test_what_treats_each_channel_by_itself_belongs_to_the_units(case):
    layer, *followers = PER_CHANNEL[case]
    shape = ROWS if isinstance(layer, nn.Linear) else (2, *[4] * (layer.weight.ndim - 2))
    torch.manual_seed(0)
    body = nn.Sequential(layer, *followers).eval()
    said = body(labelled(4, *shape)[0])
    net = nn.Sequential(body, nn.ReLU(), nn.Flatten(), nn.Linear(said[0].numel(), CLASSES))

    units = units_of(net, *shape)

    (found,) = units.layers
    assert units.shared == ()
    assert found.speaker == f"0.{len(followers)}"
    assert set(found.parameters) == {name for name in parameters(net) if name.startswith("0.")}
    # And it is true: whatever happens to one unit, the others say what they said.
    with torch.no_grad():
        for name in found.parameters:
            net.get_parameter(name)[found.spread(name, torch.arange(4)) == 2] = torch.nan
    others = torch.tensor([0, 1, 3])
    changed = body(labelled(4, *shape)[0])
    assert torch.equal(changed.index_select(found.axis, others), said.index_select(found.axis, others))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)])
def test_a_function_that_writes_into_the_output_of_a_norm_hides_nothing(norm):
    # What an instance norm puts out is a view: writing into it changes the graph behind it.
    net = conv_and_norm(lambda net, x: net.head(net.norm(net.conv(x)).relu_().flatten(1)), norm)
    units = units_of(net, *IMAGES)
    assert (units.layers[0].norm, units.shared) == ("norm", ())


def test_one_slope_for_all_channels_is_shared():
    units = units_of(conv_and_norm(norm=nn.PReLU()), *IMAGES)
    assert (units.layers[0].slopes, units.shared) == (None, ("norm.weight",))
    assert units.reasons == {"norm.weight": "PReLU with one slope for all channels"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head((net.norm(conv := net.conv(x)) + conv).flatten(1)),
        lambda net, x: net.head((net.norm(conv := net.conv(x)) * conv.mean()).flatten(1)),
        lambda net, x: net.head(net.norm(net.conv(x).relu()).flatten(1)),
        lambda net, x: net.head(net.norm(net.norm(net.conv(x))).flatten(1)),
        lambda net, x: net.head((net.norm(net.conv(x)) + net.norm(x.repeat(1, 2, 1, 1))).flatten(1)),
        lambda net, x: net.head(net.norm(torch.cat([net.conv(x)[:, :2], x], 1)).flatten(1)),
        lambda net, x: net.head(net.norm(net.conv(x) + x.repeat(1, 2, 1, 1)).flatten(1)),
        lambda net, x: net.head((net.norm(net.conv(x)).detach() + net.conv_again(x)).flatten(1)),
        lambda net, x: (net.norm(conv := net.conv(x)), net.head(conv.flatten(1)))[1],
    ],
    ids=[
        "skip around it",
        "gate around it",
        "activation before it",
        "runs twice in a row",
        "reads something else, too",
        "concatenation before it",
        "sum before it",
        "detached",
        "of no effect",
    ],
)
def test_a_norm_whose_layer_speaks_to_others_or_that_hears_others_is_shared(forward, request):
    units = units_of(conv_and_norm(forward, conv_again=nn.Conv2d(2, 4, 3, padding=1)), *IMAGES)
    assert units.layers[0].norm is None
    assert {"norm.weight", "norm.bias"} <= set(units.shared)
    assert (
        units.reasons["norm.weight"]
        == {
            "skip around it": "BatchNorm2d is not alone in reading the layer before it",
            "gate around it": "BatchNorm2d is not alone in reading the layer before it",
            "activation before it": "BatchNorm2d does not directly follow a unit layer",
            "runs twice in a row": "BatchNorm2d runs 2 times in one forward",
            "reads something else, too": "BatchNorm2d runs 2 times in one forward",
            "concatenation before it": "BatchNorm2d reads a concatenation, whose channels no layer owns",
            "sum before it": "BatchNorm2d reads a sum, whose channels no layer owns",
            "detached": "BatchNorm2d ran detached from the logits, or unseen (no_grad, reentrant checkpointing)",
            "of no effect": "BatchNorm2d ran detached from the logits, or unseen (no_grad, reentrant checkpointing)",
        }[request.node.callspec.id]
    )


def test_a_norm_over_another_axis_than_the_units_is_shared():
    # (N, positions, units): this norm scales positions.
    net = Built(
        lambda net, x: net.head(net.norm(net.first(x)).relu().flatten(1)),
        first=nn.Linear(4, 5),
        norm=nn.BatchNorm1d(3),
        head=nn.Linear(15, CLASSES),
    )
    units = units_of(net, 3, 4)
    assert units.layers[0].norm is None
    assert units.shared == ("norm.weight", "norm.bias")


def test_a_norm_is_seen_past_a_backward_hook_of_the_user():
    net = conv_and_norm()
    net.conv.register_full_backward_hook(lambda *_: None)
    assert units_of(net, *IMAGES).layers[0].norm == "norm"


def test_buffers_are_those_of_modules_that_ran():
    units = units_of(conv_and_norm(waiting=nn.BatchNorm2d(4)), *IMAGES)
    assert units.buffers == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


# -- heads ------------------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """A network and where its head should be found.

    Attributes:
        net: inputs (N, 4), or (N, 2, 4, 4).
        name: of the head.
        idle: prefixes of what waits.
    """

    net: nn.Module
    name: str
    idle: tuple[str, ...] = ()
    shape: tuple[int, ...] = ROWS


def heads_of(heads: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Built(lambda net, x: run(net.heads, net.body(x).relu()), heads=heads, body=nn.Linear(4, 4))


def output() -> nn.Linear:
    return nn.Linear(4, CLASSES)


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES))


def squeezed(pool: bool) -> nn.Module:
    return Built(
        lambda net, x: net.classifier(net.features(x)).flatten(1),
        features=nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True)),
        classifier=nn.Sequential(
            nn.Dropout(),
            nn.Conv2d(4, CLASSES, 1 if pool else 2),
            *((nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)) if pool else ()),
        ),
    )


HEADS = {
    "linear": lambda: Head(mlp(), "4"),
    "linear of a nested network": lambda: Head(Built(lambda net, x: net.net(x), net=mlp()), "net.4"),
    "viewed": lambda: Head(
        Built(lambda net, x: net.head(net.body(x)).view(-1, 3), body=nn.Linear(4, 4), head=output()), "head"
    ),
    "sequential is a body": lambda: Head(heads_of(deep(), lambda heads, h: heads(h)), "heads.2"),
    "dict": lambda: Head(
        heads_of(nn.ModuleDict({"a": output(), "b": output()}), lambda heads, h: heads["b"](h)),
        "heads.b",
        ("heads.a.",),
    ),
    "dict of one": lambda: Head(heads_of(nn.ModuleDict({"a": output()}), lambda heads, h: heads["a"](h)), "heads.a"),
    "list": lambda: Head(
        heads_of(nn.ModuleList([output(), output()]), lambda heads, h: heads[1](h)), "heads.1", ("heads.0.",)
    ),
    "multi-head": lambda: Head(
        heads_of(MultiHead(4, {"a": CLASSES, "b": CLASSES}), lambda heads, h: heads(h)),
        "heads.tasks.a",
        ("heads.tasks.b.",),
    ),
    "multi-head of sequentials": lambda: Head(
        heads_of(MultiHead(4, {"a": 3, "b": 3}, lambda _, __: deep()), lambda heads, h: heads(h)),
        "heads.tasks.a",
        ("heads.tasks.b.",),
    ),
    "sequential in a dict": lambda: Head(
        heads_of(nn.ModuleDict({"a": deep(), "b": deep()}), lambda heads, h: heads["a"](h)), "heads.a", ("heads.b.",)
    ),
    "sequential in a dict of one": lambda: Head(
        heads_of(nn.ModuleDict({"a": deep()}), lambda heads, h: heads["a"](h)), "heads.a"
    ),
    "last layer in a list of blocks": lambda: Head(
        Built(lambda net, x: net.blocks[1](net.blocks[0](x).relu()), blocks=nn.ModuleList([nn.Linear(4, 4), output()])),
        "blocks.1",
    ),
    "only block of a stack": lambda: Head(
        Built(lambda net, x: net.stack[0](net.stem(x)), stem=nn.Linear(4, 4), stack=nn.ModuleList([deep()])),
        "stack.0.2",
    ),
    "dict of body and head": lambda: Head(
        Built(
            lambda net, x: net.parts["head"](net.parts["body"](x)),
            parts=nn.ModuleDict({"body": deep(), "head": nn.Linear(3, 3)}),
        ),
        "parts.head",
    ),
    "dict of whole networks": lambda: Head(
        Built(lambda net, x: net.models["a"](x), models=nn.ModuleDict({"a": deep(), "b": deep()})),
        "models.a.2",
        ("models.b.",),
    ),
    "convolution, pool and flatten": lambda: Head(squeezed(pool=True), "classifier", shape=IMAGES),
    "convolution and flatten": lambda: Head(squeezed(pool=False), "classifier.1", shape=IMAGES),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_the_module_that_makes_the_logits(head):
    expected = HEADS[head]()

    units = units_of(expected.net, *expected.shape)

    assert units.head == expected.name
    assert list(units.head_parameters) == [
        name for name in parameters_in_order(expected.net) if name.startswith(f"{expected.name}.")
    ]
    assert units.layers
    assert not any(layer.name.startswith(expected.name) for layer in units.layers)
    assert list(units.idle) == [
        name for name in parameters_in_order(expected.net) if expected.idle and name.startswith(expected.idle)
    ]


def parameters_in_order(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters()]


def test_the_active_head_of_a_multi_head_is_the_head():
    heads = MultiHead(4, {"a": CLASSES, "b": CLASSES})
    net = heads_of(heads, lambda heads, h: heads(h))
    heads.activate("b")
    assert units_of(net).head == "heads.tasks.b"
    assert units_of(net).idle == ("heads.tasks.a.weight", "heads.tasks.a.bias")


@pytest.mark.parametrize("cast", [Tensor.double, lambda x: x.bfloat16().float()], ids=["once", "twice"])
def test_the_head_is_found_behind_a_cast_of_its_logits(cast):
    net = two_layers(lambda net, x: cast(net.head(net.second(net.first(x).relu()).relu())))
    assert (units_of(net).head, names(units_of(net))) == ("head", ["first", "second"])


@pytest.mark.parametrize("glob", ["heads.*", "heads.a", ["nothing", "heads.?"]])
def test_heads_names_the_head_where_a_function_makes_the_logits(glob):
    net = heads_of(nn.ModuleDict({"a": deep(), "b": deep()}), lambda heads, h: 2 * heads["a"](h))
    units = units_of(net, heads=glob)
    assert units.head == "heads.a"
    assert names(units) == ["body"]
    assert set(units.idle) == {name for name in parameters(net) if name.startswith("heads.b.")}


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("nothing", r"heads=\['nothing'\] matches no module"),
        ("heads.b", r"heads=\['heads.b'\] matches no module of those that ran"),
        (["heads.a", "body"], r"matches \['heads.a', 'body'\]"),
    ],
)
def test_heads_that_name_no_head_or_two_are_refused(glob, message):
    net = heads_of(nn.ModuleDict({"a": output(), "b": output()}), lambda heads, h: heads["a"](h))
    with pytest.raises(ValueError, match=message):
        units_of(net, heads=glob)


def scaled(net: nn.Module, x: Tensor) -> Tensor:
    return net.head(net.second(net.first(x).relu()).relu()) / 0.5


def of_tokens(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Three tokens of four numbers, and a function of the head's output (N, 3, classes)."""
    return two_layers(lambda net, x: function(net.head(net.second(net.first(x).relu()).relu())))


def written_to(x: Tensor) -> Tensor:
    x[:, :, 0] = 0
    return x.amax(1)


FUNCTIONS: dict[str, tuple[nn.Module, str]] = {
    "scaled": (two_layers(scaled), "head"),
    "scaled inside": (Built(lambda net, x: net.net(x), net=two_layers(scaled)), "net.head"),
    "log-softmax": (two_layers(lambda net, x: net.head(net.second(net.first(x))).log_softmax(1)), "head"),
    "module": (nn.Sequential(*mlp(), nn.LogSoftmax(1)), "4"),
    "module inside": (Built(lambda net, x: net.net(x), net=nn.Sequential(*mlp(), nn.LogSoftmax(1))), "net.4"),
    "beside what is not trained": (
        two_layers(lambda net, x: torch.cat([net.head(net.second(net.first(x)))[:, :1], x[:, :2]], 1)),
        "head",
    ),
    "dropout behind it": (nn.Sequential(*mlp(), nn.Dropout(0.5), nn.Identity(), nn.Softmax(1)), "4"),
    "in a dict": (
        heads_of(nn.ModuleDict({"a": deep(), "b": deep()}), lambda heads, h: heads["a"](h).tanh()),
        "heads.a",
    ),
}
OF_TOKENS: dict[str, tuple[nn.Module, str]] = {
    "last token": (of_tokens(lambda x: x[:, -1]), "head"),
    "first token": (of_tokens(lambda x: x.select(1, 0)), "head"),
    "the token that each sample wants": (of_tokens(lambda x: x[torch.arange(4), torch.tensor([0, 1, 2, 0])]), "head"),
    "mean over tokens": (of_tokens(lambda x: x.mean(1).double()), "head"),
    "masked mean": (of_tokens(lambda x: (x * torch.ones(4, 3, 1)).sum(1) / 3), "head"),
    "permuted and squeezed": (of_tokens(lambda x: x.permute(0, 2, 1)[..., None].mean((2, 3))), "head"),
    "reshaped": (
        of_tokens(lambda x: x.transpose(1, 2).reshape(4, 9).log_softmax(1).unflatten(1, (3, 3))[:, :, 0]),
        "head",
    ),
    "slice": (of_tokens(lambda x: x[:, 0, :3].clone().clamp(-30, 30)), "head"),
    "written to": (of_tokens(written_to), "head"),
}


@pytest.mark.parametrize("case", [*FUNCTIONS, *OF_TOKENS])
def test_the_head_is_found_behind_functions_of_its_output(case):
    net, head = {**FUNCTIONS, **OF_TOKENS}[case]
    units = units_of(net, *((3, 4) if case in OF_TOKENS else ROWS))
    assert units.head == head
    assert set(units.head_parameters) == {name for name in parameters(net) if name.startswith(f"{head}.")}
    assert not set(names(units)) & {head}


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            two_layers(lambda net, x: linear(net.second(net.first(x)), net.head.weight)),
            "heads='heads.*'; the last modules before the logits are 'second'",
        ),
        (
            two_layers(
                lambda net, x: net.head(net.second(x)) + net.side.b(net.first(x)), side=nn.ModuleDict({"b": output()})
            ),
            r"heads='side\.\*'; the last modules before the logits are 'head', 'side.b'",
        ),
        (
            two_layers(
                lambda net, x: net.head(net.second(net.first(x))) * net.scale, scale=nn.Parameter(torch.ones(3))
            ),
            "'head'",
        ),
        (two_layers(lambda net, x: -torch.cdist(net.second(net.first(x)), torch.eye(4))[:, :3]), "'second'"),
        (two_layers(lambda net, x: net.second(net.first(x)) @ torch.ones(4, 3)), "'second'"),
        (Built(lambda net, x: x[:, :3] * net.scale, scale=nn.Parameter(torch.ones(3))), "heads='heads.*'$"),
    ],
    ids=["functional", "sum", "trained scale", "distances", "product", "own"],
)
def test_logits_that_more_than_a_function_makes_are_refused_naming_candidates(net, message):
    with pytest.raises(ValueError, match=f"head not found: .*{message}"):
        units_of(net)


def test_a_multi_head_that_ran_is_the_head_whatever_comes_behind_it():
    heads = MultiHead(4, {"a": CLASSES, "b": CLASSES})
    net = heads_of(heads, lambda heads, h: heads(h) @ torch.ones(3, 3) * (heads(h).sum() > 0))
    heads.activate("b")
    units = units_of(net)
    assert (units.head, names(units)) == ("heads.tasks.b", ["body"])
    assert units.idle == ("heads.tasks.a.weight", "heads.tasks.a.bias")


def test_a_multi_head_that_other_layers_come_behind_is_no_head():
    stems, out = MultiHead(4, {"a": 4, "b": 4}), nn.ModuleDict({"a": nn.Linear(4, CLASSES), "b": nn.Linear(4, CLASSES)})
    net = Built(lambda net, x: net.out["a"](net.body(net.stems(x)).relu()), stems=stems, body=nn.Linear(4, 4), out=out)
    assert units_of(net).head == "out.a"


def test_a_multi_head_that_has_no_say_or_holds_whole_networks_is_none():
    net = two_layers(side=MultiHead(4, {"a": CLASSES}))
    net.compute = lambda net, x: (net.side(x), net.head(net.second(net.first(x))))[1]
    assert units_of(net).head == "head"
    net = Built(lambda net, x: net.heads(x).log_softmax(1), heads=MultiHead(4, {"a": deep(), "b": deep()}))
    assert (units_of(net).head, names(units_of(net))) == ("heads.tasks.a.2", ["heads.tasks.a.0"])


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...]


def test_the_head_of_a_forward_that_returns_several_things_is_found():
    net = two_layers(lambda net, x: Output(net.head(h := net.second(net.first(x).relu()).relu()), (h,)))

    def predict(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return module(batch[0]).logits.log_softmax(1), batch[1]

    outer = Built(lambda net, x: net.inner(x), inner=net)
    for model, head in ((net, "head"), (outer, "inner.head")):
        units = UnitMap.of(model, labelled(4, 4), predict)
        assert (units.head, len(units.layers)) == (head, 2)


# -- every parameter, exactly once ------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class NormAndSkip(nn.Module):
    """The norm is not the only one to hear the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + self.norm(x)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "without bias": lambda: nn.Linear(4, 4, bias=False),
    "activation": nn.ReLU,
    "linear, in-place activation": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "slopes": lambda: nn.PReLU(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "normed": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
    "residual": lambda: Residual(nn.Linear(4, 4)),
    "residual, normed": lambda: Residual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
    "scaled": Scaled,
    "norm and skip": NormAndSkip,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Conv1d(2, 1, 1), nn.Flatten()
    ),
}


@dataclass(frozen=True)
class Drawn:
    """A network: blocks in the order they run in, of which some don't.

    Attributes:
        blocks: their kinds.
        registration: the order the blocks are registered in.
        skipped: blocks that don't run.
        heads: number of heads, deep ones or not.
        active: the head that runs.
        frozen: which parameters want no gradient, repeated over all.
    """

    blocks: tuple[str, ...]
    registration: tuple[int, ...]
    skipped: frozenset[int]
    heads: tuple[bool, ...]
    active: int
    frozen: tuple[bool, ...]

    def build(self) -> nn.Module:
        net = Built(self.run)
        parts = {f"block{number}": BLOCKS[kind]() for number, kind in enumerate(self.blocks)}
        for number in self.registration:
            net.add_module(f"block{number}", parts[f"block{number}"])
        net.stem = nn.Linear(4, 4)  # runs first
        net.heads = nn.ModuleDict({f"task{n}": deep() if is_deep else output() for n, is_deep in enumerate(self.heads)})
        for number, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(not self.frozen[number % len(self.frozen)])
        return net

    def run(self, net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        for number in range(len(self.blocks)):
            if number not in self.skipped:
                x = net.get_submodule(f"block{number}")(x)
        return net.heads[f"task{self.active}"](x)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    blocks = draw(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=6))
    heads = draw(st.lists(st.booleans(), min_size=1, max_size=3))
    return Drawn(
        blocks=tuple(blocks),
        registration=tuple(draw(st.permutations(range(len(blocks))))),
        skipped=frozenset(draw(st.sets(st.integers(0, 5), max_size=2))),
        heads=tuple(heads),
        active=draw(st.integers(0, len(heads) - 1)),
        frozen=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=5))),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn())
def test_every_parameter_belongs_to_exactly_one(plan):
    net = plan.build()
    units = units_of(net)
    own = dict(net.named_parameters())
    kept = {name for name, parameter in own.items() if not parameter.requires_grad}

    assert everything(units) == parameters(net)
    assert set(units.kept) <= kept
    # A layer of which nothing learns is shared, if there are others.
    of_layers = [kept.issuperset(layer.parameters[: 1 + (f"{layer.name}.bias" in own)]) for layer in units.layers]
    assert all(of_layers) or not any(of_layers)
    assert units.head == f"heads.task{plan.active}"
    assert all(name.startswith(f"{units.head}.") for name in units.head_parameters)
    for layer in units.layers:
        assert all(len(own[name]) == layer.units for name in layer.parameters)

    blocks_run = [layer.name.split(".")[0] for layer in units.layers]
    assert "stem" not in blocks_run[1:]
    of_blocks = [name for name in blocks_run if name != "stem"]
    assert of_blocks == sorted(of_blocks)  # block0, block1, ...
    assert blocks_run[0] == "stem" or kept >= {"stem.weight", "stem.bias"}

    # Idle is exactly what the logits have no gradient by.
    net.requires_grad_(True).eval()
    gradients = torch.autograd.grad(net(labelled(4, *ROWS)[0]).sum(), list(own.values()), allow_unused=True)
    assert set(units.idle) == {name for name, gradient in zip(own, gradients, strict=True) if gradient is None}


# -- and why ----------------------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("net", "reasons"),
    [
        (
            two_layers(
                lambda net, x: net.head(net.table(x.argmax(1)[:, None]) + net.first(x)), table=nn.EmbeddingBag(4, 4)
            ),
            {"table.weight": "EmbeddingBag is no unit layer"},
        ),
        (
            two_layers(lambda net, x: net.head(net.first(x) + net.token), token=nn.Parameter(torch.ones(4))),
            {"token": "Built's own, no layer's"},
        ),
        (
            two_layers(lambda net, x: net.head(net.attend(net.first(x))), attend=Attentive()),
            {
                **{
                    f"attend.attention.{key}": "MultiheadAttention adds a key and a value of its own (add_bias_kv)"
                    for key in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v")
                },
                "attend.attention.out_proj.weight": "used functionally, the module itself did not run",
                "attend.attention.out_proj.bias": "used functionally, the module itself did not run",
            },
        ),
        (
            two_layers(lambda net, x: net.head(net.first(x) + net.second(x).detach())),
            dict.fromkeys(
                ("second.weight", "second.bias"),
                "Linear ran detached from the logits, or unseen (no_grad, reentrant checkpointing)",
            ),
        ),
        (
            # (N, positions, units): this norm scales positions.
            two_layers(lambda net, x: net.head(net.norm(net.first(x[:, None])).flatten(1)), norm=nn.BatchNorm1d(1)),
            dict.fromkeys(
                ("norm.weight", "norm.bias"), "BatchNorm1d does not go along the units of the layer before it"
            ),
        ),
    ],
    ids=["embedding", "own parameter", "attention", "detached", "other axis"],
)
def test_a_shared_parameter_says_why(net, reasons):
    units = units_of(net)
    assert units.reasons == reasons
    assert set(units.shared) == set(reasons)


def test_what_is_left_out_or_tied_says_so():
    # A tied layer is one that has to be left out; so is one that is used again elsewhere.
    assert set(units_of(tied_to_the_head(), units="first").reasons.values()) == {
        "tied to head.weight",
        "left out by units=",
    }
    net = conv_and_norm(more=nn.Conv2d(4, 4, 1))
    net.compute = lambda net, x: net.head(net.norm(net.conv(net.more(x.repeat(1, 2, 1, 1))[:, :2])).flatten(1))
    assert units_of(net, *IMAGES, units="more").reasons == {
        "conv.weight": "left out by units=",
        "conv.bias": "left out by units=",
        "norm.weight": "BatchNorm2d does not directly follow a unit layer",
        "norm.bias": "BatchNorm2d does not directly follow a unit layer",
    }


def test_a_map_can_be_read():
    net = Built(
        lambda net, x: net.heads["a"](net.last(net.middle(net.slopes(net.norm(net.conv(x)))).flatten(1)).relu()),
        conv=nn.ConvTranspose2d(2, 12, 1),
        norm=nn.BatchNorm2d(12),
        slopes=nn.PReLU(12),
        middle=nn.GroupNorm(2, 12),
        last=nn.Linear(192, 4),
        heads=nn.ModuleDict({"a": output(), "b": deep()}),
    )
    assert (
        str(units_of(net, *IMAGES))
        == """\
16 units in 2 layers, each with the norm and slopes that follow it:
  conv  ConvTranspose2d     12 units  BatchNorm2d norm, PReLU slopes
  last  Linear               4 units
of these by whole rows, since it can't be followed which of the units they read:
  last  middle (GroupNorm) mixes channels
head:
  heads.a  Linear  2 parameters
shared, frozen whole after the first task:
  middle  weight, bias  GroupNorm does not directly follow a unit layer
idle, took no part (heads of other tasks, or unused):
  heads.b.0  weight, bias
  heads.b.2  weight, bias"""
    )
    # Nothing shared, nothing idle, nothing said of it.
    assert (
        str(units_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))))
        == """\
4 units in 1 layer, each with the norm and slopes that follow it:
  0  Linear      4 units
head:
  1  Linear  2 parameters"""
    )


# -- what units can't follow ------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    net = two_layers(second=OwnLinear(4, 4))
    net.second.weight = net.first.weight
    return net


def tied_to_the_head() -> nn.Module:
    net = two_layers(head=nn.Linear(4, 4))
    net.head.weight = net.second.weight
    return net


class OwnLinear(nn.Linear):
    """It does as torch's does, in a class of its own: that has to be tried, and only a first run can be."""


WHOLE = {
    "runs twice": (
        lambda: two_layers(lambda net, x: net.head(net.second(net.second(net.first(x)))), second=OwnLinear(4, 4)),
        "second",
        "runs 2 times",
    ),
    "tied": (tied, "first", r"shares 'first.weight' with \['second.weight'\], which is of another kind"),
    "tied to the head": (
        tied_to_the_head,
        "second",
        r"shares 'second.weight' with \['head.weight'\]",
    ),
    "used functionally": (
        lambda: two_layers(lambda net, x: net.head(linear(net.second(net.first(x)), net.second.weight.T))),
        "second",
        "has its 'second.weight' used a second time",
    ),
    "parametrized": (
        lambda: two_layers(second=spectral_norm(nn.Linear(4, 4))),
        "second",
        "is parametrized, and is not made of rows, output",
    ),
}


@pytest.mark.parametrize("case", [case for case in WHOLE if case != "tied"])  # there no other layer is left
def test_a_layer_that_units_cant_follow_is_shared_as_if_it_had_been_left_out(case):
    build, name, reason = WHOLE[case]
    net = build()

    units = units_of(net)

    assert names(units) == ["first"]
    assert list(units.whole) == [name]
    assert re.match(reason, units.whole[name])
    left_out = units_of(net, units=f"!{name}")
    assert left_out.whole == {}
    assert left_out == replace(units, reasons=left_out.reasons)
    assert everything(units) == parameters(net)
    assert {parameter for parameter in parameters(net) if parameter.startswith(f"{name}.")} <= set(units.shared)
    why = {units.reasons[parameter] for parameter in units.shared if parameter.startswith(f"{name}.")}
    assert all(units.whole[name] in reason for reason in why)


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("wildcard", [False, True])
def test_a_layer_that_units_cant_follow_is_refused_where_it_is_asked_for(case, wildcard):
    build, name, reason = WHOLE[case]
    glob = f"{name[:-1]}?" if wildcard else name
    other = {"runs twice": "a layer for each run", "parametrized": "remove_parametrizations"}.get(case, "of its own")
    with pytest.raises(ValueError, match=f"layer '{name}' {reason}.*leave it out of units=.*, or .*{other}"):
        units_of(build(), units=glob)


def test_where_no_layer_is_left_it_says_how_they_are_used():
    with pytest.raises(ValueError, match=r"no unit layers: layer 'first' shares .*; layer 'second' shares"):
        units_of(tied())


def test_a_layer_of_torch_that_runs_several_times_is_made_of_units_and_what_follows_it_is_not_theirs():
    norm = nn.BatchNorm1d(4)
    net = two_layers(lambda net, x: net.head(norm(net.second(net.second(net.first(x)).relu()))), norm=norm)
    units = units_of(net)
    assert (names(units), units.whole) == (["first", "second"], {})
    assert units.layers[1] == UnitLayer("second", 4, -1, ("second.weight", "second.bias"))
    assert set(units.shared) == {"norm.weight", "norm.bias"}
    assert units.by_rows["second"] == "it runs several times"


def test_a_weight_that_a_function_reads_beside_several_runs_of_its_layer_is_not_the_units():
    net = two_layers(lambda net, x: net.head(net.second(net.second(linear(net.first(x), net.second.weight)))))
    assert names(units_of(net)) == ["first"]


def test_where_all_layers_are_parametrized_it_says_how_to_make_plain_ones():
    net = two_layers(first=spectral_norm(nn.Linear(4, 4)), second=spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"no unit layers: layer 'first' is parametrized.*remove_parametrizations"):
        units_of(net)
    with pytest.raises(ValueError, match=r"no unit layers: .* says so$"):
        units_of(tied())


def test_a_module_that_stands_in_two_places_is_one():
    net = two_layers()
    net.again, net.classifier = nn.ModuleList([net.second]), net.head
    units = units_of(net)
    assert (names(units), units.head, units.whole) == (["first", "second"], "head", {})
    assert units.head_parameters == ("head.weight", "head.bias")
    assert (units.shared, units.idle) == ((), ())
    assert {"second.weight", "again.0.weight"} <= set(units.forms)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(4, CLASSES)), "before the head '0'; nothing else has parameters"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, CLASSES)), r"outside of it are those of BatchNorm1d '0' \(8\)"),
        (
            Built(
                lambda net, x: net.head(net.table(x.argmax(1)) + net.own * net.norm(x) + net.small),
                table=nn.Embedding(300, 4),
                norm=nn.LayerNorm(4),
                own=nn.Parameter(torch.ones(1, 4)),
                small=nn.Parameter(torch.ones(4)),
                head=nn.Linear(4, CLASSES),
                unused=nn.Bilinear(9, 9, 9),
            ),
            r"Embedding 'table' \(1,200\), Bilinear 'unused' \(738\), Built '\(the model itself\)' \(8\)\. A",
        ),
    ],
    ids=["only a head", "norm", "others"],
)
def test_a_network_without_unit_layers_is_refused_naming_what_has_the_parameters(net, message):
    why = "no unit layers: no Linear, convolution, recurrent layer or attention ran"
    with pytest.raises(ValueError, match=f"{why} .*{message}"):
        UnitMap.of(net, labelled(4, 4), heads="head" if isinstance(net, Built) else None)


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("!second", ["first"]),
        (["*", "!second"], ["first"]),
        (["!first", "sec*"], ["second"]),
        (["first", "!second"], ["first"]),
        ("!f*", ["second"]),
    ],
)
def test_globs_can_exclude(globs, expected):
    net = two_layers()
    units = units_of(net, units=globs)
    assert names(units) == expected
    (left,) = {"first", "second"} - set(expected)
    assert units.shared == (f"{left}.weight", f"{left}.bias")
    assert set(units.reasons.values()) == {"left out by units="}


def test_excluding_all_of_them_leaves_nothing():
    with pytest.raises(
        ValueError, match=r"no unit layers: units=\['!\*'\] leaves all of them out; .*Linear 'first' \(20\)"
    ):
        units_of(two_layers(), units="!*")


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("nothing.*", r"units='nothing\.\*' matches no unit layer.*first, second"),
        ("norm", "units='norm' names a LayerNorm.*first, second"),
        ("head", "units='head' names the head 'head'.*first, second"),
        (["first", "nothing"], "units='nothing' matches no unit layer"),
        ("!nothing.*", r"units='!nothing\.\*' matches no unit layer.*first, second"),
        (["first", "!norm"], "units='!norm' names a LayerNorm"),
        ("!head", "units='!head' names the head 'head'"),
    ],
)
def test_units_that_match_no_unit_layer_are_refused(glob, message):
    net = two_layers(lambda net, x: net.head(net.norm(net.second(net.first(x)))), norm=nn.LayerNorm(4))
    with pytest.raises(ValueError, match=message):
        units_of(net, units=glob)


# -- checkpointed blocks ----------------------------------------------------------------------------------------------


def in_the_middle(use_reentrant: bool | None) -> nn.Module:
    """A block between stem and head, checkpointed or not. It has a norm and a parameter of its own."""

    def forward(net: Built, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(
            net.block(x) if use_reentrant is None else checkpoint(net.block, x, use_reentrant=use_reentrant)
        )

    block = Built(
        lambda net, x: net.scale * net.norm(net.layer(x)).relu(),
        layer=nn.Linear(4, 4),
        norm=nn.BatchNorm1d(4),
        scale=nn.Parameter(torch.ones(4)),
        unused=nn.Linear(4, 4),
    )
    return Built(forward, head=nn.Linear(4, CLASSES), block=block, stem=nn.Linear(4, 4))


def test_a_checkpointed_block_is_seen_like_any_other():
    assert units_of(in_the_middle(use_reentrant=False)) == units_of(in_the_middle(None))


def test_a_reentrant_checkpointed_block_is_followed_as_far_as_it_can_be_seen():
    # Autograd can't see into it: the norm is not known to follow the layer. But it ran, so it is not idle.
    units = units_of(in_the_middle(use_reentrant=True))

    assert names(units) == ["stem", "block.layer"]
    assert units.head == "head"
    assert set(units.shared) == {"block.norm.weight", "block.norm.bias", "block.scale"}
    assert units.idle == ("block.unused.weight", "block.unused.bias")

"""Export of forwards that ``torch.fx`` can't trace: followed by ``torch.export``, or copied with zeros."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from networks import CLASSES, Built, mlp
from records import bare_record
from snapshot import changes, snapshot
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everybody's name for it
from torch.nn.utils.parametrizations import weight_norm
from training import Classifier, inputs, train

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy import Inputs
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.recall.export import export
from lightning_rnf.recall.sizes import SubnetworkFlops, size_of
from lightning_rnf.recall.subnetwork import recall, statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units")

WIDTH, HIDDEN, HEADS = 8, 24, 2


@dataclass
class Answer:
    """What an encoder returns: an object with fields, some of them empty."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Block(nn.Module):
    """Attention in heads, and two linear layers, with norms behind their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] != WIDTH:
            raise ValueError(f"{tuple(x.shape)} should end in {WIDTH}")
        shape = (*x.shape[:-1], -1, WIDTH // HEADS)
        query, key, value = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2)
        x = self.norm1(x + self.output(mixed.reshape(*mixed.size()[:-2], -1).contiguous()))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))


class Encoder(nn.Module):
    """What stands in for a Hugging Face encoder: everything in its forward that fx can't trace."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.pooled = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("order", torch.arange(16)[None], persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Answer:
        return self.encode(*args, **kwargs)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, all_hidden: bool = False) -> Answer:
        samples, length = input_ids.size()
        if length > 16:
            raise ValueError(f"{length} words")
        mask = None
        if attention_mask is not None:
            smallest = torch.finfo(self.places.weight.dtype).min
            mask = (1 - attention_mask.to(self.places.weight.dtype))[:, None, None, :] * smallest
        x = self.words(input_ids) + self.places(self.order[:, :length].expand(samples, -1))
        hidden = []
        for block in self.blocks:
            x = block(x, mask=mask)
            hidden.append(x)
        logits = self.head(self.pooled(x[:, 0]).tanh())
        return Answer(logits, tuple(hidden) if all_hidden else None)


class UNet(nn.Module):
    """Skips that are concatenated, and padded to the size of what they meet; it looks at sizes on its way."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.deep = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2) if transposed else nn.Conv2d(16, 12, 1)
        self.join2 = nn.Sequential(nn.Conv2d(24, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(10, 8, 2, stride=2) if transposed else nn.Conv2d(10, 8, 1)
        self.join1 = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise RuntimeError(f"{height} x {width} is odd")
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.deep(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([self.up(self.up2, three, two), two], dim=1))
        return self.head(self.join1(torch.cat([one, self.up(self.up1, two, one)], dim=1)))

    def up(self, layer: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        x = layer(x) if self.transposed else layer(F.interpolate(x, scale_factor=2, mode="bilinear"))
        high, wide = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
        return F.pad(x, [0, wide, 0, high]) if high or wide else x


class Recurrent(nn.Module):
    """A classifier of sequences; layers around an LSTM, of which it takes the last state of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Sequential(nn.Linear(5, 14), nn.ReLU(), nn.Linear(14, 6))
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if x.dim() != 3 or x.size(0) == 0:
            raise ValueError(f"{x.shape}")
        output, (last, _) = self.lstm(self.words(x), state)
        return self.head(self.fc(torch.cat([last[-2], last[-1]], dim=1) + output.mean(dim=1)).tanh())


def tokens(samples: int = 6, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {"input_ids": torch.randint(20, (samples, length), generator=generator), "attention_mask": mask}


def images(samples: int = 4, size: int = 10) -> tuple[Tensor, ...]:
    return (torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def sequences(samples: int = 6) -> tuple[Tensor, ...]:
    return (torch.randn(samples, 4, 5, generator=torch.Generator().manual_seed(1)),)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "encoder": (Encoder, tokens),
    "u-net": (lambda: UNet(transposed=False), images),
    "transposed-u-net": (lambda: UNet(transposed=True), images),
    "recurrent": (Recurrent, sequences),
}
each_net = pytest.mark.parametrize("name", NETS)


class Task:
    """A model, some inputs, and the record of a task with a random half of its units, or the given."""

    def __init__(
        self, net: nn.Module, example: Any, relevant: dict[str, Tensor] | None = None, *, double: bool = True
    ) -> None:
        dtype = torch.float64 if double else torch.float32  # in double precision no mistake can pass as rounding
        self.net = net.to(dtype).eval()
        self.inputs = Inputs.of(example).each(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean, 0, 0.3), nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3), nn.init.uniform_(norm.weight, 0.5, 1.5)
        target = torch.zeros(len(self.inputs.tensors()[0]), dtype=torch.int64)
        batch = (self.inputs, target)
        heads = "head" if hasattr(net, "head") else None
        predict = lambda net, batch: (logits_of(batch[0], net), batch[1])  # noqa: E731
        self.units = UnitMap.of(self.net, batch, predict=predict, heads=heads)
        self.layers = self.units.layers
        generator = torch.Generator().manual_seed(0)
        self.relevant = {one.name: torch.rand(one.units, generator=generator) < 0.5 for one in self.layers}
        self.relevant.update(relevant or {})
        self.record = bare_record(self.units, self.relevant, statistics(self.net, self.units))

    def recalled(self, inputs: Inputs | None = None) -> dict[Any, Tensor]:
        with torch.no_grad(), recall(self.net, self.layers, self.record):
            return (inputs or self.inputs).run(self.net)

    def exported(self) -> nn.Module:
        return export(self.net, self.layers, self.record, inputs=lambda: self.inputs)

    def check(self, small: nn.Module, inputs: Inputs | None = None) -> None:
        expected = self.recalled(inputs)
        with torch.no_grad():
            found = (inputs or self.inputs).run(small)
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            assert float((value - value[:1]).abs().max()) > 1e-4  # they tell the samples apart
            tolerance = 1e-10 if value.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found[path], value, rtol=0, atol=tolerance * float(value.abs().max()))


def logits_of(inputs: Inputs, net: nn.Module) -> Tensor:
    output = net(*inputs.args, **inputs.kwargs)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.mean((2, 3)) if logits.ndim == 4 else logits


def task_of(name: str, relevant: dict[str, Tensor] | None = None, *, double: bool = True) -> Task:
    torch.manual_seed(0)
    make, example = NETS[name]
    return Task(make(), example(), relevant, double=double)


@cache
def exported(name: str) -> tuple[Task, nn.Module]:
    """Of a random half of the units; nobody changes them."""
    task = task_of(name, double=False)
    return task, task.exported()


def first(count: int, units: int) -> Tensor:
    return torch.arange(units) < count


@each_net
def test_fx_can_not_trace_it(name):
    task = task_of(name)
    with pytest.raises(ValueError, match=r"can't be traced by torch\.fx"):
        export(task.net, task.layers, task.record)


@each_net
def test_logits_are_those_of_recall(name):
    task, small = exported(name)
    task.check(small)
    assert isinstance(small, torch.fx.GraphModule)
    assert small.kept["parameters"] == parameters(small) < parameters(task.net)
    assert not any("lightning" in str(node.target) for node in small.graph.nodes)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- how small --------------------------------------------------------------------------------------------------------


def test_an_encoder_loses_what_is_hidden_between_two_layers_and_nothing_of_its_residual_stream():
    relevant = {f"blocks.{number}.wide": first(5 + number, HIDDEN) for number in range(2)} | {"pooled": first(3, WIDTH)}
    task = task_of("encoder", relevant)
    small = task.exported()
    task.check(small)
    found = shapes(small)
    for number in range(2):
        assert found[f"blocks.{number}.wide.weight"] == (5 + number, WIDTH)
        assert found[f"blocks.{number}.narrow.weight"] == (WIDTH, 5 + number)
        for part in ("query", "key", "value", "output"):  # heads have to be of one size
            assert found[f"blocks.{number}.{part}.weight"] == (WIDTH, WIDTH)
    assert found["pooled.weight"] == (3, WIDTH)
    assert found["head.weight"] == (CLASSES, 3)
    silent = ~task.relevant["blocks.0.output"]
    assert not small.get_parameter("blocks.0.output.weight")[silent].any()  # what stays is zero


@pytest.mark.parametrize("name", ["u-net", "transposed-u-net"])
def test_a_u_net_keeps_exactly_its_relevant_units(name):
    units = {"down1.0": 8, "down2.0": 12, "deep.0": 16, "up2": 12, "join2.0": 10, "up1": 8, "join1.0": 8}
    left = {layer: count // 2 - 1 for layer, count in units.items()}
    task = task_of(name, {layer: first(left[layer], count) for layer, count in units.items()})
    small = task.exported()
    task.check(small)
    found = {layer: small.get_submodule(layer) for layer in (*units, "head")}
    assert {layer: part.out_channels for layer, part in found.items()} == {**left, "head": CLASSES}
    assert found["join2.0"].in_channels == left["up2"] + left["down2.0"]
    assert found["join1.0"].in_channels == left["up1"] + left["down1.0"]
    assert small.kept["reasons"] == {}


def test_layers_around_an_lstm_are_cut():
    relevant = {"words.0": first(4, 14), "words.2": first(2, 6), "lstm": first(20, 32), "fc": first(3, 12)}
    task = task_of("recurrent", relevant)
    small = task.exported()
    task.check(small)
    found = shapes(small)
    assert found["words.0.weight"] == (4, 5)
    assert found["words.2.weight"] == (6, 4)  # an LSTM reads it
    assert found["fc.weight"] == (3, 16)
    assert found["head.weight"] == (CLASSES, 3)
    assert small.kept["reasons"] == {
        "lstm hears itself in each step, and is not taken apart": 12,
        "lstm in lstm mixes channels": 4,
    }


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_operations_are_counted_without_building_it():
    task, small = exported("encoder")
    example = task.inputs.kwargs
    foretold = SubnetworkFlops(task.net, task.layers, example)(task.relevant)
    assert foretold == size_of(small, example).flops < size_of(task.net, example).flops


# -- what the example has fixed ---------------------------------------------------------------------------------------


@each_net
def test_any_number_of_samples_and_any_length_of_words(name):
    task, small = exported(name)
    for samples in (1, 2, 9):
        inputs = task.inputs.each(lambda tensor, samples=samples: tensor.repeat(2, *[1] * (tensor.ndim - 1))[:samples])
        expected = task.recalled(inputs)
        for path, value in inputs.run(small).items():
            torch.testing.assert_close(
                value.detach(), expected[path], rtol=0, atol=1e-5 * float(expected[path].abs().max())
            )
    if name == "encoder":
        for length in (2, 5, 16):
            task.check(
                small, Inputs.of(tokens(3, length) if length > 2 else {**tokens(3, 2), "attention_mask": ones(3)})
            )


def ones(samples: int) -> Tensor:
    return torch.ones(samples, 2, dtype=torch.long)


def test_other_inputs_than_those_it_was_exported_for_are_refused():
    small = exported("encoder")[1]
    both = tokens()
    with pytest.raises(AssertionError, match=r"exported for input_ids\.size\(1\) <= 16"):
        small(**tokens(2, 17))
    with pytest.raises(AssertionError, match=r"exported for attention_mask in torch\.int64"):
        small(both["input_ids"], both["attention_mask"].bool())
    with pytest.raises(AssertionError, match=r"attention_mask\.size\(1\) = that of input_ids|input_ids\.size"):
        small(both["input_ids"], both["attention_mask"][:, :-1])
    with pytest.raises(TypeError):
        small(both["input_ids"])
    small = exported("u-net")[1]
    with pytest.raises(AssertionError, match=r"exported for args_0\.size\(2\) = 10|exported for x\.size\(2\) = 10"):
        small(*images(4, 12))


def test_the_way_that_the_example_went():
    """Without a mask, and with an argument that is no tensor."""
    torch.manual_seed(0)
    task = Task(Encoder(), {"input_ids": tokens()["input_ids"], "all_hidden": True})
    small = task.exported()
    task.check(small)
    ids = tokens()["input_ids"]
    assert small(ids).keys() == small(input_ids=ids, all_hidden=True).keys() == {"logits", "hidden", "loss"}
    assert len(small(ids)["hidden"]) == 2
    assert small(ids)["loss"] is None
    with pytest.raises(AssertionError, match="exported for all_hidden = True"):
        small(ids, all_hidden=False)


def test_arguments_by_position_that_are_no_tensors_are_checked():
    class Powered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, pair: dict[str, Any], power: int, way: str | None = None) -> Tensor:
            x = pair["both"][1] if pair["both"][0].dim() == 2 else pair["both"][0]
            return self.net(x**power)

    net = Powered()
    x = torch.randn(6, 4, dtype=torch.float64)
    task = Task(net, ({"both": [x, x + 1]}, 2, None))
    small = task.exported()
    task.check(small)
    assert small({"both": (x, x)}, 2, None).shape == (6, CLASSES)
    with pytest.raises(AssertionError, match="exported for power = 2"):
        small({"both": [x, x]}, 3, None)
    with pytest.raises(AssertionError, match="exported for way = None"):
        small({"both": [x, x]}, 2, "backwards")


@pytest.mark.parametrize(
    "decide", [lambda x: len(x) > 1, lambda x: x.size(0) % 2 == 0, lambda x: x.shape[0] != 8, lambda x: x.size(0) > 1]
)
def test_a_forward_that_decides_by_the_number_of_samples_is_not_cut(decide):
    net = Built(lambda self, x: self.net(x if decide(x) else -x), net=mlp())
    torch.manual_seed(0)
    task = Task(net, (torch.randn(6, 4),))
    small = task.exported()
    for samples in (6, 1, 3):
        inputs = task.inputs.each(lambda tensor, samples=samples: torch.cat([tensor, tensor])[:samples])
        torch.testing.assert_close(inputs.run(small)[()].detach(), task.recalled(inputs)[()], rtol=0, atol=1e-10)


def test_where_one_sample_alone_can_not_be_tried_it_is_refused():
    """Tensors of different lengths, as those of a graph."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y.mean(0) if x.size(0) > 1 else -x)

    torch.manual_seed(0)
    task = Task(Joined(), (torch.randn(6, 4), torch.randn(3, 4)))
    small = task.exported()
    task.check(small)
    x, y = task.inputs.args
    assert small(x[:4], y[:2]).shape == (4, CLASSES)
    with pytest.raises(AssertionError, match=r"exported for x\.size\(0\) >= 2"):
        small(x[:1], y)


def test_an_example_of_one_sample_is_enough():
    task = task_of("encoder")
    small = export(task.net, task.layers, task.record, inputs=lambda: Inputs.of(tokens(1)).to(torch.device("cpu")))
    task.check(small)


# -- files, and other programs ----------------------------------------------------------------------------------------


def test_it_is_stored_and_loaded_without_this_package_and_the_model_s_class(tmp_path):
    expected = {}
    for name in NETS:
        task, small = exported(name)
        (_, logits), *_ = task.recalled().items()
        expected[name] = (task.inputs.args, dict(task.inputs.kwargs), logits)
        torch.save(small, tmp_path / f"{name}.pt")
        assert copy.deepcopy(small).kept == small.kept
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import pathlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning_rnf", "lightning", "networks", "zennit") or name.startswith("test_"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
folder = pathlib.Path({str(tmp_path)!r})
for name, (args, kwargs, logits) in torch.load(folder / "expected.pt").items():
    small = torch.load(folder / f"{{name}}.pt", weights_only=False)
    found = small(*args, **kwargs)
    found = found["logits"] if isinstance(found, dict) else found
    torch.testing.assert_close(found.detach(), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert not small.training
    assert small.kept["layers"]
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ["encoder", "u-net", "recurrent"])
def test_onnx_gives_the_logits_of_recall(name, tmp_path):
    if torch.__version__ < (2, 9):
        pytest.skip("today's onnxscript needs torch 2.9, the first that exports with it by default")
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    (task, small), path = exported(name), tmp_path / "small.onnx"
    inputs = task.inputs.tensors()
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    torch.onnx.export(small, tuple(inputs), path, dynamo=True, dynamic_shapes=free)
    session = onnxruntime.InferenceSession(path)
    for samples in (len(inputs[0]), 3):
        given = task.inputs.each(lambda tensor, samples=samples: tensor[:samples])
        named = zip(session.get_inputs(), given.tensors(), strict=True)
        found, *_ = session.run(None, {one.name: value.numpy() for one, value in named})
        expected, *_ = task.recalled(given).values()
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -- what can't be followed at all ------------------------------------------------------------------------------------


class Deciding(nn.Module):
    """By values, and with a norm that has a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 10), nn.BatchNorm1d(10), nn.Linear(10, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        return self.head(self.two(x if bool(x.sum() > 1e9) else 2 * x).relu())


def test_what_decides_by_values_is_a_copy_with_zeros_and_a_warning_says_why():
    torch.manual_seed(0)
    net = Deciding()
    nn.init.normal_(net.norm.bias)
    task = Task(net, (torch.randn(6, 4),))
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    with pytest.warns(
        UserWarning, match=r"100% of the parameters of its silent units .*torch\.fx.*nor can torch\.export"
    ):
        small = task.exported()
    task.check(small)
    assert type(small) is Deciding
    assert not small.training
    assert all(torch.equal(value, before[name]) for name, value in task.net.state_dict().items())
    silent = ~task.relevant["one"]
    assert silent.any()
    for rows in (small.one.weight, small.one.bias, small.norm.bias):
        assert not rows[silent].any()
    assert small.kept["layers"]["one"] == {"units": 10, "silent": int(silent.sum()), "kept": 10}
    assert small.kept["parameters"] == parameters(small) == parameters(task.net)
    own = {tensor.data_ptr() for tensor in task.net.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in small.state_dict().values())


def test_layers_that_are_not_torch_s_are_silent_in_a_copy_too():
    torch.manual_seed(0)
    net = Deciding()
    weight_norm(net.one)
    task = Task(net, (torch.randn(6, 4),))
    with pytest.warns(UserWarning, match="100% of the parameters of its silent units"):
        task.check(task.exported())
    assert (~task.relevant["one"]).any()


def test_a_copy_that_is_not_recall_s_network_is_refused():
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool(x.sum() > 1e9) else 2 * x) + 1  # of a silent unit, too

    torch.manual_seed(0)
    task = Task(nn.Sequential(Shifted(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)), (torch.randn(6, 4),))
    with pytest.raises(ValueError, match=r"a copy with zeros .* is not recall's network, either: it is off by"):
        task.exported()


def test_without_inputs_the_sentence_names_them():
    with pytest.raises(
        ValueError, match=r"can't be traced by .*Or give example=, .* or the module an example_input_array"
    ):
        export(*(lambda task: (task.net, task.layers, task.record))(task_of("recurrent")))


# -- with the callback ------------------------------------------------------------------------------------------------


class Sized(Classifier):
    """It looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) == 0:
            raise ValueError("nothing")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:no free units")
def test_the_samples_that_are_kept_set_themselves():
    torch.manual_seed(0)
    model, rnf = Sized(), RelevanceFreezing()
    train(model, rnf, "a", "b")
    for task in ("a", "b"):
        with torch.no_grad(), rnf.recall(task):
            expected = model(inputs())
        before = snapshot(model)
        small = rnf.export(model, task)
        assert changes(before, snapshot(model)) == []
        assert isinstance(small, torch.fx.GraphModule)
        scale = float(expected.abs().max())
        torch.testing.assert_close(small(inputs()).detach(), expected, rtol=0, atol=1e-5 * scale)
        relevant = rnf.state.tasks[task].relevant["body.0"]
        assert len(small.get_parameter("body.0.weight")) == max(1, int(relevant.sum())) < len(relevant)


@pytest.mark.filterwarnings("ignore:no free units")
def test_in_another_program_inputs_are_given_or_the_model_s_own_example():
    torch.manual_seed(0)
    model, first_one, rnf = Sized(), RelevanceFreezing(), RelevanceFreezing()
    train(model, first_one, "a")
    rnf.load_state_dict(first_one.state_dict())
    with pytest.raises(ValueError, match="give example="):
        rnf.export(model, "a")
    expected = first_one.export(model, "a").state_dict()
    for small in (rnf.export(model, "a", example=inputs()), rnf.export(model, "a", example={"x": inputs()})):
        assert all(torch.equal(value, expected[name]) for name, value in small.state_dict().items())
    model.example_input_array = inputs()[:1]
    assert rnf.export(model, "a").state_dict().keys() == expected.keys()


# -- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bert", "ViT"])
def test_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    if name == "Bert":
        config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=CLASSES, **sizes)
        net: nn.Module = transformers.BertForSequenceClassification(config)
        example: Any = tokens()
        hidden = "bert.encoder.layer.0.intermediate.dense"
    else:
        config = transformers.ViTConfig(image_size=12, patch_size=4, num_labels=CLASSES, **sizes)
        net, example = transformers.ViTForImageClassification(config), {"pixel_values": images(4, 12)[0]}
        hidden = next(key for key, part in net.named_modules() if getattr(part, "out_features", 0) == 64)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    task = Task(net, example, double=False)
    small = task.exported()
    task.check(small)
    assert len(small.get_parameter(f"{hidden}.weight")) == int(task.relevant[hidden].sum()) < 64

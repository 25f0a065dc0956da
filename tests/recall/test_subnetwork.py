from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from records import ConvNet, Mlp, Network, batch, every_second, make, record_of
from torch import Tensor, nn
from torch.nn.functional import batch_norm, layer_norm, linear

from lightning_rnf.anatomy.units import OUTPUT_AXIS, UnitLayer, UnitMap
from lightning_rnf.memory.state import TaskRecord
from lightning_rnf.recall.subnetwork import recall, silence
from lightning_rnf.runtime.guard import evaluating

each_net = pytest.mark.parametrize("kind", [Mlp, ConvNet])


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def outputs(net: Network, x: Tensor) -> dict[str, Tensor]:
    """What each layer's units say to the rest of the network: after the norm, and after every hook that is there."""
    said: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(layer.norm or layer.name).register_forward_hook(
            lambda module, args, output, name=layer.name: said.update({name: output.detach().clone()})
        )
        for layer in net.layers
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return said


def overwrite(net: Network, record: TaskRecord, value: Callable[[Tensor], Tensor]) -> None:
    """What later tasks may do: everything that is not the task's own is replaced, the norms' statistics too."""
    own = {name: record.relevant[layer.name] for layer in net.layers for name in layer.parameters}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in own:
                parameter[~own[name]] = value(parameter[~own[name]])
            elif name not in (*net.shared, *record.head_parameters):
                parameter.copy_(value(parameter))
        for buffer in net.buffers():
            buffer.copy_(value(buffer) if buffer.is_floating_point() else buffer + 1000)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda tensor: 3 * torch.randn_like(tensor),
    "nan": lambda tensor: torch.full_like(tensor, math.nan),
    "infinity": lambda tensor: torch.full_like(tensor, math.inf),
}
each_damage = pytest.mark.parametrize("damage", DAMAGE)


# -- silence ----------------------------------------------------------------------------------------------------------


@each_net
@each_damage
def test_irrelevant_units_say_exactly_zero_after_the_norm(kind, damage):
    net = make(kind).eval()
    relevant = every_second(net.layers)
    x, _ = batch(net)
    loud = outputs(net, x)
    # Statistics stay: silence is about units, and a search measures with the norms as they are.
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    overwrite(net, record_of(net), DAMAGE[damage])
    net.load_state_dict(buffers, strict=False)
    with silence(net, net.layers, relevant):
        said = outputs(net, x)
    for layer in net.layers:
        by_unit = said[layer.name].movedim(layer.axis, 0)
        assert not by_unit[~relevant[layer.name]].count_nonzero(), layer.name
        assert by_unit[relevant[layer.name]].flatten(1).any(dim=1).all(), layer.name
    first = net.layers[0]
    assert torch.equal(
        said[first.name].movedim(first.axis, 0)[relevant[first.name]],
        loud[first.name].movedim(first.axis, 0)[relevant[first.name]],
    )


def test_silence_is_the_network_without_these_units():
    net = make(Mlp).double().eval()
    relevant = every_second(net.layers, start=1)
    x, _ = batch(net)
    keep1, keep2 = (relevant[name].double() for name in ("fc1", "fc2"))
    hidden = linear(x, net.fc1.weight * keep1[:, None], net.fc1.bias * keep1).tanh()
    hidden = layer_norm(hidden, (6,), net.norm.weight, net.norm.bias)
    hidden = linear(hidden, net.fc2.weight * keep2[:, None], net.fc2.bias * keep2).tanh()
    expected = linear(hidden, net.heads.tasks["first"].weight, net.heads.tasks["first"].bias)
    with silence(net, net.layers, relevant):
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (2, 3)),
        (nn.Linear(3, 4), (2, 5, 3)),
        (nn.Conv1d(3, 4, 2), (2, 3, 5)),
        (nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
        (nn.Conv2d(3, 4, 2), (3, 5, 5)),
        (nn.Conv3d(3, 4, 2), (2, 3, 5, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 2), (2, 3, 5)),
        (nn.ConvTranspose2d(2, 4, 2, groups=2), (2, 2, 5, 5)),
        (nn.ConvTranspose3d(3, 4, 2), (2, 3, 5, 5, 5)),
    ],
    ids=[
        "linear",
        "linear-of-tokens",
        "conv1d",
        "conv2d",
        "conv2d-without-batch",
        "conv3d",
        "conv-transpose-1d",
        "conv-transpose-2d",
        "conv-transpose-3d",
    ],
)
def test_units_are_counted_along_their_axis(layer, shape):
    axis = OUTPUT_AXIS[type(layer)]
    net = nn.Sequential(layer)
    x = torch.randn(shape)
    loud = layer(x)
    relevant = {"0": torch.tensor([True, False, False, True])}
    with silence(net, [UnitLayer("0", 4, axis, ("0.weight", "0.bias"))], relevant):
        said = net(x)
    expected = loud.clone()
    expected.index_fill_(axis, torch.tensor([1, 2]), 0.0)
    assert torch.equal(said, expected)


def test_statistics_of_a_norm_that_is_used_as_a_function_are_recalled():
    class Functional(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn1
            z = batch_norm(self.conv1(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)
            return self.heads(self.conv2(z.tanh()).tanh().mean(dim=(2, 3)))

    net = make(Functional).eval()
    x, y = batch(net)
    units = UnitMap.of(net, (x, y))
    assert {"bn1.running_mean", "bn1.running_var"} <= set(units.buffers)


def test_a_unit_is_silent_for_what_reads_it_before_its_norm_too():
    net = make(ConvNet).eval()
    heard = []
    net.bn1.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    relevant = every_second(net.layers)
    with silence(net, net.layers, relevant):
        net(batch(net)[0])
    assert not heard[0][:, ~relevant["conv1"]].any()
    assert heard[0][:, relevant["conv1"]].any()


@each_net
def test_silence_ends_with_the_context(kind):
    net = make(kind).eval()
    x, _ = batch(net)
    before, logits = hooks(net), net(x)
    with silence(net, net.layers, every_second(net.layers)):
        assert hooks(net) == before + sum(1 + (layer.norm is not None) for layer in net.layers)
        assert not torch.equal(net(x), logits)
    assert hooks(net) == before
    assert torch.equal(net(x), logits)


def test_silence_keeps_the_memory_format():
    """In channels_last pooling is ten times as fast on a CPU; what follows a silenced layer must not lose that."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).to(memory_format=torch.channels_last)
    layer = UnitLayer("0", 8, -3, ("0.weight", "0.bias"))
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    gradients: list[Tensor] = []

    def keep_gradient(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(gradients.append)

    net[0].register_forward_hook(keep_gradient)
    with silence(net, (layer,), {"0": torch.arange(8) < 5}):
        said = net[0](x)
        said.backward(torch.randn_like(said))
    assert said.is_contiguous(memory_format=torch.channels_last)
    assert not said[:, 5:].any()
    assert said[:, :5].any()
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def interrupted(net: Network, context: Callable[[], object]) -> None:
    with pytest.raises(KeyboardInterrupt), context():
        raise KeyboardInterrupt


@each_net
def test_silence_ends_with_an_exception_too(kind):
    net = make(kind)
    before = hooks(net)
    interrupted(net, lambda: silence(net, net.layers, every_second(net.layers)))
    assert hooks(net) == before


def test_hooks_are_removed_even_if_a_layer_is_missing():
    net = make(Mlp)
    layers, relevant = net.layers, every_second(net.layers)
    del net.fc2
    with pytest.raises(AttributeError, match="fc2"), silence(net, layers, relevant):
        pass
    assert hooks(net) == 0


# -- recall is exact --------------------------------------------------------------------------------------------------


@each_net
@each_damage
def test_logits_are_bit_identical_whatever_later_tasks_did(kind, damage):
    net = make(kind)
    record = record_of(net)
    x, _ = batch(net)
    with recall(net, net.layers, record):
        at_its_end = net(x)
    net.heads.activate("second")
    overwrite(net, record, DAMAGE[damage])
    with recall(net, net.layers, record):
        later = net(x)
    assert torch.equal(later, at_its_end)
    assert later.isfinite().all()
    net.heads.activate("first")
    assert not torch.equal(net.eval()(x), at_its_end)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("mode_is_inside", [True, False])
@each_net
def test_recall_is_the_same_in_every_grad_mode(kind, mode, mode_is_inside):
    net = make(kind)
    record = record_of(net)
    x, _ = batch(net)
    with recall(net, net.layers, record):
        expected = net(x).detach()
    overwrite(net, record, DAMAGE["nan"])
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    if mode_is_inside:
        with recall(net, net.layers, record), mode():
            found = net(x)
    else:
        with mode(), recall(net, net.layers, record):
            found = net(x)
    assert torch.equal(found, expected)
    for name, buffer in net.named_buffers():
        assert not buffer.is_inference()
        assert torch.equal(buffer.nan_to_num(7), buffers[name].nan_to_num(7)), name
    net.train()(x).sum().backward()  # and training goes on


@each_net
def test_gradients_flow_in_recall_and_only_through_relevant_units(kind):
    net = make(kind)
    record = record_of(net)
    x, _ = batch(net)
    x.requires_grad_(True)

    def gradients() -> dict[str, Tensor]:
        net.zero_grad()
        x.grad = None
        with recall(net, net.layers, record):
            net(x).square().sum().backward()
        return {"x": x.grad} | {name: net.get_parameter(name).grad for one in net.layers for name in one.parameters}

    at_its_end = gradients()
    overwrite(net, record, DAMAGE["noise"])
    later = gradients()
    torch.testing.assert_close(later["x"], at_its_end["x"])
    for layer in net.layers:
        relevant = record.relevant[layer.name]
        for name in layer.parameters:
            torch.testing.assert_close(later[name][relevant], at_its_end[name][relevant])
            assert later[name][relevant].any()
            assert not later[name][~relevant].any()


def test_two_recalls_may_be_nested():
    net = make(ConvNet)
    first = record_of(net)
    net.train()(batch(net)[0] + 5)
    second = record_of(net, "second", relevant=every_second(net.layers, start=1))
    x, _ = batch(net)
    with recall(net, net.layers, second):
        expected = net(x)
    with recall(net, net.layers, second):
        with recall(net, net.layers, first):
            assert not torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)
    assert net.training
    assert hooks(net) == 0


def test_a_buffer_that_two_modules_share_is_recalled():
    class Positions(nn.Module):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    table = torch.arange(6.0)
    net = make(Mlp)
    net.norm = nn.Sequential(Positions(table), Positions(table))
    buffers = {name: table.clone() for name, _ in net.named_buffers(remove_duplicate=False)}
    assert list(buffers) == ["norm.0.table", "norm.1.table"]
    record = record_of(net, norm_statistics=buffers)
    x, _ = batch(net)
    with recall(net, net.layers, record):
        expected = net(x)
    table.mul_(-1)
    with recall(net, net.layers, record):
        assert torch.equal(net(x), expected)
    assert torch.equal(table, -torch.arange(6.0))


@pytest.mark.parametrize(
    ("kept", "read"),
    [
        (lambda table: table, lambda kept: kept),
        (lambda table: [None, table.view(2, 3)], lambda kept: kept[1].flatten()),
        (lambda table: {"table": table}, lambda kept: kept["table"]),
    ],
    ids=["attribute", "view in a list", "dict"],
)
def test_a_buffer_that_its_module_reads_by_another_name_is_recalled(kept, read):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))
            object.__setattr__(self, "kept", kept(self.table))

        def forward(self, x: Tensor) -> Tensor:
            return x + read(self.kept)

    net = make(Mlp)
    net.norm = Positions()
    record = record_of(net, norm_statistics={"norm.table": net.norm.table.clone()})
    x, _ = batch(net)
    with recall(net, net.layers, record):
        expected = net(x)
    net.norm.table.mul_(-1)
    with recall(net, net.layers, record):
        assert torch.equal(net(x), expected)
    assert torch.equal(net.norm.table, -torch.arange(6.0))


# -- recall gives everything back -------------------------------------------------------------------------------------


def deliberate(net: Network) -> dict[str, bool]:
    """Training flags of a user who keeps some modules in eval mode."""
    net.train()
    for index, module in enumerate(net.children()):
        if index % 2:
            module.eval()
    return {name: module.training for name, module in net.named_modules()}


@each_net
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("broken", [False, True], ids=["left", "interrupted"])
def test_recall_gives_back_flags_buffers_head_and_hooks(kind, masked, broken):
    net = make(kind)
    record = record_of(net)
    net.heads.activate("second")
    overwrite(net, record, DAMAGE["noise"])
    flags = deliberate(net)
    assert len(set(flags.values())) == 2
    before = copy.deepcopy(net.state_dict())
    trained = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    buffers = list(net.buffers())
    if broken:
        interrupted(net, lambda: recall(net, net.layers, record, masked=masked))
    else:
        with recall(net, net.layers, record, masked=masked):
            assert not any(module.training for module in net.modules())
            assert net.heads.active == "first"
            net(batch(net)[0])
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(now is then for now, then in zip(net.buffers(), buffers, strict=True))
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == trained
    assert net.heads.active == "second"
    assert hooks(net) == 0


def test_inside_recall_the_norms_have_the_statistics_of_the_task_s_end():
    net = make(ConvNet)
    record = record_of(net)
    overwrite(net, record, DAMAGE["noise"])
    with recall(net, net.layers, record):
        assert all(torch.equal(net.get_buffer(name), value) for name, value in record.norm_statistics.items())


@each_net
def test_unmasked_the_whole_network_speaks_with_the_task_s_head(kind):
    net = make(kind)
    record = record_of(net)
    net.heads.activate("second")
    overwrite(net, record, lambda tensor: tensor.abs() + 1)
    x, _ = batch(net)
    whole = copy.deepcopy(net).eval()
    whole.heads.activate("first")
    with recall(net, net.layers, record, masked=False):
        assert hooks(net) == 0
        assert torch.equal(net(x), whole(x))


def test_a_model_with_heads_of_its_own_is_recalled_with_the_head_that_it_runs():
    class Plain(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"tasks": nn.ModuleDict({"first": nn.Linear(5, 3), "second": nn.Linear(5, 3)})})

        def forward(self, x: Tensor) -> Tensor:
            return self.heads["tasks"]["first"](self.fc2(self.norm(self.fc1(x).tanh())).tanh())

    net = make(Plain)
    record = record_of(net)
    x, _ = batch(net)
    with recall(net, net.layers, record):
        at_its_end = net(x)
    overwrite(net, record, DAMAGE["nan"])
    with recall(net, net.layers, record):
        assert torch.equal(net(x), at_its_end)


# -- compiled models --------------------------------------------------------------------------------------------------


@each_net
def test_a_compiled_model_is_silenced_too(kind):
    net = make(kind)
    record = record_of(net)
    compiled = torch.compile(net, backend="eager")
    x, _ = batch(net)
    net.eval()
    loud = compiled(x)
    with recall(net, net.layers, record):
        expected = net(x)
        assert torch.equal(compiled(x), expected)
    with evaluating(net), silence(net, net.layers, record.relevant):
        assert torch.equal(compiled(x), expected)
    assert not torch.equal(expected, loud)
    assert torch.equal(compiled(x), loud)
    overwrite(net, record, DAMAGE["nan"])
    with recall(net, net.layers, record):
        assert torch.equal(compiled(x), expected)
    torch.compiler.reset()


# -- attention --------------------------------------------------------------------------------------------------------


class Attentive(nn.Module):
    """Meets all conditions of torch's fast path for inference, which runs no submodule of an encoder layer.

    The first batch dimension is of sentences; zeros at the end are padding.
    """

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.heads = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.encoder(self.embedding(tokens), src_key_padding_mask=padding if padding.any() else None)
        return self.heads(x.masked_fill(padding[..., None], 0.0).sum(dim=1))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("silent_layers", ["01", "1", ""])
def test_units_in_a_transformer_are_silenced_in_spite_of_its_fast_path(norm_first, padded, mode, silent_layers):
    torch.manual_seed(0)
    net = Attentive(norm_first)
    tokens = torch.randint(1, 9, (4, 6))
    if padded:
        tokens[1:, 4:] = 0
    units = UnitMap.of(net, (tokens, torch.zeros(4, dtype=torch.long)))
    parts = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    assert [layer.name for layer in units.layers] == [f"encoder.layers.{n}.{part}" for n in (0, 1) for part in parts]
    relevant = {
        layer.name: torch.arange(layer.units) % 3 > 0
        if layer.name.split(".")[2] in silent_layers
        else torch.ones(layer.units, dtype=torch.bool)
        for layer in units.layers
    }
    # ReLU of nothing is nothing: rows of zeros are the same as silence.
    rowless = copy.deepcopy(net)
    with torch.no_grad():
        for layer in units.layers:
            for name in layer.parameters:
                rowless.get_parameter(name)[~layer.spread(name, relevant[layer.name])] = 0.0

    with evaluating(net), silence(net, units.layers, relevant), mode():
        said = net(tokens)

    rowless.train()  # every submodule runs
    for module in rowless.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(said, rowless(tokens).detach(), rtol=0, atol=1e-5)
    with evaluating(net), silence(net, units.layers, relevant):
        assert torch.equal(net(tokens), said)  # whatever the grad mode is


class SquashedNorm(nn.BatchNorm2d):
    """A norm with an activation of its own, which is not 0 at 0."""

    def forward(self, input):
        return super().forward(input).sigmoid()


def test_units_whose_norm_has_an_activation_of_its_own_are_silent_behind_it():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), SquashedNorm(4), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2, 3)).eval()
    x = torch.randn(5, 1, 5, 5)
    units = UnitMap.of(net, (x, torch.zeros(5, dtype=torch.int64)))
    relevant = {"0": torch.tensor([True, False, True, False]), "2": torch.tensor([True, True])}
    whole = net[:2](x)
    with silence(net, units.layers, relevant), torch.no_grad():
        spoken = net[:2](x)
    assert units.layers[0].norm == "1"
    assert not spoken[:, [1, 3]].any()
    torch.testing.assert_close(spoken[:, [0, 2]], whole[:, [0, 2]])


def test_who_looks_on_keeps_what_it_has_seen():
    """Hooks on all modules come before those of ours: silent units are made zero in a tensor that nobody has."""
    net = make(ConvNet)
    record, kept = record_of(net), []
    x, _ = batch(net)
    keep = nn.modules.module.register_module_forward_hook(lambda part, args, out: kept.append((out, out.clone())))
    with keep, recall(net, net.layers, record), torch.no_grad():
        net(x)
    assert kept
    assert all(torch.equal(now, then) for now, then in kept)

from __future__ import annotations

import pytest
import torch
from records import ConvNet, make, record_of, state_of
from snapshot import changes, snapshot
from torch import nn
from training import Classifier, ConvClassifier, clusters, inputs, plain, task_data, train, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.recall.norms import Stored, held, pinned, recalibrated, stored, with_statistics
from lightning_rnf.recall.subnetwork import silence
from lightning_rnf.search.criteria import FreeCapacity

BATCHES = [torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(n)) for n in (7, 5, 6)]


def conv_net() -> ConvNet:
    net = make(ConvNet)
    with torch.no_grad():
        net.bn1.weight.normal_()
        net.bn1.bias.normal_()
    return net


# -- estimated anew ---------------------------------------------------------------------------------------------------


def test_the_statistics_are_the_mean_over_the_batches():
    net = conv_net().eval()
    before = snapshot(net)
    heard = [net.conv1(x) for x in BATCHES]
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in heard]).mean(dim=0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x in heard]).mean(dim=0)
    with recalibrated([net.bn1], lambda: [net(x) for x in BATCHES]):
        torch.testing.assert_close(net.bn1.running_mean, mean)
        torch.testing.assert_close(net.bn1.running_var, var)
        assert (net.bn1.training, net.bn1.momentum) == (False, 0.1)
    assert changes(before, snapshot(net)) == []


def test_a_silent_unit_changes_what_the_next_norm_gets():
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
    unit_layer = ConvNet.layers[0].__class__("0", 4, -1, ("0.weight", "0.bias", "1.weight", "1.bias"), norm="1")
    x = torch.randn(20, 3)
    with (
        silence(layers, [unit_layer], {"0": torch.tensor([True, False, False, True])}),
        recalibrated([layers[1], layers[3]], lambda: layers(x)),
    ):
        first = nn.functional.batch_norm(layers[0](x), None, None, layers[1].weight, layers[1].bias, training=True)
        first[:, 1:3] = 0
        torch.testing.assert_close(layers[3].running_mean, layers[2](first).mean(dim=0))


def test_a_norm_that_no_batch_reaches_keeps_its_statistics():
    net, other = conv_net(), nn.BatchNorm2d(3)
    other.running_mean.fill_(5)
    with recalibrated([net.bn1, other], lambda: [net(x) for x in BATCHES]):
        assert (other.running_mean == 5).all()
    with recalibrated([net.bn1], lambda: None):
        assert torch.equal(net.bn1.running_mean, conv_net().bn1.running_mean)


def test_everything_comes_back_after_an_exception():
    net = conv_net()
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), recalibrated([net.bn1], lambda: 1 / 0):
        pass
    assert changes(before, snapshot(net)) == []


class Branches(nn.Module):
    """Blocks of a convolution beside a norm of the input itself, as in RepVGG: a constant goes from norm to norm."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.identities = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 1, bias=False) for _ in range(blocks))
        for norm in self.identities:
            nn.init.uniform_(norm.bias, 0.1, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for identity, conv in zip(self.identities, self.convs, strict=True):
            x = (identity(x) + 0.1 * conv(x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_constant_channels_from_norm_to_norm_say_the_same_in_another_precision(precision):
    torch.manual_seed(0)
    net = Branches(12).eval()
    silent = torch.tensor([True, True, False, False, False, True])
    blocks = [UnitLayer(f"convs.{index}", 6, -3, (f"convs.{index}.weight",)) for index in range(12)]
    layers = [UnitLayer("first", 6, -3, ("first.weight",)), *blocks]
    x = torch.cat(BATCHES)
    with (
        silence(net, layers, {layer.name: ~silent for layer in layers}),
        recalibrated(list(net.identities), lambda: net(x)),
        torch.no_grad(),
    ):
        single, other = net(x), net.to(precision)(x.to(precision))
    assert single.std(0)[~silent].min() > 1e-3  # the others do say something of their own
    torch.testing.assert_close(
        single, other.float(), rtol=0, atol=20 * single.abs().max() * max(1e-7, torch.finfo(precision).eps)
    )


@pytest.mark.parametrize("constant", [0.0, 1.0, -3e4])
def test_a_constant_channel_is_not_divided_by_its_rounding_and_another_is_by_its_deviation(constant):
    norm, x = nn.BatchNorm1d(3).eval(), torch.randn(2000, 3)
    x[:, 0] = constant
    x[:, 1] = 1e3 + 0.1 * x[:, 1]  # a deviation of 1e-4 of the mean is one
    with recalibrated([norm], lambda: [norm(part) for part in x.split(500)]), torch.no_grad():
        assert norm(x * (1 + 1e-6))[:, 0].abs().max() < 1e-6
        assert norm(x)[:, 1:].std(0) == pytest.approx([1, 1], rel=0.01)
        averaged = (norm.running_var + nn.BatchNorm1d(3).running_var) / 2
    assert averaged.isfinite().all()


def test_in_half_precision_a_constant_channel_has_the_largest_variance_that_there_is():
    norm, x = nn.BatchNorm1d(2).half().eval(), torch.randn(64, 2).half()
    x[:, 0] = 3
    with recalibrated([norm], lambda: norm(x)), torch.no_grad():
        assert norm.running_var.isfinite().all()
        assert norm(x + 0.5)[:, 0].abs().max() < 0.01


def test_norms_without_running_statistics_have_none_to_estimate():
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2), nn.LayerNorm(2))
    assert list(with_statistics(net, dict(net.named_buffers()))) == ["1"]


def test_the_search_measures_each_candidate_with_statistics_of_its_own():
    torch.manual_seed(0)
    model, rnf = ConvClassifier(), plain(criterion=FreeCapacity(0.6))
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    x, y = task_data("a").validation.tensors
    with rnf.recall("a"), torch.no_grad():
        assert (model(x).argmax(1) == y).double().mean().item() == record.subnetwork_accuracy
    assert not torch.equal(record.norm_statistics["body.4.running_mean"], model.body[4].running_mean)

    torch.manual_seed(0)
    as_it_was, without = ConvClassifier(), plain(criterion=FreeCapacity(0.6), recalibrate_norm=False)
    train(as_it_was, without, "a")
    assert torch.equal(without.state.tasks["a"].norm_statistics["body.4.running_mean"], as_it_was.body[4].running_mean)
    for name, value in model.state_dict().items():  # the model's own statistics are nobody's business
        assert torch.equal(value, as_it_was.state_dict()[name])


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_the_whole_network_is_measured_with_its_own_statistics():
    model, rnf = ConvClassifier(), plain(criterion=lambda score: False)
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert record.cutoff == 0
    assert torch.equal(record.norm_statistics["body.4.running_mean"], model.body[4].running_mean)


# -- pinned -----------------------------------------------------------------------------------------------------------

CHANNELS = torch.tensor([True, False, True, False])


STORED = {"bn1": Stored(CHANNELS, torch.tensor([0.5, 9.0, -0.25, 9.0]), torch.tensor([2.0, 9.0, 0.5, 9.0]))}


def test_pinned_channels_normalise_with_stored_statistics_in_training_too_and_others_with_the_batch_s():
    net, twin = conv_net().train(), conv_net().train()
    mean, var = STORED["bn1"].mean, STORED["bn1"].var
    x = net.conv1(BATCHES[0]).detach()
    as_stored = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + net.bn1.eps).sqrt()
    as_stored = as_stored * net.bn1.weight.view(-1, 1, 1) + net.bn1.bias.view(-1, 1, 1)
    with pinned(net, STORED):
        for _ in range(3):
            found, plain = net.bn1(x), twin.bn1(x)
            torch.testing.assert_close(found[:, CHANNELS], as_stored[:, CHANNELS])
            assert torch.equal(found[:, ~CHANNELS], plain[:, ~CHANNELS])
    for buffer, value in (("running_mean", mean), ("running_var", var)):
        assert torch.equal(net.bn1.get_buffer(buffer)[CHANNELS], value[CHANNELS])
        assert torch.equal(net.bn1.get_buffer(buffer)[~CHANNELS], twin.bn1.get_buffer(buffer)[~CHANNELS])
    assert torch.equal(net.bn1(x), twin.bn1(x))


class NormAct(nn.BatchNorm2d):
    """A norm whose forward goes on with an activation."""

    def forward(self, input):
        return super().forward(input).sigmoid()


def test_a_pinned_norm_with_an_activation_of_its_own_keeps_it():
    plain, net = conv_net(), conv_net()
    net.bn1 = NormAct(4)
    net.load_state_dict(plain.state_dict())
    x = BATCHES[0]
    for each in (plain, net):
        each.train().bn1.momentum = 0.5
    for _ in range(2):
        with pinned(plain, STORED), pinned(net, STORED):
            torch.testing.assert_close(net.bn1(net.conv1(x)), plain.bn1(plain.conv1(x)).sigmoid())
    assert torch.equal(net.bn1.running_var, plain.bn1.running_var)  # they moved once, too
    assert net.bn1.training
    with pinned(net, STORED):
        (net(BATCHES[0]).square().sum() + net(BATCHES[1]).square().sum()).backward()
    assert net.conv1.weight.grad.abs().sum(dim=(1, 2, 3)).all()


def test_gradients_flow_through_pinned_norms_after_several_forwards():
    net = conv_net().train()
    with pinned(net, STORED):
        (net(BATCHES[0]).sum() + net(BATCHES[1]).sum()).backward()
    assert net.conv1.weight.grad.abs().sum(dim=(1, 2, 3)).all()


def test_what_is_stored_of_a_channel_is_of_the_first_task_that_it_belongs_to():
    net = conv_net()
    records = []
    for number, relevant in enumerate([[1, 0, 0, 1], [1, 1, 0, 0]]):
        masks = {"conv1": torch.tensor(relevant, dtype=torch.bool), "conv2": torch.ones(5, dtype=torch.bool)}
        net.bn1.running_mean.fill_(number + 1)
        records.append(record_of(net, ("first", "second")[number], masks))
    found = stored(state_of(net, *records), net)["bn1"]
    assert found.channels.tolist() == [True, True, False, True]
    assert found.mean[found.channels].tolist() == [1, 2, 1]


def test_a_later_task_leaves_pinned_statistics_as_they_are_recalled_and_moves_free_ones():
    torch.manual_seed(0)
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=FreeCapacity(0.5), norm_statistics="pinned")
    train(model, rnf, "a")
    frozen = rnf.state.frozen()["body.3"]
    assert 0 < frozen.sum() < len(frozen)
    kept = rnf.state.tasks["a"].norm_statistics
    with rnf.recall("a"), torch.no_grad():
        logits = model(inputs())
    train(model, rnf, "b")
    for name in ("running_mean", "running_var"):
        assert torch.equal(model.body[4].get_buffer(name) == kept[f"body.4.{name}"], frozen)
        assert torch.equal(
            rnf.state.tasks["b"].norm_statistics[f"body.4.{name}"][frozen], kept[f"body.4.{name}"][frozen]
        )
    with rnf.recall("a"), torch.no_grad():
        assert torch.equal(model(inputs()), logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_channels_that_said_nothing_in_a_task_are_not_pinned_to_say_nothing_in_later_ones():
    torch.manual_seed(0)
    model = Classifier()
    model.body = nn.Sequential(
        *(nn.Unflatten(1, (1, 1, 6)), nn.Conv2d(1, 16, (1, 3)), nn.ReLU(), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 16, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 40), nn.ReLU()),
    )
    rnf, x = RelevanceFreezing(criterion=FreeCapacity(0.6), norm_statistics="pinned"), inputs()
    train(model, rnf, "a", max_epochs=2)
    silent = ~rnf.state.tasks["a"].relevant["body.1"]
    assert silent.any()
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    train(model, rnf, "b", max_epochs=3)
    assert model.body[3].running_var.max() < 1e3
    with torch.no_grad():
        assert model.eval().body[:4](x).std((0, 2, 3))[silent].max() > 0.01
        with rnf.recall("a", model):
            assert torch.equal(model(x), before)


def test_a_norm_that_belongs_to_no_unit_is_pinned_whole():
    class Late(ConvClassifier):  # the norm reads a sum: no layer owns its channels
        def forward(self, x):
            x = self.body[0](x)
            x = self.body[1](x).relu()
            y = self.body[3](x)
            return self.heads(self.body[8](self.body[7](self.body[4](y + 0.5 * y.flip(1)).relu().flatten(1))))

    model, rnf = Late(), RelevanceFreezing(criterion=FreeCapacity(0.5), norm_statistics="pinned")
    train(model, rnf, "a")
    assert "body.4.weight" in rnf.state.shared
    train(model, rnf, "b")
    kept = rnf.state.tasks["a"].norm_statistics["body.4.running_mean"]
    assert torch.equal(model.body[4].running_mean, kept)


@pytest.mark.filterwarnings("ignore:.*module.* in eval mode at the start of training")
def test_norms_that_the_user_keeps_in_eval_mode_keep_their_statistics():
    class Frozen(ConvClassifier):
        def train(self, mode=True):
            super().train(mode)
            self.body[4].eval()
            return self

    model, rnf = Frozen().train(), RelevanceFreezing(criterion=FreeCapacity(0.5))
    model.body[4].running_mean.fill_(0.3)
    train(model, rnf, "a")
    assert (rnf.state.tasks["a"].norm_statistics["body.4.running_mean"] == 0.3).all()


# -- held in recovery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("kind", "sides"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (4, 3)), (nn.InstanceNorm2d, (4, 3))],
)
def test_channels_that_are_constant_in_a_batch_keep_their_statistics_and_others_move_as_ever(kind, sides, momentum):
    torch.manual_seed(0)
    norm, plain = (kind(6, momentum=momentum, track_running_stats=True) for _ in range(2))
    for batch in range(3):
        x = torch.randn(8, 6, *sides)
        x[:, batch] = 0.0
        x[:, 5] = 2.5
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        identities = {name: id(buffer) for name, buffer in norm.named_buffers()}
        with held(nn.Sequential(norm)):
            output = norm(input=x) if batch else norm(x)
        assert torch.equal(output, plain(x))
        for name in ("running_mean", "running_var"):
            after, expected = norm.get_buffer(name), plain.get_buffer(name)
            for channel in range(6):
                if channel in (batch, 5):
                    assert torch.equal(after[channel], before[name][channel])
                elif channel > batch:  # those before were held when the plain norm's moved
                    assert torch.equal(after[channel], expected[channel])
        assert identities == {name: id(buffer) for name, buffer in norm.named_buffers()}
    norm.eval()
    before = norm.running_mean.clone()
    with held(norm):
        norm(x)
    assert torch.equal(norm.running_mean, before)
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks


class AfterActivation(ConvClassifier):
    """Its norms belong to no unit layer: what a silent unit says reaches them as a constant."""

    def __init__(self, depth: int = 6, **options):
        super().__init__(**options)
        blocks = [nn.Unflatten(1, (1, 1, 6)), nn.Conv2d(1, 16, (1, 3), padding=(0, 1))]
        for _ in range(depth):
            blocks += [nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 16, (1, 3), padding=(0, 1))]
        self.body = nn.Sequential(*blocks, nn.ReLU(), nn.Flatten(), nn.Linear(96, 40), nn.ReLU())


class Depthwise(AfterActivation):
    """A depthwise convolution speaks of its channel alone, and that may be silent."""

    def __init__(self, **options):
        super().__init__(0, **options)
        blocks = list(self.body[:2])
        for _ in range(3):
            blocks += [nn.Conv2d(16, 16, (1, 3), padding=(0, 1), groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            blocks += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.body = nn.Sequential(*blocks, *self.body[3:])


@pytest.mark.parametrize("kind", [AfterActivation, Depthwise])
def test_no_norm_s_variance_falls_to_zero_in_a_recovery_and_the_whole_network_still_speaks(kind):
    torch.manual_seed(0)
    model = kind()
    rnf = RelevanceFreezing(criterion=1.0, ration=0.35, recovery_epochs=8, recovery_criterion=FreeCapacity(0.6))
    train(model, rnf, "a", max_epochs=10)
    smallest = min(float(buffer.min()) for name, buffer in model.named_buffers() if name.endswith("running_var"))
    assert smallest > 1e-3
    model.eval()
    with torch.no_grad():
        assert model(inputs()).abs().max() < 1000


# -- per task, shared -------------------------------------------------------------------------------------------------


def test_by_default_later_tasks_move_the_model_s_statistics_and_recall_brings_them_back():
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=FreeCapacity(0.5))
    train(model, rnf, "a")
    before = model.body[4].running_mean.clone()
    kept = rnf.state.tasks["a"].norm_statistics["body.4.running_mean"]
    train(model, rnf, "b")
    assert not torch.equal(model.body[4].running_mean, before)
    with rnf.recall("a"):
        assert torch.equal(model.body[4].running_mean, kept)


def test_shared_statistics_are_left_alone_by_recall_and_this_is_said():
    with pytest.warns(UserWarning, match="norm_statistics='shared'.*recall is not exact"):
        rnf = RelevanceFreezing(criterion=FreeCapacity(0.5), norm_statistics="shared")
    model = ConvClassifier()
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    x, y = task_data("a").validation.tensors
    with rnf.recall("a"), torch.no_grad():
        assert (model(x).argmax(1) == y).double().mean().item() == record.subnetwork_accuracy
    train(model, rnf, "b")
    assert not any("running" in name for name in rnf.state.tasks["a"].norm_statistics)
    moved = model.body[4].running_mean.clone()
    with rnf.recall("a"):
        assert torch.equal(model.body[4].running_mean, moved)


@pytest.mark.parametrize("option", [{"norm_statistics": "frozen"}, {"recalibrate_norm": "yes"}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        RelevanceFreezing(**option)


def test_samples_alone_in_a_batch_are_left_out_of_the_estimate():
    model = ConvClassifier()
    data = task_data("a")
    data.validation = clusters("a", 65, 1)  # batches of 32, 32 and 1
    model.body.append(nn.BatchNorm1d(40))  # refuses single samples in training mode
    rnf = RelevanceFreezing(criterion=FreeCapacity(0.5))
    model.heads.activate("a")
    trainer(rnf).fit(model, datamodule=data)
    assert rnf.state.tasks["a"].samples == 65

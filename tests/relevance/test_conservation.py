"""How much relevance is left where, what takes it, and what the callback says about it."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from networks import Built, labelled, mlp, split
from snapshot import changes, snapshot
from torch import Tensor, nn
from training import Classifier, ConvClassifier, train
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus
from zennit.core import Composite
from zennit.rules import Pass

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.relevance.attribution import Attribution, attribute
from lightning_rnf.relevance.conservation import BIAS, INPUT, Conservation


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def attributed(net: nn.Module, *batches: tuple[Tensor, Tensor], heads: str | None = None, **options) -> Attribution:
    return attribute(net, UnitMap.of(net, batches[0], heads=heads).layers, batches, **options)


def conservation(net: nn.Module, *batches: tuple[Tensor, Tensor], **options) -> Conservation:
    return attributed(net, *batches, **options).conservation


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


# -- networks that people use, without biases -------------------------------------------------------------------------


def without_biases(architecture: str, *, trained_norms: bool = False) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.get_model(architecture, weights=None, num_classes=4)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if trained_norms:  # else activations vanish within 50 layers: logits of 1e-10, below any rule's stabiliser
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            net.train()(torch.randn(16, 3, 48, 48))
        for norm in norms:
            nn.init.zeros_(norm.running_mean)
    return net.eval(), (torch.randn(2, 3, 48, 48), torch.tensor([1, 3]))


@pytest.mark.parametrize("trained_norms", [False, True], ids=["initial norms", "trained norms"])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "vgg16_bn", "densenet121"])
def test_the_input_has_the_relevance_of_the_logits(architecture, trained_norms):
    net, batch = without_biases(architecture, trained_norms=trained_norms)
    found = conservation(net, batch)
    for cut in found.cuts:
        assert found.ratios[cut] == pytest.approx(1.0, abs=0.01)
    assert found.cuts[-1] == INPUT
    assert len(found.cuts) == {"resnet18": 2, "resnet50": 2, "vgg16_bn": 16, "densenet121": 5}[architecture]
    assert found.notes == ()
    assert found.loss() is None


def test_the_input_has_the_relevance_of_the_logits_in_a_network_without_norms():
    net, (x, _) = without_biases("squeezenet1_0")
    found = conservation(net, (x, net(x).argmax(dim=1)))  # a ReLU makes its logits, and other classes' may be 0
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "regnet_y_400mf", "efficientnet_b0"])
def test_linear_bottlenecks_and_gates_lose_a_few_percent(architecture):
    """They give relevance to outputs that aren't positive, and z⁺ has nowhere to send it without a contribution."""
    net, batch = without_biases(architecture, trained_norms=True)
    found = conservation(net, batch)
    assert 0.9 < found.ratios[INPUT] < 1.05
    assert found.notes == ()
    assert found.loss() is None


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "efficientnet_b0"])
def test_activations_that_vanish_are_named_as_a_cause(architecture):
    net, batch = without_biases(architecture)
    assert net(batch[0]).abs().max() < 1e-8
    found = conservation(net, batch)
    assert abs(found.ratios[INPUT]) < 0.01
    assert "activations are so small" in found.loss().sentence


# -- cuts -------------------------------------------------------------------------------------------------------------


def residual(net: Built, x: Tensor) -> Tensor:
    x = net.stem(x).relu()
    x = net.outer(x).relu() + net.right(net.left(x).relu()).relu()
    return net.head(net.top(x).relu())


def branches(**parts: nn.Module) -> Built:
    layers = {name: linear(8, 8) for name in ("outer", "left", "right", "top")}
    return Built(residual, **{"stem": linear(4, 8), **layers, "head": linear(8, 3), **parts})


def test_a_layer_is_a_cut_if_every_path_runs_through_it():
    found = conservation(branches(), labelled(16, 4))
    assert found.cuts == ("top", "stem", INPUT)


def test_cuts_have_the_whole_relevance_and_branches_share_it():
    net = branches()
    ratios = conservation(net, *split(labelled(16, 4), [10, 6])).ratios
    assert list(ratios) == [INPUT, *(layer.name for layer in UnitMap.of(net, labelled(2, 4)).layers)]
    for cut in (INPUT, "stem", "top"):
        assert ratios[cut] == pytest.approx(1.0, abs=1e-3)
    assert ratios["right"] == pytest.approx(ratios["left"], abs=1e-3)
    assert ratios["right"] + ratios["outer"] == pytest.approx(1.0, abs=1e-3)
    assert abs(ratios["outer"] - 1) > 0.1  # else this shows nothing


def test_ratios_are_those_of_sums():
    net, batch = mlp(), labelled(16, 4)
    found = attributed(net, batch)
    logits = net(batch[0]).gather(1, batch[1][:, None]).sum().item()
    for name, relevance in found.relevance.items():
        assert found.conservation.ratios[name] == pytest.approx(relevance.sum().item() / logits, rel=1e-4)


def test_a_skip_around_everything_leaves_the_input_as_the_only_cut():
    net = Built(
        lambda net, x: net.head(net.first(x).relu() + net.second(x).relu()),
        first=linear(4, 8),
        second=linear(4, 8),
        head=linear(8, 3),
    )
    found = conservation(net, labelled(16, 4))
    assert found.cuts == (INPUT,)
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_an_input_that_several_layers_read_counts_once(wants_gradient):
    net = Built(
        lambda net, x: net.head(torch.cat([net.first(x), net.second(x), net.third(x)], dim=1).relu()),
        **{name: linear(4, 6) for name in ("first", "second", "third")},
        head=linear(18, 3),
    )
    x, y = labelled(16, 4)
    found = conservation(net, (x.requires_grad_(wants_gradient), y))
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("canonizers", [[], [SequentialMergeBatchNorm()]], ids=["as is", "merged"])
def test_parameters_in_the_graph_are_no_way_round_a_layer(canonizers):
    net = nn.Sequential(linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), linear(8, 8), nn.BatchNorm1d(8), linear(8, 3))
    found = conservation(net, labelled(16, 4), composite=EpsilonPlus(canonizers=canonizers))
    assert found.cuts == ("3", "0", INPUT)
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=1e-3)


def test_logits_without_relevance_have_no_ratio():
    net = mlp(bias=False)
    nn.init.zeros_(net[4].weight)
    found = conservation(net, labelled(4, 4))
    assert all(math.isnan(ratio) for ratio in found.ratios.values())
    assert found.loss() is None


# -- what has no rule -------------------------------------------------------------------------------------------------


class OwnPool(nn.LPPool1d):
    pass


class OwnSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(dim=1)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear(4, 8), nn.ReLU(), module, linear(8, 8), nn.ReLU(), linear(8, 3))


WITHOUT_RULE = {
    "LPPool1d (2)": lambda: nn.LPPool1d(2, 1),
    "Softmax (2)": lambda: nn.Softmax(1),
    "OwnPool (2)": lambda: OwnPool(2, 1),
    "the function softmax (in 2)": OwnSoftmax,
    "the function cumsum (in 2)": lambda: Calls(lambda x: x.cumsum(1)),
    "the function doubled (in 2)": lambda: Calls(Doubled.apply),
}


@pytest.mark.parametrize("named", WITHOUT_RULE)
def test_what_has_no_rule_is_named(named):
    found = conservation(between(WITHOUT_RULE[named]()), labelled(16, 4))
    (note,) = found.notes
    assert note.startswith(f"no rule for {named}")
    (place,) = found.causes["0"].values()
    assert place == next(iter(found.unruled.values()))
    assert not found.causes["3"]
    assert not found.causes[INPUT]


CONSERVING = {
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
    "dropout": nn.Dropout,
    "a custom activation": lambda: Calls(lambda x: x * torch.sigmoid(1.7 * x)),
    "views": lambda: Calls(lambda x: torch.cat(x.view(-1, 2, 4).transpose(1, 2).contiguous().unbind(2), dim=1)),
    "max": lambda: Calls(lambda x: x.view(-1, 8, 1).expand(-1, 8, 3).amax(dim=2)),
    "a constant": lambda: Calls(lambda x: (x - torch.zeros(8)) * 3 / 2),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
}


@pytest.mark.parametrize("what", CONSERVING)
def test_what_conserves_is_not_named(what):
    found = conservation(between(CONSERVING[what]()), labelled(16, 4))
    assert found.notes == ()
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=0.02)


def test_what_relevance_does_not_run_through_is_no_matter():
    def forward(net: Built, x: Tensor) -> Tensor:
        logits = net.rest(net.before(x))
        net.after(logits)
        return logits + 0 * net.aside(logits.detach()).sum()

    norms = {"before": nn.LayerNorm(4), "after": nn.LayerNorm(3), "aside": nn.LayerNorm(3)}
    assert conservation(Built(forward, **norms, rest=mlp(bias=False)), labelled(16, 4), heads="rest.4").notes == ()


def test_modules_that_a_composite_has_a_rule_for_are_not_named():
    found = conservation(
        between(nn.LayerNorm(8)), labelled(16, 4), composite=EpsilonPlus(layer_map=[(nn.LayerNorm, Pass())])
    )
    assert found.notes == ()
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=1e-3)


def test_what_a_composite_passes_over_is_a_plain_gradient_and_named():
    net, (x, y) = between(nn.Mish()), labelled(16, 4)
    found = attributed(net, (x, y), composite=Composite())
    hidden = net[3](net[:3](x)).detach().requires_grad_()
    logits = net[4:](hidden)
    (expected,) = torch.autograd.grad(logits, hidden, nn.functional.one_hot(y, 3) * logits.detach())
    torch.testing.assert_close(found.relevance["3"], expected.sum(0).double(), rtol=1e-5, atol=1e-6)
    assert found.conservation.unruled == {"Linear": ("0", "3", "5"), "Mish": ("2",)}


def test_a_module_that_runs_twice_is_followed_in_both_places():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(linear(4, 8), relu, nn.Softmax(1), linear(8, 8), relu, linear(8, 3))
    found = conservation(net, labelled(16, 4))
    assert found.unruled == {"Softmax": ("2",)}
    assert found.cuts == ("3", "0", INPUT)


def test_the_shift_of_a_norm_that_stays_takes_nothing():
    net = nn.Sequential(linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), linear(8, 3))
    nn.init.ones_(net[2].bias)
    found = conservation(net, labelled(16, 4))
    assert found.causes == {"0": {}, INPUT: {}}
    assert found.ratios[INPUT] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["default", "own"])
def test_the_module_comes_back_as_it_was(composite):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Mish(), nn.Flatten(), between(nn.LayerNorm(8))
    )
    net[4][0] = linear(64, 8)
    x, y = torch.randn(6, 1, 6, 6), torch.arange(6) % 3
    layers = UnitMap.of(net, (x, y)).layers
    assert layers[0].norm == "1"
    before = snapshot(net)
    attribute(net, layers, [(x, y)] * 2, composite=composite)
    assert changes(before, snapshot(net)) == []
    with pytest.raises(ValueError, match="labels range"):
        attribute(net, layers, [(x, y), (x, y + 1)], composite=composite)
    assert changes(before, snapshot(net)) == []


# -- what is said about it --------------------------------------------------------------------------------------------


def test_the_first_loss_from_the_logits_down_is_told_with_what_lies_there():
    net = nn.Sequential(nn.Linear(4, 8), nn.Softmax(1), linear(8, 8), nn.ReLU(), nn.Softmax(1), linear(8, 3))
    found = conservation(net, labelled(16, 4))
    told = found.loss().sentence
    assert not found.loss().only_biases
    assert "layer '2'" in told
    assert "Softmax (4)" in told
    assert "layer '0'" not in told
    assert found.causes[INPUT] == {BIAS: ("0",)}


def example(**ratios: float) -> Conservation:
    """Cuts "upper" and "lower", with a bias above each."""
    causes = {"upper": {BIAS: ("head",)}, "lower": {BIAS: ("upper",)}}
    return Conservation(ratios, tuple(ratios), 1.0, {}, causes)


def test_biases_may_take_relevance_but_not_make_it():
    assert example(upper=0.4, lower=0.01).loss() is None
    assert example(upper=1.0, lower=0.0).loss() is None
    assert "a bias (head)" in example(upper=2.5, lower=2.5).loss().sentence
    told = example(upper=0.8, lower=-0.5).loss()
    assert told.sentence.startswith(
        "relevance is not conserved: of 1 at the logits 0.8 is left at layer 'upper', and -0.5"
    )
    assert "a bias (upper)" in told.sentence
    assert told.only_biases


def test_a_ratio_to_logits_that_cancel_is_no_loss():
    one = Conservation({"upper": 1.5}, ("upper",), 1.0, {}, {"upper": {}})
    cancelled = Conservation({"upper": 1.5}, ("upper",), 100.0, {}, {"upper": {}})
    assert one.loss()
    assert cancelled.loss() is None


def test_long_lists_are_cut_short():
    found = Conservation(unruled={"LayerNorm": tuple(f"norm{index}" for index in range(30))})
    assert found.notes[0].endswith("norm2 and 27 more): relevance is a plain gradient there")


# -- through the callback ---------------------------------------------------------------------------------------------


class Softened(Classifier):
    """A log softmax between two unit layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.LogSoftmax(1), nn.Linear(40, 40), nn.ReLU())


@pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
def test_networks_with_biases_do_not_warn_and_their_record_has_the_ratios(model_type):
    model, rnf = model_type(), RelevanceFreezing(normalize="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "isinstance|.*does not have many workers|.*LeafSpec|no free units")
        train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert set(record.conservation) == {INPUT, *record.relevance}
    assert record.cuts == (*list(record.relevance)[::-1], INPUT)
    assert record.notes == ()
    assert 0 < record.conservation[INPUT] <= 1.5
    back = FreezeState.from_plain(rnf.state.to_plain()).tasks["a"]
    assert (back.conservation, back.cuts, back.notes) == (record.conservation, record.cuts, record.notes)


@pytest.mark.filterwarnings("ignore:no free units:UserWarning")
def test_a_layer_without_rule_warns_once_is_noted_and_units_are_ranked_per_layer():
    model, rnf = Softened(), RelevanceFreezing(normalize="none", criterion=0.2, ration=None, recovery_epochs=0)
    with pytest.warns(UserWarning, match="not conserved|ranked per layer") as told:
        train(model, rnf, "a")
    texts = [str(warning.message) for warning in told]
    (lost,) = [text for text in texts if "not conserved" in text]
    assert "LogSoftmax (body.2)" in lost
    assert "'body.0'" in lost
    (ranked,) = [text for text in texts if "ranked per layer" in text]
    assert "normalize='none'" in ranked
    record = rnf.state.tasks["a"]
    assert record.notes[0] == "no rule for LogSoftmax (body.2): relevance is a plain gradient there"
    assert any("ranked per layer" in note for note in record.notes)
    expected = expected_order(record.relevance)
    raw = sorted(expected, key=lambda unit: record.relevance[unit[0]][unit[1]].item())
    assert set(raw[: record.cutoff]) != set(expected[: record.cutoff])  # else this shows nothing
    assert [record.relevant[name][index].item() for name, index in expected] == [
        rank >= record.cutoff for rank in range(80)
    ]


def expected_order(relevance: dict[str, Tensor]) -> list[tuple[str, int]]:
    """Units of all layers by their share of their layer's absolute relevance; those without any first."""
    shares = {name: values.double() / values.double().abs().sum() for name, values in relevance.items()}
    units = [(name, index) for name, values in shares.items() for index in range(len(values))]
    return sorted(units, key=lambda unit: shares[unit[0]][unit[1]].item() or -math.inf)


@pytest.mark.filterwarnings("ignore:no free units:UserWarning", "ignore:.*not conserved:UserWarning")
def test_ranking_per_layer_as_ever_needs_no_word():
    model, rnf = Softened(), RelevanceFreezing()
    train(model, rnf, "a")
    assert not any("ranked per layer" in note for note in rnf.state.tasks["a"].notes)


@pytest.mark.filterwarnings("ignore:no free units:UserWarning")
def test_scores_that_are_no_relevance_have_nothing_to_conserve():
    model, rnf = Softened(), RelevanceFreezing(importance="magnitude", normalize="none")
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert (record.conservation, record.cuts, record.notes) == ({}, (), ())

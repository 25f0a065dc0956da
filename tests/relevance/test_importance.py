"""Scores against formulas written out on a network that is small enough for them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from training import Classifier, task_data, train, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy.predict import supervised
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.importance import IMPORTANCES, activation, gradient_x_activation, magnitude, random, taylor


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 5, dtype=torch.float64), torch.randint(3, (n,))) for n in (6, 3)]


def scores(importance, net, batches):
    (found,) = importance(net, UnitMap.of(net, batches[0]).layers, batches, supervised).values()
    return found


def written_out(net, batches):
    """Inputs, labels, hidden activations and the weights of the true class's logit, over all samples."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    hidden = net[0](x).clamp(min=0).detach()
    return hidden, y, net[2].weight.detach(), net[2](hidden).detach()


def test_gradient_x_activation(net, batches):
    hidden, y, weight, _ = written_out(net, batches)
    torch.testing.assert_close(scores(gradient_x_activation, net, batches), (hidden * weight[y]).sum(dim=0))


def test_taylor(net, batches):
    hidden, y, weight, logits = written_out(net, batches)
    of_logits = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    of_logits[torch.arange(len(y)), y] -= 1
    torch.testing.assert_close(scores(taylor, net, batches), (hidden * (of_logits @ weight)).abs().sum(dim=0))


def test_taylor_of_several_labels(net, batches):
    hidden, y, weight, logits = written_out(net, batches)
    several = nn.functional.one_hot(y, 3) + nn.functional.one_hot((y + 1) % 3, 3)
    batches = [(x, part) for (x, _), part in zip(batches, several.split([6, 3]), strict=True)]
    of_logits = 1 / (1 + (-logits).exp()) - several
    torch.testing.assert_close(scores(taylor, net, batches), (hidden * (of_logits @ weight)).abs().sum(dim=0))


def test_activation(net, batches):
    torch.testing.assert_close(scores(activation, net, batches), written_out(net, batches)[0].sum(dim=0))


def test_magnitude(net, batches):
    expected = torch.tensor([sum(abs(w) for w in row) for row in net[0].weight.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scores(magnitude, net, batches), expected)


def test_magnitude_of_a_transposed_convolution():
    torch.manual_seed(0)
    up = nn.ConvTranspose1d(4, 6, 3, groups=2)
    net = nn.Sequential(up, nn.Flatten(), nn.Linear(42, 3))
    batch = (torch.randn(2, 4, 5), torch.zeros(2, dtype=torch.long))
    expected = [sum(up.weight[2 * (unit // 3) + i, unit % 3].abs().sum().item() for i in range(2)) for unit in range(6)]
    torch.testing.assert_close(scores(magnitude, net, [batch]), torch.tensor(expected, dtype=torch.float64))


def test_random_is_the_same_for_a_seed_and_never_zero(net, batches):
    assert torch.equal(scores(random, net, batches), scores(random, net, batches))
    assert (scores(random, net, batches) > 0).all()


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
def test_random_keeps_other_units_in_every_task():
    model, rnf = Classifier(), RelevanceFreezing(importance="random", candidates="all")
    train(model, rnf, "a", "b")
    first, second = (record.relevance["body.0"] for record in rnf.state.tasks.values())
    assert not torch.equal(first, second)


def test_sums_go_over_the_positions_of_a_filter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(3, (5,))
    hidden = net[0](x).clamp(min=0).detach()
    weight = net[3].weight.detach()[y].view(5, 4, 4, 4)
    torch.testing.assert_close(scores(activation, net, [(x, y)]), hidden.sum(dim=(0, 2, 3)))
    torch.testing.assert_close(scores(gradient_x_activation, net, [(x, y)]), (hidden * weight).sum(dim=(0, 2, 3)))


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
@pytest.mark.parametrize("importance", [*IMPORTANCES, "my own"])
def test_every_importance_goes_through_search_and_freezing(importance):
    def mine(module, layers, batches, predict):
        return {layer.name: torch.arange(layer.units).double() + 1 for layer in reversed(layers)}

    pl.seed_everything(0, verbose=False)
    model, rnf = Classifier(), RelevanceFreezing(importance=mine if importance == "my own" else importance)
    train(model, rnf, "a")
    record = rnf.state.tasks["a"]
    assert list(record.relevance) == ["body.0", "body.3"]
    assert record.accuracy - record.subnetwork_accuracy <= 0.02 + 1e-9
    if importance == "my own":
        mask = record.relevant["body.0"]
        assert torch.equal(mask, mask.sort().values)  # the last ones are kept


@pytest.mark.parametrize("rubbish", [{}, {"body.0": None}, {"body.0": torch.ones(3), "body.3": torch.ones(40)}])
def test_scores_that_do_not_fit_are_refused_by_layer_before_training(rubbish):
    rnf = RelevanceFreezing(importance=lambda *args: rubbish)
    with pytest.raises(
        ValueError, match=r"importance gave .* for layer 'body.0', expected one score for each of 40 units"
    ):
        trainer(rnf).fit(Classifier(), datamodule=task_data("a"))


def test_unknown_names_and_a_composite_without_use_are_refused():
    from zennit.composites import EpsilonPlus

    with pytest.raises(ValueError, match="importance is 'shap', expected one of"):
        RelevanceFreezing(importance="shap")
    with pytest.raises(ValueError, match="composite holds rules for importance='lrp'"):
        RelevanceFreezing(importance="taylor", composite=EpsilonPlus())

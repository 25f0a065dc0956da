"""Connections in fits: what is free in frozen rows learns, what is frozen keeps its bits, and recall is exact."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from training import Classifier, ConvClassifier, clusters, frozen_entries, task_data, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.memory import FreezeState

OPTIONS = {"criterion": 0.1, "ration": 0.4, "recovery_epochs": 0, "reset_free": False}


def fit(model, rnf, task, epochs=3, **options):
    model.heads.activate(task)
    trainer(rnf, max_epochs=epochs, **options).fit(model, datamodule=task_data(task))


@pytest.mark.parametrize("kind", [Classifier, ConvClassifier])
def test_frozen_entries_keep_their_bits_and_free_ones_of_frozen_rows_learn(kind):
    torch.manual_seed(0)
    model, rnf = kind(weight_decay=0.1), RelevanceFreezing(**OPTIONS)
    fit(model, rnf, "a")
    frozen, before = frozen_entries(rnf, model), copy.deepcopy(dict(model.named_parameters()))
    x = clusters("c", 50).tensors[0]
    with rnf.recall("a", model), torch.no_grad():
        logits = model(x)
    rows = rnf.state.frozen()
    entries = [name for name, mask in frozen.items() if mask.ndim > 1]
    assert entries

    fit(model, rnf, "b")

    for name, mask in frozen.items():
        now, then = model.get_parameter(name).detach(), before[name].detach()
        assert torch.equal(now[mask], then[mask])
        if name in entries:
            free = ~mask & rows[name.rpartition(".")[0]][:, None]
            assert free.any()
            assert bool((now[free] != then[free]).any())
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), logits)
    report = rnf.report(model)
    assert not any(report.audit.changed.values())
    assert not any(report.audit.unknown.values())


def test_whole_rows_are_frozen_with_units_and_in_the_paper():
    for rnf in (RelevanceFreezing(freeze="units", **OPTIONS), RelevanceFreezing.paper()):
        torch.manual_seed(0)
        model = Classifier()
        fit(model, rnf, "a", epochs=1)
        assert rnf.state.tasks["a"].connections == ()
        assert rnf.weights_left() == rnf.capacity()


def test_free_weights_are_one_before_any_task_and_more_than_free_units_after_it():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(**OPTIONS)
    assert rnf.free_weights == 1.0
    fit(model, rnf, "a")
    frozen = rnf.state.frozen()
    first, second = (frozen[layer.name].double() for layer in rnf.state.layers)
    sizes = model.body[0].weight.numel(), model.body[3].weight.numel()
    expected = (1 - first.mean(), 1 - first.mean() * second.mean())
    assert rnf.weights_left() == pytest.approx({"body.0": float(expected[0]), "body.3": float(expected[1])})
    total = sum(share * size for share, size in zip(expected, sizes, strict=True)) / sum(sizes)
    assert rnf.free_weights == pytest.approx(float(total))
    record = FreezeState.from_plain(rnf.state_dict()).tasks["a"]
    assert record.free_weights == pytest.approx(rnf.weights_left())
    assert record.connections == ("body.3",)


def test_free_entries_of_frozen_rows_are_reset():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(**{**OPTIONS, "reset_free": True})
    start = model.body[3].weight.detach().clone()
    fit(model, rnf, "a")
    frozen = frozen_entries(rnf, model)["body.3.weight"]
    kept = model.body[3].weight.detach().clone()
    seen = []

    class Look(nn.Module):
        pass

    from lightning.pytorch import Callback

    class Looker(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            if not seen:
                seen.append(module.body[3].weight.detach().clone())

    model.heads.activate("b")
    trainer(rnf, Looker(), max_epochs=1).fit(model, datamodule=task_data("b"))
    assert torch.equal(seen[0], torch.where(frozen, kept, start))


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_recall_and_export_are_exact_if_free_entries_diverge(damage):
    torch.manual_seed(0)
    model, rnf = ConvClassifier(), RelevanceFreezing(**OPTIONS)
    fit(model, rnf, "a")
    x = clusters("c", 50).tensors[0]
    with rnf.recall("a", model), torch.no_grad():
        logits = model(x)
    exported = rnf.export(model, "a")(x)
    with torch.no_grad():
        for name, mask in frozen_entries(rnf, model).items():
            model.get_parameter(name)[~mask] = damage

    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), logits)
    assert torch.equal(rnf.export(model, "a")(x), exported)
    assert not any(rnf.report(model).audit.changed.values())


class Predicts(Classifier):
    """Its ``training_step`` does something else than its forward: silent units are not silent there."""

    def shifted(self, x):
        return self.heads(self.body[3:](self.body[:3](x) + 1.0))


@pytest.mark.filterwarnings("ignore:.*falls short of the criterion:UserWarning")
def test_where_predict_runs_something_else_than_forward_rows_are_frozen():
    torch.manual_seed(0)
    model = Predicts()
    rnf = RelevanceFreezing(
        freeze="connections", **OPTIONS, predict=lambda module, batch: (module.shifted(batch[0]), batch[1])
    )
    fit(model, rnf, "a")
    assert rnf.state.tasks["a"].connections == ()

    seen = Classifier()
    seen.load_state_dict(model.state_dict())
    other = RelevanceFreezing(**OPTIONS)
    fit(seen, other, "a")
    assert other.state.tasks["a"].connections == ("body.3",)
    later = Predicts()
    later.load_state_dict(seen.state_dict())
    rnf = RelevanceFreezing(
        freeze="connections", **OPTIONS, predict=lambda module, batch: (module.shifted(batch[0]), batch[1])
    )
    rnf.load_state_dict(other.state_dict())
    before = later.body[3].weight.detach().clone()
    rows = rnf.state.frozen()["body.3"]
    with pytest.warns(UserWarning, match=r"body\.3: silent channels are not zero"):
        fit(later, rnf, "b")
    assert torch.equal(later.body[3].weight[rows], before[rows])


def test_records_from_before_are_frozen_and_audited_by_rows():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(freeze="units", **OPTIONS)
    fit(model, rnf, "a")
    later = RelevanceFreezing(**OPTIONS)
    later.load_state_dict(rnf.state_dict())
    rows, before = later.state.frozen()["body.3"], model.body[3].weight.detach().clone()
    fit(model, later, "b")
    assert torch.equal(model.body[3].weight[rows], before[rows])
    assert not any(later.report(model).audit.changed.values())
    assert later.state.tasks["b"].connections

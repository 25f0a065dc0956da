"""Pixels, tokens, characters and numbers through two tasks: what is recorded, recalled and reported of them."""

from __future__ import annotations

import copy
import json
from contextlib import suppress

import pytest
import torch
from positions import (
    TASKS,
    Regressor,
    Tagger,
    UNet,
    Writer,
    data,
    next_of,
    numbers,
    of_next,
    pixels,
    text,
    tokens,
)
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.text import Perplexity
from training import trainer

from lightning_rnf import MetricDrop, RelevanceFreezing, UnitMap, heatmaps
from lightning_rnf.relevance import attribute
from lightning_rnf.relevance.importance import gradient_x_activation, taylor
from lightning_rnf.runtime import Ranks
from lightning_rnf.tasks import fitting
from lightning_rnf.tasks.candidates import _noting
from lightning_rnf.tasks.fitting import Fitting, Head, last_layer
from lightning_rnf.tasks.reference import ReferenceData

FEW = {"recovery_epochs": 0, "ration": None, "reset_free": False}
EPOCHS = 4


def right(model, dataset):
    """Share of right answers of positions that count, counted one by one."""
    x, y = dataset.tensors
    logits = model(x)
    logits = logits if logits.shape[1] == 3 else logits.transpose(1, 2)
    pairs = zip(logits.argmax(1).flatten().tolist(), y.flatten().tolist(), strict=True)
    counted = [one == wanted for one, wanted in pairs if wanted >= 0]
    return sum(counted) / len(counted), len(counted)


def of_next_right(model, dataset):
    logits, wanted = next_of(model(dataset.tensors[0]), dataset.tensors[0])
    return float((logits.argmax(1) == wanted).double().mean()), len(wanted)


def explained(model, dataset):
    x, y = dataset.tensors
    y, output = y.view(len(y), -1).double(), model(x).view(len(y), -1).double()
    share = 1 - (output - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
    return float(share.clamp(min=0).mean()), len(y)


def one_number(task, seed=0):
    return numbers(task, seed, 1, squeezed=True)


KINDS = {
    "pixels": (UNet, pixels, right, {"criterion": 0.1}),
    "tokens": (Tagger, tokens, right, {}),
    "next characters": (Writer, text, of_next_right, {"predict": of_next}),
    "numbers": (Regressor, numbers, explained, {}),
    "one number": (lambda: Regressor(1, squeezed=True), one_number, explained, {}),
}


def fitted(model, make, *tasks, epochs=EPOCHS, **options):
    rnf = RelevanceFreezing(**{**FEW, **options})
    for task in tasks:
        torch.manual_seed(1)
        model.heads.activate(task)
        trainer(rnf, max_epochs=epochs).fit(model, datamodule=data(make, task))
    return rnf


def built(network):
    torch.manual_seed(0)
    return network()


@pytest.mark.parametrize("kind", KINDS)
def test_two_tasks_are_recalled_to_the_bit_and_recorded_as_they_are(kind):
    network, make, score, options = KINDS[kind]
    model = built(network)
    rnf = fitted(model, make, "a", **options)
    x = make("a", 1).tensors[0]
    record = rnf.state.task("a")
    with rnf.recall("a", model), torch.no_grad():
        then = model(x)
        found, targets = score(model, make("a", 1))  # the validation data
    assert record.subnetwork_accuracy == pytest.approx(found, abs=1e-5)
    assert record.samples == targets
    assert record.scored == ("R²" if "number" in kind else "")
    assert record.accepted
    assert set(record.whole) == {"trained", "fitted"}
    model.heads.activate("b")
    trainer(rnf, max_epochs=EPOCHS).fit(model, datamodule=data(make, "b"))
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), then)
        assert score(model, make("a", 1))[0] == found
    assert list(rnf.state.tasks) == list(TASKS)
    report = rnf.report(model)
    assert report.drift["a"] == 0.0
    assert not any(report.audit.changed.values())
    assert ("scored by" in report.to_dict()["tasks"][0]) == ("number" in kind)


def by_hand(model, batch):
    """The same as rows, as a user could have made them before."""
    logits, target = model(batch[0]), batch[1]
    rows, labels = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    return rows[labels >= 0], labels[labels >= 0]


def test_pixels_are_judged_as_rows_that_were_made_by_hand():
    records = []
    for options in ({}, {"predict": by_hand, "heads": "heads.tasks.*"}):
        model = built(UNet)
        records.append(fitted(model, pixels, "a", epochs=2, **options).state.task("a"))
    plain, flat = records
    assert plain.evaluations == flat.evaluations
    assert plain.whole == flat.whole
    assert all(torch.equal(plain.relevant[name], flat.relevant[name]) for name in plain.relevant)
    assert all(torch.allclose(plain.relevance[name], flat.relevance[name], rtol=1e-4) for name in plain.relevance)


# -- relevance --------------------------------------------------------------------------------------------------------


def test_relevance_starts_at_the_true_class_of_each_pixel_that_counts():
    model = built(UNet)
    x, y = pixels("a").tensors
    layers = UnitMap.of(model, (x[:4], y[:4])).layers
    found = attribute(model, layers, [(x[:4], y[:4])])
    other = y[:4].clone()
    other[other < 0] = -5
    assert all(
        torch.equal(found.relevance[name], value)
        for name, value in attribute(model, layers, [(x[:4], other)]).relevance.items()
    )
    # Of one pixel alone: what one pixel starts with is its logit, and what it does not reach gets nothing.
    single = torch.full_like(y[:1], -100)
    single[0, 3, 3] = 1
    sent = attribute(model, layers, [(x[:1], single)]).conservation
    last = gradient_x_activation(model, layers, [(x[:1], single)], lambda module, batch: (module(batch[0]), batch[1]))
    with torch.no_grad():
        logit, bias = float(model(x[:1])[0, 1, 3, 3]), float(model.heads.tasks["a"].bias[1])
    assert float(last[layers[-1].name].sum()) == pytest.approx(logit - bias, rel=1e-4)
    assert sent.size == 1.0


def test_all_pixels_start_what_each_starts():
    model = built(UNet)
    x, y = (tensor[:2] for tensor in pixels("a").tensors)
    layers = UnitMap.of(model, (x, y)).layers
    whole = attribute(model, layers, [(x, y)]).relevance
    halves = []
    for left in (True, False):
        part = y.clone()
        part[:, :, :4] = -100 if left else part[:, :, :4]
        part[:, :, 4:] = part[:, :, 4:] if left else -100
        halves.append(attribute(model, layers, [(x, part)]).relevance)
    for name, value in whole.items():
        assert torch.allclose(halves[0][name] + halves[1][name], value, rtol=1e-4, atol=1e-5)


def test_heatmaps_of_pixels_show_what_they_look_at():
    model = built(UNet)
    x, y = pixels("a").tensors
    single = torch.full_like(y[:2], -100)
    single[0, :4] = 1
    maps = heatmaps(model, UnitMap.of(model, (x[:2], y[:2])).layers, (x[:2], single))
    assert maps.shape == (2, 8, 8)
    assert maps[0].any()
    assert not maps[1].any()


def test_relevance_of_numbers_starts_at_their_size():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x, y = numbers("a").tensors
    layers = UnitMap.of(net, (x, y)).layers
    with torch.no_grad():
        said = net[1](net[0](x))
        output = said @ net[2].weight.T
        wanted = (said * (output.sign() @ net[2].weight)).sum(0)  # what each unit adds to the size of both
    found = attribute(net, layers, [(x, y)])
    assert torch.allclose(found.relevance["0"].float(), wanted, rtol=1e-3, atol=1e-3)
    assert found.conservation.ratios["0"] == pytest.approx(1.0, abs=1e-4)
    assert float(found.relevance["0"].sum()) == pytest.approx(float(output.abs().sum()), rel=1e-4)
    turned = copy.deepcopy(net)
    turned[2].weight.data[0] *= -1  # the other way round it is needed as much
    again = attribute(turned, layers, [(x, y)])
    assert torch.allclose(again.relevance["0"], found.relevance["0"], rtol=1e-4, atol=1e-4)


def test_taylor_of_numbers_goes_by_their_error():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = (tensor[:1] for tensor in numbers("a").tensors)
    layers = UnitMap.of(net, (x, y)).layers
    said = net[0](x)
    output = net[2](said.relu())
    gradient = torch.autograd.grad((output - y).square().sum() / 2, said)[0]
    wanted = (said * gradient).abs().sum(0)
    found = taylor(net, layers, [(x, y)], lambda module, batch: (module(batch[0]), batch[1]))
    assert torch.allclose(found["0"].float(), wanted, rtol=1e-4, atol=1e-6)


# -- heads ------------------------------------------------------------------------------------------------------------


def test_a_regressor_s_head_is_what_least_squares_make_of_it():
    model = built(Regressor)
    x, y = numbers("a").tensors
    data_of = ReferenceData(list(zip(x.split(50), y.split(50), strict=True)), 4)
    data_of = data_of.laid_out(UnitMap.of(model, (x, y)).layout)
    assert last_layer(model, "heads.tasks.a", data_of) == "heads.tasks.a"
    head = Fitting(model, "heads.tasks.a", data_of).fit(all_data=True)
    with torch.no_grad():
        features = model.body(x).double()
    ones = torch.cat([features, torch.ones(len(x), 1).double()], 1)
    best = torch.linalg.lstsq(ones, y.double()).solution
    by_hand = (ones @ best - y).square().mean()
    ours = (features @ head.weight.double().T + head.bias.double() - y).square().mean()
    assert head.says_numbers
    assert float(by_hand) * 0.999 <= float(ours) < float(by_hand) * 1.1
    assert float(ours) < 0.2 * float((y - y.mean(0)).square().mean())


def test_numbers_far_from_zero_are_fitted_as_well():
    model = built(Regressor)
    x, y = numbers("a").tensors
    errors = []
    for far in (0.0, 2**20):
        batches = ReferenceData([(x, y + far)], 1).laid_out(UnitMap.of(model, (x, y)).layout)
        head = Fitting(model, "heads.tasks.a", batches).fit(all_data=True)
        with torch.no_grad():
            output = model.body(x).double() @ head.weight.double().T + head.bias.double()
        errors.append(float((output - y - far).square().mean()))
    assert errors[1] < 1.2 * errors[0] + 0.01, errors  # a sum as large has only so many digits


def test_a_head_of_numbers_is_never_scaled():
    steep = Head(100 * torch.ones(1, 3), torch.ones(1), says_numbers=True)
    trained = Head(torch.ones(1, 3), torch.ones(1))
    assert steep.as_flat_as(trained) is trained
    assert fitting.scale_of(torch.ones(4, 1), torch.zeros(4, 1)) == 1.0


class Heard(Ranks):
    """One of several ranks, by turns: what the others have said in the turn before is what they say in this one."""

    def __init__(self, rank, said):
        super().__init__(rank, len(said))
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "turn", 0)

    def gather(self, value):
        mine, turn = self.said[self.rank], self.turn
        object.__setattr__(self, "turn", turn + 1)
        mine[turn:] = [value]
        return [value if len(of_rank) <= turn else of_rank[turn] for of_rank in self.said]


@pytest.mark.parametrize(("network", "make"), [(UNet, pixels), (Regressor, numbers)])
def test_three_processes_fit_the_head_that_one_fits(network, make):
    model = built(network)
    x, y = make("a").tensors
    batches = list(zip(x.split(7), y.split(7), strict=True))
    layout = UnitMap.of(model, (x[:2], y[:2])).layout
    name = "heads.tasks.a"
    alone = Fitting(model, name, ReferenceData(batches, 99).laid_out(layout), scaled=True).fit(all_data=True)
    said = [[], [], []]
    for turn in range(24):  # until each has heard all that the others have to say
        rank = turn % 3
        shares = ReferenceData(batches[rank::3], 99, ranks=Heard(rank, said)).laid_out(layout)
        with suppress(Exception):
            found = Fitting(model, name, shares, scaled=True).fit(all_data=True)
    assert torch.equal(found.weight, alone.weight)
    assert torch.equal(found.bias, alone.bias)


def test_of_many_pixels_some_are_fitted_and_kept(monkeypatch):
    monkeypatch.setattr(fitting, "ROWS", 300)
    model = built(UNet)
    x, y = pixels("a").tensors
    batches = ReferenceData(list(zip(x.split(8), y.split(8), strict=True)), 6)
    rows = []
    original = Fitting._moments

    def moments(self, features, *others):
        rows.append(len(features))
        return original(self, features, *others)

    monkeypatch.setattr(Fitting, "_moments", moments)
    one = Fitting(model, "heads.tasks.a", batches)
    few = one.fit(all_data=True)
    assert 0.9 * 300 < sum(rows) <= 300
    assert few.weight.shape == (3, 12, 1, 1)
    seen = []
    reference = _noting(batches, seen, batches=2**23)
    reference.measure(model)
    assert [len(logits) for logits, _ in seen] == [1] * 6


def test_places_of_thinned_pixels_are_not_of_one_column():
    width, logits = 64, torch.arange(16 * 64 * 64)
    places, _ = fitting.thinned(logits, logits, (torch.zeros(16, 1, 64, 64), logits), 1024)
    assert len(places) == 1023
    columns = (places % width).bincount(minlength=width)
    assert columns.min() > 0
    assert columns.max() < 3 * columns.float().mean()


def test_a_vocabulary_is_not_fitted(monkeypatch):
    monkeypatch.setattr(fitting, "OUTPUTS", 4)
    rnf = fitted(built(Tagger), tokens, "a", epochs=1, criterion=0.5)
    assert rnf.state.task("a").whole == {}


# -- criteria, records, reports ---------------------------------------------------------------------------------------


def test_perplexity_goes_by_its_own_direction_and_is_that_of_the_sub_network():
    model = built(Writer)
    drop = MetricDrop(Perplexity(), tolerance=0.2)
    rnf = fitted(model, text, "a", epochs=8, predict=of_next, criterion=drop)
    record = rnf.state.task("a")
    whole, last = record.evaluations[0].score, record.evaluations[-1].score
    assert last.values["Perplexity"] <= whole.values["Perplexity"] + 0.2
    assert record.cutoff > 0
    with rnf.recall("a", model), torch.no_grad():
        ids = text("a", 1).tensors[0]
        loss = nn.functional.cross_entropy(*next_of(model(ids), ids))
    assert last.values["Perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert all(one.accepted == (drop(one.score)) for one in record.evaluations[1:])


def test_mean_squared_error_goes_by_its_own_direction():
    model = built(Regressor)
    rnf = fitted(model, numbers, "a", epochs=8, criterion=MetricDrop(MeanSquaredError(), tolerance=0.05))
    record = rnf.state.task("a")
    whole, last = record.evaluations[0].score, record.evaluations[-1].score
    assert last.values["MeanSquaredError"] <= whole.values["MeanSquaredError"] + 0.05
    assert record.cutoff > 0
    with rnf.recall("a", model), torch.no_grad():
        x, y = numbers("a", 1).tensors
        error = float((model(x) - y).square().mean())
    assert last.values["MeanSquaredError"] == pytest.approx(error, rel=1e-3)


def test_records_of_numbers_come_back_from_files_and_checkpoints(tmp_path, caplog):
    caplog.set_level("INFO")
    model = built(Regressor)
    rnf = fitted(model, numbers, "a")
    assert "(R² 0." in caplog.text
    record = rnf.state.task("a")
    rnf.save(tmp_path / "masks.safetensors")
    other = RelevanceFreezing()
    other.load(tmp_path / "masks.safetensors", model)
    assert other.state.task("a").scored == "R²"
    third = RelevanceFreezing()
    third.load_state_dict(copy.deepcopy(rnf.state_dict()))
    assert third.state.task("a").scored == "R²"
    assert third.state.task("a").accuracy == record.accuracy
    report = other.report(model)
    assert report.to_dict()["tasks"][0]["scored by"] == "R²"
    assert "R²" in str(report)
    assert json.loads(report.to_json())["tasks"][0]["accuracy"] == record.accuracy


def test_a_regression_that_learned_nothing_is_said_to_be_judged_by_nothing():
    model = built(Regressor)
    with pytest.warns(UserWarning, match=r"explains .* of the variance of the targets, and the criterion lets all"):
        fitted(model, lambda task, seed: noise_of(seed), "a", epochs=1, fit_head=False, criterion=0.5)


def noise_of(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randn(64, 2, generator=generator))

"""Targets of any form as rows, against what is known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MultilabelAccuracy,
    MultilabelAUROC,
)
from torchmetrics.text import Perplexity

from lightning_rnf import UnitMap
from lightning_rnf.anatomy import (
    Flat,
    Layout,
    ignored_by,
    in_front,
    largest_logits,
    measure,
    predict_checked,
    rows_of_samples,
)
from lightning_rnf.anatomy.explained import Explained
from lightning_rnf.anatomy.targets import flattened
from lightning_rnf.runtime import Ranks


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


class Echo(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("places", [(7,), (5, 7), (2, 5, 7)])
@pytest.mark.parametrize("last", [False, True])
def test_each_position_is_a_row_with_its_own_label(places, last):
    logits, target = noise(3, 4, *places), labels(3, *places, classes=4)
    rows, flat = flattened(logits.movedim(1, -1) if last else logits, target)
    by_hand = [
        (logits[(sample, slice(None), *place)], target[(sample, *place)])
        for sample in range(3)
        for place in torch.cartesian_prod(*map(torch.arange, places)).view(-1, len(places)).tolist()
    ]
    assert torch.equal(rows, torch.stack([one for one, _ in by_hand]))
    assert torch.equal(flat, torch.stack([one for _, one in by_hand]))
    loss = nn.functional.cross_entropy(logits, target)
    assert torch.isclose(nn.functional.cross_entropy(rows, flat), loss)


def test_what_is_in_rows_already_stays_the_very_same():
    logits, target = noise(6, 3), labels(6, classes=3)
    rows, flat = flattened(logits, target)
    assert rows is logits
    assert torch.equal(flat, target)


@pytest.mark.parametrize("label", [-100, -1])
def test_positions_below_zero_do_not_count(label):
    logits, target = noise(2, 3, 4, 4), labels(2, 4, 4, classes=3)
    target[0, :2], target[1, 3] = label, label
    rows, flat = flattened(logits, target)
    assert len(rows) == len(flat) == 32 - 12
    by_torch = nn.functional.cross_entropy(logits, target, ignore_index=label)
    assert torch.isclose(nn.functional.cross_entropy(rows, flat), by_torch)


def test_of_samples_only_torchs_own_label_does_not_count():
    rows, flat = flattened(torch.eye(3), torch.tensor([0, -100, 2]))
    assert torch.equal(rows, torch.eye(3)[[0, 2]])
    assert flat.tolist() == [0, 2]
    with pytest.raises(ValueError, match="labels range from -1 to 2"):
        flattened(torch.eye(3), torch.tensor([0, -1, 2]))


def test_a_loss_in_the_module_says_what_does_not_count():
    module = Echo()
    module.loss, module.other = nn.CrossEntropyLoss(ignore_index=255), nn.MSELoss()
    assert ignored_by(module) == {-100, 255}
    logits, target = noise(1, 2, 3), torch.tensor([[0, 255, 1]])
    rows, _ = predict_checked(lambda module, batch: batch, module, (logits, target))
    assert torch.equal(rows, logits[0].T[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_several_labels_may_be_at_positions(dtype):
    logits, target = noise(2, 3, 4, 4), labels(2, 3, 4, 4, classes=2).to(dtype)
    rows, flat = flattened(logits, target)
    assert rows.shape == flat.shape == (32, 3)
    assert flat.dtype == torch.int64
    assert torch.equal(rows, logits.permute(0, 2, 3, 1).reshape(-1, 3))
    assert measure(Echo(), [(logits, target)]).accuracy == float(((logits > 0) == (target > 0)).float().mean())


NUMBERS = {
    "(N,)": ((8,), (8,), (8, 1)),
    "(N, 1) and (N,)": ((8, 1), (8,), (8, 1)),
    "(N, D)": ((8, 3), (8, 3), (8, 3)),
    "depth": ((2, 1, 4, 4), (2, 4, 4), (32, 1)),
    "depth with its channel": ((2, 1, 4, 4), (2, 1, 4, 4), (32, 1)),
    "images": ((2, 3, 4, 4), (2, 3, 4, 4), (32, 3)),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_stay_what_they_are(form):
    of_output, of_target, of_rows = NUMBERS[form]
    output, target = noise(*of_output), noise(*of_target, seed=1)
    rows, flat = flattened(output, target)
    assert rows.shape == flat.shape == of_rows
    assert flat.is_floating_point()
    by_hand = (output.reshape(of_target) - target).square().mean()
    assert torch.isclose((rows - flat).square().mean(), by_hand)


def test_what_the_first_batch_shows_holds_where_another_leaves_it_open():
    square, target = noise(2, 5, 5), labels(2, 5, classes=5)
    by_torch, _ = flattened(square, target)
    last, _ = flattened(square, target, Layout(axis=-1))
    assert torch.equal(by_torch, square.transpose(1, 2).reshape(-1, 5))
    assert torch.equal(last, square.reshape(-1, 5))
    ones = torch.ones(4, 2)
    assert flattened(noise(4, 2), ones)[1].dtype == torch.int64
    assert flattened(noise(4, 2), ones, Layout(numbers=True))[1].dtype == torch.float32
    with pytest.raises(ValueError, match="expected 0 and 1 alone"):
        flattened(noise(4, 2), ones / 2, Layout(numbers=False))


class OfTokens(nn.Module):
    """As many classes as tokens; by a linear layer, or a convolution, and handed on or turned round."""

    def __init__(self, *, convolution, turned):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Conv1d(6, 5, 1) if convolution else nn.Linear(6, 5)
        self.convolution, self.turned = convolution, turned

    def forward(self, x):
        x = self.body(x).relu()
        y = self.head(x.transpose(1, 2) if self.convolution else x)
        return y.transpose(1, 2) if self.turned else y


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_layer_that_makes_the_logits_says_which_dimension_counts_classes(convolution, turned):
    module = OfTokens(convolution=convolution, turned=turned)
    units = UnitMap.of(module, (noise(2, 5, 4), labels(2, 5, classes=5)))
    assert units.layout == Layout(axis=1 if convolution != turned else -1, numbers=False)


def test_features_in_the_place_of_logits_meet_the_same_targets():
    logits, target = noise(2, 3, 4, 4), labels(2, 4, 4, classes=3)
    target[0] = -100
    features = noise(2, 9, 4, 4)
    rows, flat = in_front(features, target, 3)
    assert torch.equal(flat, flattened(logits, target)[1])
    assert torch.equal(rows, features[1].permute(1, 2, 0).reshape(-1, 9))
    rows, flat = in_front(noise(7, 9), noise(7, 2, seed=1), 2, Layout(1, numbers=True))
    assert rows.shape == (7, 9)
    assert torch.equal(flat, noise(7, 2, seed=1))


# -- measured --------------------------------------------------------------------------------------------------------


def test_pixels_that_do_not_count_have_no_influence():
    logits, target = noise(4, 3, 5, 5), labels(4, 5, 5, classes=3)
    target[:, 0], target[3] = -100, -100
    metric = MulticlassAccuracy(3, average="macro", ignore_index=-100)
    found = measure(Echo(), [(logits[:2], target[:2]), (logits[2:], target[2:])], metrics={"macro": metric})
    counted = target >= 0
    assert found.samples == int(counted.sum())
    assert found.accuracy == float((logits.argmax(1) == target)[counted].double().mean())
    assert found.values["macro"] == pytest.approx(float(metric(logits, target)), abs=1e-6)
    other = torch.where(counted.unsqueeze(1), logits, 100 * noise(4, 3, 5, 5, seed=1))
    assert measure(Echo(), [(other, target)]).accuracy == found.accuracy
    assert measure(Echo(), [(logits, torch.where(counted, target, -7))]).accuracy == found.accuracy
    nothing = (noise(1, 3, 5, 5), torch.full((1, 5, 5), -100))
    again = measure(Echo(), [nothing, (logits, target)], metrics={"macro": metric})
    assert again.accuracy == found.accuracy
    assert again.values == pytest.approx(found.values, abs=1e-6)


def test_an_evaluation_of_pixels_ends_by_the_pixels_that_are_wrong():
    logits = torch.stack([torch.zeros(4, 5), torch.ones(4, 5)], dim=1)
    wrong = torch.zeros(4, 5).long()
    wrong[1] = -100
    batches = [(logits[one : one + 1], wrong[one : one + 1]) for one in range(4)]
    assert measure(Echo(), batches, lowest=0.7, expected=15).samples == 5
    assert measure(Echo(), batches, lowest=0.6, expected=15).samples == 10


@pytest.mark.parametrize("by", [1, 3, 24])
@pytest.mark.parametrize(
    ("metric", "is_of_labels"),
    [
        (MultilabelAccuracy(4), True),
        (MultilabelAUROC(4), True),
        (MulticlassAccuracy(4), False),
        (MulticlassAUROC(4), False),
        (MulticlassCalibrationError(4, n_bins=5), False),
    ],
)
def test_a_metric_takes_logits_for_logits_also_in_batches_where_all_are_between_0_and_1(metric, is_of_labels, by):
    logits = noise(24, 4)
    logits[::3] = logits[::3].sigmoid()  # of every third sample, alone in its batch, they could be probabilities
    target = labels(24, 4, classes=2) if is_of_labels else labels(24, classes=4)
    ours = measure(Echo(), list(zip(logits.split(by), target.split(by), strict=True)), metrics={"m": metric})
    probabilities = logits.sigmoid() if is_of_labels else logits.softmax(1)
    assert ours.values["m"] == pytest.approx(float(metric.clone()(probabilities, target)), abs=1e-6)


def test_perplexity_of_tokens_is_that_of_the_sequences():
    logits, target = noise(3, 7, 5), labels(3, 7, classes=5)
    target[1, 4:] = -100
    ours = measure(Echo(), [(logits[:1], target[:1]), (logits[1:], target[1:])], metrics={"p": Perplexity()})
    assert ours.values["p"] == pytest.approx(float(Perplexity(ignore_index=-100)(logits, target)), rel=1e-5)
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), target)
    assert ours.values["p"] == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("columns", [1, 3])
def test_of_numbers_the_explained_variance_is_measured_and_no_accuracy(columns):
    output, target = noise(40, columns), 1000 + noise(40, columns, seed=1)
    output = target + output / torch.tensor([2.0, 4.0, 8.0])[:columns]
    batches = list(zip(output.split(7), target.split(7), strict=True))
    found = measure(Echo(), batches, metrics={"mse": MeanSquaredError(), "r2": R2Score()})
    residual = (output - target).double().square().sum(0)
    spread = (target.double() - target.double().mean(0)).square().sum(0)
    assert found.accuracy == pytest.approx(float((1 - residual / spread).mean()), rel=1e-9)
    assert (found.scored, found.samples) == ("R²", 40)
    assert found.values["mse"] == pytest.approx(float((output - target).square().mean()), rel=1e-5)
    assert found.values["r2"] == pytest.approx(found.accuracy, rel=0.01)  # torchmetrics' own has float32 sums


def test_what_explains_nothing_is_worth_nothing():
    target = noise(20, 2)
    target[:, 1] = 3.0  # tells nothing
    mean, worse = target.mean(0).expand(20, 2), -5 * target
    assert measure(Echo(), [(target, target)]).accuracy == 1.0
    assert measure(Echo(), [(mean, target)]).accuracy == pytest.approx(0.0, abs=1e-6)
    assert measure(Echo(), [(worse, target)]).accuracy == 0.0
    broken = target.clone()
    broken[3, 0] = torch.nan
    assert measure(Echo(), [(broken, target)], finite=False).accuracy == 0.0
    assert measure(Echo(), [(torch.ones(5), torch.full((5,), 2.0))]).accuracy == 0.0


def test_sums_of_parts_are_those_of_all():
    output, target = noise(50, 2), 100 + noise(50, 2, seed=1)
    whole = Explained.of(output, target)
    parts = [Explained.of(*part) for part in zip(output.split(11), target.split(11), strict=True)]
    total = Explained.of(output[:0], target[:0])
    for part in parts:
        total = total + part
    for name in ("mean", "spread", "missed"):
        assert torch.allclose(getattr(total, name), getattr(whole, name), rtol=1e-10)
    assert total.rows == 50


def test_two_processes_find_of_numbers_what_one_finds():
    output, target = noise(24, 2), noise(24, 2, seed=1)
    batches = list(zip(output.split(5), target.split(5), strict=True))
    one = measure(Echo(), batches, metrics={"mse": MeanSquaredError()})
    shares = []
    for rank in (0, 1):
        heard = []
        ranks = Ranks(rank, 2)
        object.__setattr__(ranks, "gather", lambda value, heard=heard: heard.append(value) or [value, value])
        measure(Echo(), batches[rank::2], metrics={"mse": MeanSquaredError()}, ranks=ranks)
        shares.append(next(value for value in heard if isinstance(value, list)))
    both = Ranks(0, 2)
    answers = iter([[None, None], shares])
    object.__setattr__(both, "gather", lambda value: next(answers, [value, value]))
    found = measure(Echo(), batches[::2], metrics={"mse": MeanSquaredError()}, ranks=both)
    assert found.accuracy == one.accuracy
    assert found.values == one.values


def test_labels_and_numbers_do_not_go_together():
    batches = [(noise(4, 3), labels(4, classes=3)), (noise(4, 3), noise(4, 3))]
    with pytest.raises(ValueError, match="some batches of the reference data have numbers for targets, others labels"):
        measure(Echo(), batches)


def test_a_flat_predict_gives_rows_once_and_for_all():
    batch = noise(2, 5, 5), labels(2, 5, classes=5)
    flat = Flat(lambda module, batch: batch, Layout(axis=-1))
    once, target = flat(Echo(), batch)
    again, _ = predict_checked(Flat.like(flat, flat), Echo(), batch)
    assert torch.equal(once, batch[0].reshape(-1, 5))
    assert torch.equal(again, once)
    assert len(target) == 10


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_two_classes_of_one_logit_are_labels_however_they_are_written(shape):
    """As for ``BCEWithLogitsLoss``, which takes floats."""
    wanted = torch.tensor([0.0, 1, 1, 0, 1, 0])
    rows, target = flattened(noise(*shape), wanted.view(shape))
    assert rows.shape == (6, 1)
    assert torch.equal(target, wanted.long().view(6, 1))
    _, numbers = flattened(noise(*shape), wanted.view(shape), Layout(numbers=True))
    assert numbers.is_floating_point()  # in a task whose first batch was of others


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_labels_of_another_task_may_lie_outside_of_a_head_whose_logits_are_looked_at(classes):
    of_samples, of_tokens, of_pixels = noise(4, classes), noise(4, 7, classes), noise(4, classes, 6, 6)
    y = torch.tensor([0, 2, -100, 1])
    assert torch.equal(largest_logits(of_samples, y, 3), of_samples.amax(1)[[0, 1, 3]])
    y = labels(4, 7, classes=3)
    y[1:3, 4:] = -100
    assert torch.equal(largest_logits(of_tokens, y, 3), of_tokens.amax(2)[y >= 0])
    y = labels(4, 6, 6, classes=3).masked_fill(labels(4, 6, 6, classes=5) == 0, 255)
    assert torch.equal(largest_logits(of_pixels, y, 3, ignored={255}), of_pixels.amax(1)[y < 255])
    several = labels(4, 3, classes=2).float()
    assert torch.equal(largest_logits(of_samples, several, 3), of_samples.amax(1))


def test_of_several_heads_at_once_the_rows_of_largest_logits_stand_as_those_of_flattened():
    own = {"b": noise(4, 3), "a": noise(4, 2, seed=1)}
    other = {"a": noise(4, 5, seed=2), "b": noise(4, 2, seed=3)}
    target = {"b": torch.tensor([0, 2, -100, 1]), "a": torch.tensor([1, -100, 0, 0])}
    rows, _ = flattened(own, target)
    found = largest_logits(other, target, rows.shape[1])
    assert torch.equal(found, torch.cat([other["a"].amax(1)[[0, 2, 3]], other["b"].amax(1)[[0, 1, 3]]]))
    chosen = rows_of_samples(torch.tensor([True, False, False, True]), own, target)
    assert chosen.tolist() == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match="another task has no head 'b'"):
        largest_logits({"a": other["a"]}, target, 5)
    with pytest.raises(TypeError, match="logits are of type str"):
        largest_logits("x", torch.zeros(2), 5)


def test_whose_rows_are_chosen_is_known_only_where_outputs_are_of_samples():
    for output in (torch.zeros(8, 3), "x"):
        with pytest.raises(ValueError, match=r"for 2 samples.* an entry for each sample"):
            rows_of_samples(torch.tensor([True, False]), output, torch.zeros(8).long())

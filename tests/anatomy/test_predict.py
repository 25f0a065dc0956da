from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy, MultilabelF1Score

from lightning_rnf.anatomy.predict import measure, predict_checked, supervised


class Echo(nn.Module):
    def forward(self, x):
        return x


class SumMetricOfLogits(SumMetric):
    def update(self, logits, target):
        super().update(logits.sum())


def test_accuracy_counts_samples_and_not_batches():
    right, wrong = torch.eye(3), 1 - torch.eye(3)
    batches = [(right, torch.arange(3)), (wrong[:1], torch.tensor([0]))]
    assert measure(Echo(), batches).accuracy == 0.75


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_accuracy_of_several_labels_is_the_share_that_is_right(dtype):
    logits = torch.tensor([[3.0, -1.0, 0.5], [-2.0, -1.0, 4.0]])
    target = torch.tensor([[1, 0, 0], [0, 1, 1]]).to(dtype)
    batches = [(logits, target), (torch.full((1, 3), -1.0), torch.zeros(1, 3).to(dtype))]
    assert measure(Echo(), batches).accuracy == 7 / 9
    logits[0, 1] = torch.nan
    assert measure(Echo(), batches, finite=False).accuracy == 5 / 9


def test_metrics_of_several_labels_get_integers():
    logits, target = torch.tensor([[3.0, -1.0], [-2.0, 4.0], [1.0, 1.0]]), torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    found = measure(Echo(), [(logits, target)], metrics={"f1": MultilabelF1Score(2)})
    assert found.values["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_metrics_are_measured_on_all_samples_by_copies():
    metric = SumMetricOfLogits()
    metric.update(torch.eye(2), torch.arange(2))
    found = measure(Echo(), [(torch.eye(3), torch.arange(3)), (torch.eye(2), torch.arange(2))], metrics={"sum": metric})
    assert found.values == {"sum": 5.0}
    assert metric.compute() == 2.0


def test_samples_whose_logits_are_not_finite_may_count_as_wrong():
    logits = torch.tensor([[torch.inf, 0.0], [torch.nan, 1.0], [0.0, 1.0], [1.0, 0.0]])
    batches = [(logits, torch.tensor([0, 0, 1, 0]))]
    assert measure(Echo(), batches, finite=False).accuracy == 0.5
    assert measure(Echo(), batches, metrics={"sum": SumMetricOfLogits()}, finite=False).values == {"sum": 3.0}
    with pytest.raises(ValueError, match="not finite"):
        measure(Echo(), batches)


def test_the_forward_context_is_entered_around_each_forward():
    entered = []

    @contextmanager
    def context():
        entered.append(True)
        yield

    measure(Echo(), [(torch.eye(2), torch.arange(2))] * 3, forward_context=context)
    assert len(entered) == 3


@pytest.mark.parametrize(
    ("logits", "target", "error", "sentence"),
    [
        (torch.eye(2).long(), torch.arange(2), TypeError, "logits are a torch.int64 tensor"),
        ("text", torch.arange(2), TypeError, "logits are of type str"),
        (torch.eye(2), torch.ones(2), TypeError, "labels are a torch.float32 tensor"),
        (torch.eye(2), torch.eye(2).long() * 2, ValueError, "labels .N, classes. range from 0 to 2, expected 0 and 1"),
        (torch.eye(2), torch.full((2, 2), 0.5), ValueError, "at least 0 and sum to 1: probabilities of classes"),
        (torch.eye(2), torch.eye(2) / 0, ValueError, "targets are not finite"),
        (torch.eye(2)[:, 0], torch.arange(2), ValueError, "logits of shape .2,. and labels of shape .2,."),
        (torch.eye(2), torch.eye(3)[:2], ValueError, "logits of shape .2, 2. and labels of shape .2, 3."),
        (torch.eye(2)[:, :1], torch.arange(2), ValueError, "two classes of one logit are labels .N, 1."),
        (torch.eye(2), torch.arange(3), ValueError, "logits of shape .2, 2. and labels of shape .3,."),
        (
            torch.ones(2, 2, 4, 4),
            torch.ones(2, 4, 3).long(),
            ValueError,
            "expected .N, classes. and .N,. of class indices, or",
        ),
        (torch.eye(2), torch.tensor([0, 2]), ValueError, "labels range from 0 to 2, but the head has 2 outputs"),
        ([{"boxes": torch.ones(1, 4)}], torch.arange(1), TypeError, "of type list.*A detector's boxes are no answers"),
        (
            {"depth": torch.eye(2)},
            torch.arange(2),
            TypeError,
            "let predict return one of .'depth'., or, for several heads at once",
        ),
        (torch.ones(1, 2, 2), torch.tensor([[0, 255]]), ValueError, "0 to 255.*let predict return target.masked_fill"),
        (torch.eye(2) / 0, torch.arange(2), ValueError, "logits on the reference data are not finite"),
    ],
)
def test_what_is_no_classification_is_refused(logits, target, error, sentence):
    with pytest.raises(error, match=sentence):
        predict_checked(lambda module, batch: batch, Echo(), (logits, target))


def test_other_batches_are_refused_with_the_way_out():
    for batch in ({"x": torch.ones(1, 2)}, torch.ones(3, 2), (torch.ones(1), torch.ones(1), torch.ones(1)), 3):
        with pytest.raises(TypeError, match=r"not \(x, y\).*pass predict="):
            supervised(Echo(), batch)
    with pytest.raises(ValueError, match="no sample"):
        measure(Echo(), [])


class Counted(nn.Module):
    """Is right where the sample says so, and counts the batches."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.stack([x, 1 - x], dim=1)


def batches_of(right, size):
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.tensor(right).float().split(size)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("lowest", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_an_evaluation_ends_when_an_accuracy_is_out_of_reach_and_never_before(seed, lowest):
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (23,), generator=generator).tolist()
    module, batches = Counted(), batches_of(right, 3)
    whole = measure(Counted(), batches)
    found = measure(module, batches, lowest=lowest, expected=23)
    assert (found.accuracy < lowest) == (whole.accuracy < lowest)
    seen = [min(3 * number, 23) for number in range(1, 9)]
    certain = [sum(right[:number]) + 23 - number < lowest * 23 for number in seen]
    assert module.calls == (certain.index(True) + 1 if True in certain else len(batches))
    assert found.samples == seen[module.calls - 1]
    assert found.accuracy == sum(right[: found.samples]) / found.samples


def test_an_accuracy_that_is_just_reached_is_measured_to_the_end():
    right = [0] + [1] * 9
    assert measure(Counted(), batches_of(right, 1), lowest=0.9, expected=10).samples == 10
    assert measure(Counted(), batches_of(right, 1), lowest=0.9 + 1e-3, expected=10).samples == 1


def test_with_several_labels_a_sample_all_answers_count():
    logits, labels = torch.tensor([[1.0, -1.0, -1.0]] * 6), torch.tensor([[0, 1, 0]] * 6)
    batches = [(logits[:2], labels[:2])] * 3
    assert measure(nn.Identity(), batches, lowest=0.33, expected=6).samples == 6  # one of three is right
    assert measure(nn.Identity(), batches, lowest=0.9, expected=6).samples == 2


def test_metrics_of_an_evaluation_that_ended_are_of_what_was_seen():
    metric = {"accuracy": MulticlassAccuracy(num_classes=2, average="micro")}
    found = measure(Counted(), batches_of([1, 0, 0, 0, 1, 1], 2), metrics=metric, lowest=0.8, expected=6)
    assert (found.samples, found.accuracy, found.values["accuracy"]) == (4, 0.25, 0.25)

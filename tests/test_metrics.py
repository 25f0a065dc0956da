from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rnf.metrics import (
    AccuracyMatrix,
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
)

NAN = float("nan")
BY_HAND = torch.tensor([[0.90, NAN, NAN], [0.60, 0.80, NAN], [0.70, 0.50, 0.95]])
# average:    0.90, (0.60 + 0.80) / 2, (0.70 + 0.50 + 0.95) / 3
# forgetting: task 1: max(0.90, 0.60) - 0.70 = 0.20; task 2: 0.80 - 0.50 = 0.30; mean 0.25
# transfer:   task 1: 0.70 - 0.90 = -0.20; task 2: 0.50 - 0.80 = -0.30; mean -0.25


def test_a_matrix_computed_by_hand():
    assert average_accuracy(BY_HAND).tolist() == pytest.approx([0.90, 0.70, 2.15 / 3])
    assert forgetting(BY_HAND).item() == pytest.approx(0.25)
    assert backward_transfer(BY_HAND).item() == pytest.approx(-0.25)


def test_forgetting_counts_from_the_best_and_transfer_from_the_first():
    matrix = torch.tensor([[0.5, NAN, NAN], [0.9, 0.7, NAN], [0.6, 0.8, 0.9]])
    assert forgetting(matrix).item() == pytest.approx(((0.9 - 0.6) + (0.7 - 0.8)) / 2)
    assert backward_transfer(matrix).item() == pytest.approx(((0.6 - 0.5) + (0.8 - 0.7)) / 2)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_formulas_written_out_as_sums(rows):
    n = len(rows)
    matrix = torch.tensor(rows, dtype=torch.float64).tril() + torch.full((n, n), NAN, dtype=torch.float64).triu(
        1
    ).nan_to_num(0)
    matrix[torch.triu(torch.ones(n, n), 1).bool()] = NAN
    averages = [sum(rows[i][j] for j in range(i + 1)) / (i + 1) for i in range(n)]
    forgot = sum(max(rows[i][j] for i in range(j, n - 1)) - rows[n - 1][j] for j in range(n - 1)) / (n - 1)
    transfer = sum(rows[n - 1][j] - rows[j][j] for j in range(n - 1)) / (n - 1)
    assert average_accuracy(matrix).tolist() == pytest.approx(averages)
    assert forgetting(matrix).item() == pytest.approx(forgot)
    assert backward_transfer(matrix).item() == pytest.approx(transfer)


def test_one_task_forgets_nothing():
    assert forgetting(torch.tensor([[0.4]])) == 0
    assert backward_transfer(torch.tensor([[0.4]])) == 0


@pytest.mark.parametrize("metric", [average_accuracy, forgetting, backward_transfer])
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0)])
def test_other_shapes_are_refused(metric, shape):
    with pytest.raises(ValueError, match=r"expected \(tasks, tasks\)"):
        metric(torch.zeros(shape))


def test_the_matrix_counts_over_batches_and_keeps_untested_entries_nan():
    matrix = AccuracyMatrix(2)
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    matrix.update(logits, torch.tensor([0, 1, 1]), trained=0, task=0)
    matrix.update(logits[:1], torch.tensor([0]), trained=0, task=0)
    computed = matrix.compute()
    assert computed[0, 0] == 0.75
    assert computed.isnan().sum() == 3


@pytest.mark.parametrize("entry", [(-1, 0), (0, -1), (2, 0), (0, 2)])
def test_entries_that_are_not_there_are_refused(entry):
    matrix = AccuracyMatrix(2)
    with pytest.raises(IndexError, match="is not in a matrix of 2 tasks"):
        answered(matrix, *entry, right=1, of=1)
    assert not matrix.samples.any()


def test_states_of_two_processes_add_up():
    logits, target = torch.randn(10, 3), torch.randint(3, (10,))
    whole, first, second = AccuracyMatrix(1), AccuracyMatrix(1), AccuracyMatrix(1)
    whole.update(logits, target, trained=0, task=0)
    first.update(logits[:3], target[:3], trained=0, task=0)
    second.update(logits[3:], target[3:], trained=0, task=0)
    reduced = {
        name: reduction(torch.stack([getattr(first, name), getattr(second, name)]))
        for name, reduction in first._reductions.items()
    }
    assert reduced["correct"] / reduced["samples"] == whole.compute()


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n),
            st.lists(st.floats(0, 1), min_size=n, max_size=n),
        )
    )
)
def test_forward_transfer_written_out_as_a_sum(drawn):
    rows, baseline = drawn
    n = len(rows)
    expected = sum(rows[j - 1][j] - baseline[j] for j in range(1, n)) / (n - 1) if n > 1 else 0.0
    found = forward_transfer(torch.tensor(rows, dtype=torch.float64), torch.tensor(baseline, dtype=torch.float64))
    assert found.item() == pytest.approx(expected)


def test_a_baseline_of_another_length_is_refused():
    with pytest.raises(ValueError, match="one accuracy per task"):
        forward_transfer(torch.eye(3), torch.zeros(2))


def answered(metric, trained, task, right, of):
    """Update a metric with ``of`` answers, of which so many are right."""
    logits = torch.tensor([[1.0, 0.0]]).repeat(of, 1)
    target = torch.tensor([0] * right + [1] * (of - right))
    metric.update(logits, target, trained=trained, task=task)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_metrics_are_the_functions_of_their_matrix():
    single = {AverageAccuracy: 0.6, Forgetting: 0.4, BackwardTransfer: -0.4}
    for kind, expected in single.items():
        metric = kind(3)  # of which two are trained so far
        assert metric.compute().isnan()
        for trained, task, right in ((0, 0, 8), (0, 1, 9), (1, 0, 4), (1, 1, 8)):
            answered(metric, trained, task, right, 10)
        assert metric.compute().item() == pytest.approx(expected)
        metric.reset()
        assert metric.compute().isnan()
    metric = ForwardTransfer(torch.tensor([0.5, 0.5]))
    assert metric.compute().isnan()
    answered(metric, 0, 1, 9, 10)
    assert metric.compute().item() == pytest.approx(0.4)


def test_metrics_of_two_processes_add_up_before_the_division():
    whole, halves = Forgetting(2), [Forgetting(2), Forgetting(2)]
    for trained, task, right, of in ((0, 0, 9, 10), (1, 0, 1, 3), (1, 0, 6, 7), (1, 1, 2, 2)):
        answered(whole, trained, task, right, of)
        answered(halves[right % 2], trained, task, right, of)
    # What torchmetrics does between processes: states are added up, then the number is computed.
    halves[0].correct += halves[1].correct
    halves[0].samples += halves[1].samples
    assert halves[0].compute().item() == pytest.approx(whole.compute().item())

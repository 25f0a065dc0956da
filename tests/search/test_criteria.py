from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassF1Score, MulticlassHingeLoss

from lightning_rnf.search.criteria import (
    AccuracyDrop,
    ComputeBudget,
    Criterion,
    FreeCapacity,
    MetricDrop,
    SubnetworkScore,
    as_criterion,
)
from lightning_rnf.search.cutoff import search_cutoff
from lightning_rnf.search.ranking import Measured, rank


def score(accuracy: float, baseline: float) -> SubnetworkScore:
    return SubnetworkScore(cutoff=1, accuracy=accuracy, baseline=baseline, units=10, relevant=9, free=1, free_before=0)


# -- AccuracyDrop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", ["0", "0.01", "0.02", "0.05", "0.1", "0.3", "0.35", "1"])
def test_a_drop_of_the_tolerance_is_accepted_and_one_sample_more_is_not(tolerance):
    criterion = AccuracyDrop(float(tolerance))
    for samples in range(1, 201):
        most = math.floor(Fraction(tolerance) * samples)  # samples that may be lost
        for correct in range(samples + 1):
            for lost in {min(most, correct), min(most + 1, correct)}:
                accepted = criterion(score((correct - lost) / samples, correct / samples))
                assert accepted == (Fraction(lost, samples) <= Fraction(tolerance)), (lost, correct, samples)


def test_a_tolerance_that_is_a_quotient_itself_is_exact_too():
    for samples in range(1, 61):
        for most in range(samples):
            criterion = AccuracyDrop(most / samples)
            for correct in range(most + 1, samples + 1):
                assert criterion(score((correct - most) / samples, correct / samples))
                assert not criterion(score((correct - most - 1) / samples, correct / samples))


def test_a_gain_is_always_accepted():
    assert AccuracyDrop(0.0)(score(0.9, 0.8))


def test_the_paper_s_tolerance_is_the_default():
    assert AccuracyDrop() == AccuracyDrop(0.02)


@pytest.mark.parametrize("tolerance", [-0.01, 1.01, 2, math.nan, math.inf, -math.inf])
def test_a_tolerance_that_is_no_share_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance is"):
        AccuracyDrop(tolerance)


def test_accuracy_that_is_not_a_number_is_not_accepted():
    assert not AccuracyDrop(1.0)(score(math.nan, 0.9))


def test_the_limit_of_accuracy_is_the_baseline_less_the_tolerance_and_of_several_the_highest():
    assert AccuracyDrop(0.25).accuracy_limit(0.75) == 0.5
    assert FreeCapacity(0.5).accuracy_limit(0.75) is None
    for both in (AccuracyDrop(0.25) & AccuracyDrop(0.5), AccuracyDrop(0.5) & FreeCapacity(0.5) & AccuracyDrop(0.25)):
        assert both.accuracy_limit(0.75) == 0.5


def test_so_many_samples_tell_a_drop_of_the_tolerance_as_one_of_them_weighs_no_more():
    AccuracyDrop(0.25).check_samples(4)
    AccuracyDrop(0.0).check_samples(1)  # no loss at all can be told by any
    AccuracyDrop(1.0).check_samples(1)
    with pytest.raises(ValueError, match="samples") as refused:
        AccuracyDrop(0.02).check_samples(40)
    assert str(refused.value) == (
        "reference data has 40 samples, so one weighs 2.5%, more than the tolerance of 2.0%: give at least 50 samples, "
        "a larger tolerance, or 0 for no loss"
    )
    for either in (FreeCapacity(0.5) & AccuracyDrop(0.02), AccuracyDrop(0.02) & FreeCapacity(0.5)):
        with pytest.raises(ValueError, match="has 40 samples"):
            either.check_samples(40)


# -- FreeCapacity -----------------------------------------------------------------------------------------------------


def free_units(minimum: str, units: int, *, method: str, resolution: int = 1, frozen: int = 0) -> int:
    """How many units are free after a search; the frozen ones are the most relevant, and accuracy is hopeless."""
    ranking = rank({"layer": torch.arange(float(units))}, {"layer": torch.arange(units) >= units - frozen})
    criterion = FreeCapacity(float(minimum))
    return search_cutoff(
        ranking, lambda _: Measured(0.0), criterion, method=method, resolution=resolution
    ).taken.score.free


each_method = pytest.mark.parametrize("method", ["bisect", "linear"])
MINIMA = ["0", "0.07", "0.1", "0.28", "0.3", "0.55", "0.7", "1"]  # 0.07 × 100 and others round upwards


@each_method
@pytest.mark.parametrize("resolution", [1, 2, 3, 7])
def test_at_least_the_minimum_is_left_free_and_less_than_one_step_more(method, resolution):
    for minimum, units in product(MINIMA, (1, 2, 7, 25, 40, 50, 100)):
        wanted = Fraction(minimum) * units
        found = free_units(minimum, units, method=method, resolution=resolution)
        assert wanted <= found < wanted + resolution, f"{minimum} of {units} units are to be free, {found} are"


@each_method
def test_where_frozen_units_take_more_all_others_are_left_free(method):
    assert free_units("0.8", 10, method=method, frozen=6) == 4
    assert free_units("0.3", 10, method=method, frozen=6) == 3


@pytest.mark.parametrize("minimum", [-0.01, 1.01, 30, math.nan, math.inf])
def test_a_minimum_that_is_no_share_is_refused(minimum):
    with pytest.raises(ValueError, match="minimum is"):
        FreeCapacity(minimum)


# -- as_criterion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 0.0, 0.02, 0.5, 1, 1.0])
def test_a_number_is_a_tolerance(number):
    assert as_criterion(number) == AccuracyDrop(float(number))


@pytest.mark.parametrize("number", [2, -1, 2.0, math.nan])
def test_a_number_that_is_no_share_is_refused(number):
    with pytest.raises(ValueError, match="two per cent is"):
        as_criterion(number)


def test_a_criterion_is_taken_as_it_is_and_another_callable_by_its_verdict():
    for criterion in (AccuracyDrop(0.1), FreeCapacity(0.3)):
        assert as_criterion(criterion) is criterion
    few_free = as_criterion(lambda score: score.free < 3)
    assert few_free(score(0.5, 1.0))
    assert not few_free(replace(score(0.5, 1.0), free=3))


# -- metrics, operations, combinations --------------------------------------------------------------------------------


def with_values(before: dict[str, float], after: dict[str, float]) -> SubnetworkScore:
    return replace(score(0.5, 0.5), values=after, baseline_values=before)


@pytest.mark.parametrize(
    ("metric", "direction", "worse"),
    [
        (MulticlassF1Score(3), None, -1),
        (MulticlassF1Score(3), False, 1),
        (MulticlassHingeLoss(3), None, 1),
        (MulticlassHingeLoss(3), True, -1),
    ],
)
def test_a_metric_may_worsen_by_the_tolerance_in_its_direction(metric, direction, worse):
    criterion = MetricDrop(metric, tolerance=0.25, higher_is_better=direction)
    name = type(metric).__name__
    for change, accepted in ((0.25, True), (0.26, False), (0.0, True), (-0.5, True)):
        assert criterion(with_values({name: 1.0}, {name: 1.0 + worse * change})) == accepted
    assert criterion.metrics == {name: metric}


def test_two_metrics_of_one_name_are_refused_unless_they_are_one_or_named_apart():
    strict, lax = MulticlassF1Score(3), MulticlassF1Score(3, top_k=2)
    with pytest.raises(ValueError, match=r"both called 'MulticlassF1Score': give one MetricDrop\(..., name=...\)"):
        _ = (MetricDrop(strict) & MetricDrop(lax)).metrics
    assert (MetricDrop(strict, 0.1) & MetricDrop(strict, 0.2)).metrics == {"MulticlassF1Score": strict}
    both = MetricDrop(strict, 0.1) & MetricDrop(lax, 0.1, name="lax")
    assert both.metrics == {"MulticlassF1Score": strict, "lax": lax}
    before = {"MulticlassF1Score": 0.9, "lax": 0.9}
    assert both(with_values(before, before))
    for name in before:
        assert not both(with_values(before, {**before, name: 0.5}))


def test_what_is_free_or_small_enough_is_met_however_much_more_is_pruned():
    enough = replace(score(0.5, 1.0), free=5, free_before=4)
    assert FreeCapacity(0.3).met(enough)
    assert not FreeCapacity(0.3)(enough)
    assert not FreeCapacity(0.6).met(enough)
    assert FreeCapacity(0.07).met(replace(enough, units=100, free=7))  # 0.07 × 100 is 7.000000000000001
    assert not FreeCapacity(0.07).met(replace(enough, units=100, free=6))
    small = with_values({"flops": 100.0}, {"flops": 40.0, "flops_before": 45.0})
    assert ComputeBudget(0.5).met(small)
    assert not ComputeBudget(0.5)(small)
    assert not ComputeBudget(30).met(small)
    assert ComputeBudget(0.4).met(small)
    assert ComputeBudget(40).met(small)
    assert not ComputeBudget(2).met(small)  # two operations, not twice what the whole network needs
    assert (AccuracyDrop(0.5) & FreeCapacity(0.3)).met(enough)
    assert not (AccuracyDrop(0.4) & FreeCapacity(0.3)).met(enough)


def test_a_metric_without_direction_or_what_is_none_is_refused():
    with pytest.raises(ValueError, match="higher_is_better=True"):
        MetricDrop(SumMetric())
    with pytest.raises(TypeError, match="torchmetrics"):
        MetricDrop("f1")
    with pytest.raises(ValueError, match="tolerance"):
        MetricDrop(MulticlassF1Score(3), tolerance=-0.1)
    with pytest.raises(ValueError, match="tolerance is inf, expected at least 0, in the metric's unit"):
        MetricDrop(MulticlassF1Score(3), tolerance=math.inf)
    assert not MetricDrop(MulticlassF1Score(3), 0.0)(
        with_values({"MulticlassF1Score": 0.5}, {"MulticlassF1Score": 0.49})
    )


def test_a_budget_is_a_share_or_a_number_of_operations_and_is_met_at_the_first_step_within_it():
    flops = [1000.0, 900.0, 600.0, 500.0, 100.0]

    def measure(cutoff: int) -> Measured:
        return Measured(0.0, {"flops": flops[cutoff], "flops_before": flops[max(cutoff - 1, 0)]})

    ranking = rank({"layer": torch.arange(4.0)}, {})
    for budget, cutoff in ((0.6, 2), (600, 2), (599, 3), (1.0, 0), (1000, 0), (0.05, 4)):
        for method in ("bisect", "linear"):
            found = search_cutoff(ranking, measure, ComputeBudget(budget), method=method)
            assert found.taken.score.cutoff == cutoff, budget
    assert ComputeBudget(0.5).counts_flops


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="flops is"):
        ComputeBudget(budget)


def test_criteria_combine_to_one_that_accepts_what_all_accept_and_asks_for_what_each_asks():
    metric = MulticlassF1Score(3)
    both = AccuracyDrop(0.1) & FreeCapacity(0.5) & MetricDrop(metric) & ComputeBudget(0.5) & (lambda score: True)
    for accuracy, free_before, f1, flops in product((0.5, 0.7), (0, 9), (0.5, 0.9), (40.0, 60.0)):
        one = replace(
            score(accuracy, 0.75),
            free_before=free_before,
            values={"MulticlassF1Score": f1, "flops_before": flops},
            baseline_values={"MulticlassF1Score": 0.9, "flops": 100.0},
        )
        assert both(one) == (accuracy == 0.7 and free_before == 0 and f1 == 0.9 and flops == 60.0)
    assert both.metrics == {"MulticlassF1Score": metric}
    assert both.counts_flops
    assert not (AccuracyDrop() & FreeCapacity(0.5)).counts_flops
    assert ((lambda score: False) & AccuracyDrop(1.0))(score(1.0, 1.0)) is False
    assert ((lambda score: True) & AccuracyDrop(0.1))(score(0.5, 1.0)) is False
    with pytest.raises(ValueError, match="samples"):
        both.check_samples(9)


def test_of_two_heads_the_better_one_is_that_of_what_the_criterion_goes_by():
    accurate = Measured(0.9, {"MulticlassF1Score": 0.5, "MulticlassHingeLoss": 0.5, "flops": 1.0})
    other = Measured(0.8, {"MulticlassF1Score": 0.6, "MulticlassHingeLoss": 0.4, "flops": 9.0})
    by_accuracy = [AccuracyDrop(), FreeCapacity(0.5), ComputeBudget(0.5), as_criterion(lambda score: True)]
    for criterion in (*by_accuracy, MetricDrop(MulticlassF1Score(3)) & AccuracyDrop(), by_accuracy[1] & by_accuracy[2]):
        assert not criterion.by_metrics
        assert criterion.worth(accurate) > criterion.worth(other)
    for metric in (MulticlassF1Score(3), MulticlassHingeLoss(3)):
        drop = MetricDrop(metric)
        for criterion in (drop, FreeCapacity(0.5) & drop, drop & ComputeBudget(0.5) & drop):
            assert criterion.by_metrics
            assert criterion.worth(other) > criterion.worth(accurate)


def test_a_criterion_without_a_verdict_is_refused_when_it_is_made():
    class Undecided(Criterion):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Undecided()


# -- rubbish ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", [None, "0.02", True, [0.02], {}, torch.tensor(0.02)])
def test_what_is_neither_a_number_nor_callable_is_refused_by_what_it_is(rubbish):
    with pytest.raises(TypeError, match="expected a tolerance such as") as refused:
        as_criterion(rubbish)
    assert repr(rubbish) in str(refused.value)

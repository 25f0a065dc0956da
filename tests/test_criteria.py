from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch

from lightning_rnf.criteria import AccuracyDrop, FreeCapacity, SubnetworkScore, as_criterion
from lightning_rnf.search import rank, search_cutoff


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


# -- FreeCapacity -----------------------------------------------------------------------------------------------------


def free_units(minimum: str, units: int, *, method: str, resolution: int = 1, frozen: int = 0) -> int:
    """How many units are free after a search; the frozen ones are the most relevant, and accuracy is hopeless."""
    ranking = rank({"layer": torch.arange(float(units))}, {"layer": torch.arange(units) >= units - frozen})
    criterion = FreeCapacity(float(minimum))
    return search_cutoff(ranking, lambda _: 0.0, criterion, method=method, resolution=resolution).accepted.free


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


def test_a_callable_is_taken_as_it_is():
    for criterion in (AccuracyDrop(0.1), FreeCapacity(0.3), lambda score: score.free < 3, bool):
        assert as_criterion(criterion) is criterion


@pytest.mark.parametrize("rubbish", [None, "0.02", True, [0.02], {}, torch.tensor(0.02)])
def test_what_is_neither_a_number_nor_callable_is_refused_by_what_it_is(rubbish):
    with pytest.raises(TypeError, match="expected a tolerance such as") as refused:
        as_criterion(rubbish)
    assert repr(rubbish) in str(refused.value)

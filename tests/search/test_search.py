from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_rnf.search.cutoff import SearchResult, about, search_cutoff
from lightning_rnf.search.ranking import Measured, Ranking, rank

quickly = settings(deadline=None, database=None, max_examples=60)
each_method = pytest.mark.parametrize("method", ["fewest", "bisect", "linear"])


def order(
    relevance: dict[str, list[float]], frozen: dict[str, list[int]] | None = None, dtype=torch.float32, **options
) -> list[int]:
    masks = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in (frozen or {}).items()}
    scores = {name: torch.tensor(values, dtype=dtype) for name, values in relevance.items()}
    return rank(scores, masks, **options).order.tolist()


# -- rank -------------------------------------------------------------------------------------------------------------


def test_the_least_relevant_goes_first():
    assert order({"a": [3.0, 1.0], "b": [2.0, 4.0, 0.0]}, normalize="none") == [4, 1, 2, 0, 3]


def test_ties_go_by_layer_order_then_by_index():
    assert order({"z": [1.0, 0.0, 1.0], "a": [0.0, 1.0]}, normalize="none") == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_scores_keep_the_order_of_the_network(normalize, value):
    sizes = {"z": 40, "a": 40, "m": 40}  # long enough for an unstable sort to show
    assert order({name: [value] * size for name, size in sizes.items()}, normalize=normalize) == list(range(120))


def test_negative_relevance_goes_before_none():
    assert order({"a": [0.0, -1.0, 2.0], "b": [-3.0, 1.0]}, normalize="none") == [3, 1, 0, 4, 2]


def test_each_layer_is_divided_by_the_sum_of_its_absolute_relevance():
    # a: 100/300, -100/300, 100/300 = 0.33, -0.33, 0.33 (by the signed sum it would be 1, -1, 1); b: 0.3, 0.4, 0.3
    relevance = {"a": [100.0, -100.0, 100.0], "b": [3.0, 4.0, 3.0]}
    assert order(relevance) == [1, 3, 5, 0, 2, 4]
    assert order(relevance, normalize="none") == [1, 3, 5, 4, 0, 2]


def test_a_layer_whose_relevance_sums_to_less_than_zero_keeps_its_order():
    assert order({"a": [-3.0, 1.0, -1.0]}) == [0, 2, 1]


def test_units_without_relevance_go_first_and_cost_nothing():
    relevance = {"dead": [0.0, 0.0], "a": [1.0, -1.0, 0.0]}
    assert order(relevance) == [0, 1, 4, 3, 2]
    assert order(relevance, normalize="none") == [3, 0, 1, 4, 2]


@quickly
@given(st.data())
def test_parts_of_one_layer_go_as_layers_of_their_own_would(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    scores = st.floats(-10, 10, width=32)
    apart = {f"p{i}": data.draw(st.lists(scores, min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    flat = [score for part in apart.values() for score in part]
    part_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = {"fused": [(part_of == part, 1.0) for part in range(len(sizes))]}
    assert order({"fused": flat}, parts=parts) == order(apart)
    assert order({"fused": flat}, parts=parts, normalize="none") == order({"fused": flat}, normalize="none")


def test_a_part_sums_to_what_it_is_to_sum_to():
    # a: 0.1, 0.4 for the first and the third, 0.25, 0.75 for the others; b: 0.2, 0.8
    relevance = {"a": [1.0, 2.0, 4.0, 6.0], "b": [1.0, 4.0]}
    first = torch.tensor([True, False, True, False])
    assert order(relevance, parts={"a": [(first, 0.5), (~first, 1.0)]}) == [0, 4, 1, 2, 3, 5]


FROZEN = {"a": [1, 0, 0], "b": [0, 1]}


def test_frozen_units_are_no_candidates_unless_all_are():
    relevance = {"a": [0.0, 3.0, 1.0], "b": [4.0, 2.0]}
    assert order(relevance, FROZEN, normalize="none", candidates="free") == [2, 1, 3]
    assert order(relevance, FROZEN, normalize="none", candidates="all") == [0, 2, 4, 1, 3]


@quickly
@given(st.data())
def test_free_candidates_are_exactly_the_units_that_are_not_frozen(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    scores = st.floats(-10, 10, width=32)
    relevance = {f"l{i}": data.draw(st.lists(scores, min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    frozen = {f"l{i}": data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    flat = [flag for mask in frozen.values() for flag in mask]
    assert sorted(order(relevance, frozen)) == [unit for unit, flag in enumerate(flat) if not flag]
    assert sorted(order(relevance, frozen, candidates="all")) == list(range(len(flat)))


@quickly
@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=6), min_size=1, max_size=4))
def test_raw_ranking_is_python_s_stable_sort(layers):
    flat = [score for layer in layers for score in layer]
    found = order({f"l{i}": layer for i, layer in enumerate(layers)}, normalize="none")
    assert found == sorted(range(len(flat)), key=lambda unit: flat[unit])


def test_ranking_is_the_same_every_time():
    relevance = {"a": torch.randn(300).round(decimals=1), "b": torch.randn(200).round(decimals=1)}
    first, second = rank(relevance, {}), rank({name: values.clone() for name, values in relevance.items()}, {})
    assert torch.equal(first.order, second.order)
    assert first.sizes == second.sizes == {"a": 300, "b": 200}


def test_ranking_leaves_its_input_alone_and_takes_half_precision_with_gradient():
    relevance = torch.tensor([2.0, 1.0, 4.0], dtype=torch.bfloat16, requires_grad=True)
    assert rank({"a": relevance}, {}).order.tolist() == [1, 0, 2]
    assert torch.equal(relevance, torch.tensor([2.0, 1.0, 4.0], dtype=torch.bfloat16))
    relevance = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    rank({"a": relevance}, {}, parts={"a": [(relevance > 1, 1.0), (relevance <= 1, 0.5)]})
    assert relevance.tolist() == [2.0, 1.0, 4.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_relevance_that_is_not_finite_is_refused_by_the_layer_s_name(value):
    with pytest.raises(ValueError, match=r"'body\.fc'.* not finite in 2 units"):
        order({"body.conv": [0.0, 1.0], "body.fc": [value, 1.0, value]})


def test_a_network_without_units_is_refused():
    with pytest.raises(ValueError, match=r"^no units to rank$"):
        order({})


def test_relevant_units_are_those_beyond_the_cutoff_in_the_shape_of_the_layers():
    ranking = rank({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 4.0, 0.0])}, {}, normalize="none")
    expected = {0: ("11", "111"), 1: ("11", "110"), 3: ("10", "010"), 5: ("00", "000")}
    for cutoff, masks in expected.items():
        found = ranking.relevant(cutoff)
        assert all(mask.dtype == torch.bool for mask in found.values())
        assert tuple("".join(str(int(flag)) for flag in mask) for mask in found.values()) == masks
        assert list(found) == ["a", "b"]


@quickly
@given(st.data())
def test_a_layer_is_untouched_if_no_cutoff_takes_a_unit_of_it(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    relevance = {f"l{i}": torch.rand(size) for i, size in enumerate(sizes)}
    frozen = {
        f"l{i}": torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for i, n in enumerate(sizes)
    }
    ranking = rank(relevance, frozen)
    assert ranking.untouched() == [name for name, mask in ranking.relevant(ranking.candidates).items() if mask.all()]


def test_a_score_counts_as_free_only_what_no_task_needs():
    relevance = {"a": torch.tensor([0.0, 3.0, 1.0]), "b": torch.tensor([4.0, 2.0])}
    frozen = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in FROZEN.items()}
    ranking = rank(relevance, frozen, normalize="none", candidates="all")  # order 0 2 4 1 3, of which 0 and 4 frozen
    scores = [ranking.score(cutoff, Measured(0.5), Measured(0.75)) for cutoff in range(6)]
    assert [score.free for score in scores] == [0, 0, 1, 1, 2, 3]
    assert [score.relevant for score in scores] == [5, 4, 3, 2, 1, 0]
    assert {(score.units, score.accuracy, score.baseline) for score in scores} == {(5, 0.5, 0.75)}
    assert [score.cutoff for score in scores] == list(range(6))


# -- ration -----------------------------------------------------------------------------------------------------------


def test_the_least_relevant_claims_beyond_the_ration_go_first():
    relevance = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    ranking = rank(relevance, {}, normalize="none", ration=0.5)
    assert ranking.order.tolist() == [4, 5, 3, 2, 6, 7, 1, 0]
    assert ranking.beyond_ration == 4
    assert ranking.cutoffs() == [4, 5, 6, 7, 8]
    assert ranking.cutoffs(3) == [4, 7, 8]


@quickly
@given(st.data())
def test_no_task_claims_more_than_its_ration_of_a_layer_s_free_units(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    ration = data.draw(st.sampled_from([0.01, 0.07, 0.35, 0.5, 0.99, 1.0]))
    scores = st.sampled_from([-1.0, 0.0, 0.5, 2.0])

    def drawn(values) -> dict[str, Tensor]:
        return {f"l{i}": torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n))) for i, n in enumerate(sizes)}

    relevance, frozen = drawn(scores), drawn(st.booleans())
    candidates = data.draw(st.sampled_from(["free", "all"]))
    ranking = rank(relevance, frozen, normalize="none", ration=ration, candidates=candidates)
    least, most = ranking.relevant(ranking.beyond_ration), ranking.relevant(ranking.candidates)
    for name, was_frozen in frozen.items():
        free = int((~was_frozen).sum())
        claimed = relevance[name][least[name] & ~was_frozen]
        allowed = max(1, math.floor(Fraction(str(ration)) * free)) if free else 0
        assert len(claimed) == allowed
        left = relevance[name][~least[name] & ~was_frozen]
        assert not len(left) or left.max() <= claimed.min()
        assert torch.equal(least[name] & was_frozen, was_frozen)  # what is frozen costs nothing
        assert not (most[name] & ~was_frozen).any()


@each_method
def test_a_ration_is_kept_to_whatever_the_criterion_says_and_its_verdict_is_recorded(method):
    ranking = rank({"layer": torch.arange(8.0)}, {}, ration=0.5)
    found = search_cutoff(ranking, lambda cutoff: Measured(1.0), lambda score: False, method=method)
    assert found.taken.score.cutoff == 4
    assert not found.taken.accepted
    found = search_cutoff(ranking, lambda cutoff: Measured(1.0), lambda score: score.cutoff <= 6, method=method)
    assert found.taken.score.cutoff == 6
    assert found.taken.accepted
    assert [evaluation.score.cutoff for evaluation in found.evaluations][:2] == [0, 4]


# -- search -----------------------------------------------------------------------------------------------------------


def ranking_of(candidates: int, frozen: int = 0) -> Ranking:
    return rank(
        {"layer": torch.arange(float(frozen + candidates))}, {"layer": torch.arange(frozen + candidates) < frozen}
    )


class Network:
    """A network's accuracy at each cutoff, and which cutoffs a criterion would take; remembers what it was asked."""

    def __init__(self, verdicts: list[bool]) -> None:
        self.verdicts = verdicts
        self.measured: list[int] = []
        self.judged: list[int] = []

    def accuracy(self, cutoff: int) -> float:
        return 1.0 - cutoff / 1000

    def measure(self, cutoff: int) -> Measured:
        self.measured.append(cutoff)
        return Measured(self.accuracy(cutoff), {"units left": len(self.verdicts) - cutoff})

    def criterion(self, score) -> bool:
        self.judged.append(score.cutoff)
        return self.verdicts[score.cutoff]

    def search(self, method: str, resolution: int = 1) -> SearchResult:
        ranking = ranking_of(len(self.verdicts) - 1, frozen=2)
        return search_cutoff(ranking, self.measure, self.criterion, method=method, resolution=resolution)


verdicts = st.lists(st.booleans(), min_size=1, max_size=70)
resolutions = st.integers(1, 90)


@each_method
@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_the_returned_cutoff_was_measured_and_accepted(method, verdicts, resolution):
    network = Network(verdicts)
    cutoff = network.search(method, resolution).taken.score.cutoff
    assert cutoff in network.measured
    assert cutoff == 0 or verdicts[cutoff]


@each_method
@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_the_next_cutoff_is_a_rejected_one_or_there_is_none(method, verdicts, resolution):
    network = Network(verdicts)
    cutoff = network.search(method, resolution).taken.score.cutoff
    beyond = min(cutoff + resolution, len(verdicts) - 1)
    assert beyond == cutoff or (beyond in network.measured and not verdicts[beyond])


@each_method
@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_no_larger_cutoff_that_was_measured_is_accepted_and_the_next_one_is_rejected(method, verdicts, resolution):
    network = Network(verdicts)
    found = network.search(method, resolution)
    assert list(found.from_fewest) == sorted(found.evaluations, key=lambda one: -one.score.cutoff)
    larger = found.from_fewest[: found.from_fewest.index(found.taken)]
    assert not any(evaluation.accepted or verdicts[evaluation.score.cutoff] for evaluation in larger)


@each_method
@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_every_evaluation_is_recorded_in_order_and_none_is_made_twice(method, verdicts, resolution):
    network = Network(verdicts)
    found = network.search(method, resolution)
    assert [evaluation.score.cutoff for evaluation in found.evaluations] == network.measured
    assert len(set(network.measured)) == len(network.measured)
    assert network.measured[0] == 0
    for evaluation in found.evaluations:
        score = evaluation.score
        assert score.accuracy == network.accuracy(score.cutoff)
        assert score.baseline == network.accuracy(0)
        assert score.values == {"units left": len(verdicts) - score.cutoff}
        assert score.baseline_values == {"units left": len(verdicts)}
        assert evaluation.accepted == (score.cutoff == 0 or verdicts[score.cutoff])
        assert (score.units, score.relevant, score.free) == (
            len(verdicts) + 1,
            len(verdicts) + 1 - score.cutoff,
            score.cutoff,
        )
    assert found.taken in found.evaluations


@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_bisect_needs_logarithmically_many_evaluations(verdicts, resolution):
    network = Network(verdicts)
    network.search("bisect", resolution)
    steps = math.ceil((len(verdicts) - 1) / resolution)
    assert len(network.measured) <= math.ceil(math.log2(steps + 1)) + 1


@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_never_more_evaluations_than_foretold(verdicts, resolution):
    for method in ("fewest", "bisect", "linear"):
        made = len(Network(verdicts).search(method, resolution).evaluations)
        assert made <= about(ranking_of(len(verdicts) - 1, frozen=2), method, resolution)


def test_from_the_fewest_costs_at_most_one_and_a_half_bisections_for_any_number_of_candidates():
    positions, mask = torch.arange(200_000), torch.zeros(0, dtype=torch.bool)
    # Both numbers change at powers of two, and at those plus a kept count, only.
    turns = {2**power + more for power in range(17) for more in (-1, 0, 1, 2, *(2 * 4**step + 1 for step in range(8)))}
    for candidates in {*range(5000), *turns, 100_000}:
        ranking = Ranking({}, positions[:candidates], mask)
        assert about(ranking, "fewest") <= 1.5 * about(ranking, "bisect"), candidates
    for candidates in range(0, 200, 7):
        for resolution in (1, 3, 10):
            for ration in (None, 0.3):
                ranking = rank({"layer": torch.arange(float(candidates + 1))}, {}, ration=ration)
                assert about(ranking, "fewest", resolution) <= 1.5 * about(ranking, "bisect", resolution)


def test_what_is_foretold_of_a_search_from_the_fewest_is_what_the_worst_boundary_needs():
    for candidates in range(45):
        most = 0
        for boundary in range(candidates + 1):
            network = Network([cutoff <= boundary for cutoff in range(candidates + 1)])
            assert network.search("fewest").taken.score.cutoff == boundary
            most = max(most, len(network.measured))
        assert most == about(ranking_of(candidates), "fewest")


@pytest.mark.parametrize("ration", [None, 0.5])
@pytest.mark.parametrize("resolution", [1, 3])
def test_what_is_foretold_of_each_method_is_what_its_worst_boundary_needs(resolution, ration):
    for candidates in range(1, 34):
        ranking = rank({"layer": torch.arange(float(candidates))}, {}, ration=ration)
        made = {"fewest": set(), "bisect": set(), "linear": set()}
        for method, counts in made.items():
            for boundary in [*ranking.cutoffs(resolution), -1]:
                found = search_cutoff(
                    ranking,
                    lambda cutoff: Measured(1.0),
                    lambda score, boundary=boundary: score.cutoff <= boundary,
                    method=method,
                    resolution=resolution,
                )
                assert found.taken.score.cutoff == max(boundary, ranking.beyond_ration)
                counts.add(len(found.evaluations))
            said = about(ranking, method, resolution)
            if method == "bisect":
                assert said - 1 <= min(counts) <= max(counts) <= said
            else:
                assert said == max(counts)
            if resolution == 1:
                assert said == about(ranking, method) == about(ranking, method, 1, 0.0)


@pytest.mark.parametrize("precision", [0.0, 0.07, 0.3])
def test_what_is_foretold_to_a_precision_is_what_the_worst_boundary_needs_in_larger_networks_too(precision):
    for candidates in (9, 33, 128, 129, 131, 140, 200):  # some just beyond a kept count: the worst is not at the end
        ranking = ranking_of(candidates)
        most = 0
        for boundary in range(candidates + 1):
            network = Network([cutoff <= boundary for cutoff in range(candidates + 1)])
            search_cutoff(ranking, network.measure, network.criterion, precision=precision)
            most = max(most, len(network.measured))
        assert most == about(ranking, "fewest", precision=precision), candidates


def test_by_default_the_search_is_from_the_fewest_unit_by_unit_and_exact():
    ranking = ranking_of(50)

    def search(**options) -> list[int]:
        found = search_cutoff(ranking, lambda cutoff: Measured(1.0), lambda score: score.cutoff <= 17, **options)
        return [evaluation.score.cutoff for evaluation in found.evaluations]

    assert search() == search(method="fewest", resolution=1, precision=0.0)
    assert 17 in search()


def test_from_the_fewest_finds_few_units_that_do_where_more_do_not():
    def does(kept: int) -> bool:  # as seen on an MLP of 800 units
        return 10 <= kept < 50 or kept > 300

    network = Network([does(800 - cutoff) for cutoff in range(801)])
    assert network.search("fewest").taken.score.cutoff == 800 - 10
    assert network.measured[:5] == [0, 800, 798, 792, 768]
    assert min(network.measured[1:]) == 768  # nothing large was measured on the way
    assert Network(network.verdicts).search("bisect").taken.score.cutoff == 800 - 301


def test_from_the_fewest_keeps_none_of_the_candidates_if_the_frozen_units_do():
    network = Network([True] * 801)
    assert network.search("fewest").taken.score.cutoff == 800
    assert network.measured == [0, 800]


@quickly
@given(verdicts=verdicts, resolution=resolutions)
def test_linear_is_the_paper_s_loop_and_stops_at_the_first_rejection(verdicts, resolution):
    cutoff = 0
    while cutoff < len(verdicts) - 1:
        step = min(cutoff + resolution, len(verdicts) - 1)
        if not verdicts[step]:
            break
        cutoff = step
    assert Network(verdicts).search("linear", resolution).taken.score.cutoff == cutoff


@each_method
@quickly
@given(candidates=st.integers(0, 300), acceptable=st.integers(0, 310), resolution=resolutions)
def test_where_acceptance_is_monotone_the_largest_cutoff_is_found_to_the_resolution(
    method, candidates, acceptable, resolution
):
    verdicts = [cutoff <= acceptable for cutoff in range(candidates + 1)]
    largest = max(cutoff for cutoff, accepted in enumerate(verdicts) if accepted)
    found = Network(verdicts).search(method, resolution).taken.score.cutoff
    assert 0 <= largest - found < resolution


@quickly
@given(st.integers(0, 300), st.integers(0, 310), resolutions, st.sampled_from([0.01, 1 / 16, 0.3]))
def test_from_the_fewest_a_boundary_is_found_to_the_precision(candidates, acceptable, resolution, precision):
    network = Network([cutoff <= acceptable for cutoff in range(candidates + 1)])
    ranking = ranking_of(candidates, frozen=2)
    options = {"resolution": resolution, "precision": precision}
    cutoff = search_cutoff(ranking, network.measure, network.criterion, **options).taken.score.cutoff
    kept = -(-(candidates - cutoff) // resolution)
    assert 0 <= min(acceptable, candidates) - cutoff < resolution * max(1, precision * kept)
    assert len(network.measured) <= about(ranking, "fewest", resolution, precision)
    assert about(ranking, "fewest", resolution, precision) <= about(ranking, "fewest", resolution)


@quickly
@given(candidates=st.integers(0, 70), acceptable=st.integers(0, 80), resolution=resolutions)
def test_where_acceptance_is_monotone_all_methods_agree(candidates, acceptable, resolution):
    verdicts = [cutoff <= acceptable for cutoff in range(candidates + 1)]
    fewest, bisect, linear = (
        Network(verdicts).search(method, resolution).taken.score for method in ("fewest", "bisect", "linear")
    )
    assert fewest == bisect == linear


@quickly
@given(candidates=st.integers(0, 200), resolution=resolutions, ration=st.sampled_from([None, 0.5]), data=st.data())
def test_milder_cutoffs_keep_half_as_many_more_each_up_to_all(candidates, resolution, ration, data):
    ranking = rank({"layer": torch.arange(candidates + 1.0)}, {}, ration=ration)
    cutoffs = ranking.cutoffs(resolution)
    cutoff = data.draw(st.sampled_from(cutoffs))
    milder = ranking.milder(cutoff, resolution)
    assert set(milder) <= set(cutoffs)
    assert [cutoff, *milder][-1] == ranking.beyond_ration
    steps = [len(cutoffs) - 1 - cutoffs.index(one) for one in (cutoff, *milder)]
    for fewer, more in pairwise(steps):
        assert more == min(max(fewer + 1, math.floor(1.5 * fewer)), len(cutoffs) - 1)
    assert len(milder) <= 4 + math.log(len(cutoffs), 1.5)
    assert ranking.milder(cutoff) == ranking.milder(cutoff, 1)


@quickly
@given(candidates=st.integers(1, 60), resolution=resolutions, ration=st.sampled_from([None, 0.5]))
def test_the_step_before_a_step_is_the_one_before_it_and_before_the_first_none_is_silent(
    candidates, resolution, ration
):
    masks = {"layer": torch.arange(candidates + 2) % 4 == 1}
    ranking = rank({"layer": torch.arange(candidates + 2.0)}, masks, candidates="all", ration=ration)
    steps = ranking.cutoffs(resolution)
    before = {later: earlier for earlier, later in pairwise([0, *steps])}
    for cutoff in steps:
        assert ranking.before(cutoff, resolution) == before[cutoff]
        score = ranking.score(cutoff, Measured(0.5, {"f1": 0.25}, 7), Measured(0.75, {"f1": 1.0}, 9), resolution)
        assert (score.free, score.free_before) == (ranking.free(cutoff), ranking.free(before[cutoff]))
        assert (score.samples, score.values, score.baseline_values) == (7, {"f1": 0.25}, {"f1": 1.0})
        assert (score.units, score.relevant) == (candidates + 2, candidates + 2 - cutoff)
    for cutoff in ranking.cutoffs():
        assert ranking.before(cutoff) == ranking.before(cutoff, 1)
        assert ranking.score(cutoff, Measured(0.5)) == ranking.score(cutoff, Measured(0.5), Measured(0.5), 1)


def test_relevance_too_small_to_divide_by_still_ranks():
    assert order({"a": [2e-310, 1e-310, -1e-310], "b": [0.0, 0.0]}, dtype=torch.float64) == [3, 4, 2, 1, 0]


@each_method
def test_the_whole_network_is_acceptable_whatever_the_criterion_says(method):
    network = Network([False] * 9)
    found = network.search(method)
    assert found.taken.score.cutoff == 0
    assert found.evaluations[0].accepted
    assert 0 not in network.judged
    assert not any(evaluation.accepted for evaluation in found.evaluations[1:])


@each_method
@pytest.mark.parametrize("resolution", [1, 3, 8, 100])
def test_all_candidates_go_if_every_cutoff_is_accepted(method, resolution):
    assert Network([True] * 9).search(method, resolution).taken.score.cutoff == 8


@each_method
@pytest.mark.parametrize(("accepted", "cutoff"), [(True, 5), (False, 0)])
def test_a_resolution_beyond_the_candidates_is_one_step_to_all_of_them(method, accepted, cutoff):
    network = Network([True] * 5 + [accepted])
    assert network.search(method, 100).taken.score.cutoff == cutoff
    assert network.measured == [0, 5]


@each_method
def test_without_candidates_the_whole_network_is_measured_and_kept(method):
    network = Network([False])
    assert network.search(method).taken.score.cutoff == 0
    assert network.measured == [0]


@each_method
def test_searching_twice_finds_the_same(method):
    verdicts = [bool(flag) for flag in torch.randint(2, (60,)).tolist()]
    assert Network(verdicts).search(method) == Network(verdicts).search(method)


@pytest.mark.parametrize("resolution", [0, -1])
def test_a_resolution_below_one_unit_is_refused_before_anything_is_measured(resolution):
    network = Network([True] * 3)
    with pytest.raises(ValueError, match=f"^resolution is {resolution}, expected at least 1 unit per step$"):
        network.search("bisect", resolution)
    assert network.measured == []


@each_method
def test_a_criterion_may_answer_with_a_tensor(method):
    def criterion(score) -> Tensor:
        return torch.tensor(score.cutoff <= 3)

    found = search_cutoff(ranking_of(9), lambda cutoff: Measured(1.0), criterion, method=method)
    assert found.taken.score.cutoff == 3
    assert all(type(evaluation.accepted) is bool for evaluation in found.evaluations)

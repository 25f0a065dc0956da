"""Densities, posteriors and levels against numpy, torch.distributions and counting by hand."""

from __future__ import annotations

import itertools
from functools import reduce
from operator import add
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from lightning_rnf.inference import Judge, Sums, quantiles, space_of
from lightning_rnf.inference.densities import RIDGE, judges, levels, posterior
from lightning_rnf.memory import LEVELS, Gaussians, Portrait, Space

SIZE = 5


def drawn(classes: int, seed: int, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of classes that differ in mean and covariance, and in how many points they have."""
    generator = torch.Generator().manual_seed(seed)
    counts = [7 + 20 * index for index in range(classes)]
    points = [
        torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)
        + 3 * torch.randn(size, generator=generator)
        for count in counts
    ]
    target = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    order = torch.randperm(len(target), generator=generator)
    return torch.cat(points)[order], target[order]


def gaussians(classes: int, seed: int, size: int = SIZE) -> Gaussians:
    points, target = drawn(classes, seed, size)
    return Sums.none(classes, size).with_samples(points, target).gaussians()


def by_hand(of_tasks: dict[str, Gaussians]) -> dict[str, list[MultivariateNormal]]:
    """Each class shrunk towards all, in numpy, entry by entry."""
    full = {name: one.full().numpy() for name, one in of_tasks.items()}
    counts = {name: one.counts.numpy() for name, one in of_tasks.items()}
    of_all = [(c, n) for name in full for c, n in zip(full[name], counts[name], strict=True)]
    together = sum(c * n for c, n in of_all) / sum(n for _, n in of_all)
    size = len(together)
    found: dict[str, list[MultivariateNormal]] = {}
    for name, one in of_tasks.items():
        found[name] = []
        for mean, covariance, count in zip(one.means, full[name], counts[name], strict=True):
            a = size / (size + count)
            shrunk = (1 - a) * covariance + a * together + np.eye(size) * RIDGE * np.trace(together) / size
            found[name].append(MultivariateNormal(mean.double(), torch.from_numpy(shrunk)))
    return found


@pytest.mark.parametrize("classes", [(1,), (3,), (2, 4), (1, 1, 3)])
def test_log_densities_are_those_of_torchs_normal_but_for_a_constant(classes):
    of_tasks = {f"task {index}": gaussians(count, index) for index, count in enumerate(classes)}
    judge, expected = Judge(of_tasks), by_hand(of_tasks)
    x = drawn(3, 17)[0]
    constant = SIZE / 2 * np.log(2 * np.pi)
    each = [[one.log_prob(x.double()) + constant for one in of_task] for of_task in expected.values()]
    together = torch.stack([torch.stack(of_task).logsumexp(0) for of_task in each], dim=1)
    assert torch.allclose(judge(x).double(), together, rtol=1e-4, atol=1e-3)
    separate = torch.stack(list(itertools.chain(*each)), dim=1)
    assert torch.allclose(judge.of_classes(x).double(), separate, rtol=1e-4, atol=1e-3)


def test_points_are_judged_alike_however_many_there_are_at_once(monkeypatch):
    judge, x = Judge({"a": gaussians(4, 0)}), drawn(3, 1)[0]
    expected = judge(x)
    monkeypatch.setattr("lightning_rnf.inference.densities.CHUNK", 3 * 4 * SIZE)
    assert torch.allclose(judge(x), expected, rtol=1e-5, atol=1e-5)
    assert judge(x[:0]).shape == (0, 1)


def test_a_class_of_one_sample_has_the_covariance_of_all_and_a_feature_that_never_moves_is_no_error():
    points, target = drawn(2, 0)
    points, target = torch.cat([points, points[:1] + 50]), torch.cat([target, torch.tensor([2])])
    points[:, 0] = 1.0
    judge = Judge({"a": Sums.none(3, SIZE).with_samples(points, target).gaussians()})
    found = judge.of_classes(points)
    assert found.isfinite().all()
    assert int(found[-1].argmax()) == 2


def test_covariances_that_are_none_are_refused():
    one = gaussians(2, 0)
    broken = Gaussians(one.counts * 1000, one.means, -one.covariances)
    with pytest.raises(ValueError, match="classes of 'a' are no covariances"):
        Judge({"a": broken})


def test_covariances_that_no_samples_have_are_refused_before_they_overflow():
    """What they lack of 0 is nearly what the ridge adds: there are Cholesky factors, of next to nothing."""
    least = RIDGE * 1e-12
    lacking = torch.nextafter(torch.tensor(least), torch.tensor(0.0))
    assert 0 < least - float(lacking) < 1e-23
    covariances = torch.tensor([[-1.0, 0.0, -1.0]]) * lacking
    with pytest.raises(ValueError, match="classes of 'a' are no covariances"):
        Judge({"a": Gaussians(torch.tensor([5]), torch.zeros(1, 2), covariances)})
    flat = Judge({"a": Gaussians(torch.tensor([5]), torch.zeros(1, 2), torch.zeros(1, 3))})
    assert flat(torch.full((1, 2), 30.0)).isfinite().all()


def test_sums_of_batches_and_of_ranks_are_those_of_all_samples():
    points, target = drawn(3, 5)
    points = points + 20  # far from the origin, where squares cancel
    batches = list(zip(points.split(11), target.split(11), strict=True))
    ranks = [
        reduce(lambda sums, batch: sums.with_samples(*batch), batches[rank::3], Sums.none(5, SIZE)) for rank in range(3)
    ]
    found = reduce(add, ranks).gaussians()
    assert found.counts.tolist() == [int((target == index).sum()) for index in range(3)]  # two classes have none
    for index in range(3):
        some = points[target == index].double().numpy()
        assert np.allclose(found.means[index].numpy(), some.mean(0), rtol=1e-5)
        assert np.allclose(found.full()[index].numpy(), np.cov(some.T, bias=True), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.full(), found.full().transpose(1, 2))


def test_samples_of_no_class_are_left_out():
    points, target = drawn(3, 5)
    without = Sums.none(3, SIZE).with_samples(points[target != 1], target[target != 1]).gaussians()
    found = Sums.none(3, SIZE).with_samples(points, target.masked_fill(target == 1, -1)).gaussians()
    assert torch.equal(found.counts, without.counts)
    assert torch.allclose(found.means, without.means)
    assert torch.allclose(found.full(), without.full())


def test_samples_without_a_place_are_left_out():
    points, target = drawn(3, 5)
    without = Sums.none(3, SIZE).with_samples(points[3:], target[3:]).gaussians()
    points[:3, 1] = torch.nan
    found = Sums.none(3, SIZE).with_samples(points, target).gaussians()
    assert torch.equal(found.counts, without.counts)
    assert torch.equal(found.means, without.means)
    assert torch.equal(found.covariances, without.covariances)
    with pytest.raises(ValueError, match="no sample is left"):
        Sums.none(3, SIZE).with_samples(points * torch.nan, target).gaussians()


def portraits(names: str = "abc") -> dict[str, Portrait]:
    """Of tasks that ended in this order, each in the spaces of those before, which differ in size."""
    sizes = {name: SIZE + index for index, name in enumerate(names)}
    found = {}
    for index, name in enumerate(names):
        space = Space((), torch.zeros(sizes[name]), torch.ones(sizes[name]), torch.empty(sizes[name], 0))
        classes = {
            other: gaussians(1 + index, 10 * index + place, sizes[other])
            for place, other in enumerate(names[: index + 1])
        }
        found[name] = Portrait(space, classes, torch.zeros(LEVELS))
    return found


def test_the_posterior_of_three_tasks_is_the_product_over_spaces_and_sums_to_one():
    of_tasks = portraits()
    points = [torch.randn(40, SIZE + index, generator=torch.Generator().manual_seed(index)) for index in range(3)]
    pairs = list(zip(judges(tuple(of_tasks.items())), points, strict=True))
    densities = [judge(some) for (judge, _), some in pairs]
    for (_, own), (name, one), some in zip(judges(tuple(of_tasks.items())), of_tasks.items(), points, strict=True):
        assert torch.equal(own.of_classes(some), Judge({name: one.classes[name]}).of_classes(some))
    assert [one.shape for one in densities] == [(40, 3), (40, 2), (40, 1)]
    found = posterior(of_tasks, densities)
    assert torch.allclose(found.exp().sum(1), torch.ones(40), atol=1e-4)

    expected = torch.zeros(40, 3, dtype=torch.float64)
    in_a, in_b = (
        by_hand({name: of_tasks[name].classes[space] for name in rest}) for space, rest in (("a", "abc"), ("b", "bc"))
    )
    for sample in range(40):
        p = {n: sum(float(g.log_prob(points[0][sample].double()).exp()) for g in in_a[n]) for n in "abc"}
        q = {n: sum(float(g.log_prob(points[1][sample].double()).exp()) for g in in_b[n]) for n in "bc"}
        is_a = p["a"] / sum(p.values())
        is_b = q["b"] / sum(q.values())
        expected[sample] = torch.tensor([is_a, (1 - is_a) * is_b, (1 - is_a) * (1 - is_b)])
    assert torch.allclose(found.exp().double(), expected, atol=1e-3)
    assert (expected > 0.05).any(0).all()  # none of them is nothing


def test_the_posterior_of_one_task_is_certain():
    assert posterior(portraits("a"), [torch.randn(5, 1)]).tolist() == [[0.0]] * 5


def test_levels_are_shares_of_quantiles_that_are_lower():
    usual = [quantiles(torch.arange(1000.0)), quantiles(torch.full((10,), 4.0))]
    densities = torch.tensor([[-1.0, 9.0], [499.5, 9.0], [2000.0, 9.0], [0.0, 3.9], [0.0, 4.0], [0.0, 4.1]])
    chosen = torch.tensor([0, 0, 0, 1, 1, 1])
    found = levels(usual, chosen, densities)
    by_counting = [
        sum(float(level) < float(densities[row, task]) for level in usual[task]) / LEVELS
        for row, task in enumerate(chosen.tolist())
    ]
    assert found.tolist() == pytest.approx(by_counting)
    assert found.tolist() == pytest.approx([0, 50 / 101, 1, 0, 0, 1], abs=0.006)


def test_levels_of_what_the_quantiles_are_of_are_even():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    found = levels([quantiles(values)], torch.zeros(2000, dtype=torch.long), values.unsqueeze(1))
    for share in (0.05, 0.3, 0.9):
        assert float((found < share).float().mean()) == pytest.approx(share, abs=0.011)
    assert float(quantiles(values)[0]) == float(values.min())
    assert float(quantiles(values)[-1]) == float(values.max())


def test_a_space_centres_and_scales_by_layer_and_projects_what_is_large():
    layers = [SimpleNamespace(name=name) for name in ("first", "second")]
    features = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0] * 3 + [0.1] * 4) + 2
    every = features.double()
    space = space_of(layers, [3, 4], 300, every.sum(0), every.square().sum(0))
    expected = features.numpy()
    deviations = [np.sqrt(part.var(0).mean()) for part in np.split(expected, [3], axis=1)]
    expected = (expected - expected.mean(0)) / np.repeat(deviations, [3, 4])
    assert space.layers == ("first", "second")
    assert space.dimensions == 7
    assert np.allclose(space(features).numpy(), expected, atol=1e-4)
    assert space(torch.full((1, 7), 3e38)).tolist() == [[30.0] * 7]
    for value in (torch.nan, torch.inf, -torch.inf):
        assert space(torch.tensor([[0.0] * 6 + [value], [0.0] * 7])).isnan().all(1).tolist() == [True, False]

    large = space_of(layers, [100, 200], 2, torch.zeros(300).double(), torch.ones(300).double() * 2)
    assert large.dimensions == 128
    assert large(torch.randn(6, 300)).shape == (6, 128)
    again = space_of(layers, [100, 200], 2, torch.zeros(300).double(), torch.ones(300).double() * 2)
    assert torch.equal(large.projection, again.projection)

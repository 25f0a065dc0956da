"""Closed form: what other ways of solving the same give, and sums that no order changes."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch

from lightning_rnf.tasks.leastsquares import RIDGES, Moments, scales


def moments(x, y, like=None):
    return Moments.of(x, y, scales((x if like is None else like).abs().amax(dim=0).double()))


def drawn(samples=200, features=6, outputs=3, noise=0.1):
    generator = torch.Generator().manual_seed(samples + features)
    x = torch.randn(samples, features, generator=generator)
    weight, bias = torch.randn(outputs, features, generator=generator), torch.randn(outputs, generator=generator)
    return x, x @ weight.T + bias + noise * torch.randn(samples, outputs, generator=generator)


def ridge_by_hand(x, y, share, *, bias=True):
    """The ridge as rows that are appended to the samples, and the bias as a column that none of them touches."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0) if bias else x
    root = (share * (centred**2).sum(0).mean()).sqrt()
    penalty = root * torch.eye(x.shape[1], dtype=torch.float64)
    columns = torch.cat([x, penalty])
    if bias:
        columns = torch.cat([columns, torch.cat([torch.ones(len(x), 1), torch.zeros(x.shape[1], 1)]).double()], dim=1)
    return torch.linalg.lstsq(columns, torch.cat([y, torch.zeros(x.shape[1], y.shape[1]).double()])).solution.T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("samples", "noise"), [(200, 0.1), (30, 3.0), (4, 1.0)])
def test_is_a_ridge_of_those_that_may_be_chosen(samples, noise, bias):
    x, y = drawn(samples, noise=noise)
    weight, shift = moments(x, y).solve(bias=bias)
    tried = [ridge_by_hand(x, y, share, bias=bias) for share in RIDGES]
    found = torch.cat([weight, shift.unsqueeze(1)], dim=1) if bias else weight
    assert min(float((found - one).abs().max()) for one in tried) < 1e-3
    assert bias or not shift.any()


def test_chooses_as_a_held_out_part_would():
    """Thirty features, forty samples, and only three of the features say anything."""
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(samples, 30, generator=generator) for samples in (40, 4000))
    truth = torch.zeros(30, 1).index_fill_(0, torch.arange(3), 1.0)
    y = x @ truth + 2 * torch.randn(40, 1, generator=generator)
    weight, bias = moments(x, y).solve()

    def error(weight, bias):
        return float(((new.double() @ weight.T + bias - new.double() @ truth.double()) ** 2).mean())

    every = [error(one[:, :-1], one[:, -1]) for one in (ridge_by_hand(x, y, share) for share in RIDGES)]
    assert error(weight, bias) < 1.5 * min(every)
    assert max(every) > 3 * min(every), "a choice that makes no difference shows nothing"


def test_sums_are_the_same_in_any_order():
    x, y = drawn(960, features=20)
    y = (y > 0).double()
    parts = [moments(*part, like=x) for part in zip(x.split(32), y.split(32), strict=True)]
    forward, backward = reduce(add, parts), reduce(add, parts[::-1])
    of_three = reduce(add, [reduce(add, parts[rank::3]) for rank in range(3)])
    squares = [[part.double().T @ part.double() for part in x.split(32)[::way]] for way in (1, -1)]
    assert not torch.equal(*(reduce(add, way) for way in squares)), "the numbers are too easy to show anything"
    for other in (backward, of_three):
        assert torch.equal(forward.sums, other.sums)
        assert all(torch.equal(one, two) for one, two in zip(forward.solve(), other.solve(), strict=True))
    assert forward.samples == 960


def test_a_feature_that_never_varies_gets_no_weight():
    x, y = drawn()
    y = (y > 0).double()
    x[:, 2], x[:, 4] = 0.0, 7.3
    weight, bias = moments(x, y).solve()
    assert not weight[:, [2, 4]].any()
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    weight, bias = moments(torch.ones(9, 2), torch.arange(9.0).unsqueeze(1)).solve()
    assert not weight.any()
    assert bias.item() == pytest.approx(4.0)

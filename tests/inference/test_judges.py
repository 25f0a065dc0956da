"""Judges are made once for the same portraits, kept no longer than these, and of one precision."""

from __future__ import annotations

import gc
from weakref import ref

import torch

from lightning_rnf.inference.densities import Judge, Sums, judges
from lightning_rnf.memory import LEVELS, Portrait, Space

DIMENSIONS = 3


def portrait(spaces: list[str], seed: int = 0) -> Portrait:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(20, DIMENSIONS, generator=generator)
    gaussians = Sums.none(2, DIMENSIONS).with_samples(points, torch.arange(20) % 2).gaussians()
    space = Space(("body",), torch.zeros(DIMENSIONS), torch.ones(DIMENSIONS), torch.empty(DIMENSIONS, 0))
    return Portrait(space, dict.fromkeys(spaces, gaussians), torch.zeros(LEVELS))


def test_they_are_made_once_for_the_same_portraits_and_anew_for_others():
    one, two, other = portrait(["a"]), portrait(["a", "b"], 1), portrait(["a", "b"], 2)
    made = judges((("a", one), ("b", two)))
    assert judges((("a", one), ("b", two))) is made
    assert judges((("a", one), ("b", other))) is not made
    assert len(judges((("a", one),))) == 1
    x = torch.randn(5, DIMENSIONS, generator=torch.Generator().manual_seed(3))
    found = judges((("a", one), ("b", two)))
    expected = Judge({"a": one.classes["a"], "b": two.classes["a"]})
    assert torch.equal(found[0][0](x), expected(x))


def test_they_go_with_their_portraits():
    one, two = portrait(["a"]), portrait(["a", "b"], 1)
    made = ref(judges((("a", one), ("b", two)))[0][0])
    known = ref(two)
    assert made() is not None
    del two
    gc.collect()
    assert known() is None
    del one
    gc.collect()
    assert made() is None


def test_neither_features_nor_densities_are_of_a_fits_lower_precision():
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(7, 5, generator=generator)
    projection = torch.randn(5, DIMENSIONS, generator=generator)
    space = Space(("body",), torch.zeros(5), torch.ones(5), projection)
    judge = Judge({"a": portrait(["a"]).classes["a"]})
    expected = judge(space(features))
    with torch.autocast("cpu", torch.bfloat16):
        assert (features @ projection).dtype == torch.bfloat16
        assert torch.equal(judge(space(features)), expected)

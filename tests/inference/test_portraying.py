"""Portraits that several processes make of their shares of the data; what they run is in support/portraying.py."""

from __future__ import annotations

import pytest
import torch
from launched import launched, one_thread
from portraying import of_few_samples, portraits

from lightning_rnf import RelevanceFreezing

pytestmark = pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")


def test_two_processes_make_the_portraits_of_one_and_fail_together(tmp_path):
    run = launched("portraying.py", 2, tmp_path)
    with one_thread():
        alone = {"portraits": portraits("a", "b", fit_head="auto"), "of_few": of_few_samples()}
    assert run.codes == [0, 0]
    for rank in run.ranks:
        assert rank["unread"] == [None]  # nobody has waited for the one that could not be read
        for which, of_one in alone.items():
            for found, expected in zip(rank[which], of_one, strict=True):
                assert found["layers"] == expected["layers"]
                assert found["spaces"] == expected["spaces"]
                assert list(found["tensors"]) == list(expected["tensors"])
                for key, value in expected["tensors"].items():
                    assert torch.allclose(found["tensors"][key], value, rtol=1e-5, atol=1e-5), (which, key)
    one, other = run.ranks
    for which in alone:
        for mine, theirs in zip(one[which], other[which], strict=True):
            assert all(torch.equal(value, theirs["tensors"][key]) for key, value in mine["tensors"].items())
    assert alone["portraits"][1]["spaces"] == ["a", "b"]
    assert alone["portraits"][1]["tensors"]["0.counts"].sum() == 77
    assert alone["of_few"][1]["tensors"]["0.counts"].sum() == 50


def test_the_papers_retention_takes_no_portraits():
    with pytest.raises(ValueError, match="which retention='paper' never runs"):
        RelevanceFreezing.paper(portraits=True)

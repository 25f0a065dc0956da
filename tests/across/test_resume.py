"""Killed anywhere and resumed: the same weights and masks, bit for bit. What is killed is in killed.py."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from killed import ASKED, MOMENTS, run
from launched import ended, started

# At random moments so many times: RNF_KILLS=20 pytest -m slow tests/across/test_resume.py is the long run.
KILLS = int(os.environ.get("RNF_KILLS", 3))


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "recovery"])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    assert ended(started(run, folder, None, request.param)) == [0]
    return request.param, torch.load(folder / "result.pt", weights_only=True), time.monotonic() - began


def assert_equal(folder, expected):
    found = torch.load(folder / "result.pt", weights_only=True)
    assert len(found["state"]["tasks"]) == 2
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    for record, other in zip(expected["state"]["tasks"], found["state"]["tasks"], strict=True):
        for key in record.keys() - {"seconds", "drift"}:  # logits to compare with stay in their process
            if isinstance(record[key], dict) and key in {"relevant", "relevance", "norm_statistics"}:
                assert all(torch.equal(value, other[key][name]) for name, value in record[key].items()), key
            else:
                assert record[key] == other[key], key


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment_and_resumed_is_as_if_never_killed(moment, uninterrupted, tmp_path):
    recovery_epochs, expected, _ = uninterrupted
    assert ended(started(run, tmp_path, moment, recovery_epochs)) == [-signal.SIGKILL]
    assert not (tmp_path / "result.pt").exists()
    assert ended(started(run, tmp_path, None, recovery_epochs)) == [0]
    assert_equal(tmp_path, expected)


def test_asked_to_end_in_a_search_a_fit_ends_there_and_resumed_is_as_if_never_asked(uninterrupted, tmp_path):
    recovery_epochs, expected, _ = uninterrupted
    assert ended(started(run, tmp_path, ASKED, recovery_epochs)) == [0]  # Lightning's exception ends with 0
    assert not (tmp_path / "result.pt").exists()
    assert ended(started(run, tmp_path, None, recovery_epochs)) == [0]
    assert_equal(tmp_path, expected)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_as_if_never_killed(uninterrupted, tmp_path):
    recovery_epochs, expected, seconds = uninterrupted
    draw = random.Random(recovery_epochs)
    for trial in range(KILLS):
        folder, kills = tmp_path / str(trial), 0
        process = started(run, folder, None, recovery_epochs)
        process.join(draw.uniform(0.0, seconds))
        while process.exitcode is None and kills < 3:
            process.kill()
            kills += 1
            process = started(run, folder, None, recovery_epochs)
            process.join(draw.uniform(0.0, seconds))
        assert ended(process) == [0]
        assert_equal(folder, expected)

"""What the experiments took, and what has not been run, as the examples' page says it."""

from __future__ import annotations

import importlib

import pytest
from launched import ROOT


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("costs").costs


@pytest.fixture
def folder(tmp_path):
    """Two scripts, of which one begins as the other does, and three files of settings."""
    for script in ("split.py", "split_more.py"):
        (tmp_path / script).touch()
    settings = "title: A\nseeds: 2\ntraining: {epochs: 1}\nmethods: {naive: {}, paper: {}, default: {}, tuned: {}}\n"
    (tmp_path / "split.yaml").write_text(settings)
    (tmp_path / "split_more.yaml").write_text("base: split.yaml\nmethods: {paper: null, tuned: null}\n")
    (tmp_path / "split_more_short.yaml").write_text("base: split_more.yaml\nseeds: null\n")
    return tmp_path


def methods(**seconds):
    return {"methods": {name: {"runs": [{"seconds": one} for one in given]} for name, given in seconds.items()}}


def test_each_file_of_settings_has_a_line_with_its_command_its_time_and_what_is_missing(costs, folder):
    found = {
        "split": methods(naive=[60, 120, 90], paper=[1200], default=[1800, None], tuned=[30, 30]),
        "split-class": methods(naive=[600]),
        "split_more_short": methods(naive=[None], default=[720]),
    }
    _, _, *rows = costs(folder, found).splitlines()
    assert rows == [
        # of four methods the quickest and the slowest: medians of what was timed
        "| `split.py` | tuned 0.5, default 30 | 0.9 (1 of 8 not timed) | paper: 1 of 2 seeds |",
        "| `split.py --scenario class` | naive 10 | 0.2 |  |",
        "| `split_more.py` |  |  | all |",
        "| `split_more.py --settings split_more_short.yaml` | default 12 | 0.2 (1 of 2 not timed) |  |",
    ]


def test_methods_that_lack_as_much_stand_together(costs, folder):
    _, _, row, *_ = costs(folder, {"split": methods(naive=[60], default=[60])}).splitlines()
    assert row.endswith("| naive, default: 1 of 2 seeds; paper, tuned: all |")

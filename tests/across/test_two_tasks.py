"""A slice of the table in docs/networks.md: two tasks in networks of plain torch, with nothing configured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

import specimens
import table
import three_seeds

SLICE = (
    "deep and cross",
    "GRU of tokens, tied weights",
    "hypernetwork",
    "MLP, two numbers",
    "one weight at three dilations",
    "siamese towers",
    "TCN, weight norm",
)
RESULTS = json.loads((Path(table.__file__).with_name("two_tasks.json")).read_text())


@pytest.mark.filterwarnings("ignore::UserWarning")  # they are hardly trained
@pytest.mark.parametrize("name", SLICE)
def test_two_tasks_run_and_the_first_is_recalled_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(table, "EPOCHS", 2)
    found = table.row(name)
    assert not {"refused", "crashed"} & set(found), found
    assert found["recall"] is True
    assert 0 < found["second"]["free_weights"] <= found["first"]["free_weights"] <= 1
    assert found["export"][0].isdigit(), found["export"]


def test_what_is_not_made_of_rows_is_refused_by_a_sentence_that_names_a_way(monkeypatch):
    monkeypatch.setattr(table, "EPOCHS", 1)
    found = table.row("CNN, spectral norm")
    assert found["refused"].startswith("first task: ValueError: no unit layers")
    assert "remove_parametrizations" in found["refused"]


def test_the_recorded_table_is_of_networks_that_there_are_and_nothing_of_it_was_recalled_otherwise():
    networks = RESULTS["networks"]
    assert set(networks) <= set(specimens.ALL)
    assert all(found["recall"] for found in networks.values() if "recall" in found)
    ran = [found for found in networks.values() if "second" in found]
    assert len(ran) >= 0.9 * len(networks)
    docs = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    for name, found in networks.items():
        assert table.as_row(name, found) in docs, name


def test_the_table_of_three_seeds_is_the_recorded_one_and_what_is_said_of_it_holds():
    found = json.loads(Path(three_seeds.__file__).with_suffix(".json").read_text())
    docs = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    assert three_seeds.as_table(found) in docs
    runs = [run for of_name in found["networks"].values() for of_said in of_name.values() for run in of_said.values()]
    assert len(runs) == len(three_seeds.NETWORKS) * len(three_seeds.SAID) * len(three_seeds.SEEDS)
    assert all(run["recall"] for run in runs)
    short = {
        said: {
            name: 100 * mean(run["fresh"] - run["second"]["accuracy"] for run in of_name[said].values())
            for name, of_name in found["networks"].items()
        }
        for said in three_seeds.SAID
    }
    assert round(max(short["tasks=2"].values()), 1) == 2.3
    assert [name for name, points in short["no argument"].items() if points > 2.3] == ["GRU"]
    assert round(short["no argument"]["GRU"], 1) == 7.8

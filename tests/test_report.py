from __future__ import annotations

import sys

import pytest
import torch

from lightning_rnf.report import StreamResult, accuracy_table, plot_retention

NAN = float("nan")
RESULT = StreamResult("freezing", ["t-1", "t-2"], torch.tensor([[0.9, NAN], [0.8, 0.7]]), [0.6, 0.25])


def test_the_table_holds_accuracies_averages_and_free_units():
    table = accuracy_table(RESULT)
    assert [column.header for column in table.columns] == ["after t-…", "1", "2", "average", "free units"]
    assert [list(column.cells) for column in table.columns] == [
        ["1", "2"],
        ["90.0", "80.0"],
        ["", "70.0"],
        ["90.0", "75.0"],
        ["60", "25"],
    ]
    assert table.caption == "forgetting 10.00 points"


def test_the_figure_is_drawn_without_touching_pyplot(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    naive = StreamResult("naive", RESULT.tasks, RESULT.matrix)
    plot_retention([naive, RESULT], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize("package", ["rich.table", "matplotlib.figure"])
def test_a_missing_extra_is_an_import_error(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        accuracy_table(RESULT) if package.startswith("rich") else plot_retention([RESULT], tmp_path / "f.png")

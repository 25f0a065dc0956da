"""What is shown while a task ends: in both of Lightning's progress bars, and in rank 0 only."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from training import Classifier, plain, task_data, trainer

from lightning_rnf import AccuracyDrop, FreeCapacity
from lightning_rnf.runtime.progress import shown, silent
from lightning_rnf.search.cutoff import about, search_cutoff
from lightning_rnf.search.ranking import Measured, rank


def fitted(*callbacks, epochs=2, shows=True, **options):
    torch.manual_seed(0)
    model, rnf = Classifier(), plain(attribution_samples=64, **options)
    model.heads.activate("a")
    one = trainer(rnf, *callbacks, max_epochs=epochs, enable_progress_bar=shows)
    one.fit(model, datamodule=task_data("a"))
    return rnf.state.task("a")


def test_tqdm_shows_samples_evaluations_cutoffs_and_the_limit(capsys):
    record = fitted(TQDMProgressBar())
    printed = capsys.readouterr().out
    assert re.search(r"relevance:.*\| 2/2 \[.*, 64 samples\]", printed)
    for number, evaluation in enumerate(record.evaluations, start=1):
        score = evaluation.score
        told = f"cutoff {score.cutoff}, accuracy {score.accuracy:.3f} (limit {record.accuracy - 0.02:.3f})"
        assert re.search(rf"search:.*\| {number}/\d+ \[\d\d:\d\d<.*{re.escape(told)}", printed)


def test_rich_shows_the_same_and_its_other_bars_stay(capsys):
    record = fitted(RichProgressBar(console_kwargs={"force_terminal": True, "width": 200}))
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "relevance: 64 samples" in printed
    assert f"search: cutoff {record.evaluations[0].score.cutoff}, accuracy" in printed
    assert "Epoch 1/1" in printed


def test_recovery_in_the_middle_of_a_fit_leaves_the_training_bar_alone(capsys):
    bar = RichProgressBar(console_kwargs={"force_terminal": True, "width": 200})
    assert fitted(bar, epochs=3, recovery_epochs=1).recovery
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert printed.rindex("Epoch 2/2") > printed.index("search:")


def test_rich_leaves_room_for_the_bars_on_a_terminal_of_80_columns(capsys):
    fitted(RichProgressBar(console_kwargs={"force_terminal": True, "width": 80}))
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    lines = [line for line in re.split(r"[\r\n]", printed) if "━" in line and "0:0" in line]
    assert any(line.startswith("search:") for line in lines)
    assert all(line.count("━") >= 15 for line in lines if line.startswith(("relevance:", "search:")))
    assert "…" not in "".join(line for line in lines if line.startswith("search:"))
    assert re.search(r"search: cutoff \d+,.*\n.*accuracy 0\.\d{3}.*\n.*\(limit 0\.\d{3}\)", printed)


def test_what_is_measured_after_a_recovery_has_its_limit_too(capsys):
    record = fitted(TQDMProgressBar(), epochs=3, recovery_epochs=1)
    settled = record.recovery[0].score
    told = f"cutoff {settled.cutoff}, accuracy {settled.accuracy:.3f} (limit {settled.baseline - 0.02:.3f})"
    assert told in capsys.readouterr().out


def test_no_bar_no_output(capsys):
    fitted(shows=False)
    fitted(TQDMProgressBar(refresh_rate=0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bar", [None, ProgressBar(), RichProgressBar()])
def test_other_bars_and_other_ranks_show_nothing(bar):
    with shown(SimpleNamespace(progress_bar_callback=bar, is_global_zero=True)) as show:
        assert show is silent
        show("search", 1, 2, "")
    with shown(SimpleNamespace(progress_bar_callback=TQDMProgressBar(), is_global_zero=False)) as show:
        assert show is silent


@pytest.mark.parametrize("method", ["fewest", "bisect", "linear"])
@pytest.mark.parametrize("ration", [None, 0.5])
@pytest.mark.parametrize("resolution", [1, 7])
def test_the_number_of_evaluations_is_foretold(method, ration, resolution):
    for units in (1, 2, 3, 10, 64, 100):
        for boundary in {0, 1, units // 2, units}:
            ranking = rank({"layer": torch.arange(1.0, units + 1)}, {}, ration=ration)
            found = search_cutoff(
                ranking,
                lambda cutoff: Measured(float(cutoff <= boundary)),  # noqa: B023
                AccuracyDrop(0.5),
                method=method,
                resolution=resolution,
            )
            made, expected = len(found.evaluations), about(ranking, method, resolution)
            assert made <= expected
            assert method != "bisect" or expected - made <= 1


def test_the_limit_is_the_strictest_of_those_on_accuracy():
    assert AccuracyDrop(0.25).accuracy_limit(0.75) == 0.5
    assert FreeCapacity(0.5).accuracy_limit(0.75) is None
    assert (AccuracyDrop(0.25) & FreeCapacity(0.5)).accuracy_limit(0.75) == 0.5
    assert (AccuracyDrop(0.25) & AccuracyDrop(0.125)).accuracy_limit(0.75) == 0.625
    assert (FreeCapacity(0.25) & FreeCapacity(0.5)).accuracy_limit(0.75) is None

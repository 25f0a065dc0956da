"""Loggers get numbers, and figures if they take some, by what they can do and not by what they are called."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from training import Classifier, task_data, train, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.tracking import scalars, takes_figures

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning")


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", "0"

    def __init__(self, experiment=None):
        self.numbers, self._experiment = [], experiment

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.numbers += [(step, metrics)] if any(name.startswith("rnf/") for name in metrics) else []

    def log_hyperparams(self, *args, **kwargs): ...


def two_tasks(*loggers):
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", "b", max_epochs=1, logger=list(loggers))
    return rnf


def test_numbers_have_the_number_of_finished_tasks_as_their_step():
    recorder = Recorder()
    rnf = two_tasks(recorder)
    assert [step for step, _ in recorder.numbers] == [1, 2]
    numbers = recorder.numbers[-1][1]
    record = rnf.state.task("b")
    assert numbers["rnf/free_capacity"] == pytest.approx(rnf.free_capacity)
    assert {layer: numbers[f"rnf/free_capacity/{layer}"] for layer in rnf.capacity()} == pytest.approx(rnf.capacity())
    assert numbers["rnf/cutoff"] == record.cutoff
    assert numbers["rnf/accuracy"] == record.accuracy
    assert numbers["rnf/subnetwork_accuracy"] == record.subnetwork_accuracy
    assert numbers["rnf/seconds/search"] == record.seconds["search"]
    assert numbers["rnf/largest_drift"] == 0
    assert numbers == scalars(rnf.state, record)


def test_a_csv_logger_gets_numbers(tmp_path):
    rnf = two_tasks(CSVLogger(tmp_path, version="one"))
    with open(tmp_path / "lightning_logs" / "one" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("rnf/cutoff")]
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["rnf/cutoff"]) == rnf.state.task("b").cutoff


def test_tensorboard_gets_numbers_and_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_tasks(TensorBoardLogger(tmp_path, version="one"))
    found = EventAccumulator(str(tmp_path / "lightning_logs" / "one")).Reload()
    assert [event.step for event in found.Scalars("rnf/free_capacity")] == [1, 2]
    assert {tag: len(found.Images(tag)) for tag in found.Tags()["images"]} == {
        "rnf/capacity": 2,
        "rnf/search": 2,
        "rnf/overlap": 1,
    }


def test_weights_and_biases_form_gets_images():
    class TakesImages(Recorder):
        def log_image(self, key, images, step=None):
            given.append((key, step, images))

    given = []
    recorder = TakesImages(SimpleNamespace())
    two_tasks(recorder)
    assert [(key, step) for key, step, _ in given] == [
        ("rnf/capacity", 1),
        ("rnf/search", 1),
        ("rnf/capacity", 2),
        ("rnf/search", 2),
        ("rnf/overlap", 2),
    ]
    for _, _, (image,) in given:
        assert isinstance(image, numpy.ndarray)
        assert image.dtype == numpy.uint8
        assert image.shape[2] == 4
        assert image[..., :3].std() > 0


@pytest.mark.parametrize("run_id", ["run", None])
def test_mlflow_and_comet_forms_get_figures(run_id):
    calls = []

    class Experiment:
        def log_figure(self, *args, **kwargs):
            calls.append((args, kwargs))

    recorder = Recorder(Experiment())
    recorder.run_id = run_id
    two_tasks(recorder)
    assert len(calls) == 5
    args, kwargs = calls[0]
    if run_id:
        assert args[0] == "run"
        assert kwargs == {"artifact_file": "rnf/capacity-1.png"}
    else:
        assert args[0] == "rnf/capacity"
        assert kwargs == {"step": 1}


def test_a_logger_that_takes_no_figures_gets_none(tmp_path):
    assert not takes_figures(CSVLogger(tmp_path))
    assert not takes_figures(Recorder(SimpleNamespace()))
    assert not takes_figures(Recorder())


def test_without_matplotlib_there_are_numbers_only(monkeypatch):
    class Experiment:
        def add_figure(self, *args, **kwargs):
            raise AssertionError("no figure was asked for")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recorder = Recorder(Experiment())
    rnf = RelevanceFreezing()
    model = Classifier()
    model.heads.activate("a")
    one = trainer(rnf, max_epochs=1, logger=recorder)
    one.fit(model, datamodule=task_data("a"))
    assert [step for step, _ in recorder.numbers] == [1]

"""Loggers get numbers, and figures if they take some, by what they can do and not by what they are called."""

from __future__ import annotations

import csv
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from training import Classifier, Recorder, task_data, train, trainer

from lightning_rnf import RelevanceFreezing
from lightning_rnf.report.tracking import scalars, takes_figures
from lightning_rnf.tasks import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning")


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


def kept_although(tmp_path, logger, name="a"):
    """The warnings of a fit whose logger fails, and the task in the checkpoint of its end."""
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing(task=name)
    model.heads.activate("a")
    loggers = [*logger] if isinstance(logger, list) else [logger]
    options = {"max_epochs": 1, "logger": loggers, "enable_checkpointing": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(rnf, ModelCheckpoint(tmp_path / "kept"), **options).fit(model, datamodule=task_data("a"))
    (path,) = (tmp_path / "kept").glob("*-ended.ckpt")
    assert list(checkpoints.finished_tasks(checkpoints.read(path)).tasks) == list(rnf.state.tasks) == [name]
    return [str(one.message) for one in caught if "is kept all the same" in str(one.message)]


def test_a_logger_that_fails_costs_no_task_and_no_other_logger_anything(tmp_path):
    class Fails(Recorder):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("rnf/") for name in metrics):
                raise ConnectionError("the network is down")

    other = Recorder()
    (warned,) = kept_although(tmp_path, [Fails(), other])
    assert warned.startswith("Fails did not take the numbers of the task: ConnectionError: the network is down")
    assert [step for step, _ in other.numbers] == [1]


def test_a_figure_that_a_logger_refuses_costs_no_other_figure(tmp_path):
    class Experiment:
        def add_figure(self, name, *args, **kwargs):
            taken.append(name)
            if name == "rnf/capacity":
                raise OSError("the disk is full")

    taken = []
    (warned,) = kept_although(tmp_path, Recorder(Experiment()))
    assert warned.startswith("Recorder did not take rnf/capacity: OSError: the disk is full")
    assert taken == ["rnf/capacity", "rnf/search"]


def test_a_logger_whose_experiment_can_not_be_had_gets_no_figures(tmp_path):
    class Fails(Recorder):
        @property
        def experiment(self):
            if self.numbers:  # Lightning asks for it, too, before
                raise ConnectionError("log in first")

    (warned,) = kept_although(tmp_path, Fails())
    assert warned.startswith("Fails did not say whether it takes figures: ConnectionError: log in first")


def test_a_figure_that_can_not_be_drawn_costs_nothing(tmp_path, monkeypatch):
    def fails(state):
        raise ValueError("expected a number")

    monkeypatch.setattr("lightning_rnf.report.figures.capacity", fails)
    recorder = Recorder(SimpleNamespace(add_figure=lambda name, *args, **kwargs: taken.append(name)))
    taken = []
    (warned,) = kept_although(tmp_path, recorder)
    assert warned.startswith("rnf/capacity can't be drawn: ValueError: expected a number")
    assert taken == ["rnf/search"]


def test_a_name_that_no_file_can_have_is_kept_under_a_shorter_one(tmp_path):
    kept_although(tmp_path, [], "ü" * 300)
    (path,) = (tmp_path / "kept").glob("*-ended.ckpt")
    assert path.name.startswith("ü" * 50)
    assert path.name != checkpoints.file_name("ü" * 301)
    assert checkpoints.file_name("digits-01") == "digits-01-ended.ckpt"

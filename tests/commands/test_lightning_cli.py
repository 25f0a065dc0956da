"""`rnf fit` and `rnf stream`: everything from YAML, one sentence for what can't be."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
from pathlib import Path

import project
import pytest
import torch
import yaml
from documents import blocks
from project import name_of_task, predict, score
from training import Classifier, inputs
from zennit.composites import EpsilonPlus

from lightning_rnf import ComputeBudget, FreeCapacity, MetricDrop, RelevanceFreezing
from lightning_rnf.commands.cli import main
from lightning_rnf.commands.lightning_cli import _instantiated, _stream_parser, built_model
from lightning_rnf.memory.state import VERSION
from lightning_rnf.tasks import checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:no free units are left:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:elasticity=:UserWarning"),
    pytest.mark.filterwarnings("ignore:norm_statistics='shared':UserWarning"),
]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
METRIC = {"class_path": "torchmetrics.classification.MulticlassF1Score", "init_args": {"num_classes": 2}}
EVERY_PARAMETER = {  # what the YAML says, and what the callback then has
    "reference": (
        {"class_path": "project.Clusters", "init_args": {"task": "b"}},
        lambda rnf: rnf.reference.task == "b",
    ),
    "criterion": (0.05, lambda rnf: rnf.ending.criterion.tolerance == 0.05),
    "elasticity": ({"body.*": 0.1}, lambda rnf: rnf.elasticity == {"body.*": 0.1}),
    "irrelevant_elasticity": (0.5, lambda rnf: rnf.irrelevant_elasticity == 0.5),
    "retention": ("exact", lambda rnf: rnf.retention == "exact"),
    "freeze": ("connections", lambda rnf: rnf.ending.connections is True),
    "tasks": (5, lambda rnf: rnf.ending.selection.tasks == 5),
    "over_samples": ("signed", lambda rnf: rnf.ending.selection.over_samples == "signed"),
    "fit_head": ("auto", lambda rnf: rnf.ending.head_fit.fit == "auto"),
    "fit_data": (
        {"class_path": "project.Clusters", "init_args": {"task": "b"}},
        lambda rnf: rnf.ending.head_fit.source.task == "b",
    ),
    "fit_samples": (500, lambda rnf: rnf.ending.head_fit.samples == 500),
    "candidates": ("all", lambda rnf: rnf.ending.selection.candidates == "all"),
    "recovery_epochs": (1, lambda rnf: rnf.ending.recovery.epochs == 1),
    "recovery_criterion": (0.2, lambda rnf: rnf.ending.recovery.criterion.tolerance == 0.2),
    "recovery_search": (True, lambda rnf: rnf.ending.recovery.search is True),
    "ration": ([0.5, 0.25], lambda rnf: rnf.ending.selection.rations == (0.5, 0.25)),
    "reset_free": (True, lambda rnf: rnf.reset_free is True),
    "importance": ("lrp", lambda rnf: rnf.ending.selection.importance == "lrp"),
    "composite": (
        {"class_path": "zennit.composites.EpsilonPlus", "init_args": {"epsilon": 1e-5}},
        lambda rnf: isinstance(rnf.ending.selection.composite, EpsilonPlus),
    ),
    "normalize": ("none", lambda rnf: rnf.ending.selection.normalize == "none"),
    "search": ("linear", lambda rnf: rnf.ending.selection.search == "linear"),
    "resolution": (5, lambda rnf: rnf.ending.selection.resolution == 5),
    "embeddings": ("frozen", lambda rnf: rnf.embeddings == "frozen"),
    "norm_parameters": ("frozen", lambda rnf: rnf.ending.tracing.own_norms is False),
    "norm_statistics": ("shared", lambda rnf: rnf.ending.selection.norm_statistics == "shared"),
    "recalibrate_norm": (False, lambda rnf: rnf.ending.selection.recalibrate_norm is False),
    "reference_samples": (100, lambda rnf: rnf.ending.reference.samples == 100),
    "attribution_samples": (None, lambda rnf: rnf.ending.reference.attribution_samples is None),
    "units": (["body.*"], lambda rnf: rnf.ending.tracing.units == ("body.*",)),
    "heads": ("heads.*", lambda rnf: rnf.ending.tracing.heads == "heads.*"),
    "predict": ("project.predict", lambda rnf: rnf.ending.reference.predict is predict),
    "task": ("digits-01", lambda rnf: rnf.task == "digits-01"),
    "seed": (7, lambda rnf: rnf.ending.reference.seed == 7),
    "heatmaps": (4, lambda rnf: rnf.ending.heatmaps == 4),
    "portraits": (True, lambda rnf: rnf.ending.portraits),
}
OTHER_FORMS = [
    ({"criterion": {"class_path": "lightning_rnf.FreeCapacity", "init_args": {"minimum": 0.3}}}, FreeCapacity),
    ({"criterion": {"class_path": "lightning_rnf.ComputeBudget", "init_args": {"flops": 0.5}}}, ComputeBudget),
    (
        {"criterion": {"class_path": "lightning_rnf.MetricDrop", "init_args": {"metric": METRIC, "tolerance": 0.1}}},
        MetricDrop,
    ),
]


def callback(**parameters):
    parser = _stream_parser()
    tasks = [{"class_path": "project.Clusters"}]
    content = {"model": {"class_path": "project.Model"}, "tasks": tasks, "rnf": parameters}
    return _instantiated(parser, content).rnf


def written(folder, **content):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def fit_config(folder, task="a", **changes):
    content = {
        "seed_everything": 0,  # or it is what a test before has left in the environment
        "model": {"class_path": "project.Model"},
        "data": {"class_path": "project.Clusters", "init_args": {"task": task}},
        "trainer": {**QUIET, "max_epochs": 2, "default_root_dir": str(folder)},
        "rnf": {"criterion": 0.05},
    }
    return written(folder, **{**content, **changes})


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The checkpoint of a finished task ``a``."""
    folder = tmp_path_factory.mktemp("ended")
    main(["fit", "--config", fit_config(folder)])
    return next(folder.rglob("a-ended.ckpt"))


def refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rnf: ")
    return error


def test_every_parameter_can_be_given_in_yaml():
    assert set(EVERY_PARAMETER) == set(inspect.signature(RelevanceFreezing).parameters)
    made = callback(**{name: value for name, (value, _) in EVERY_PARAMETER.items()})
    for name, (_, holds) in EVERY_PARAMETER.items():
        assert holds(made), name


@pytest.mark.parametrize(("parameters", "kind"), OTHER_FORMS)
def test_criteria_of_other_kinds(parameters, kind):
    assert isinstance(callback(**parameters).ending.criterion, kind)


def test_functions_by_their_names():
    assert callback(task="project.name_of_task").task is name_of_task
    assert callback(importance="project.score").ending.selection.importance is score
    assert callback(importance="taylor").ending.selection.importance == "taylor"


@pytest.mark.parametrize("command", ["fit", "stream"])
def test_the_files_in_the_readme_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{command}.yaml"
    path.write_text(next(text for text in blocks("yaml") if f"# {command}" in text))
    options = [f"--trainer.{name}={value}".lower() for name, value in {**QUIET, "max_epochs": 1}.items()]
    main([command, "--config", str(path), *options])
    assert len(list(tmp_path.rglob("*-ended.ckpt"))) == (1 if command == "fit" else 2)


def test_a_task_is_fitted_goes_on_is_tested_and_predicted(ended, tmp_path, capsys):
    config = fit_config(tmp_path, "b", trainer={**QUIET, "max_epochs": 4, "default_root_dir": str(tmp_path)})
    main(["fit", "--config", config, "--ckpt_path", str(ended)])
    second = next(tmp_path.rglob("b-ended.ckpt"))
    states = [checkpoints.finished_tasks(checkpoints.read(path)) for path in (ended, second)]
    assert [list(state.tasks) for state in states] == [["a"], ["a", "b"]]
    logits = []
    for path in (ended, second):
        model, rnf = built_model(config), RelevanceFreezing()
        model.load_state_dict(checkpoints.read(path)["state_dict"])
        rnf.state = checkpoints.finished_tasks(checkpoints.read(path))
        with rnf.recall("a", model), torch.no_grad():
            logits.append(model(inputs()))
    assert torch.equal(*logits)
    capsys.readouterr()
    results = []
    for task in "ab":
        main(["test", "--config", fit_config(tmp_path, task), "--ckpt_path", str(second)])
        results.append(float(re.search(r"test_accuracy\D+([\d.]+)", capsys.readouterr().out)[1]))
    assert min(results) > 0.8
    main(["validate", "--config", config, "--ckpt_path", str(second)])


STREAM = {
    "model": {"class_path": "project.Model"},
    "tasks": [{"class_path": "project.Clusters", "init_args": {"task": task}} for task in "ab"],
    "trainer": {**QUIET, "max_epochs": 2},
    "rnf": {"criterion": 0.05},
}


def test_a_stream_is_trained_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    config = written(tmp_path, **STREAM)
    main(["stream", "--config", config, "--output", str(tmp_path / "out")])
    first = json.loads((tmp_path / "out" / "accuracies.json").read_text())
    assert first["tasks"] == ["a", "b"]
    assert [len(row) for row in first["accuracies"]] == [1, 2]
    assert first["accuracies"][0][0] == first["accuracies"][1][0] > 0.8
    assert first["forgetting"] == 0
    assert "forgetting 0.00 points" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")}
    assert {path.name for path in files} >= {"a-ended.ckpt", "b-ended.ckpt", "last.ckpt"}
    main(["stream", "--config", config, "--output", str(tmp_path / "out")])  # nothing is left to train
    assert json.loads((tmp_path / "out" / "accuracies.json").read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")} == files


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([{"class_path": "project.Clusters"}] * 2, "a name of its own; they have ['a', 'a']"),
        ([{"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}], "they have [None]"),
    ],
)
def test_tasks_without_names_are_refused(tasks, sentence, tmp_path, capsys):
    assert sentence in refused(["stream", "--config", written(tmp_path, **{**STREAM, "tasks": tasks})], capsys)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rnf": {"critrion": 0.1}}, "critrion"),
        ({"rnf": {"criterion": "much"}}, "rnf.criterion"),
        ({"rnf": {"resolution": 0}}, "resolution is 0, expected a whole number of at least 1"),
        ({"rnf": {"resolution": "x"}}, "rnf.resolution"),
        ({"rnf": {"importance": "charm"}}, "rnf.importance"),
        ({"model": {"class_path": "project.Modell"}}, "Modell"),
        ({"rnf": {"units": "nothing.*"}}, "nothing.*"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "stream"])
def test_a_yaml_with_a_wrong_name_or_type_is_refused(command, changes, sentence, tmp_path, capsys):
    if command == "fit":
        arguments = ["fit", "--config", fit_config(tmp_path, **changes)]
    else:
        arguments = ["stream", "--config", written(tmp_path, **{**STREAM, **changes}), "--output", str(tmp_path / "o")]
    assert sentence in refused(arguments, capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def damaged(path, kind, folder):
    content = torch.load(path, weights_only=True)
    found = folder / "damaged.ckpt"
    if kind == "truncated":
        found.write_bytes(Path(path).read_bytes()[:5000])
        return found
    if kind == "missing":
        return found
    if kind == "newer":
        content["callbacks"]["RelevanceFreezing"]["version"] = VERSION + 1
    elif kind == "another model":
        content["state_dict"]["body.0.weight"] = torch.zeros(30, 6)
    elif kind == "no state":
        content = {"weights": 1}
    elif kind == "a state that is none":
        content["callbacks"]["RelevanceFreezing"] = {"version": 1}
    elif kind == "runs code":
        content["evil"] = pytest.raises
    torch.save(content, found)
    return found


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "can't be read: it is cut off, or no checkpoint"),
        ("missing", "no checkpoint at"),
        ("newer", f"the state has version {VERSION + 1}, this lightning_rnf reads up to {VERSION}: update it"),
        ("another model", "of another model: 'body.0.weight' is (30, 6) in it, and (40, 6) in this one"),
        ("no state", "is no checkpoint of Lightning"),
        ("a state that is none", "not a state of lightning_rnf"),
        ("runs code", "or holds more than tensors and plain values"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_nothing_is_changed(kind, sentence, ended, tmp_path, capsys):
    path = str(damaged(ended, kind, tmp_path))
    config = fit_config(tmp_path, "b")
    before = sorted(tmp_path.rglob("*"))
    assert sentence in refused(["fit", "--config", config, "--ckpt_path", path], capsys)
    if kind != "another model":
        assert sentence in refused(["report", path], capsys)
    assert sentence in refused(["export", path, "--task", "a", "--config", config], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bug_of_the_users_own_is_shown_in_full(tmp_path):
    with pytest.raises(ValueError, match="a bug of the user's own"):
        main(["fit", "--config", fit_config(tmp_path, model={"class_path": "project.Broken"})])


def test_report_masks_and_export_read_a_checkpoint(ended, tmp_path, capsys):
    main(["report", str(ended)])
    printed = capsys.readouterr().out
    assert re.search(r"^ *a +0\.9\d+ +0\.9\d+ +yes +\d+", printed, flags=re.MULTILINE)
    assert re.search(r"^ *body.3 +40 ", printed, flags=re.MULTILINE)
    main(["report", str(ended), "--json"])
    report = json.loads(capsys.readouterr().out)
    record = checkpoints.finished_tasks(checkpoints.read(ended)).tasks["a"]
    assert report["tasks"][0]["relevant units"] == sum(int(mask.sum()) for mask in record.relevant.values())
    assert report["layers"][1]["a"] + report["layers"][1]["free"] == 40
    main(["masks", "show", str(ended), "--task", "a"])
    assert "body.0" in capsys.readouterr().out
    assert "no finished task 'z'" in refused(["masks", "show", str(ended), "--task", "z"], capsys)

    config, small = fit_config(tmp_path), tmp_path / "small.pt"
    main(["export", str(ended), "--task", "a", "--config", config, "--output", str(small)])
    model, rnf = built_model(config), RelevanceFreezing()
    model.load_state_dict(checkpoints.read(ended)["state_dict"])
    rnf.state = checkpoints.finished_tasks(checkpoints.read(ended))
    with rnf.recall("a", model), torch.no_grad():
        torch.testing.assert_close(torch.load(small, weights_only=False)(inputs()), model(inputs()))


def test_a_pipeline_fails_on_what_a_report_is_held_to(ended, tmp_path, capsys):
    config, xml = ["--config", fit_config(tmp_path)], tmp_path / "found.xml"
    main(["report", str(ended), *config, "--fail-on", "changed", "drift", "free=0.01", "--junit", str(xml)])
    assert 'failures="0"' in xml.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["report", str(ended), *config, "--json", "--fail-on", "changed", "--fail-on", "free=1"])
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert json.loads(printed.out)["tasks"], "the report is printed all the same"
    assert re.fullmatch(r"rnf: free=1: free capacity: 0\.\d+\n", printed.err)
    assert "name a condition" in refused(["report", str(ended), "--junit", str(xml)], capsys)
    assert "--fail-on dance: expected some of changed" in refused(["report", str(ended), "--fail-on", "dance"], capsys)


def test_a_report_without_a_model_says_what_would_tell_whether_rows_are_the_same(ended, tmp_path, capsys):
    asked = ["report", str(ended), "--fail-on", "changed"]
    assert refused(asked, capsys).startswith("rnf: --config FILE, which says how to build the model, tells whether")
    main([*asked, "--config", fit_config(tmp_path)])


def test_a_report_of_a_checkpoint_says_where_the_last_tests_are(ended, capsys):
    asked = ["report", str(ended), "--fail-on", "accuracy=0.5"]
    assert refused(asked, capsys).endswith("a file of rnf.save(FILE) after the tests has them")


@pytest.mark.parametrize("option", ["--config", "--html", "--junit"])
def test_a_path_that_is_not_there_is_said_in_a_sentence(option, ended, tmp_path, capsys):
    path = str(tmp_path / "nowhere" / "file")
    error = refused(["report", str(ended), "--fail-on", "changed", option, path], capsys)
    assert error == f"rnf: {path}: No such file or directory"
    assert refused(["report", str(ended), "--fail-on", "changed", f"{option}={path}"], capsys) == error


def test_an_export_that_could_not_be_written_is_refused_before_it_is_made(ended, tmp_path, capsys):
    asked = ["export", str(ended), "--task", "a", "--config", fit_config(tmp_path)]
    error = refused([*asked, "--output", str(tmp_path / "nowhere" / "a.pt")], capsys)
    assert error == f"rnf: no folder {str(tmp_path / 'nowhere')!r} to write a.pt to"


def test_a_config_that_is_no_yaml_is_said_in_a_sentence(ended, tmp_path, capsys):
    config = tmp_path / "fit.yaml"
    config.write_text("model: {class_path: [")
    error = refused(["report", str(ended), "--config", str(config)], capsys)
    assert f"{str(config)!r} is no YAML: " in error
    config.write_bytes(b"\xff\xfe\x00model")
    assert f"{str(config)!r} is no YAML: " in refused(["report", str(ended), "--config", str(config)], capsys)


def test_what_torch_says_of_a_file_has_no_advice_and_no_colours(tmp_path, capsys):
    path = tmp_path / "whole.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    error = refused(["report", str(path)], capsys)
    assert error.endswith("or holds more than tensors and plain values (UnpicklingError: Weights only load failed)")
    path.write_bytes(b"")
    assert refused(["report", str(path)], capsys).endswith("plain values (EOFError)")


def test_report_compares_the_weights_in_a_checkpoint(ended, tmp_path, capsys):
    def audited(path, *options):
        main(["report", str(path), "--json", *options])
        (row,) = json.loads(capsys.readouterr().out)["audit"]
        return row["frozen since its end"]

    config = ["--config", fit_config(tmp_path)]
    assert audited(ended, *config) == "bit-equal"
    assert audited(ended) == "not known: body.3"  # which entries count is read off the model's graph
    content = torch.load(ended, weights_only=True)
    relevant = content["callbacks"]["RelevanceFreezing"]["tasks"][0]["relevant"]["body.3"]
    row = int(relevant.nonzero()[0])
    content["state_dict"]["body.3.bias"][row : row + 1].view(torch.int32).bitwise_xor_(1)
    torch.save(content, tmp_path / "other.ckpt")
    assert audited(tmp_path / "other.ckpt", *config) == "changed: body.3"
    masks = tmp_path / "masks.safetensors"
    rnf = RelevanceFreezing()
    rnf.state = checkpoints.finished_tasks(checkpoints.read(ended))
    rnf.save(masks)
    assert "--config is of use for a checkpoint" in refused(["report", str(masks), *config], capsys)
    content["state_dict"]["body.3.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "small.ckpt")
    said = refused(["report", str(tmp_path / "small.ckpt")], capsys)
    assert "this model's 'body.3.bias' has shape (3,)" in said
    del content["state_dict"]["body.3.bias"]
    torch.save(content, tmp_path / "part.ckpt")
    assert audited(tmp_path / "part.ckpt") == "not looked at: no weights"
    rnf = RelevanceFreezing()
    rnf.state = checkpoints.finished_tasks(checkpoints.read(ended))
    rnf.save(tmp_path / "masks.safetensors")
    assert audited(tmp_path / "masks.safetensors") == "not looked at: no weights"


def test_a_missing_extra_is_a_sentence(ended, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refused(["report", str(ended), "--html", str(tmp_path / "page.html")], capsys)
    assert said == "rnf: matplotlib is missing: pip install 'lightning-rnf[plots]'"
    assert not list(tmp_path.iterdir())


def test_masks_diff_is_silent_for_the_same_and_exits_with_1_for_others(ended, tmp_path, capsys):
    main(["masks", "diff", str(ended), str(ended)])
    assert capsys.readouterr().out == ""
    content = torch.load(ended, weights_only=True)
    relevant = content["callbacks"]["RelevanceFreezing"]["tasks"][0]["relevant"]["body.0"]
    relevant[:3] = ~relevant[:3]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit, match="1"):
        main(["masks", "diff", str(ended), str(tmp_path / "other.ckpt")])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:3] == ["a", "body.0", "40"]
    assert int(row[4]) + int(row[5]) == 3


@pytest.mark.parametrize("verb", ["fit", "stream"])
def test_a_fit_that_sigterm_has_ended_is_no_success(verb, tmp_path, monkeypatch):
    step = Classifier.training_step

    def asked(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)  # Lightning's handler is there in a fit
        return step(self, batch)

    monkeypatch.setattr(project.Model, "training_step", asked)
    if verb == "fit":
        given = ["fit", "--config", fit_config(tmp_path)]
    else:
        given = ["stream", "--config", written(tmp_path, **STREAM), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 143

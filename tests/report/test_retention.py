"""The report: what it says of tasks that were trained, and of records that were written by hand."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import pytest
import torch
from records import ConvNet, Mlp, batch, every_second, make, many, record_of, state_of
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset
from training import TASKS, Classifier, clusters, task_data, train, trainer

from lightning_rnf import RelevanceFreezing, RetentionReport
from lightning_rnf.memory import masks
from lightning_rnf.memory.fingerprints import Audit, fingerprints
from lightning_rnf.memory.state import FreezeState
from lightning_rnf.recall.subnetwork import recall
from lightning_rnf.report.figures import StreamResult
from lightning_rnf.report.forecast import Forecast
from lightning_rnf.report.retention import accuracy_rows, curve
from lightning_rnf.report.tables import rich_table
from lightning_rnf.tasks.probes import Probe, taken
from lightning_rnf.tasks.reference import ReferenceData

NAN = float("nan")
RESULT = StreamResult("freezing", ["t-1", "t-2"], torch.tensor([[0.9, NAN], [0.8, 0.7]]), [0.6, 0.25])


def two_tasks(net, **changes):
    second = record_of(net, "second", relevant=every_second(net.layers, 1), **changes)
    return state_of(net, record_of(net), second)


@pytest.fixture(scope="module")
def trained():
    """Three tasks, each tested after every fit with the module's own test_step."""
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    for index, task in enumerate(TASKS):
        train(model, rnf, task)
        for seen in TASKS[: index + 1]:
            model.heads.activate(seen)
            trainer(rnf).test(model, datamodule=task_data(seen), verbose=False)
    return model, rnf


def test_the_matrix_is_what_the_tests_have_logged(trained):
    model, rnf = trained
    matrix = rnf.report().matrix
    for index, task in enumerate(TASKS):
        model.heads.activate(task)
        found = trainer(rnf).test(model, datamodule=task_data(task), verbose=False)
        assert matrix[2, index].item() == pytest.approx(found[0]["test_accuracy"])
        assert len({matrix[row, index].item() for row in range(index, 3)}) == 1  # recall is exact
    assert matrix.isnan().tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_tests_that_are_not_told_the_task_are_shown_beside_those_that_are():
    net = make(ConvNet)
    state = two_tasks(net)
    plain = RetentionReport.of(state)
    title = "not told the task, after the last one: right untold, right told, tasks found"
    assert title not in plain.sections
    assert plain.to_dict()["untold"] == []
    logged = {"accuracy": 0.5, "accuracy_told": 0.875, "tasks_found": 0.625}
    of_numbers = {"r_squared": 0.25, "r_squared_told": 0.75, "tasks_found": 1.0}
    state.task("first").tests["first"] = dict.fromkeys(logged, 1.0)
    state.task("second").tests.update({"second": of_numbers, "first": logged, "given up": logged})
    report = RetentionReport.of(state)
    rows = [
        {"task": "first", "scored by": "accuracy", "untold": 0.5, "told": 0.875, "task found": 0.625},
        {"task": "second", "scored by": "r_squared", "untold": 0.25, "told": 0.75, "task found": 1.0},
    ]
    assert report.sections[title] == report.to_dict()["untold"] == rows
    assert re.search(r"first +accuracy +0.5000 +0.8750 +0.6250", str(report))
    assert "| first | accuracy | 0.5000 | 0.8750 | 0.6250 |" in report.to_markdown()
    assert "<td>0.8750</td><td>0.6250</td>" in report.to_html()
    state.task("second").tests.clear()
    state.task("second").tests["first"] = {"accuracy": 0.5, "tasks_found": 0.5}  # the user's own name
    assert title not in RetentionReport.of(state).sections


def test_the_audit_finds_nothing_where_nothing_has_changed(trained):
    model, rnf = trained
    report = rnf.report(model)
    assert report.changed == dict.fromkeys(TASKS, ())
    assert report.drift == dict.fromkeys(TASKS, 0.0)
    assert report.is_sound
    assert report.numbers["forgetting"] == 0
    assert report.to_dict()["audit"] == [
        {
            "task": task,
            "frozen since its end": "bit-equal",
            "largest drift of a logit": 0.0,
            "logits compared": "now",
        }
        for task in TASKS
    ]


@pytest.mark.parametrize(
    "name", ["body.0.weight", "body.0.bias", "body.3.weight", "heads.tasks.b.weight", "heads.tasks.a.bias"]
)
def test_the_audit_sees_a_single_bit(trained, name):
    model, rnf = trained
    parameter = model.get_parameter(name)
    layer = name.rpartition(".")[0]
    row = int(rnf.state.task("b").relevant[layer].nonzero()[0]) if layer.startswith("body") else 0
    bits = parameter.data[row : row + 1].view(torch.int32)
    bits ^= 1
    try:
        report = rnf.report(model)
        hit = "a" if "tasks.a" in name else "b"
        assert layer in report.changed[hit]
        assert not report.is_sound
        assert f"changed: {layer}" in str(report).replace("\n", "")
    finally:
        bits ^= 1
    assert rnf.report(model).is_sound


def recalled(rnf, model, task="a"):
    model.heads.activate(task)
    with rnf.recall(task, model), torch.no_grad():
        return model(clusters(task, 320, 1).tensors[0])


def test_the_logits_are_those_of_the_model_that_is_looked_at(trained):
    model, rnf = trained
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.heads.tasks["c"].bias += torch.tensor([0.0, 0.25])
    report = rnf.report(other)
    assert report.drift == {"a": 0.0, "b": 0.0, "c": pytest.approx(0.25, abs=1e-6)}
    assert rnf.report(model).drift["c"] == 0
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), rnf._model().parameters(), strict=True))


def test_a_model_in_another_precision_is_another_one(trained):
    model, rnf = trained
    report = rnf.report(copy.deepcopy(model).double())
    assert all(report.changed.values())
    assert not report.audit.drift
    assert report.is_sound is False


@pytest.mark.parametrize("missing", [("body.0", "body.3", "heads.tasks.b"), ("body.3",)])
def test_where_nothing_was_kept_to_compare_with_nothing_is_said(trained, missing):
    model, rnf = trained
    state = FreezeState.from_plain(rnf.state.to_plain())
    rows = {name: value for name, value in state.task("b").rows.items() if name not in missing}
    state.tasks["b"] = replace(state.task("b"), rows=rows)
    other = RelevanceFreezing()
    other.state = state
    for one in (model, Classifier()):
        report = other.report(one)
        assert report.audit.unknown == {"a": (), "b": missing, "c": ()}
        said = {row["task"]: row["frozen since its end"] for row in report.to_dict()["audit"]}
        assert said["b"].endswith(f"not known: {', '.join(missing)}")
        assert report.is_sound is (None if one is model else False)


def test_a_shared_parameter_without_a_fingerprint_is_not_known_either():
    net = make(Mlp)
    state = state_of(net, record_of(net), record_of(net, "second"))
    units = net.units()
    first = state.task("first")
    rows = fingerprints(net, units, first, FreezeState())
    parameters = dict(net.named_parameters())
    state.tasks["first"] = replace(first, rows=rows)
    assert Audit.of(parameters, state).unknown == {"first": (), "second": ("fc1", "fc2", "heads.tasks.second")}
    state.tasks["first"] = replace(first, rows={name: rows[name] for name in rows if name != "norm.bias"})
    assert Audit.of(parameters, state).unknown["first"] == ("norm.bias",)


def test_a_drift_that_one_task_did_not_measure_is_not_known():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", "b", max_epochs=1)
    before = recalled(rnf, model)
    with pytest.warns(UserWarning, match="recall will not be exact"):
        later = RelevanceFreezing(elasticity=1.0)
    later.load_state_dict(rnf.state_dict())  # as after a restart: samples are in no checkpoint
    train(model, later, "c", max_epochs=1)
    assert not torch.equal(recalled(later, model), before)
    report = later.report(model)
    assert report.drift == {"c": 0.0}
    assert report.to_dict()["audit"][0]["logits compared"] == "no: its samples are gone, or its head does not run"
    assert report.is_sound is False
    assert RetentionReport.of(later.state).is_sound is None


def test_what_was_kept_of_tasks_goes_with_them(tmp_path):
    torch.manual_seed(0)
    models = [Classifier(), Classifier()]
    rnf, other = RelevanceFreezing(), RelevanceFreezing()
    for model, callback in zip(models, (rnf, other), strict=True):
        train(model, callback, "a", max_epochs=1)
        callback.save(tmp_path / f"{models.index(model)}.safetensors")
    rnf.load(tmp_path / "0.safetensors", models[0])
    assert rnf.report(models[0]).drift == {"a": 0.0}
    rnf.load(tmp_path / "1.safetensors", models[1])
    assert rnf.report(models[1]).drift == {}
    assert rnf.report(models[1]).changed == {"a": ()}


def test_a_free_row_may_change(trained):
    model, rnf = trained
    free = (~rnf.state.frozen()["body.0"]).nonzero()
    assert len(free)
    model.body[0].weight.data[int(free[0])] += 1
    try:
        assert rnf.report(model).is_sound
    finally:
        model.body[0].weight.data[int(free[0])] -= 1


def test_units_that_go_on_learning_are_told_on():
    torch.manual_seed(0)
    model = Classifier()
    with pytest.warns(UserWarning, match="recall will not be exact"):
        rnf = RelevanceFreezing(elasticity=1.0)
    train(model, rnf, "a", "b", max_epochs=1)
    report = rnf.report(model)
    assert report.drift["a"] == rnf.state.task("b").drift["a"] > 0
    assert set(report.changed["a"]) == {"body.0", "body.3"}
    assert report.changed["b"] == ()
    assert not report.is_sound


def probe_of(net, record, reference):
    batch, logits, noise = taken(net, reference, lambda: recall(net, net.layers, record))
    assert noise == 0
    return Probe.of(net, batch, logits, reference)


@pytest.mark.parametrize("kind", [Mlp, ConvNet])
def test_a_drift_of_logits_is_their_largest_difference(kind):
    net = make(kind)
    net.heads.activate("first")
    record = record_of(net)
    reference = ReferenceData([batch(net, 20)], 1)
    probe = probe_of(net, record, reference)
    assert len(probe.logits) == 8
    assert probe.drift(net, net.layers, record, masked=True) == 0
    with torch.no_grad():
        net.heads.tasks["first"].bias += torch.tensor([0.25, -0.5, 0.0])
    assert probe.drift(net, net.layers, record, masked=True) == pytest.approx(0.5, abs=1e-5)
    with torch.no_grad():
        net.heads.tasks["first"].bias[1] = NAN
    assert math.isnan(probe.drift(net, net.layers, record, masked=True))


def test_a_batch_that_cannot_be_cut_is_probed_whole():
    net = make(Mlp)
    net.heads.activate("first")
    x, y = batch(net, 20)
    odd = {"x": x, "y": y, "weights of classes": torch.ones(3)}
    reference = ReferenceData([odd], 1, lambda module, one: (module(one["x"]), one["y"]))
    assert len(probe_of(net, record_of(net), reference).logits) == 20


def test_without_a_model_rows_are_not_looked_at():
    state = two_tasks(make(Mlp))
    report = RetentionReport.of(state)
    assert report.changed is None
    assert report.is_sound is None
    assert "not looked at" in str(report)


def test_the_numbers_are_those_of_the_matrix():
    matrix = torch.tensor([[0.9, 0.4], [0.7, 0.8]])
    report = RetentionReport.of(two_tasks(make(Mlp)), matrix=matrix, baseline=torch.tensor([0.5, 0.3]))
    expected = {"average accuracy": 0.75, "forgetting": 0.2, "backward transfer": -0.2, "forward transfer": 0.1}
    assert report.numbers == pytest.approx({**expected, "free capacity": 0.0})


def test_a_number_that_can_not_be_told_is_missing_for_a_reason():
    state = two_tasks(make(Mlp))
    untested = RetentionReport.of(state)
    assert list(untested.numbers) == ["free capacity"]
    assert set(untested.not_known) == {"average accuracy", "forgetting", "backward transfer"}
    assert (
        "not known: average accuracy, forgetting and backward transfer (no test has logged an accuracy)"
        in untested.summary
    )
    once = RetentionReport.of(state, matrix=torch.tensor([[NAN, NAN], [0.7, 0.8]]), baseline=torch.zeros(2))
    assert list(once.numbers) == ["average accuracy", "free capacity"]
    assert once.not_known == {
        "forgetting": "'first' was not tested after 'first'",
        "backward transfer": "'first' was not tested after 'first'",
        "forward transfer": "'second' was not tested after 'first'",
    }
    assert once.not_known == once.to_dict()["not known"]
    last = RetentionReport.of(state, matrix=torch.tensor([[0.9, NAN], [NAN, NAN]]))
    assert last.not_known["average accuracy"] == "'first' was not tested after 'second', and 1 more"
    assert last.not_known["forgetting"] == "'first' was not tested after 'second'"
    full = RetentionReport.of(state, matrix=torch.tensor([[0.9, NAN], [0.7, 0.8]]))
    assert full.not_known == {}
    assert "not known" not in full.summary
    assert all("was not tested" in form for form in (str(once), once.to_markdown(), once.to_html()))


def test_a_matrix_a_baseline_or_a_metric_that_do_not_fit_are_refused():
    state = two_tasks(make(Mlp))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(2, 2\)"):
        RetentionReport.of(state, matrix=torch.eye(3))
    with pytest.raises(ValueError, match=r"one accuracy per task: \(2,\)"):
        RetentionReport.of(state, baseline=torch.zeros(3))
    with pytest.raises(ValueError, match="no test has logged 'f1'; logged were: nothing"):
        RetentionReport.of(state, metric="f1")


def test_the_metric_is_chosen_by_its_name():
    state = two_tasks(make(Mlp), tests={"first": {"loss": 2.0, "top1_Acc": 0.5, "f1": 0.25}})
    assert RetentionReport.of(state).matrix[1].tolist() == [0.5, pytest.approx(NAN, nan_ok=True)]
    assert RetentionReport.of(state, metric="f1").matrix[1, 0] == 0.25
    assert RetentionReport.of(two_tasks(make(Mlp), tests={"first": {"loss": 2.0}})).matrix is None


def test_the_forecast_divides_free_units_by_what_tasks_have_claimed():
    net = make(Mlp)  # layers of 6 and 5 units
    first = {"fc1": torch.tensor([1, 1, 0, 0, 0, 0]).bool(), "fc2": torch.tensor([1, 0, 0, 0, 0]).bool()}
    second = {"fc1": torch.tensor([1, 0, 1, 0, 0, 0]).bool(), "fc2": torch.tensor([1, 0, 0, 1, 0]).bool()}
    one = Forecast.of(state_of(net, record_of(net, relevant=first)))
    assert (one.tasks, one.units_per_task, one.layer, one.tasks_until_full) == (8 / 3, 3, "fc1", 2)
    two = Forecast.of(state_of(net, record_of(net, relevant=first), record_of(net, "second", relevant=second)))
    assert (two.tasks, two.units_per_task, two.layer, two.tasks_until_full) == (6 / 2, 2, "fc1", 3)
    none = Forecast.of(state_of(net, record_of(net, relevant=first), record_of(net, "second", relevant=first)))
    assert none.layer is None
    assert math.isinf(none.tasks)
    assert "no new unit" in str(none)
    assert Forecast.of(FreezeState()) is None


def test_the_curve_is_sorted_and_recovery_comes_last():
    record = record_of(make(Mlp))
    record = replace(record, evaluations=record.evaluations[::-1], recovery=record.evaluations[:1])
    found = [(row["cutoff"], row["accuracy"], row["accepted"], row["after recovery"]) for row in curve(record)]
    assert found == [(0, 0.75, True, False), (4, 0.5, False, False), (0, 0.75, True, True)]


def test_layers_say_who_was_first_and_what_is_shared():
    net = make(ConvNet)  # 4 and 5 units
    second = {"conv1": torch.tensor([1, 1, 0, 0]).bool(), "conv2": torch.tensor([0, 0, 0, 0, 0]).bool()}
    state = state_of(net, record_of(net), record_of(net, "second", relevant=second))  # the first: every other unit
    rows = RetentionReport.of(state).sections["layers: units frozen first by each task, serving several, free"]
    assert rows == [
        {"layer": "conv1", "units": 4, "first": 2, "second": 1, "shared": 1, "free": 1},
        {"layer": "conv2", "units": 5, "first": 3, "second": 0, "shared": 0, "free": 2},
    ]


def test_json_markdown_and_data_frames_hold_the_same(trained):
    _, rnf = trained
    report = rnf.report()
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert [row["task"] for row in plain["tasks"]] == list(TASKS)
    assert plain["matrix"][0][1] is None
    frames = report.to_pandas()
    assert frames["tasks"]["task"].tolist() == list(TASKS)
    assert list(frames) == list(report.sections)
    lines = report.to_markdown().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == sum(len(rows) + 2 for rows in report.sections.values())
    assert all(line.count("|") > 2 and line.endswith("|") for line in tables)


def test_an_infinite_forecast_is_null_in_json():
    net = make(Mlp)
    state = state_of(net, record_of(net), record_of(net, "second"))
    assert json.loads(RetentionReport.of(state).to_json())["forecast"]["tasks"] is None


@pytest.mark.parametrize("with_rich", [True, False])
def test_it_prints_as_tables_with_and_without_rich(with_rich, trained, monkeypatch):
    _, rnf = trained
    if not with_rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = str(rnf.report())
    for title in rnf.report().sections:
        assert title in text
    for word in (*TASKS, "body.0", "bit-equal", "average accuracy", "more tasks"):
        assert word in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 160
    assert not any(line.endswith(" ") for line in text.splitlines())


def printed(report, width):
    text = StringIO()
    Console(file=text, width=width, color_system=None).print(report)
    return text.getvalue()


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("tasks", [1, 10, 30])
@pytest.mark.parametrize("name", ["t-{:02d}", "a name of many words {:02d}", "{:02d}-" + "x" * 300])
def test_no_number_is_cut_however_many_tasks_there_are(name, tasks, width):
    report = many([name.format(index) for index in range(tasks)])
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    matrix = text.split("accuracy of each task (column)")[1].split("average accuracy")[0]
    found = sorted(float(number) for number in re.findall(r"\b0\.\d{4}\b", matrix))
    assert found == pytest.approx(sorted(report.matrix[~report.matrix.isnan()].tolist()), abs=1e-4)
    for heading in ("sub-net", "evaluations", "samples", "shared"):
        assert heading in text


def test_without_rich_wide_tables_are_split_too(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = str(many([f"task-{index:02d}" for index in range(30)]))
    assert max(map(len, text.splitlines())) <= 160
    assert text.count("0.9000") >= 30


@pytest.mark.parametrize("name", ["after", "task", "layer", "units", "shared", "free", "average"])
def test_a_task_may_be_called_like_a_column(name):
    report = many([name, "x", "y"])
    tables = report.sections
    matrix = tables["accuracy of each task (column) after each task (row)"]
    assert [row["after"] for row in matrix] == [name, "x", "y"]
    assert all(len(row) == 4 for row in matrix)
    assert list(matrix[2].values())[1:] == pytest.approx(report.matrix[2].tolist())
    layers = tables["layers: units frozen first by each task, serving several, free"]
    assert [row["layer"] for row in layers] == ["conv1", "conv2"]
    assert all(row["units"] == size and len(row) == 7 for row, size in zip(layers, (4, 5), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        ":smile:",
        "[red]x",
        "[/]",
        "a|b",
        "c\\|d",
        "a\nb",
        "c\r\nd",
        "\x1b[31mred",
        "\x9b31m",
        "a\x00",
        "**a**",
        "`b`",
        "_c_",
    ],
)
def test_a_name_is_shown_letter_by_letter(name):
    report = many([name, "other"])
    shown = masks.printable(name)
    text = str(report)
    assert shown in text
    assert not set(text) & {"\x1b", "\x9b", "\x00", "\r"}
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(rows) + 2 for rows in report.sections.values())
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in lines]
    for rows in report.sections.values():  # every line has its table's columns
        assert [len(row) for row in cells[: len(rows) + 2]] == [len(rows[0])] * (len(rows) + 2)
        del cells[: len(rows) + 2]
    assert shown in [re.sub(r"\\([\W_])", r"\1", line).removeprefix("| ").split(" | ")[0] for line in lines]


def test_a_lone_surrogate_can_be_written_to_a_file():
    report = many(["\ud800", "other"])
    for text in (str(report), report.to_markdown(), report.to_html()):
        assert "\\ud800" in text
        text.encode()


def test_no_finished_task_is_a_report_too():
    report = RelevanceFreezing().report()
    assert str(report) == "no finished task"
    assert report.to_dict()["tasks"] == []
    assert report.numbers == {}


def test_the_figure_of_a_report(tmp_path, trained):
    _, rnf = trained
    rnf.report().plot(tmp_path / "retention.png")
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        RetentionReport.of(two_tasks(make(Mlp))).plot(tmp_path / "none.png")


def test_tests_of_several_loaders_are_told_apart():
    class Several(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            super().test_step(batch)

    torch.manual_seed(0)
    model, rnf = Several(), RelevanceFreezing()
    train(model, rnf, "a", "b", max_epochs=1)
    loaders = [task_data(task).test_dataloader() for task in ("a", "b")]
    for one, task in zip(loaders, ("a", "b"), strict=True):
        one.dataset.task = task
    found = trainer(rnf).test(model, loaders, verbose=False)
    matrix = rnf.report().matrix
    assert matrix[1].tolist() == [found[index][f"test_accuracy/dataloader_idx_{index}"] for index in range(2)]
    assert matrix[0].isnan().all()


def matrix_entry(rnf, model, **options):
    """What is in the matrix for the first task after the second, once it was tested."""
    model.heads.activate("a")
    trainer(rnf, **options).test(model, datamodule=task_data("a"), verbose=False)
    return rnf.state.task("b").tests.get("a")


def test_only_whole_tests_of_the_model_itself_are_in_the_matrix():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", "b", max_epochs=1)
    assert matrix_entry(rnf, model, fast_dev_run=True) is None
    with pytest.warns(UserWarning, match="'a' was tested on 1 of 10 batches, so the test is left out"):
        assert matrix_entry(rnf, model, limit_test_batches=1) is None
    with pytest.warns(UserWarning, match="'a' was tested on 5 of 10 batches, so the test is left out"):
        assert matrix_entry(rnf, model, limit_test_batches=0.5) is None
    with pytest.warns(
        UserWarning, match=r"not the one in which 'b' has ended \(body.0, body.3, heads.tasks.b differ\)"
    ):
        assert matrix_entry(rnf, Classifier()) is None
    kept = matrix_entry(rnf, copy.deepcopy(model), limit_test_batches=10)
    assert kept is not None
    with pytest.warns(UserWarning, match="left out"):
        assert matrix_entry(rnf, Classifier()) is kept


def test_loaders_of_unknown_length_are_tested_whole_or_left_out():
    class Stream(IterableDataset):
        task = "a"

        def __iter__(self):
            return iter(clusters("a", 64))

    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    loader = DataLoader(Stream(), 16)
    with pytest.warns(UserWarning, match="'a' was tested on 2 batches, so the test is left out"):
        trainer(rnf, limit_test_batches=2).test(model, loader, verbose=False)
    assert rnf.report().matrix is None
    (found,) = trainer(rnf).test(model, loader, verbose=False)
    assert rnf.report().matrix.item() == pytest.approx(found["test_accuracy"])


def test_an_untrained_task_that_is_tested_gives_forward_transfer():
    torch.manual_seed(0)
    model, rnf = Classifier(), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=1)
    model.heads.activate("b")
    (found,) = trainer(rnf).test(model, datamodule=task_data("b"), verbose=False)
    train(model, rnf, "b", max_epochs=1)
    report = rnf.report(baseline=torch.tensor([0.5, 0.5]))
    assert report.matrix[0, 1].item() == pytest.approx(found["test_accuracy"])


def test_what_tests_have_logged_survives_a_checkpoint(trained):
    _, rnf = trained
    other = RelevanceFreezing()
    other.load_state_dict(rnf.state_dict())
    assert torch.equal(other.report().matrix.nan_to_num(-1), rnf.report().matrix.nan_to_num(-1))
    assert other.report().drift == {"a": 0.0, "b": 0.0}
    assert [row["logits compared"] for row in other.report().to_dict()["audit"]] == ["when c ended"] * 2 + ["not yet"]


def test_rows_of_a_stream():
    rows = accuracy_rows(RESULT)
    assert rows == [
        {"after t-…": "1", "1": "90.0", "2": "", "average": "90.0", "free units": "60"},
        {"after t-…": "2", "1": "80.0", "2": "70.0", "average": "75.0", "free units": "25"},
    ]
    text = StringIO()
    Console(file=text, width=80).print(rich_table("title", rows))
    assert "75.0" in text.getvalue()


def test_without_rich_there_is_no_table_of_its(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError):
        rich_table("", [{"a": 1}])


@pytest.mark.parametrize(
    ("module", "work", "said"),
    [
        ("matplotlib.figure", lambda rnf, report, path: report.plot(path), "matplotlib is missing.*rnf.plots"),
        ("matplotlib.figure", lambda rnf, report, path: report.to_html(), "matplotlib is missing.*rnf.plots"),
        ("pandas", lambda rnf, report, path: report.to_pandas(), "pandas is missing: pip install pandas"),
        ("huggingface_hub", lambda rnf, report, path: rnf.push_to_hub("a/b"), "_hub is missing.*rnf.hub"),
        (
            "huggingface_hub",
            lambda rnf, report, path: rnf.from_pretrained("a/b"),
            "_hub is missing.*rnf.hub",
        ),
    ],
)
def test_a_missing_extra_is_an_import_error_that_names_it(module, work, said, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    rnf = RelevanceFreezing()
    rnf.state = two_tasks(make(Mlp))
    with pytest.raises(ImportError, match=said):
        work(rnf, rnf.report(matrix=torch.eye(2)), tmp_path / "f.png")
    assert not list(tmp_path.iterdir())


def test_the_package_imports_without_what_only_extras_bring():
    absent = ("pandas", "sklearn", "huggingface_hub")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import lightning_rnf"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)

"""Every example runs on a slice of the real data; `RNF_DATA` names the folder that has it."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import script_until
from launched import ROOT, ended, started

EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("RNF_DATA", "no data"))
SETTINGS = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*falls short of the criterion:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no free units are left:UserWarning"),
]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def run(tmp_path):
    """Runs an example with options; what it writes as JSON."""

    def main(name: str, *options: str) -> dict:
        output = tmp_path / "results"
        # Settings that name bfloat16 take far longer on a CPU that has none: an MLP and a ResNet keep it below.
        given = ["--data", str(DATA), "--output", str(output), "--accelerator", "cpu", "--precision", "32-true"]
        given += options
        summary = importlib.import_module(script_of(name)).main(given)
        settings = [Path(option).stem for option in options if option.endswith(".yaml")]
        file = (settings or [name])[0] + "-fast" * ("--fast" in options)
        file += "-validation" * ("--on-validation" in options) + "-class" * ("class" in options)
        assert json.loads((output / f"{file}.json").read_text()) == summary
        assert not (output / f"{file}-unfinished").exists()
        return summary

    return main


def script_of(name: str) -> str:
    """The script that a file of settings belongs to: the longest whose name it begins with."""
    return max((path.stem for path in EXAMPLES.glob("*.py") if name.startswith(path.stem)), key=len)


def has(*folders: str) -> pytest.MarkDecorator:
    missing = [folder for folder in folders if not (DATA / folder).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"RNF_DATA names no folder with {', '.join(missing)} in it")


def of(summary: dict, method: str) -> dict:
    """The first run of a method."""
    return summary["methods"][method]["runs"][0]


# -- every experiment -------------------------------------------------------------------------------------------------


def test_ddp_ends_every_task_in_two_processes_that_lightning_starts():
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ddp.py"), "--accelerator", "cpu", "--devices", "2", "--epochs", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count("of its sub-network") == 5  # said by one of them
    assert "All distributed processes registered. Starting with 2 processes" in done.stderr


@has("MNIST")
def test_fast_compares_all_methods_on_a_slice_of_the_real_data(run):
    summary = run("mnist_split", "--fast", "--samples", "3000", "--tasks", "3")
    assert list(summary["methods"]) == ["naive", "separate", "paper", "exact", "default", "tuned"]
    assert "a reduced schedule on a slice of the data (--fast)" in summary["reduced"]
    assert of(summary, "naive")["free_capacity"] == []
    for method in ("paper", "exact", "tuned"):
        one = of(summary, method)
        assert len(one["capacity"]) == len(one["free_capacity"]) == len(one["accepted"]) == len(one["tasks"]) == 3
        assert one["free_capacity"] == sorted(one["free_capacity"], reverse=True)
    for method in ("exact", "tuned"):
        assert of(summary, method)["forgetting"] == 0
    # Before a task ends nothing tells these apart: the same weights, and batches in the same order.
    first = {of(summary, method)["matrix"][0][0] for method in ("naive", "separate", "paper")}
    assert len(first) == 1
    alone = of(summary, "separate")["matrix"]
    assert alone[2][:2] == [alone[0][0], alone[1][1]]  # what a task has reached stays
    assert alone[1][1] != of(summary, "naive")["matrix"][1][1]  # the second began with the first weights, too


MILD = "freezing.criterion=0.2"  # one sample of 10 or 20 weighs more than the usual tolerance


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        pytest.param("mnist_permuted", "tuned", ["--samples", "2000"], marks=has("MNIST")),
        pytest.param("cifar_random", "tuned", ["--samples", "500", "--set", MILD], marks=has("cifar10", "cifar100")),
        pytest.param(
            "cifar_semantic",
            "exact",
            ["--samples", "1000", "--epochs", "1", "--set", MILD],
            marks=has("cifar10", "cifar100"),
        ),
        pytest.param("cifar_resnet", "tuned", ["--samples", "2000", "--set", MILD], marks=has("cifar100")),
        pytest.param("cifar_alexnet", "default", ["--samples", "1000", "--set", MILD], marks=has("cifar100")),
        pytest.param("tiny_split", "default", ["--set", MILD], marks=has("tinyimagenet200")),
    ],
)
def test_nothing_is_forgotten_on_a_slice_of_the_real_data(run, name, method, options):
    given = [option.replace(MILD, f"methods.{method}.{MILD}") for option in options]
    one = of(run(name, "--fast", "--tasks", "2", "--method", method, *given), method)
    assert one["forgetting"] == 0
    assert one["matrix"][1][0] == one["matrix"][0][0]
    assert 0 < one["free_capacity"][1] <= one["free_capacity"][0]


@has("cifar10")
def test_with_and_without_a_word_of_the_task(run):
    small = [
        "--set",
        "methods.default.freezing.criterion=0.06",
        "network.width=8",
        "--epochs",
        "1",
        "--samples",
        "1000",
        "--tasks",
        "2",
        "--precision",
        "bf16-mixed",
    ]
    summary = run("cifar_split", "--fast", "--scenario", "class", "--method", "default", *small)
    assert summary["tested_on"] == "test data, of all tasks as one label space"
    one = of(summary, "default")
    for untold, told, found in zip(one["matrix"][1], one["accuracy_told"], one["tasks_found"], strict=True):
        assert 0 < untold <= min(told, found)
    shown = importlib.import_module("results").table(summary)
    assert "| where the task is told, % | task found, % |" in shown


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        pytest.param("monthly_series", "statsmodels"),
        pytest.param("languages_of_names", "babel"),
        pytest.param("names_by_lstm", "babel"),
        pytest.param("two_games", "gymnasium"),
    ],
)
def test_other_networks_and_targets_forget_nothing_either(run, name, needs, tmp_path, monkeypatch):
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    given = ["--fast", "--tasks", "2", "--samples", "1800", "--method", "naive", "default"]
    summary = run(name, *given)
    one = of(summary, "default")
    assert one["forgetting"] == 0
    assert one["matrix"][1][0] == one["matrix"][0][0]
    naive = of(summary, "naive")["matrix"]
    assert naive[1][0] != naive[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "nothing is left where it was started"


def test_an_adapter_for_each_task_forgets_nothing_and_is_counted(run):
    pytest.importorskip("babel")
    given = ["--fast", "--tasks", "2", "--samples", "1800"]
    summary = run("adapters_on_names", *given, "--method", "naive", "default", "lora_per_task")
    every = {of(summary, method)["adapter weights"] for method in ("naive", "default")}
    assert every == {12 * 2 * (4 * (48 + 48) + 2 * (48 + 96))}  # rank 12 beside six layers in each of two
    one = of(summary, "lora_per_task")
    assert one["new adapter weights"] == [*every, *every]
    default, naive = of(summary, "default"), of(summary, "naive")["matrix"]
    assert default["forgetting"] == 0
    assert default["matrix"][1][0] == default["matrix"][0][0]
    assert naive[1][0] != naive[0][0]
    shared = default["new adapter weights"]
    assert len(shared) == 2
    assert 0 <= sum(shared) <= min(every)
    for name in ("adapters_on_names", "languages_of_names"):
        method = "lora" if name == "languages_of_names" else "lora_per_task"
        peer = of(run(name, *given, "--method", method), method)
        assert peer["forgetting"] == 0
        assert peer["matrix"][1][0] == peer["matrix"][0][0]


@has("cifar10")
def test_heatmaps_drift_unless_the_task_is_recalled(run, tmp_path):
    from results import main

    options = ["--fast", "--samples", "1000", "--epochs", "1", "--method", "naive", "exact"]
    summary = run("heatmaps", *options, "--set", "methods.exact.freezing.criterion=0.2")
    assert of(summary, "exact")["drift"][-1] == {"cosine": pytest.approx(1), "signs": 1}
    assert of(summary, "naive")["drift"][-1]["signs"] < 0.99
    assert "stand-in" in summary["title"] or summary["stand_in"]
    main([str(tmp_path / "results")])
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        "heatmaps-fast.png",
        "heatmaps-fast_maps.png",
    }


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "whole"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_that_their_script_takes(name, fast):
    import settings

    experiment = importlib.import_module(script_of(name)).EXPERIMENT
    read = settings.read(EXAMPLES / f"{name}.yaml", fast=fast)
    for method in read["methods"]:
        experiment.made_with(read, method, options(), f"{name}.yaml")
    assert read["seeds"] >= 1
    assert read["tuning"]


def options(**changed):
    from argparse import Namespace

    return Namespace(**{"epochs": None, "precision": None, "scenario": "task", **changed})


# -- streams ----------------------------------------------------------------------------------------------------------


def test_the_semantic_groups_hold_every_class_of_cifar_100_once():
    from cifar_semantic import GROUPS, groups

    numbers = [number for group in groups() for number in group]
    assert sorted(numbers) == list(range(100))
    assert len(groups()) == 7
    assert len(set(map(len, groups()))) > 1  # of unequal size
    if (DATA / "cifar100").is_dir():
        named = (DATA / "cifar100" / "classes.txt").read_text().split()
        assert [[named[number] for number in group] for group in groups()] == [n.split() for n in GROUPS.values()]


@has("cifar10", "cifar100")
def test_streams_of_cifar_have_the_papers_tasks():
    import cifar_random
    import cifar_semantic
    from images import Data

    data = Data(DATA, samples=1000)
    random = cifar_random.stream(data, 3)
    assert [task.classes for task in random] == [10] * 11
    labels = [sorted(task.train.labels) for task in random[1:]]
    assert sorted(sum(labels, [])) == list(range(100))  # noqa: RUF017 - ten short lists
    assert labels != [sorted(task.train.labels) for task in cifar_random.stream(data, 4)[1:]]
    semantic = cifar_semantic.stream(data, 3)
    assert [task.classes for task in semantic] == [10, 10, 30, 12, 20, 8, 10, 10]
    assert semantic[2].task == "land animals"


@has("cifar10")
def test_both_layouts_of_cifar_give_the_same_images(monkeypatch, tmp_path):
    import images

    data = images.Data(DATA, samples=200)
    expected, labels = images.cifar(data, 10, is_train=False).tensors

    class OfTorchvision:
        def __init__(self, folder, train, download):
            assert (folder, train, download) == (tmp_path, False, True)
            self.data = (255 * expected).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            self.targets = labels.tolist()

    monkeypatch.setattr(images, "CIFAR10", OfTorchvision)
    found, its_labels = images.cifar(images.Data(tmp_path, download=True, samples=100), 10, is_train=False).tensors
    assert torch.equal(found, expected[:100])
    assert torch.equal(its_labels, labels[:100])
    assert labels.bincount().tolist() == [20] * 10
    assert 0 <= float(expected.min()) < 0.1 < 0.9 < float(expected.max()) <= 1
    assert data.altered == {"CIFAR-10": "re-encoded as AVIF, with loss"}


def test_a_slice_has_as_many_samples_of_each_class():
    from images import balanced

    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert balanced(labels, 6).tolist() == [0, 1, 4, 5, 6, 7]
    assert balanced(labels, None).tolist() == list(range(9))


def test_zenkes_network_is_the_one_of_the_paper():
    from cifar_random import Zenke

    model = Zenke(learning_rate=0.001)
    shapes = [tuple(parameter.shape) for parameter in model.body.parameters() if parameter.ndim > 1]
    assert shapes == [(32, 3, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (512, 2304)]
    assert [module.p for module in model.body if isinstance(module, torch.nn.Dropout)] == [0.25, 0.25, 0.5]
    assert model.body(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


# -- runs -------------------------------------------------------------------------------------------------------------

QUICK = ["--fast", "--samples", "1000", "--tasks", "2"]


@has("MNIST")
def test_killed_and_run_again_the_results_are_those_of_one_run(run, tmp_path):
    quick = ["--samples", "3000", "--epochs", "3", "--tasks", "3", "--seeds", "1"]
    quick += ["--method", "naive", "tuned", "--set", "methods.tuned.freezing.recovery_epochs=1"]
    unbroken = run("mnist_split", *quick)
    output = tmp_path / "results"
    output.rename(tmp_path / "unbroken")
    given = ["--data", str(DATA), "--output", str(output), "--accelerator", "cpu", *quick]
    second = Path("mnist_split-unfinished", "tuned-0", "mnist-23", "last.ckpt")
    (exitcode,) = ended(started(script_until, second.as_posix(), EXAMPLES / "mnist_split.py", *given))
    assert exitcode == -signal.SIGKILL
    assert (output / second).exists()
    assert [*json.loads((output / "mnist_split.json").read_text())["methods"]] == ["naive"]
    again = run("mnist_split", *quick)
    assert of(again, "tuned")["seconds"] is None  # what came before is not known
    assert without_seconds(again) == without_seconds(unbroken)


def without_seconds(summary: dict) -> dict:
    for method in summary["methods"].values():
        for one in method["runs"]:
            del one["seconds"], one["task_end_seconds"]
    return summary


@has("MNIST")
def test_results_that_are_there_are_not_made_again_and_other_settings_are_refused(run, capsys):
    first = run("mnist_split", *QUICK, "--method", "naive", "--seeds", "1")
    second = run("mnist_split", *QUICK, "--method", "naive", "--seeds", "2")
    assert of(second, "naive") == of(first, "naive")
    assert [one["seed"] for one in second["methods"]["naive"]["runs"]] == [0, 1]
    for other in (["--epochs", "1"], ["--set", "network.width=100"], ["--precision", "bf16-mixed"]):
        with pytest.raises(SystemExit):
            run("mnist_split", *QUICK, "--method", "naive", *other)
        assert "were made with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("mnist_split", *QUICK, "--method", "naif")
    assert "has the methods naive, separate, paper, exact, default, tuned" in capsys.readouterr().err


@has("MNIST")
def test_what_the_trainer_refuses_does_not_begin_a_run(run):
    naive = [*QUICK, "--method", "naive", "--seeds", "1", "--epochs", "1", "--set", "first_seed=5"]
    with pytest.raises(Exception, match="rubbish"):
        run("mnist_split", *naive, "--precision", "rubbish")
    one = of(run("mnist_split", *naive), "naive")
    assert one["seconds"] is not None  # nothing was gone on with
    assert one["seed"] == 5


@has("MNIST")
def test_first_seed_set_precision_and_pages(run, tmp_path):
    chosen = [*QUICK, "--method", "exact", "--seeds", "1", "--first-seed", "7"]
    changes = ["--set", "network.width=50", "methods.exact.freezing.criterion=0.1"]
    summary = run("mnist_split", *chosen, *changes, "--precision", "bf16-mixed")
    one = of(summary, "exact")
    assert one["seed"] == 7
    assert one["device"].startswith("CPU")
    assert {"torch", "lightning", "zennit", "lightning-rnf"} <= set(one["versions"])
    made_with = summary["methods"]["exact"]["settings"]
    assert (made_with["network"], made_with["freezing"]["criterion"]) == ({"width": 50}, 0.1)
    assert made_with["precision"] == "bf16-mixed"
    assert summary["run_with"] == f"--tasks 2 --samples 1000 {' '.join(changes)}"
    shutil.rmtree(tmp_path / "results")
    run("mnist_split", *chosen, *changes, "--pages")
    assert "<html" in (tmp_path / "results" / "mnist_split-fast-exact-7.html").read_text()[:200]


@has("MNIST")
def test_on_validation_the_test_data_are_not_looked_at(run, monkeypatch, tmp_path):
    import mnist_split
    from torch.utils.data import TensorDataset

    chosen = [*QUICK, "--method", "naive", "--on-validation"]
    seen = run("mnist_split", *chosen)
    assert seen["tested_on"] == "validation data"
    load = mnist_split.mnist

    def without_test(data, is_train):
        found = load(data, is_train)
        return found if is_train else TensorDataset(torch.zeros_like(found.tensors[0]), found.tensors[1])

    monkeypatch.setattr(mnist_split, "mnist", without_test)
    shutil.rmtree(tmp_path / "results")
    unseen = run("mnist_split", *chosen)
    assert without_seconds(seen) == without_seconds(unseen)
    shutil.rmtree(tmp_path / "results")
    tested = run("mnist_split", *QUICK, "--method", "naive")
    assert of(tested, "naive")["matrix"] != of(seen, "naive")["matrix"]


def test_reference_data_are_test_data_only_where_settings_say_so(monkeypatch):
    import mnist_split
    from torch.utils.data import TensorDataset

    def loaded(data, is_train):
        labels = torch.arange(200) % 10
        return TensorDataset(torch.randn(200, 1, 2, 2) + is_train, labels)

    monkeypatch.setattr(mnist_split, "mnist", loaded)
    streams = []
    for given in ({}, {"reference": "test"}):
        torch.manual_seed(0)
        streams.append(mnist_split.stream(None, 3, **given))
    for held_out, tested in zip(*streams, strict=True):
        assert tested.validation is tested.test
        assert held_out.validation is not held_out.test
        for ours, theirs in zip(held_out.train, tested.train, strict=True):  # it learns from as many, the same ones
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match=r"stream.reference is 'tets', expected 'validation' or 'test'"):
        mnist_split.stream(None, 3, reference="tets")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_the_same_batches_whether_a_fit_begins_with_it_or_not(workers, tmp_path):
    from experiment import SeedEpochs
    from lightning.pytorch import LightningModule, Trainer

    from lightning_rnf.streams import TaskDataModule

    class Seen(LightningModule):
        """What comes from the loader, with what its workers draw."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = {}

        def training_step(self, batch):
            self.seen.setdefault(self.trainer.current_epoch, []).append(batch.tolist())
            return self.weight * 0

        def validation_step(self, batch):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.stack([torch.tensor(float(index)), torch.rand(())])

    def fit(epochs, disturbed, **options):
        datamodule = TaskDataModule("a", Drawn(), Drawn(), Drawn(), 2, batch_size=4, num_workers=workers)
        torch.rand(disturbed)
        kept = {"default_root_dir": tmp_path, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=epochs, callbacks=[SeedEpochs(0, {"a": 0})], limit_val_batches=0, **kept)
        model = Seen()
        trainer.fit(model, datamodule=datamodule, **options)
        return model.seen, trainer

    whole, _ = fit(3, 5)
    first, trainer = fit(1, 7)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    rest, _ = fit(3, 11, ckpt_path=tmp_path / "a.ckpt")
    assert {**first, **rest} == whole
    _, trainer = fit(2, 13)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model := Seen(), datamodule=trainer.datamodule)  # on with the same Trainer
    assert model.seen == {2: whole[2]}
    assert len(whole) == 3
    assert whole[0] != whole[1]


def test_two_processes_are_not_at_one_run(tmp_path):
    from result_files import alone

    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from result_files import alone\n"
    code += "with alone(Path(sys.argv[2])): print('begun')"
    command = [sys.executable, "-c", code, str(EXAMPLES), str(tmp_path / "tuned-0")]
    with alone(tmp_path / "tuned-0"):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (second.returncode, second.stdout) == (1, "")
        assert "another process is at this run" in second.stderr
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout == "begun\n"


def test_a_run_that_was_begun_with_other_settings_is_not_gone_on_with(tmp_path):
    from result_files import begun

    assert not begun(tmp_path / "run", {"training": {"epochs": 2}})
    assert begun(tmp_path / "run", {"training": {"epochs": 2}})
    with pytest.raises(SystemExit, match="begun with other settings"):
        begun(tmp_path / "run", {"training": {"epochs": 3}})


def test_results_of_two_processes_and_of_one_that_dies_while_writing_are_kept(tmp_path, monkeypatch):
    from result_files import Results

    one, other = (Results(tmp_path / "a.json", ABOUT) for _ in range(2))
    one.add("naive", {"training": {}}, a_run(1))
    other.add("naive", {"training": {}}, a_run(0))
    one.add("paper", {"training": {}}, a_run(0))
    assert [run["seed"] for run in other.read()["methods"]["naive"]["runs"]] == [0, 1]
    before = other.read()
    write = Path.write_text

    def dies(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(OSError, match="no space"):
        one.add("naive", {"training": {}}, a_run(2))
    assert other.read() == before


ABOUT = {"title": "A", "stand_in": None, "reduced": None, "run_with": None, "tested_on": "test data", "tuning": None}


def a_run(seed: int, **changed) -> dict:
    """What a file of results needs of a run of two tasks."""
    found = {"seed": seed, "device": "CPU", "versions": {"torch": "2"}, "tasks": ["a", "b"], "average": 0.8}
    found |= {"matrix": [[0.9, None], [0.9, 0.7]], "forgetting": 0.0, "free_capacity": [], "accepted": []}
    return {**found, **changed}


def test_a_run_does_not_join_those_that_another_process_has_added_with_other_settings(tmp_path):
    from result_files import Results

    one, other = (Results(tmp_path / "a.json", {**ABOUT, "run_with": with_}) for with_ in (None, "--epochs 2"))
    for results, epochs in ((one, 60), (other, 2)):
        results.check("naive", {"training": {"epochs": epochs}})  # there is no file yet
    one.add("naive", {"training": {"epochs": 60}}, a_run(0))
    with pytest.raises(ValueError, match=r"made with training \{'epochs': 60\}, run_with None: name another"):
        other.add("naive", {"training": {"epochs": 2}}, a_run(1))
    assert [run["seed"] for run in one.read()["methods"]["naive"]["runs"]] == [0]


def test_runs_join_only_those_of_which_the_file_says_the_same(tmp_path):
    from result_files import Results

    Results(tmp_path / "a.json", ABOUT).add("naive", {"training": {"epochs": 2}}, a_run(0))
    renamed = Results(tmp_path / "a.json", {**ABOUT, "title": "B"})
    renamed.check("naive", {"training": {"epochs": 2}})
    renamed.check("paper", {"training": {"epochs": 3}})
    for key, before in (("tuning", "chosen on test data"), ("reduced", "2 epochs"), ("tested_on", "validation data")):
        other = Results(tmp_path / "a.json", {**ABOUT, key: before})
        with pytest.raises(ValueError, match=f"made with {key} {ABOUT[key]}: name another --output"):
            other.check("naive", {"training": {"epochs": 2}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "Invalid JSON"),
        ('{"methods": ', "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON: recursion limit"),
        ("[]", "Input should be an object"),
        ("{}", "title: Field required"),
        ({**ABOUT, "methods": {}}, "methods: Dictionary should have at least 1 item"),
        ({**ABOUT, "methods": {"naive": []}}, "methods.naive: Input should be an object"),
        ({**ABOUT, "methods": {"naive": {"settings": {}, "runs": []}}}, "methods.naive.settings.training: Field"),
        ({**ABOUT, "title": 3, "methods": {}}, "title: Input should be a valid string"),
        ({"seed": 0}, "methods.naive.runs.1.device: Field required"),
        (("seed", "1"), "runs.1.seed: Input should be a valid integer"),
        (("average", None), "runs.1.average: Input should be a valid number"),
        (("average", float("nan")), "runs.1.average: Input should be a finite number"),
        (("versions", []), "runs.1.versions: Input should be an object"),
        (("data", "other"), "runs.1.data: Input should be an object"),
        (("free_capacity", [0.5]), "runs.1: Value error, free_capacity has 1 numbers for 2 tasks"),
        (("tasks", []), "runs.1.tasks: List should have at least 1 item"),
        (("tasks", ["a", 5]), "runs.1.tasks.1: Input should be a valid string"),
        (("tasks", ["a", "c"]), "Value error, its runs have different tasks"),
        (("matrix", [1, 2]), "runs.1.matrix.0: Input should be a valid array"),
        (("matrix", [[0.9]]), "runs.1: Value error, matrix has not a row for each of 2 tasks"),
        (("matrix", [[0.9, None], [0.9, None]]), "matrix has not a row for each of 2 tasks with the last one filled"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_by_its_name(content, said, tmp_path):
    import results
    from result_files import Results

    if isinstance(content, tuple):
        content = {**a_run(1), content[0]: content[1]}
    if isinstance(content, dict) and "methods" not in content:
        content = {**ABOUT, "methods": {"naive": {"settings": {"training": {}}, "runs": [a_run(0), content]}}}
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit, match=rf"a\.json holds no results .*{said}.*move it away"):
        results.main([str(tmp_path)])
    with pytest.raises(ValueError, match=rf"a\.json .*{said}"):
        Results(tmp_path / "a.json", ABOUT).check("naive", {})


@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "results").glob("*.json")))
def test_the_files_of_results_are_those_that_the_settings_make(name):
    import settings
    from experiment import about
    from result_files import Results

    of_settings = name.removesuffix("-class")
    scenario = "task" if of_settings == name else "class"
    read = settings.read(EXAMPLES / f"{of_settings}.yaml")
    no_options = options(fast=False, on_validation=False, tasks=None, samples=None, set=[], scenario=scenario)
    kept = Results(EXAMPLES / "results" / f"{name}.json", about(read, no_options))
    experiment = importlib.import_module(script_of(of_settings)).EXPERIMENT
    for method, of_method in kept.read()["methods"].items():
        made_with = experiment.made_with(read, method, options(precision=of_precision(of_method)), f"{name}.yaml")
        kept.check(method, made_with)
        assert of_method["runs"][0]["seed"] >= read.get("first_seed", 0)
    there = json.loads(kept.path.read_text())
    assert {key: there[key] for key in kept.about} == kept.about


def of_precision(method: dict) -> str | None:
    """A GPU's runs may be of another precision than the settings name; a CPU's are made by the command as it stands."""
    return None if method["runs"][0]["device"].startswith("CPU") else method["settings"]["precision"]


# -- settings ---------------------------------------------------------------------------------------------------------

SOUND = (
    "title: A\ntraining: {epochs: 1, batch_size: 8, learning_rate: 0.1}\nnetwork: {width: 8}\nmethods: {naive: {}}\n"
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("titel: B", "a.yaml has titel; known are: title, stand_in"),
        ("fast: {epochs: 1}", "a.yaml: fast has epochs; known are: title"),
        ("methods: {tuned: {ration: 0.2}}", "a.yaml: methods.tuned has ration; known are: freezing, paper"),
        (
            "methods: {tuned: {freezing: {rations: 0.2}}}",
            "methods.tuned: .*unexpected keyword argument 'rations'",
        ),
        ("methods: {tuned: {freezing: {ration: 2}}}", "a.yaml: methods.tuned: ration is 2"),
        (
            "methods: {tuned: {freezing: {}, paper: {}}}",
            "methods.tuned: a method has freezing or paper, not both",
        ),
        ("methods: {}", "a.yaml: methods is {}: Dictionary should have at least 1 item"),
        ("methods: null", "a.yaml: methods is None: Input should be a valid dictionary"),
        ("methods: {0.3: {}}", r"a.yaml: methods.0.3.\[key\] is 0.3: Input should be a valid string"),
        ("network: {widht: 8}", "a.yaml: network with training has widht; known are: width, learning_rate"),
        ("network: {}", "a.yaml: network with training lacks width"),
        ("training: {epochs: 1, batch_size: 8, learning_rate: 1e-3}", "learning_rate is the text '1e-3'.*a dot"),
        ("training: {epochs: 0, batch_size: 8, learning_rate: 0.1}", "training.epochs is 0, expected a number of at"),
        ("stream: {tasks: 3}", "a.yaml: stream has tasks; known are: reference"),
        ("stream: [3]", r"a.yaml: stream is \[3\]: Input should be a valid dictionary"),
        ("methods: 3", "a.yaml: methods is 3: Input should be a valid dictionary"),
        ("methods: {tuned: 5}", "a.yaml: methods.tuned is 5: Input should be"),
        ("methods: {tuned: {training: 7}}", "a.yaml: methods.tuned.training is 7: Input should be a valid dictionary"),
        ("fast: 3", "a.yaml: fast is 3, expected a mapping"),
        ("seeds: x", "a.yaml: seeds is 'x': Input should be a valid integer"),
        ("tasks: -1", "a.yaml: tasks is -1: Input should be greater than 0"),
        ("training: {epochs: true, batch_size: 8, learning_rate: 0.1}", "training.epochs is True, expected a number"),
        ("first_seed: -1", "a.yaml: first_seed is -1: Input should be greater than or equal to 0"),
        ("title: 3", "a.yaml: title is 3: Input should be a valid string"),
        ("published: 97.5", "a.yaml: published is 97.5: Input should be a valid string"),
        ("goal: high", "a.yaml: goal is 'high': Input should be a valid number"),
        ("stream: {day: 2026-01-01}", "a.yaml is no YAML that JSON can hold: Object of type date"),
        ("base: 3", "a.yaml: base is 3, expected the name of a file"),
        ("base: a.yaml", "a.yaml stands on itself: a.yaml on a.yaml"),
    ],
)
def test_settings_that_nobody_takes_are_refused_with_those_that_are_known(changed, said, tmp_path, capsys):
    import yaml
    from mnist_split import main

    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**yaml.safe_load(SOUND), **yaml.safe_load(changed)}))
    with pytest.raises(SystemExit):
        main(["--data", "nowhere", "--settings", str(tmp_path / "a.yaml"), "--output", str(tmp_path)])
    assert re.search(said, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--seeds", "0"], "--seeds: 0 is less than 1"),
        (["--first-seed", "-1"], "--first-seed: -1 is less than 0"),
        (["--tasks", "-1"], "--tasks: -1 is less than 1"),
        (["--samples", "some"], "--samples: invalid"),
        (["--set", "title=["], r"title=\[ is no YAML"),
        (["--set", "fast.seeds=3"], "'fast.seeds=3': changes are made after those of fast"),
        (["--set", "methods.defualt.freezing.ration=1.0"], "mnist_split.yaml has the methods naive, .*default"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, said, tmp_path, capsys):
    from mnist_split import main

    with pytest.raises(SystemExit):
        main(["--data", "nowhere", "--output", str(tmp_path), *option])
    assert re.search(said, capsys.readouterr().err)


def test_a_file_that_is_no_yaml_is_refused_by_its_name(tmp_path):
    import settings

    (tmp_path / "a.yaml").write_text("title: [")
    with pytest.raises(ValueError, match=r"a\.yaml is no YAML"):
        settings.read(tmp_path / "a.yaml")


def test_goals_are_of_tests_that_are_told_the_task():
    read = {"title": "digits", "goal": 90.0, "published": "89 (SI)"}
    about = importlib.import_module("experiment").about
    whole = {"fast": False, "tasks": None, "samples": None, "set": [], "on_validation": False}
    told, untold = (about(read, options(**whole, scenario=scenario)) for scenario in ("task", "class"))
    assert (told["goal"], told["published"]) == (90.0, "89 (SI)")
    assert (untold["goal"], untold["published"]) == (None, None)


def test_precision_and_first_seed_are_the_settings_unless_the_command_line_has_others():
    import settings
    from mnist_split import EXPERIMENT

    read = settings.read(EXAMPLES / "mnist_split.yaml")
    of = {**read, "precision": "bf16-mixed"}
    assert EXPERIMENT.made_with(read, "naive", options(), "a.yaml")["precision"] == "32-true"
    assert EXPERIMENT.made_with(of, "naive", options(), "a.yaml")["precision"] == "bf16-mixed"
    assert EXPERIMENT.made_with(of, "naive", options(precision="32-true"), "a.yaml")["precision"] == "32-true"


def test_settings_stand_on_others_and_are_changed_by_fast_and_by_the_command_line(tmp_path):
    import settings

    (tmp_path / "a.yaml").write_text(SOUND + "fast: {samples: 10, training: {epochs: 7}}\n")
    (tmp_path / "b.yaml").write_text(
        "base: a.yaml\ntitle: B\nmethods: {naive: null, tuned: {freezing: {ration: 0.5}}}\n"
    )
    read = settings.read(tmp_path / "b.yaml")
    assert (read["title"], read["training"]["epochs"], [*read["methods"]]) == ("B", 1, ["tuned"])
    fast = settings.read(
        tmp_path / "b.yaml", fast=True, changes=["methods.tuned.freezing.ration=null", "network.width=9"]
    )
    assert (fast["samples"], fast["training"]["epochs"], fast["training"]["batch_size"]) == (10, 7, 8)
    assert fast["methods"] == {"tuned": {"freezing": {}}}
    assert fast["network"] == {"width": 9}
    with pytest.raises(ValueError, match=r"'width' is no change of a setting: write key\.key=value"):
        settings.read(tmp_path / "b.yaml", changes=["width"])
    (tmp_path / "c.yaml").write_text(SOUND)
    with pytest.raises(ValueError, match="does not say what --fast changes"):
        settings.read(tmp_path / "c.yaml", fast=True)


def test_a_method_may_change_network_and_training_for_itself_and_epochs_hold_for_all(tmp_path):
    import settings
    from mnist_split import EXPERIMENT

    own = "methods: {naive: {}, tuned: {freezing: {ration: 0.5}, training: {epochs: 5}, network: {width: 9}}}"
    (tmp_path / "a.yaml").write_text(SOUND.replace("methods: {naive: {}}", own))
    read = settings.read(tmp_path / "a.yaml")
    tuned, naive = (EXPERIMENT.made_with(read, method, options(), "a.yaml") for method in ("tuned", "naive"))
    assert (tuned["training"]["epochs"], tuned["training"]["batch_size"], tuned["network"]) == (5, 8, {"width": 9})
    assert (naive["training"]["epochs"], naive["network"]) == (1, {"width": 8})
    for method in ("tuned", "naive"):
        assert EXPERIMENT.made_with(read, method, options(epochs=3), "a.yaml")["training"]["epochs"] == 3
    assert settings.freezing(tuned).ending.selection.rations == (0.5,)
    assert settings.freezing(naive) is None


def test_networks_of_their_own_have_nothing_to_freeze_and_are_told_the_task(tmp_path):
    import settings
    from mnist_split import EXPERIMENT

    own = "methods: {naive: {}, separate: {separate: true}, both: {separate: true, paper: {}}}"
    (tmp_path / "a.yaml").write_text(SOUND.replace("methods: {naive: {}}", own))
    read = settings.read(tmp_path / "a.yaml")
    assert "separate" not in EXPERIMENT.made_with(read, "naive", options(), "a.yaml")  # as files from before have it
    assert EXPERIMENT.made_with(read, "separate", options(), "a.yaml")["separate"] is True
    with pytest.raises(ValueError, match="networks of their own have nothing to freeze"):
        EXPERIMENT.made_with(read, "both", options(), "a.yaml")
    with pytest.raises(ValueError, match="knows the task"):
        EXPERIMENT.made_with(read, "separate", options(scenario="class"), "a.yaml")


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        pytest.param("two_games", "default", "two_games.py tests each task by its name"),
        pytest.param("imagenet_to_adience", "exact", "imagenet_to_adience.py tests each task by its name"),
        pytest.param("monthly_series", "naive", "numbers don't say which task a sample is of"),
        pytest.param("monthly_series", "paper", "methods.paper: .*portraits"),
    ],
)
def test_an_experiment_that_needs_the_task_says_so_before_it_begins(capsys, tmp_path, name, method, said):
    pytest.importorskip({"two_games": "gymnasium", "monthly_series": "statsmodels"}.get(name, "torchvision"))
    given = ["--data", str(DATA), "--fast", "--scenario", "class", "--method", method, "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(given)
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@has("cifar10")
def test_an_experiment_with_a_fit_of_its_own_is_tested_without_a_word_of_the_task(run):
    small = ["--fast", "--samples", "1000", "--epochs", "2", "--tasks", "2", "--method", "exact"]
    one = of(run("heatmaps", "--scenario", "class", *small, "--set", "methods.exact.freezing.criterion=0.06"), "exact")
    for untold, told, found in zip(one["matrix"][1], one["accuracy_told"], one["tasks_found"], strict=True):
        assert untold <= min(told, found)


def test_of_numbers_without_a_word_of_the_task_the_told_share_stands_for_accuracy(run):
    pytest.importorskip("statsmodels")
    one = of(run("monthly_series", "--fast", "--scenario", "class", "--method", "default", "--epochs", "2"), "default")
    for told, found in zip(one["accuracy_told"], one["tasks_found"], strict=True):
        assert 0 <= told <= 1
        assert 0 <= found <= 1


def test_a_seed_is_there_once_though_two_processes_add_it(tmp_path):
    from result_files import Results

    for seed, average in ((1, 0.5), (0, 0.6), (1, 0.7)):
        results = Results(tmp_path / "a.json", ABOUT)
        results.add("naive", {"training": {}}, a_run(seed, average=average))
    runs = results.read()["methods"]["naive"]["runs"]
    assert [(run["seed"], run["average"]) for run in runs] == [(0, 0.6), (1, 0.7)]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_readme_shows_what_the_files_of_results_hold():
    from results import main

    main(["--check"])


@pytest.fixture
def shown(tmp_path):
    """A folder with the results of two seeds, and a text with a block for them and one for results to come."""
    runs = [
        {
            "seed": seed,
            "device": "CPU",
            "versions": {"torch": "2"},
            "tasks": ["a", "b"],
            "matrix": [[0.9, None], [last, 0.7]],
            "average": (last + 0.7) / 2,
            "forgetting": 0.9 - last,
            "free_capacity": [],
            "accepted": [],
        }
        for seed, last in ((3, 0.5), (4, 0.7))
    ]
    kept = [
        {**run, "average": of_best, "free_capacity": [0.5, 0.25], "accepted": [True, run["seed"] == 3]}
        for run, of_best in zip(runs, (0.75, 0.9), strict=True)
    ]
    kept[1]["data"] = {"CIFAR-10": "re-encoded"}
    summary = {
        "title": "A stream",
        "stand_in": "this for that",
        "reduced": "a quarter",
        "run_with": None,
        "tested_on": "validation data",
        "tuning": "seed 9",
        "methods": {
            "naive": {"settings": {"training": {"epochs": 2, "batch_size": 8}}, "runs": runs},
            "tuned": {
                "settings": {"training": {"epochs": 3, "batch_size": 8, "augment": True}, "freezing": {"ration": 0.5}},
                "runs": kept,
            },
        },
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(summary))
    text = "before\n<!-- results:a -->\nold\n<!-- /results -->\nbetween\n<!-- results:b -->\n<!-- /results -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_tables_have_means_deviations_and_seeds_and_call_a_stand_in_one(shown):
    from results import main

    main([str(shown / "results"), "--readme", str(shown / "README.md")])
    text = (shown / "README.md").read_text()
    called = "A stream; stand-in: this for that; CIFAR-10 re-encoded in some runs; reduced: a quarter; "
    called += "tested on validation data"
    assert text.count(called) == 2  # above the table and with the figure
    assert "| naive | 65.00 ± 7.07 |  | 30.00 ± 14.14 | 60.00 ± 14.14 | 100 | 2 (3, 4) |" in text
    assert "| naive | 60.0 ± 14.1 | 70.0 ± 0.0 |" in text
    assert "| tuned | 82.50 ± 10.61 | +17.50 ± 3.54 | 30.00 ± 14.14 | 60.00 ± 14.14 | 50, 25 | 2 (3, 4) |" in text
    assert "seeds 3, 4; training: batch_size 8\n" in text
    assert "naive: fine-tuning; training: epochs 2\n" in text
    met = "the criterion was met in 3 of 4 tasks"
    assert f"tuned: `RelevanceFreezing(ration=0.5)`; training: epochs 3, augment True; {met}" in text
    assert "how settings were chosen: seed 9" in text
    assert "](results/a.png)" in text
    assert (shown / "results" / "a.png").exists()
    assert "old" not in text
    assert re.search(r"^before\n.*\nbetween\n<!-- results:b -->\n\nNot run yet.\n.*\nafter\n$", text, flags=re.DOTALL)


def test_a_method_looks_the_same_in_every_experiment_s_figure(shown):
    from results import figures

    def looks(methods):
        left = figures("a", {**summary, "methods": methods})["a.png"]().axes[0]
        return dict(zip(methods, [(line.get_linestyle(), line.get_color()) for line in left.get_lines()], strict=True))

    summary = json.loads((shown / "results" / "a.json").read_text())
    two = summary["methods"]
    four = looks({"naive": two["naive"], "paper": two["tuned"], "exact": two["tuned"], "tuned": two["tuned"]})
    assert looks(two) == {"naive": four["naive"], "tuned": four["tuned"]}
    # The default is drawn as what it came after, which is left out beside it.
    drawn = figures("a", {**summary, "methods": {"exact": two["tuned"], "default": two["tuned"], **two}})
    assert len(drawn["a.png"]().axes[0].get_lines()) == 3
    assert looks({"naive": two["naive"], "default": two["tuned"]})["default"] == four["exact"]


def test_methods_of_other_seeds_are_not_passed_off_as_compared(shown):
    from results import table

    summary = json.loads((shown / "results" / "a.json").read_text())
    of = summary["methods"]
    of["exact"] = {**of["tuned"], "runs": [{**of["tuned"]["runs"][0], "seed": 7}]}
    of["paper"] = {**of["tuned"], "runs": [of["tuned"]["runs"][0], {**of["tuned"]["runs"][1], "seed": 8}]}
    text = table({**summary, "methods": dict(reversed(of.items()))})
    assert "| exact | 75.00 |  | 40.00 | 50.00 | 50, 25 | 1 (7) |" in text  # nothing to compare it with
    assert "| paper | 82.50 ± 10.61 | +15.00 (1 of 2) |" in text
    assert "seeds of naive: 3, 4, paper: 3, 8, exact: 7, tuned: 3, 4; training" in text
    assert text.index("| naive |") < text.index("| exact |") < text.index("| tuned |")  # whichever was run first


def test_the_overview_has_a_line_for_each_experiment_with_its_goal(shown):
    from results import main

    file = shown / "results" / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "goal": 97.5, "published": "95 (others)"}))
    readme = shown / "README.md"
    readme.write_text("<!-- overview -->\n<!-- /overview -->\n" + readme.read_text())
    main([str(file.parent), "--readme", str(readme)])
    said = "| A stream (stand-in, reduced, validation data) | 65.00 ± 7.07 (3, 4) |  |  |  | "
    said += "82.50 ± 10.61 (3, 4) | 97.5 | "
    assert said + "95 (others) |" in readme.read_text()


def test_check_sees_a_changed_file_a_typed_number_and_a_missing_figure(shown):
    from results import main

    arguments = [str(shown / "results"), "--readme", str(shown / "README.md")]
    checks = [*arguments, "--check"]
    with pytest.raises(SystemExit, match=r"not shown by a\.png"):
        main(checks)
    assert "old" in (shown / "README.md").read_text()  # nothing was changed
    main(arguments)
    main(checks)
    before = (shown / "README.md").read_text()
    (shown / "README.md").write_text(before.replace("65.00 ± 7.07", "66.00 ± 7.07"))
    with pytest.raises(SystemExit, match=r"not shown by [^,]*README\.md:"):
        main(checks)
    (shown / "README.md").write_text(before)
    figure = shown / "results" / "a.png"
    whole = figure.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"no picture", whole.replace(b"Source", b"Sauce ")):
        figure.write_bytes(wrong)
        with pytest.raises(SystemExit, match=r"not shown by a\.png: run"):
            main(checks)
    figure.write_bytes(whole)
    main(checks)
    file = shown / "results" / "a.json"
    file.write_text(file.read_text().replace("0.7", "0.8"))
    with pytest.raises(SystemExit, match=r"not shown by a\.png, .*README\.md:"):
        main(checks)
    file.rename(file.with_name("c.json"))
    with pytest.raises(SystemExit, match="no block for c"):
        main(arguments)


def test_figures_are_drawn_anew_when_the_drawing_code_has_changed_and_not_for_another_matplotlib(shown, monkeypatch):
    import inspect

    import results

    arguments = [str(shown / "results"), "--readme", str(shown / "README.md")]
    results.main(arguments)
    monkeypatch.setattr("matplotlib.__version__", "99.0")
    results.main([*arguments, "--check"])
    source = inspect.getsource
    for changed in (results._retention, results._free, inspect.getmodule(results.retention)):
        with monkeypatch.context() as code:
            code.setattr(inspect, "getsource", lambda part, changed=changed: source(part) + "#" * (part is changed))
            with pytest.raises(SystemExit, match=r"not shown by a\.png: run"):
                results.main([*arguments, "--check"])
            results.main(arguments)
            results.main([*arguments, "--check"])
        before = (shown / "results" / "a.png").stat().st_mtime_ns
        results.main(arguments)
        results.main(arguments)  # what is fresh is left alone
        assert before < (shown / "results" / "a.png").stat().st_mtime_ns
        before = (shown / "results" / "a.png").stat().st_mtime_ns
        results.main(arguments)
        assert (shown / "results" / "a.png").stat().st_mtime_ns == before


def test_numbers_in_sentences_are_checked_and_written_with_the_tables(shown, capsys):
    from results import main

    arguments = [str(shown / "results"), "--readme", str(shown / "README.md")]
    readme = shown / "README.md"
    blocks = readme.read_text()
    sentence = (
        "Ours is 17.5 points above, in two seeds.\n<!-- numbers of a\n17.5: tuned.over(naive).mean(); two: 2\n-->\n"
    )
    readme.write_text(blocks + sentence)
    main(arguments)
    main([*arguments, "--check"])
    capsys.readouterr()
    file = shown / "results" / "a.json"
    file.write_text(file.read_text().replace('"average": 0.75', '"average": 0.85'))
    with pytest.raises(SystemExit, match=r"17\.5 should be 22\.5 .*in: after Ours is 17\.5 points above"):
        main([*arguments, "--check"])
    main(arguments)
    assert "written, read it again: " in capsys.readouterr().out
    assert readme.read_text().endswith(sentence.replace("17.5", "22.5"))
    main([*arguments, "--check"])
    readme.write_text(readme.read_text() + "Naive has 65.0 %.\n")
    for options in ([], ["--check"]):
        with pytest.raises(SystemExit):
            main([*arguments, *options])
    assert "to be written by hand: " in capsys.readouterr().out


def test_images_come_back_from_text():
    from images import as_text, from_text

    images = torch.randn(3, 2, 4, 4)
    largest = images.abs().amax(dim=(1, 2, 3), keepdim=True)
    back = from_text(json.loads(json.dumps(as_text(images))))
    torch.testing.assert_close(back, images / largest, atol=0.5 / 127 + 1e-6, rtol=0)

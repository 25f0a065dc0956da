"""Every example runs on a slice of the real data; `RNF_DATA` names the folder that has it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = Path(os.environ.get("RNF_DATA", "no data"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example with options; what it writes as JSON."""

    def main(name: str, *options: str) -> dict:
        monkeypatch.syspath_prepend(EXAMPLES)
        importlib.import_module(name).main(["--data", str(DATA), "--output", str(tmp_path), *options])
        assert (tmp_path / f"{name}.png").exists()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return main


def has(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"RNF_DATA names no folder with {folder} in it")


def test_ddp_ends_every_task_in_two_processes_that_lightning_starts():
    pytest.importorskip("sklearn")
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "ddp.py"), "--accelerator", "cpu", "--devices", "2", "--epochs", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert ended.stderr.count("of its sub-network") == 5  # said by one of them
    assert "All distributed processes registered. Starting with 2 processes" in ended.stderr


@has("MNIST")
def test_split_mnist_forgets_nothing_on_a_slice_of_the_real_data(run):
    options = ["--methods", "naive", "default", "--seeds", "1", "--epochs", "1", "--samples", "6000"]
    summary = run("split_mnist", *options)
    (result,) = summary["runs"]["default"]
    assert result["forgetting"] == 0
    assert result["average"] > 0.9


@has("MNIST")
def test_results_that_are_there_are_not_made_again_and_other_options_are_refused(run, capsys):
    options = ["--methods", "naive", "--epochs", "1", "--samples", "2000", "--tasks", "1"]
    first = run("split_mnist", *options, "--seeds", "1")
    second = run("split_mnist", *options, "--seeds", "2")
    assert second["runs"]["naive"][0] == first["runs"]["naive"][0]
    assert [result["seed"] for result in second["runs"]["naive"]] == [0, 1]
    with pytest.raises(SystemExit):
        run("split_mnist", "--epochs", "2")
    assert "was made with other options" in capsys.readouterr().err


@has("MNIST")
def test_mnist_permuted_recovers_on_a_slice_of_the_real_data(run):
    options = ["--methods", "recovery", "--epochs", "5", "--samples", "3000", "--tasks", "2"]
    (result,) = run("mnist_permuted", *options)["runs"]["recovery"]
    assert result["forgetting"] == 0
    assert result["average"] > 0.7
    assert 0 < result["free_capacity"][1] < result["free_capacity"][0]


@pytest.mark.filterwarnings("ignore:.*overridden `on_after_batch_transfer` in `LightningModule`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*passed in a `val_dataloader` but have no `validation_step`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*falls short of the criterion:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no free units are left:UserWarning")
@has("cifar100")
def test_cifar_resnet_runs_on_a_slice_of_the_real_data(run):
    options = ["--width", "8", "--stem-stride", "2", "--epochs", "7", "--samples", "6000", "--tasks", "2"]
    (result,) = run("cifar_resnet", *options, "--methods", "recovery, ration")["runs"]["recovery, ration"]
    assert result["forgetting"] == 0
    assert result["average"] > 0.15  # chance is 0.1; 54 batches a task
    assert min(result["capacity"][0].values()) >= 0.6


@pytest.mark.filterwarnings("ignore:.*overridden `on_after_batch_transfer` in `LightningModule`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*passed in a `val_dataloader` but have no `validation_step`:UserWarning")
@has("cifar100")
def test_cifar_resnet_takes_device_and_precision_and_goes_on_with_files_older_than_its_options(run, tmp_path):
    options = ["--width", "8", "--stem-stride", "2", "--epochs", "1", "--samples", "2000", "--tasks", "1"]
    options += ["--methods", "naive", "--accelerator", "cpu"]
    summary = run("cifar_resnet", *options)
    assert summary["runs"]["naive"][0]["device"].startswith("CPU")
    for younger in ("precision", "batch_size", "learning_rate"):
        del summary["options"][younger]
    (tmp_path / "cifar_resnet.json").write_text(json.dumps(summary))
    assert run("cifar_resnet", *options)["runs"] == summary["runs"]
    with pytest.raises(SystemExit):
        run("cifar_resnet", *options, "--precision", "bf16-mixed")
    (tmp_path / "cifar_resnet.json").unlink()
    mixed = run("cifar_resnet", *options, "--precision", "bf16-mixed", "--batch-size", "32", "--learning-rate", "0.1")
    assert mixed["options"]["precision"] == "bf16-mixed"
    assert mixed["runs"]["naive"][0]["matrix"] != summary["runs"]["naive"][0]["matrix"]

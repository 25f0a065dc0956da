"""Projects of the package `pytorch_lightning`: one program gives the same in both, and where that one is alone."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch
import pytest
import torch
from launched import ROOT, SUPPORT, ended, launched, started
from lightning_utilities.core.imports import compare_version
from packaged import DIGITS, LIGHTNING, OTHER, assert_imported, module_of, ours, program, stream

import lightning_rnf
from lightning_rnf.packages import either, like
from lightning_rnf.runtime.progress import shown, silent
from lightning_rnf.streams import fit_stream
from lightning_rnf.tasks import runs

other = pytest.importorskip(OTHER)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*relevance is not conserved:UserWarning"),
    pytest.mark.filterwarnings("ignore:no free units are left:UserWarning"),  # as torch's version rounds
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`:UserWarning"),
]


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return one == two


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not equal(found[key], expected[key])]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What comes of the program under `lightning.pytorch`."""
    return program(LIGHTNING, tmp_path_factory.mktemp("lightning"))


def test_the_program_freezes_recalls_and_reports(expected):
    assert torch.equal(expected["then"], expected["now"])
    assert torch.equal(expected["then"], expected["restored"])
    assert list(expected["masks"]) == list(DIGITS)
    assert any(0 < mask.sum() < len(mask) for mask in expected["masks"][DIGITS[1]].values())
    assert expected["tests"][0] == expected["tests"][1] == expected["report"][DIGITS[1]][DIGITS[0]]
    assert expected["hooks"] == [True, True]
    assert {f"{task}-ended.ckpt" for task in DIGITS} < set(expected["files"])
    assert {one for each in expected["summaries"] for one in each} == {"UnitSummary"}
    assert {"rnf/free_capacity", "accuracy"} < expected["numbers"].keys()


def test_it_gives_the_same_bit_for_bit_under_pytorch_lightning(expected, tmp_path):
    assert_equal(program(OTHER, tmp_path), expected)


def test_the_callback_of_the_other_package_in_its_list_works_too(expected, tmp_path):
    if compare_version(OTHER, operator.lt, "2.6"):  # asks of each in the list what only callbacks of its own know
        with pytest.raises(ValueError, match="Expected a parent"):
            program(OTHER, tmp_path, lightning_rnf.RelevanceFreezing)
        return
    assert_equal(program(OTHER, tmp_path, lightning_rnf.RelevanceFreezing), expected)


def installed_alone(folder: Path) -> None:
    """Fill a folder with all packages of this environment but `lightning` and what stands on it."""
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for one in path.iterdir():
                is_left_out = one.name.partition("-")[0] in ("lightning", "lightning_rnf") or one.suffix == ".pth"
                if not is_left_out and not (folder / one.name).exists():
                    (folder / one.name).symlink_to(one)
    assert (folder / OTHER).exists()


def test_it_gives_the_same_where_pytorch_lightning_is_installed_alone(expected, tmp_path):
    site, folder = tmp_path / "site", tmp_path / "saved"
    site.mkdir()
    folder.mkdir()
    installed_alone(site)
    run = subprocess.run(
        [sys.executable, "-S", str(SUPPORT / "packaged.py"), OTHER, str(folder)],  # -S: nothing but PYTHONPATH
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (folder / "found.pt").exists(), run.stderr
    found = torch.load(folder / "found.pt", weights_only=True)
    imported = found.pop("imported")
    assert OTHER in imported
    assert "lightning" not in imported
    assert_equal(found, expected)
    # The command line is that of the other one.
    assert (run.returncode, run.stderr.splitlines()[-1]) == (2, "rnf: lightning is missing: pip install lightning")


def test_where_only_lightning_is_used_the_other_is_not_imported():
    assert ended(started(assert_imported, "lightning_rnf.callback", OTHER)) == [0]


def test_masks_of_two_processes_are_the_same_under_both(tmp_path):
    run = launched("several.py", 2, tmp_path)
    assert run.codes == [0, 0], run.stderr
    for found in run.ranks:
        assert found[OTHER].keys() == {"task-0"}
        assert equal(found[OTHER], found[LIGHTNING])


# -- what is asked of classes ------------------------------------------------------------------------------------------


def bare(kind):
    """An instance that nobody has set up."""
    return object.__new__(kind)


def quiet(*callbacks, **options):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return other.Trainer(callbacks=list(callbacks), accelerator="cpu", **{**off, "max_epochs": 1, **options})


def test_classes_have_twins_and_what_nobody_has_imported_has_none(monkeypatch):
    assert either(lightning.pytorch.Trainer, lightning.pytorch.Callback) == (
        *(lightning.pytorch.Trainer, lightning.pytorch.Callback),
        *(other.Trainer, other.Callback),
    )
    assert like(lightning.pytorch.Trainer, module_of(other)) is other.Trainer
    assert like(lightning.pytorch.Trainer, module_of(lightning.pytorch)) is lightning.pytorch.Trainer
    assert like(lightning.pytorch.Trainer, torch.nn.Linear(1, 1)) is lightning.pytorch.Trainer
    for name in [name for name in sys.modules if name.partition(".")[0] == OTHER]:
        monkeypatch.delitem(sys.modules, name)
    assert either(lightning.pytorch.Trainer) == (lightning.pytorch.Trainer,)


def test_our_classes_are_those_of_both_packages():
    own = ours(OTHER)
    assert issubclass(own.RelevanceFreezing, lightning_rnf.RelevanceFreezing)
    for package in (other, lightning.pytorch):
        assert issubclass(own.RelevanceFreezing, package.Callback)
        assert issubclass(own.UnitSummary, package.callbacks.ModelSummary)
        assert issubclass(own.RichUnitSummary, package.callbacks.RichModelSummary)
        for split in (own.split_by_class, lambda *given, **options: own.permute_pixels(*given[:2], 2)):
            assert all(isinstance(task, package.LightningDataModule) for task in stream(split))
    assert own.RelevanceFreezing.paper().state_key == lightning_rnf.RelevanceFreezing().state_key
    rnf = own.RelevanceFreezing()
    assert rnf in other.Trainer(callbacks=rnf, logger=False, accelerator="cpu").callbacks


def test_its_command_line_takes_the_callback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["project.py"])
    cli = pytest.importorskip("pytorch_lightning.cli")
    callback = {"class_path": "lightning_rnf.pytorch_lightning.RelevanceFreezing", "init_args": {"ration": 0.25}}
    given = {"trainer": {"logger": False, "accelerator": "cpu", "callbacks": [callback]}}
    options = {"run": False, "seed_everything_default": False, "save_config_callback": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse to Lightning
        made = cli.LightningCLI(type(module_of(other)), args=given, **options)
    assert made.trainer.callbacks[0].ending.selection.rations == (0.25,)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_whose_pieces_are_no_rows_are_refused(name):
    with pytest.raises(ValueError, match=f"can't work under {name}: "):
        runs.refuse_strategies(SimpleNamespace(strategy=bare(getattr(other.strategies, name)), world_size=2))


def test_launchers_that_lose_the_state_are_refused():
    with pytest.raises(ValueError, match="spawned and forked processes take the finished tasks with them"):
        runs.refuse_strategies(quiet(strategy="ddp_spawn", devices=2))


def test_rows_spread_by_the_other_package_are_looked_at():
    strategy = bare(other.strategies.ModelParallelStrategy)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match="ModelParallelStrategy spreads each layer over 2 processes"):
        runs.check_sharding(SimpleNamespace(strategy=strategy, world_size=2), module_of(other))


def test_averaging_behind_us_is_warned_of():
    rnf = ours(OTHER).RelevanceFreezing()
    averaging = other.callbacks.StochasticWeightAveraging(1e-2)
    with pytest.warns(UserWarning, match="StochasticWeightAveraging writes its averaged weights after"):
        runs._warn_of_averages(SimpleNamespace(callbacks=[rnf, averaging]), rnf)


def test_an_early_stopping_of_an_earlier_fit_is_told_of():
    own, pl = ours(OTHER), other
    stopping = pl.callbacks.EarlyStopping("accuracy", patience=1, mode="max")
    stopping.best_score, stopping.wait_count = torch.tensor(2.0), 1  # no accuracy is better
    model, task = module_of(pl), stream(own.split_by_class)[0]
    model.heads.activate(task.task)
    with pytest.warns(UserWarning, match="EarlyStopping.monitor='accuracy'. has ended the fit at epoch 1 of 3 by what"):
        quiet(own.RelevanceFreezing(), stopping, max_epochs=3).fit(model, datamodule=task)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_a_module_that_validates_nothing_gives_reference_data_or_is_told_that_it_lacks_them():
    model, rnf, task = module_of(other), ours(OTHER).RelevanceFreezing(), stream(ours(OTHER).split_by_class)[0]
    model.heads.activate(task.task)
    with pytest.raises(ValueError, match="no reference data: the fit's validation data is missing"):
        quiet(rnf, limit_val_batches=0).fit(model, task.train_dataloader())
    model.val_dataloader = task.val_dataloader
    quiet(rnf, limit_val_batches=0).fit(model, task.train_dataloader())
    assert rnf.state.tasks["task-0"].samples == len(task.validation)


@pytest.mark.parametrize("options", [{"max_time": "00:01:00:00"}, {}])
def test_a_limit_of_time_leaves_no_epochs_for_a_recovery(options):
    from lightning_rnf.tasks.recovery import Recovery

    epochs = Recovery("auto", None, False).epochs_of(quiet(max_epochs=8, **options), several=False, begun=0)
    assert (epochs == 0) == bool(options)


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_is_shown_in_its_bars(name):
    bar = getattr(other.callbacks, name)()
    bar.progress = object()  # of rich, which draws only while the fit runs
    with shown(SimpleNamespace(progress_bar_callback=bar, is_global_zero=True)) as show:
        assert show is not silent


def test_a_stream_keeps_its_checkpoints_and_goes_on_from_them(tmp_path):
    own, model = ours(OTHER), module_of(other)

    def trainer(*, callbacks):
        return quiet(*callbacks, enable_checkpointing=True)

    tasks = stream(own.split_by_class)
    accuracies = fit_stream(model, tasks, own.RelevanceFreezing(), trainer, folder=tmp_path)
    assert accuracies[0, 0] == accuracies[1, 0]
    again = fit_stream(module_of(other), tasks, own.RelevanceFreezing(), trainer, folder=tmp_path)
    assert torch.equal(accuracies.nan_to_num(), again.nan_to_num())
    assert sorted(path.name for path in (tmp_path / DIGITS[0]).iterdir())[0] == f"{DIGITS[0]}-ended.ckpt"


def test_a_module_of_one_package_in_a_trainer_of_the_other_is_refused_by_lightning():
    with pytest.raises(TypeError, match=r"`model` must be a `LightningModule`.*got `.*Module`"):
        quiet(ours(OTHER).RelevanceFreezing()).fit(module_of(lightning.pytorch))

"""The promises on one GPU: every precision, fused optimizers, NCCL, checkpoints and exports that change the device.

Each test runs on the CPU, too, with what the CPU has of it: where there is no GPU, that shows that the test is right.
"""

from __future__ import annotations

import copy
import math
import os
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from apart import held_out, train_apart
from lightning.pytorch.plugins import MixedPrecision
from training import (
    Classifier,
    ConvClassifier,
    clusters,
    frozen_entries,
    frozen_rows,
    inputs,
    plain,
    task_data,
    trainer,
)

from lightning_rnf import RelevanceFreezing
from lightning_rnf.relevance.attribution import attribute

KIND = {"cpu": "cpu", "gpu": "cuda"}
INITIAL_SCALE = 2.0**24  # gradients of 1/32 don't fit into half precision then: the first steps are skipped
MODELS = pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true")
pytestmark = [
    pytest.mark.filterwarnings("ignore:no free units are left:UserWarning"),
    # What torch 2.11 says of itself: a process's first product on the GPU, and any DDP.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
    pytest.mark.parametrize(
        "device",
        [
            "cpu",
            pytest.param(
                "gpu",
                marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
            ),
        ],
    ),
]


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    pl.seed_everything(0, verbose=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for comparisons across devices


@pytest.fixture
def process_group():
    """Takes back the environment and the process group that strategy="ddp" leaves."""
    with mock.patch.dict(os.environ):
        yield
    torch.distributed.destroy_process_group()


def fit(model, callback, task, device, precision="32-true", callbacks=(), **options):
    """Train one task; how many steps the gradient scaler skipped."""
    model.heads.activate(task)
    scaler = torch.amp.GradScaler(KIND[device], init_scale=INITIAL_SCALE)
    chosen = {"precision": precision}
    if precision == "16-mixed":
        chosen = {"plugins": [MixedPrecision(precision, KIND[device], scaler)]}
    own = trainer(*callbacks, *([callback] if callback else []), accelerator=device, devices=1, **chosen, **options)
    own.fit(model, datamodule=task_data(task))
    return round(math.log2(INITIAL_SCALE / scaler.get_scale()))


def recalled(model, callback, task, device, precision="32-true"):
    """The logits of a finished task, on the device and in the precision of its fit; the model stays there."""
    model.to(KIND[device])
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    with callback.recall(task, model), torch.no_grad(), torch.autocast(KIND[device], dtype, enabled=dtype is not None):
        return model(inputs().to(KIND[device], model.dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
@MODELS
def test_frozen_rows_are_bit_equal_and_recall_bit_identical(model_type, precision, device):
    model = model_type(weight_decay=1.0)  # less is rounded away in bfloat16, and would move no row that isn't held
    rnf, before, rows = RelevanceFreezing(criterion=0.1), {}, {}
    for task in "abc":
        skipped = fit(model, rnf, task, device, precision)
        assert (0 < skipped < 20) == (precision == "16-mixed")
        now = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        for name, (frozen, values) in rows.items():
            assert torch.equal(now[name][frozen], values), (task, name)
        rows = {name: (mask, now[name][mask]) for name, mask in frozen_entries(rnf, model).items()}
        before[task] = recalled(model, rnf, task, device, precision)
        assert before[task].device.type == KIND[device]
        for earlier, logits in before.items():
            assert torch.equal(recalled(model, rnf, earlier, device, precision), logits), (task, earlier)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimizers(optimizer, precision, device):
    model, rnf = Classifier(optimizer, weight_decay=0.1, fused=True), RelevanceFreezing(criterion=0.1)
    fit(model, rnf, "a", device, precision)
    frozen, start = frozen_entries(rnf, model), copy.deepcopy(model.state_dict())
    assert 0 < rnf.free_capacity < 1
    before = recalled(model, rnf, "a", device, precision)
    assert (fit(model, rnf, "b", device, precision) > 0) == (precision == "16-mixed")
    after = model.state_dict()
    for name, mask in frozen.items():
        assert torch.equal(after[name].cpu()[mask], start[name].cpu()[mask])
        assert not torch.equal(after[name].cpu()[~mask], start[name].cpu()[~mask])
    assert torch.equal(recalled(model, rnf, "a", device, precision), before)


def test_elasticity_moves_relevant_units_a_tenth_as_far_under_a_fused_optimizer(device):
    moved = []
    for elasticity in (0.1, 1.0):
        pl.seed_everything(0, verbose=False)
        model = Classifier(torch.optim.Adam, fused=True)
        with pytest.warns(UserWarning, match="recall will not be exact"):
            rnf = RelevanceFreezing(criterion=0.1, elasticity=elasticity)
        fit(model, rnf, "a", device)
        start = frozen_rows(model, rnf)["body.0.weight"]
        relevant = rnf.state.tasks["a"].relevant["body.0"]
        fit(model, rnf, "b", device, max_steps=1, max_epochs=-1)
        moved.append(model.body[0].weight.detach()[relevant] - start)
    torch.testing.assert_close(moved[0], 0.1 * moved[1], rtol=0.01, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*sync_dist=True:UserWarning")
@MODELS
def test_ddp_in_one_process(model_type, device, process_group):
    model, rnf = model_type(weight_decay=0.1), RelevanceFreezing(criterion=0.1)
    fit(model, rnf, "a", device, strategy="ddp")
    assert torch.distributed.get_backend() == {"cpu": "gloo", "gpu": "nccl"}[device]
    frozen = frozen_entries(rnf, model)
    rows = {name: model.get_parameter(name).detach().cpu()[mask] for name, mask in frozen.items()}
    before = recalled(model, rnf, "a", device)
    fit(model.cpu(), rnf, "b", device, strategy="ddp")
    for name, mask in frozen.items():
        assert torch.equal(model.get_parameter(name).detach().cpu()[mask], rows[name])
    assert torch.equal(recalled(model, rnf, "a", device), before)
    assert list(rnf.state.tasks) == ["a", "b"]


@MODELS
def test_relevance_is_that_of_the_cpu_and_same_seed_same_masks(model_type, device):
    found = []
    for _ in range(2):
        pl.seed_everything(0, verbose=False)
        model, rnf = model_type(), RelevanceFreezing(criterion=0.1)
        fit(model, rnf, "a", device)
        found.append(rnf.state.tasks["a"])
        assert all(mask.device.type == "cpu" for mask in found[-1].relevant.values())
    assert all(torch.equal(mask, found[1].relevant[name]) for name, mask in found[0].relevant.items())
    batch = clusters("a", 320, seed=1).tensors
    on_cpu = attribute(model.cpu(), rnf.state.layers, [batch]).relevance
    there = [tensor.to(KIND[device]) for tensor in batch]
    on_device = attribute(model.to(KIND[device]), rnf.state.layers, [there]).relevance
    for name, relevance in on_cpu.items():
        torch.testing.assert_close(on_device[name], relevance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm_statistics", ["per_task", "pinned"])
def test_recovery_ration_and_free_units_that_are_reset(norm_statistics, device):
    model = ConvClassifier()
    rnf = RelevanceFreezing(
        criterion=0.5, recovery_epochs=2, ration=0.5, reset_free=True, norm_statistics=norm_statistics
    )
    fit(model, rnf, "a", device, max_epochs=4)
    before = recalled(model, rnf, "a", device)
    fit(model.cpu(), rnf, "b", device, max_epochs=4)
    assert torch.equal(recalled(model, rnf, "a", device), before)
    assert [record.recovery_epochs for record in rnf.state.tasks.values()] == [2, 2]
    assert all(share >= 0.25 for share in rnf.capacity().values())


@MODELS
def test_a_checkpoint_goes_on_on_the_cpu(model_type, device, tmp_path):
    model, rnf = model_type(), RelevanceFreezing(criterion=0.1)
    model.heads.activate("a")
    first = trainer(rnf, accelerator=device, devices=1)
    first.fit(model, datamodule=task_data("a"))
    first.save_checkpoint(tmp_path / "a.ckpt")
    there = recalled(model, rnf, "a", device).cpu()

    saved = torch.load(tmp_path / "a.ckpt", map_location="cpu", weights_only=True)
    other, fresh = model_type(), RelevanceFreezing(criterion=0.1)
    other.load_state_dict(saved["state_dict"])
    fresh.load_state_dict(saved["callbacks"]["RelevanceFreezing"])
    before = recalled(other, fresh, "a", "cpu")
    torch.testing.assert_close(before, there, rtol=1e-4, atol=1e-5)

    other, fresh = model_type(), RelevanceFreezing(criterion=0.1)
    other.heads.activate("b")
    trainer(fresh, max_epochs=5).fit(other, datamodule=task_data("b"), ckpt_path=tmp_path / "a.ckpt")
    assert list(fresh.state.tasks) == ["a", "b"]
    assert torch.equal(recalled(other, fresh, "a", "cpu"), before)


@MODELS
def test_an_export_is_where_the_model_is_and_runs_elsewhere(model_type, device):
    model, rnf = model_type(), RelevanceFreezing(criterion=0.1)
    for task in "ab":
        fit(model, rnf, task, device)
    logits = recalled(model, rnf, "a", device)
    model.heads.activate("a")
    small = rnf.export(model, "a")
    assert {tensor.device.type for tensor in small.state_dict().values()} == {KIND[device]}
    assert sum(map(torch.numel, small.parameters())) < sum(map(torch.numel, model.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(small(inputs().to(KIND[device])), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small.cpu()(inputs()), logits.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fit_leaves_the_model_where_it_would_be_without_the_callback(precision, device):
    seen = {}
    for name, rnf in (("with", plain(criterion=0.1)), ("without", None)):
        pl.seed_everything(0, verbose=False)
        model, watched = ConvClassifier(), Watch()
        fit(model, rnf, "a", device, precision, callbacks=[watched])
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        seen[name] = {
            "forms": {key: (tensor.device, tensor.dtype, tensor.requires_grad) for key, tensor in tensors.items()},
            "training": [module.training for module in model.modules()],
            "values": tensors,
            **watched.seen,
        }
    values = [one.pop("values") for one in seen.values()]
    states = [one.pop("random state") for one in seen.values()]
    assert seen["with"] == seen["without"]
    assert torch.equal(*states)  # nothing was drawn
    assert all(torch.equal(value, values[1][key]) for key, value in values[0].items())


class Watch(pl.Callback):
    """Where and how the model is when the fit has ended and it is still on its device."""

    def on_fit_end(self, trainer, pl_module):
        self.seen = {
            "then": [(parameter.device, parameter.dtype) for parameter in pl_module.parameters()],
            "mode": [module.training for module in pl_module.modules()],
            "random state": torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state(),
        }


def test_a_trainer_recalls_by_itself_on_the_device(device):
    model, rnf = ConvClassifier(), RelevanceFreezing(criterion=0.1)
    for task in "ab":
        fit(model, rnf, task, device)
    own = trainer(rnf, accelerator=device, devices=1)
    (tested,) = own.test(model, datamodule=task_data("a"), verbose=False)
    x, y = (tensor.to(KIND[device]) for tensor in clusters("a", 320, seed=2).tensors)
    with rnf.recall("a", model.to(KIND[device])), torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert tested["test_accuracy"] == pytest.approx(accuracy)


@MODELS
def test_a_task_that_nobody_names_is_found_on_the_device(model_type, device):
    model, rnf = model_type(), RelevanceFreezing(criterion=0.1, portraits=True)
    train_apart(model, rnf, "a", "b", accelerator=device, devices=1, max_epochs=3)
    model.to(KIND[device])
    x, names = held_out("a", "b")
    found = rnf.infer_task(x.to(KIND[device]), model)
    assert sum(map(str.__eq__, found.names, names)) > 0.9 * len(names)
    assert found.logits.device.type == KIND[device]
    with rnf.recall("auto", model), torch.no_grad():
        assert torch.equal(model(x.to(KIND[device])), found.logits)
    elsewhere = rnf.infer_task(x, model.cpu())
    assert sum(map(str.__eq__, found.names, elsewhere.names)) > 0.99 * len(names)  # rounding may tip a doubtful one


def test_scores_of_a_user_s_function_are_copied_to_the_cpu(device):
    def biases(module, layers, batches, predict):
        return {layer.name: module.get_parameter(f"{layer.name}.bias") for layer in layers}

    model, rnf = Classifier(), RelevanceFreezing(criterion=0.1, importance=biases)
    fit(model, rnf, "a", device)
    kept = {name: scores.tolist() for name, scores in rnf.state.tasks["a"].relevance.items()}
    copy.deepcopy(rnf)  # what hangs in a graph can't be copied
    fit(model, rnf, "b", device)
    for name, scores in rnf.state.tasks["a"].relevance.items():
        assert scores.device.type == "cpu"
        assert scores.tolist() == kept[name]


@MODELS
def test_a_state_that_was_loaded_to_the_device_is_one_on_the_cpu(model_type, device, tmp_path):
    model, rnf = model_type(), RelevanceFreezing(criterion=0.1, recovery_epochs=1, reset_free=True)
    fit(model, rnf, "a", device)
    torch.save(rnf.state_dict(), tmp_path / "state.pt")
    fresh = RelevanceFreezing(criterion=0.1, recovery_epochs=1, reset_free=True)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", map_location=KIND[device], weights_only=True))
    record = fresh.state.tasks["a"]
    for tensors in (record.relevant, record.relevance, record.norm_statistics, fresh.state.initial):
        assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    before = recalled(model, rnf, "a", device)
    fit(model, fresh, "b", device)
    assert torch.equal(recalled(model, fresh, "a", device), before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_report_compares_logits_where_the_task_has_ended(precision, device):
    model, callback = Classifier(), RelevanceFreezing()
    for task in ("a", "b"):
        fit(model, callback, task, device, precision, max_epochs=1)
    before = {name: (value.device, value.data_ptr()) for name, value in model.named_parameters()}
    report = callback.report(model)
    assert report.drift == {"a": 0.0, "b": 0.0}
    assert report.is_sound
    assert {name: (value.device, value.data_ptr()) for name, value in model.named_parameters()} == before

"""Fits in which what is frozen is not put back after every step: it has its bits whenever anybody can look."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from training import Classifier, frozen_entries, plain, task_data, trainer

from lightning_rnf.freezing.held import HeldRows


class ByHand(Classifier):
    """Steps its optimizer itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


class Watching(pl.Callback):
    """After each batch and each epoch: whether frozen entries have the bits that they began with."""

    def __init__(self, frozen):
        self.frozen, self.before, self.looks = frozen, {}, 0

    def on_train_start(self, trainer, pl_module):
        self.before = self._now(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self._look(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._look(pl_module)

    def on_validation_start(self, trainer, pl_module):
        self._look(pl_module)

    def _look(self, module):
        self.looks += 1
        for name, values in self._now(module).items():
            assert torch.equal(values, self.before[name]), name

    def _now(self, module):
        return {name: module.get_parameter(name).detach()[mask].clone() for name, mask in self.frozen.items()}


class Writing(pl.Callback):
    """Writes to what is frozen, after each batch."""

    def __init__(self, *, uncounted):
        self.uncounted = uncounted

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *args):
        weight = pl_module.body[3].weight
        (weight.data if self.uncounted else weight).clamp_(-0.01, 0.01)


@pytest.fixture
def pins(monkeypatch):
    counted = []
    pin = HeldRows.pin
    monkeypatch.setattr(HeldRows, "pin", lambda rows: (counted.append(rows.parameter), pin(rows)))
    return counted


def second_fit(kind, *before, after=(), freeze="connections", options=None, **of_trainer):
    """Two tasks; the second is watched. Returns the model, its callback and the watch."""
    torch.manual_seed(0)
    model, rnf = kind(optimizer=torch.optim.Adam, **options or {}), plain(criterion=0.1, ration=0.4, freeze=freeze)
    model.heads.activate("a")
    trainer(rnf, max_epochs=1).fit(model, datamodule=task_data("a"))
    watch = Watching(frozen_entries(rnf, model))
    model.heads.activate("b")
    run = trainer(*before, rnf, watch, *after, max_epochs=2, num_sanity_val_steps=0, **of_trainer)
    run.fit(model, datamodule=task_data("b"))
    return model, rnf, watch


@pytest.mark.parametrize("freeze", ["connections", "units"])
@pytest.mark.parametrize(
    ("kind", "of_trainer"),
    [
        (Classifier, {}),
        (Classifier, {"precision": "bf16-mixed"}),
        (Classifier, {"accumulate_grad_batches": 3}),
        (ByHand, {}),
    ],
)
def test_no_step_of_such_a_fit_puts_anything_back(kind, of_trainer, freeze, pins):
    *_, watch = second_fit(kind, freeze=freeze, **of_trainer)
    assert watch.looks > 20
    # Each validation's start, and the end: never the 20 batches.
    assert max(sum(one is other for other in pins) for one in pins) < 10


@pytest.mark.parametrize(("options", "of_trainer"), [({}, {"gradient_clip_val": 0.1}), ({"weight_decay": 0.1}, {})])
def test_every_step_of_others_does(options, of_trainer, pins):
    model, _, watch = second_fit(Classifier, options=options, **of_trainer)
    assert watch.looks > 20
    for layer in (model.body[0], model.body[3]):
        assert sum(one is layer.weight for one in pins) >= 20


def test_what_a_callback_writes_is_undone_before_anybody_looks():
    *_, watch = second_fit(Classifier, Writing(uncounted=False))
    assert watch.looks > 20


def test_what_a_callback_writes_uncounted_is_warned_of_once_and_undone_in_the_end():
    frozen = []

    class Seen(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            frozen.append(copy.deepcopy(pl_module.body[3].weight.detach()))

    with pytest.warns(UserWarning, match=r"body\.3\.weight: frozen rows were moved") as warned:
        model, _, watch = second_fit(Classifier, after=[Seen(), Writing(uncounted=True)])
    assert sum("were moved" in str(one.message) for one in warned) == 1
    mask = watch.frozen["body.3.weight"]
    assert mask.any()
    assert not torch.equal(frozen[0].clamp(-0.01, 0.01)[mask], frozen[0][mask])
    assert torch.equal(model.body[3].weight.detach()[mask], frozen[0][mask])


def test_a_checkpoint_has_the_second_moments_that_it_would_have(tmp_path):
    class Saving(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.heads.active == "b":
                trainer.save_checkpoint(tmp_path / "b.ckpt")
                self.filled = trainer.optimizers[0].state[pl_module.body[0].weight]["exp_avg_sq"].clone()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.during = trainer.optimizers[0].state[pl_module.body[0].weight]["exp_avg_sq"].clone()

    saving = Saving()
    model, _, watch = second_fit(Classifier, after=[saving])
    number = [name for name, _ in model.named_parameters()].index("body.0.weight")
    mask = watch.frozen["body.0.weight"]
    mask = mask.view(*mask.shape, *[1] * (2 - mask.ndim)).expand(40, 6)
    saved = torch.load(tmp_path / "b.ckpt", weights_only=False)["optimizer_states"][0]["state"][number]["exp_avg_sq"]
    assert mask.any()
    assert (saving.during[mask] > 0.9).all()
    assert not saved[mask].any()
    assert not saving.filled[mask].any()  # the next step fills them again

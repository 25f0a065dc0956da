"""A project as a user writes it who types everything: the guide's way through the package, checked and run.

`mypy --strict` and `pyright` in its strict mode read it beside the installed package, which has to tell them enough.
``python typed_project.py FOLDER`` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_rnf import (
    AccuracyDrop,
    Criterion,
    FreeCapacity,
    FreezeState,
    MetricDrop,
    MultiHead,
    RelevanceFreezing,
    RetentionReport,
    Size,
    StreamResult,
    SubnetworkScore,
    TaskInference,
    TaskRecord,
    UnitLayer,
    UnitMap,
    UnitSummary,
    plot_retention,
    register_layer,
    size_of,
)
from lightning_rnf.metrics import AverageAccuracy, average_accuracy, forgetting
from lightning_rnf.streams import TaskDataModule, fit_stream, split_by_class

Batch = tuple[Tensor, Tensor]
CLASSES = {"digits-01": 2, "digits-23": 2}


class Doubled(nn.Module):
    """A layer of one's own: its weight has a row for each unit."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(2 * x, self.weight)


class Classifier(LightningModule):
    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), second or nn.Linear(24, 24), nn.ReLU())
        self.heads = MultiHead(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.body(x))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class EnoughUnits(Criterion):
    """A criterion of one's own: as good as it was, and no fewer than two units."""

    def __call__(self, score: SubnetworkScore) -> bool:
        return score.accuracy >= score.baseline - 0.05 and score.relevant >= 2


def answers(module: nn.Module, batch: Batch) -> Batch:
    """How logits and targets come of a batch."""
    x, y = batch
    return module(x), y


def largest_weights(
    module: nn.Module, layers: Sequence[UnitLayer], batches: Iterable[Batch], predict: object
) -> dict[str, Tensor]:
    """An importance of one's own."""
    return {layer.name: module.get_parameter(f"{layer.name}.weight").detach().abs().sum(1) for layer in layers}


def name_of_task(trainer: Trainer, module: LightningModule) -> str:
    heads = module.heads
    assert isinstance(heads, MultiHead)
    assert heads.active is not None
    return heads.active


class TasksInTurn(Callback):
    """Two tasks in one fit."""

    def __init__(self, rnf: RelevanceFreezing) -> None:
        self.rnf = rnf
        self.record: TaskRecord | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and isinstance(pl_module, Classifier):
            self.record = self.rnf.end_task("digits-01")
            pl_module.heads.activate("digits-23")


def stream() -> list[TaskDataModule]:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(4, 6, generator=generator)

    def drawn(samples: int) -> TensorDataset:
        labels = torch.arange(samples) % 4
        return TensorDataset(centres[labels] + torch.randn(samples, 6, generator=generator), labels)

    return split_by_class(drawn(640), drawn(240), [(0, 1), (2, 3)], name="digits", validation=0.3, batch_size=32)


def trainer_of(*callbacks: Callback, epochs: int = 2, folder: Path | None = None) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
    )


def fitted(folder: Path) -> None:
    """README's twelve lines and the guide's pages behind them."""
    model, tasks = Classifier(), stream()
    rnf = RelevanceFreezing(tasks=2, portraits=True)
    for datamodule in tasks:
        model.heads.activate(datamodule.task)
        trainer_of(rnf, UnitSummary(), folder=folder / datamodule.task).fit(model, datamodule=datamodule)

    x = torch.randn(8, 6)
    with rnf.recall("digits-01"):
        then: Tensor = model(x)
    of_samples = ["digits-01", "digits-23"] * 4
    with rnf.recall(of_samples):
        mixed: Tensor = model(x)
    assert torch.equal(then.argmax(1)[::2], mixed.argmax(1)[::2])
    found: TaskInference = rnf.infer_task(x)
    names: Sequence[str | None] = found.names
    scores: Tensor = found.scores
    assert len(names) == len(scores) == 8

    free_weights: float = rnf.free_weights
    left: dict[str, float] = rnf.weights_left()
    free_units: float = rnf.free_capacity
    capacity: dict[str, float] = rnf.capacity()
    assert 0 < free_weights <= 1
    assert 0 < free_units <= 1
    assert left.keys()
    assert capacity.keys()
    state: FreezeState = rnf.state
    record: TaskRecord = state.tasks["digits-01"]
    relevant: Tensor = record.relevant["body.0"]
    assert relevant.dtype == torch.bool
    assert record.accepted

    for datamodule in tasks:
        model.heads.activate(datamodule.task)
        trainer_of(rnf).test(model, datamodule=datamodule, verbose=False)
    report: RetentionReport = rnf.report()
    sound: bool | None = report.is_sound
    assert sound is not False
    assert "free capacity" in str(report)
    (folder / "report.html").write_text(report.to_html(), encoding="utf-8")
    report.plot(folder / "retention.png")
    (folder / "report.md").write_text(report.to_markdown() + report.to_json(), encoding="utf-8")

    units: UnitMap = UnitMap.of(model, next(iter(tasks[0].val_dataloader())))
    assert "body.2" in str(units)
    small: nn.Module = rnf.export(model, "digits-01")
    size: Size = size_of(small, x)
    assert size.parameters <= size_of(model, x).parameters

    rnf.save(folder / "masks.safetensors")
    other = RelevanceFreezing()
    other.load(folder / "masks.safetensors", model)
    freed: dict[str, int] = other.forget("digits-23")
    wider: dict[str, int] = rnf.widen(model, 0.5, layers="body.*")
    assert freed.keys()
    assert wider.keys() <= capacity.keys()

    model = Classifier()
    model.heads.add("digits-45", 2)
    rnf = RelevanceFreezing()
    rnf.restore(next(folder.rglob("digits-23-ended.ckpt")), model)
    with rnf.recall("digits-01", model):
        assert model(x).shape == then.shape


def configured() -> None:
    """Arguments that are functions and classes of one's own."""
    register_layer(Doubled, axis=-1)
    model, tasks = Classifier(Doubled(24, 24)), stream()
    rnf = RelevanceFreezing(
        lambda trainer, module: tasks[0],
        criterion=EnoughUnits() & FreeCapacity(0.1),
        importance=largest_weights,
        predict=answers,
        task=name_of_task,
        elasticity={"body.*": 0.0},
        ration=(0.5, 1.0),
        recovery_epochs=0,
    )
    old = DataLoader(tasks[1].validation, batch_size=32)
    model.heads.activate("digits-23")
    record: TaskRecord = rnf.protect(model, old, name="digits-23", criterion=AccuracyDrop(0.5))
    assert record.samples == len(tasks[1].val_dataloader().dataset)  # type: ignore[arg-type]
    model.heads.activate("digits-01")
    trainer_of(rnf).fit(model, datamodule=tasks[0])

    by_metric = MetricDrop(MulticlassAccuracy(num_classes=2), tolerance=0.1)
    turn = TasksInTurn(RelevanceFreezing(criterion=by_metric, recovery_epochs=0, task=name_of_task))
    trainer_of(turn, turn.rnf, epochs=4).fit(Classifier(), datamodule=tasks[0])
    assert turn.record is not None
    assert list(turn.rnf.state.tasks) == list(CLASSES)


def streamed(folder: Path) -> None:
    """The loop over tasks that comes with the package, and the numbers of the field."""
    matrices: list[Tensor] = []
    for callback in (None, RelevanceFreezing(), RelevanceFreezing.paper()):
        factory = partial(
            Trainer,
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        matrices.append(fit_stream(Classifier(), stream(), callback, factory))
    naive, exact, _ = matrices
    assert exact[0, 0] == exact[1, 0]
    assert float(forgetting(exact)) == 0.0 <= float(average_accuracy(exact)[-1])
    results = [StreamResult(method, [*CLASSES], matrix) for method, matrix in (("naive", naive), ("exact", exact))]
    plot_retention(results, folder / "methods.png", methods=["naive", "exact"])
    average = AverageAccuracy(2)
    average.update(torch.eye(2), torch.tensor([0, 1]), trained=0, task=0)
    assert float(average.compute()) == 1.0


def main(folder: Path) -> None:
    seed_everything(0, verbose=False)
    fitted(folder)
    configured()
    streamed(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Lightning modules of other people's packages, as they are: only heads are put in, and the callback is added.

Needs the extra ``projects``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from documents import blocks
from torch import nn
from torch.utils.data import DataLoader, StackDataset
from torchmetrics.classification import MultilabelF1Score
from training import trainer

from lightning_rnf import MetricDrop, MultiHead, RelevanceFreezing

# What these packages and torch do that torch has deprecated is theirs.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")

TASKS = {"first": 0, "second": 1}


def images(seed: int, *, several: bool = False) -> StackDataset:
    """Images (3, 16, 16) whose mean colour tells the class, or all the labels."""
    generator = torch.Generator().manual_seed(seed)
    label = (
        torch.randint(2, (160, 3), generator=generator) if several else torch.randint(3, (160,), generator=generator)
    )
    colour = (label if several else nn.functional.one_hot(label, 3)).roll(seed % 2, dims=-1).float()
    x = colour[:, :, None, None] + torch.randn(160, 3, 16, 16, generator=generator) / 2
    return StackDataset(x=x, y=label)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def loader(data: StackDataset, keys: tuple[str, str] | None, shuffle: bool = False) -> DataLoader:
    def collate(items: list[dict[str, Any]]) -> Any:
        x, y = torch.stack([item["x"] for item in items]), torch.stack([item["y"] for item in items])
        return (x, y) if keys is None else dict(zip(keys, (x, y), strict=True))

    return DataLoader(data, batch_size=32, shuffle=shuffle, drop_last=shuffle, collate_fn=collate)


def keeps_its_tasks(
    module: Any, heads: MultiHead, keys: tuple[str, str] | None, loss: str, several: bool = False, **options: Any
) -> RelevanceFreezing:
    """Train two tasks, and see the first one's logits bit-equal after the second in the Trainer's own test run."""
    predict: Callable[..., Any] | None = None
    if keys is not None:

        def predict(module: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return module(batch[keys[0]]), batch[keys[1]]

    rnf = RelevanceFreezing(predict=predict, task=lambda trainer, module: heads.active, reset_free=True, **options)
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    kept: dict[str, torch.Tensor] = {}
    tested: dict[str, float] = {}
    for name, seed in TASKS.items():
        heads.activate(name)
        data = [loader(images(seed + 2 * part, several=several), keys, shuffle=part == 0) for part in range(3)]
        trainer(rnf, max_epochs=3).fit(module, data[0], data[1])
        with torch.no_grad(), rnf.recall(name, module):
            kept[name] = module(x)
        # Metrics of torch_uncertainty keep inference tensors over a reset, and break in the next fit's validation.
        tested[name] = trainer(rnf, inference_mode=False).validate(module, data[2], verbose=False)[0][loss]

    assert list(rnf.state.tasks) == list(TASKS)
    for name, seed in TASKS.items():
        record = rnf.state.task(name)
        assert record.accuracy > 0.9
        assert record.accepted
        with torch.no_grad(), rnf.recall(name, module):
            torch.testing.assert_close(module(x), kept[name], rtol=0, atol=0)
        heads.activate(name)
        data = loader(images(seed + 4, several=several), keys)
        assert trainer(rnf).validate(module, data, verbose=False)[0][loss] == tested[name]
    return rnf


def test_classification_with_a_second_head():
    pytest.importorskip("torch_uncertainty")
    from torch_uncertainty.models.classification import lenet
    from torch_uncertainty.routines import ClassificationRoutine

    net = lenet(in_channels=3, num_classes=3, norm=nn.BatchNorm2d, dropout_rate=0.1)
    heads = net.fc3 = MultiHead(84, dict.fromkeys(TASKS, 3))
    routine = ClassificationRoutine(
        net, num_classes=3, loss=nn.CrossEntropyLoss(), optim_recipe=torch.optim.AdamW(net.parameters(), lr=3e-3)
    )
    rnf = keeps_its_tasks(routine, heads, None, "val/cls/NLL")
    assert 0 < rnf.free_capacity < 1


def test_the_example_of_the_readme():
    pytest.importorskip("torchgeo")
    (code,) = [block for block in blocks("python") if "torchgeo" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    names["heads"].activate("autumn")
    data = loader(images(0, several=True), ("image", "label"))
    trainer(names["rnf"], max_epochs=1).fit(names["module"], data, data)
    assert list(names["rnf"].state.tasks) == ["autumn"]


def test_several_labels_with_a_metric_of_torchmetrics():
    pytest.importorskip("torchgeo")
    from torchgeo.trainers import ClassificationTask

    module = ClassificationTask(model="resnet10t", task="multilabel", num_labels=3, loss="bce", lr=2e-3)
    heads = module.model.fc = MultiHead(module.model.num_features, dict.fromkeys(TASKS, 3))
    criterion = MetricDrop(MultilabelF1Score(num_labels=3), tolerance=0.03)
    rnf = keeps_its_tasks(module, heads, ("image", "label"), "val_loss", several=True, criterion=criterion)
    for record in rnf.state.tasks.values():
        made = (*record.evaluations, *record.recovery)
        *_, taken = [evaluation.score for evaluation in made if evaluation.score.cutoff == record.cutoff]
        assert record.accepted
        assert taken.baseline_values["MultilabelF1Score"] - taken.values["MultilabelF1Score"] <= 0.03


def test_batches_that_are_dicts():
    pytest.importorskip("lightning_uq_box")
    from lightning_uq_box.models import MLP
    from lightning_uq_box.uq_methods import DeterministicClassification

    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), MLP(n_inputs=48, n_hidden=[64, 64], n_outputs=3, dropout_p=0.1))
    module = DeterministicClassification(
        net, nn.CrossEntropyLoss(), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3)
    )
    heads = net[2].model[-1] = MultiHead(64, dict.fromkeys(TASKS, 3))
    keeps_its_tasks(module, heads, ("input", "target"), "val_loss")

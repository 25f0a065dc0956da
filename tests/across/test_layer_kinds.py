"""Layers that are not torch's, trained on two tasks: recall of the first is bit-equal, its network can be exported."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from kinds import Conv1D, Cosine, Linear
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import Classifier, frozen_entries, inputs, train, trainer

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap, register_layer
from lightning_rnf.anatomy import kinds
from lightning_rnf.relevance.attribution import attribute


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(kinds, "_REGISTERED", {})
    torch.manual_seed(0)


def conv1d() -> nn.Module:
    return nn.Sequential(Conv1D(40, 6), nn.GELU(), Conv1D(40, 40), nn.ReLU())


KINDS = {
    "Conv1D": conv1d,
    "Linear": lambda: nn.Sequential(Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), Linear(40, 40), nn.ReLU()),
    "registered": lambda: nn.Sequential(Cosine(6, 40), nn.ReLU(), Cosine(40, 40), nn.ReLU()),
}


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("case", KINDS)
def test_recall_is_bit_equal_after_a_second_task(case):
    register_layer(Cosine, axis=-1)
    model, rnf, x = Classifier(), RelevanceFreezing(), inputs()
    model.body = KINDS[case]()
    train(model, rnf, "a", max_epochs=3)
    assert len(rnf.state.layers) == 2
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    assert 0 < rnf.free_capacity < 1
    frozen = frozen_entries(rnf, model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, rnf, "b", max_epochs=3)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    report = rnf.report(model)
    assert report.is_sound
    for layer in rnf.state.layers:  # what is free has learned, and it is most of it
        moved = model.get_parameter(f"{layer.name}.weight") != weights[f"{layer.name}.weight"]
        held = frozen[f"{layer.name}.weight"]
        held = held.view(*held.shape, *[1] * (moved.ndim - held.ndim)).expand_as(moved)
        assert not (moved & held).any()
        assert moved[~held].any()
    small = rnf.export(model, "a")
    assert (small(x) - before).abs().max() < 1e-5 * before.abs().max()
    # Its file knows which dimension of the weight has the units.
    again = RelevanceFreezing()
    again.state = type(rnf.state).from_plain(rnf.state.to_plain())
    with again.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


# -- the packages themselves, where they are --------------------------------------------------------------------------


def two_tasks(model: Any, loaders: Any, predict: Any, example: Any) -> RelevanceFreezing:
    """Train on two tasks and check that the first is recalled to the bit."""
    rnf = RelevanceFreezing(predict=predict)
    before = None
    for task in ("a", "b"):
        model.heads.activate(task)

        class Data(pl.LightningDataModule):
            def __init__(self, task: str) -> None:
                super().__init__()
                self.task = task

            def train_dataloader(self) -> Any:
                return loaders(self.task, 1, True)

            def val_dataloader(self) -> Any:
                return loaders(self.task, 2, False)

        trainer(rnf, max_epochs=2).fit(model, datamodule=Data(task))
        with rnf.recall("a", model), torch.no_grad():
            logits, _ = predict(model, example)
        before = logits if before is None else before
        assert torch.equal(logits, before)
    assert rnf.report(model).is_sound
    return rnf


class Learner(pl.LightningModule):
    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(*self.predicted(self, batch))

    def validation_step(self, batch: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gpt2():
    transformers = pytest.importorskip("transformers")

    class Gpt2(Learner):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.GPT2Config(
                vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=2, pad_token_id=0
            )
            self.net = transformers.GPT2ForSequenceClassification(config)
            self.net.score = self.heads = MultiHead(8, {"a": 2, "b": 2})

        @staticmethod
        def predicted(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
            return module.net(batch[0]).logits, batch[1]

    def loaders(task: str, seed: int, shuffle: bool) -> DataLoader:
        x = torch.randint(1, 20, (128, 6), generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, (x[:, -1] < 10 if task == "a" else x[:, -2] < 10).long()), 32, shuffle)

    model, example = Gpt2(), next(iter(loaders("a", 3, False)))
    units = UnitMap.of(model, example, Gpt2.predicted)
    assert {layer.name.rpartition(".")[2] for layer in units.layers} == {"c_attn", "c_proj", "c_fc"}
    assert all(
        layer.transposed == (len(model.get_parameter(f"{layer.name}.weight")), 1)[::-1] for layer in units.layers
    )
    two_tasks(model, loaders, Gpt2.predicted, example)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["GCNConv", "GATConv", "SAGEConv"])
def test_graph_networks(kind):
    geometric = pytest.importorskip("torch_geometric")
    layers = pytest.importorskip("torch_geometric.nn")
    from torch_geometric.loader import DataLoader as GraphLoader

    class Graphs(Learner):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (getattr(layers, kind)(inputs, 12) for inputs in (4, 12))
            self.heads = MultiHead(12, {"a": 2, "b": 2})

        @staticmethod
        def predicted(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
            x = module.first(batch.x, batch.edge_index).relu()
            x = module.second(x, batch.edge_index).relu()
            return module.heads(layers.global_mean_pool(x, batch.batch)), batch.y

    def loaders(task: str, seed: int, shuffle: bool) -> Any:
        generator, graphs = torch.Generator().manual_seed(seed), []
        for _ in range(128):
            x = torch.randn(5, 4, generator=generator)
            edges = torch.randint(0, 5, (2, 10), generator=generator)
            graphs.append(geometric.data.Data(x=x, edge_index=edges, y=(x[:, task == "b"].mean() > 0).long().view(1)))
        return GraphLoader(graphs, 32, shuffle)

    model, example = Graphs(), next(iter(loaders("a", 3, False)))
    rnf = two_tasks(model, loaders, Graphs.predicted, example)
    assert {layer.name.split(".")[0] for layer in rnf.state.layers} == {"first", "second"}
    if kind != "GATConv":  # whose attention is a softmax
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        found = attribute(model, rnf.state.layers, [example], Graphs.predicted).conservation
        assert found.notes == ()
        assert abs(found.ratios["<input>"] - 1) < 0.01

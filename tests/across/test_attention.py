"""Attention through whole tasks: its parts are ranked by themselves, and what a task keeps is kept to the bit."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.attribution import attribute

HEADS, SIZE, LENGTH, CLASSES = 2, 8, 6, 3


class Block(nn.Module):
    """Of a vision transformer, with one layer for queries, keys and values or one for each."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))
        self.qkv = nn.ModuleList([nn.Linear(SIZE, 3 * SIZE)] if fused else [nn.Linear(SIZE, SIZE) for _ in range(3)])
        self.proj = nn.Linear(SIZE, SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 2 * SIZE), nn.GELU(), nn.Linear(2 * SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        made = self.norms[0](x)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in torch.cat([layer(made) for layer in self.qkv], dim=-1).chunk(3, dim=-1)
        )
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(pl.LightningModule):
    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(4, SIZE)
        self.blocks = nn.Sequential(Block(fused), Block(fused))
        self.norm = nn.LayerNorm(SIZE)
        self.heads = MultiHead(SIZE, {"a": CLASSES, "b": CLASSES})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.norm(self.blocks(self.embed(x))).mean(dim=1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-3, weight_decay=0.1)


def data(task: str, samples: int = 96) -> DataLoader:
    """The class says which of the first tokens the last one is like, in one half of its numbers."""
    generator = torch.Generator().manual_seed(ord(task))
    labels = torch.arange(samples) % CLASSES
    x = torch.randn(samples, LENGTH, 4, generator=generator)
    half = slice(0, 2) if task == "a" else slice(2, 4)
    x[:, -1, half] = 2 * x[torch.arange(samples), labels, half]
    return DataLoader(TensorDataset(x, labels), 32)


def trained(model: Transformer, task: str, *callbacks: pl.Callback, epochs: int = 4) -> Transformer:
    model.heads.activate(task)
    trainer(*callbacks, max_epochs=epochs).fit(model, data(task), data(task))
    return model


@pytest.fixture
def learned() -> Transformer:
    pl.seed_everything(0, verbose=False)
    return trained(Transformer(), "a")


def apart(fused: Transformer) -> Transformer:
    """The same network with a layer for each of queries, keys and values."""
    twin = Transformer(fused=False)
    state = fused.state_dict()
    for key in [key for key in state if ".qkv.0." in key]:
        for number, part in enumerate(state.pop(key).chunk(3)):
            state[key.replace(".qkv.0.", f".qkv.{number}.")] = part
    twin.load_state_dict(state)
    twin.heads.activate("a")
    return twin


def callback(**options) -> RelevanceFreezing:
    return RelevanceFreezing(criterion=0.1, task=lambda trainer, module: module.heads.active, **options)


def recalled(rnf: RelevanceFreezing, model: Transformer, x: Tensor) -> Tensor:
    with torch.no_grad(), rnf.recall("a", model):
        return model(x)


@pytest.mark.parametrize("importance", ["lrp", "taylor", "magnitude"])
def test_a_fused_layer_keeps_the_units_that_three_layers_keep(learned, importance):
    options = {"importance": importance, "ration": None, "fit_head": False}
    fused = callback(**options).protect(learned, data("a"), name="a")
    three = callback(**options).protect(apart(learned), data("a"), name="a")
    assert fused.cutoff == three.cutoff > 0
    for block in range(2):
        of_three = [three.relevant[f"blocks.{block}.qkv.{number}"] for number in range(3)]
        assert torch.equal(fused.relevant[f"blocks.{block}.qkv.0"], torch.cat(of_three))


def test_as_in_the_paper_nothing_is_normalised_and_fused_layers_are_one(learned, monkeypatch):
    with_parts = RelevanceFreezing.paper(criterion=0.1).protect(learned, data("a"), name="a")
    monkeypatch.setattr(UnitMap, "parts", lambda self: {})
    without = RelevanceFreezing.paper(criterion=0.1).protect(learned, data("a"), name="a")
    assert with_parts.relevant.keys() == without.relevant.keys()
    assert all(torch.equal(mask, without.relevant[name]) for name, mask in with_parts.relevant.items())


def test_a_query_and_its_key_have_the_same_relevance(learned):
    """Each score is a sum of products of one with the other, half of which is each's: so they go together."""
    batch = next(iter(data("a")))
    layers = UnitMap.of(learned, batch).layers
    for kind in ("signed", "absolute"):
        relevance = attribute(learned, layers, [batch], over_samples=kind).relevance
        for block in range(2):
            queries, keys, _ = relevance[f"blocks.{block}.qkv.0"].chunk(3)
            torch.testing.assert_close(queries, keys, rtol=1e-3, atol=1e-5)


def test_a_task_is_recalled_to_the_bit_whatever_later_tasks_do_to_the_free_units():
    pl.seed_everything(1, verbose=False)
    model, rnf, x = Transformer(), callback(), next(iter(data("a")))[0]
    trained(model, "a", rnf)
    relevant = rnf.state.tasks["a"].relevant
    assert not all(bool(mask.all()) for name, mask in relevant.items() if "qkv" in name)
    before = recalled(rnf, model, x)
    trained(model, "b", rnf)
    assert torch.equal(recalled(rnf, model, x), before)
    with torch.no_grad():
        for name, mask in rnf.state.frozen().items():
            layer = model.get_submodule(name)
            layer.weight[~mask] = torch.nan
            layer.bias[~mask] = torch.nan
    assert torch.equal(recalled(rnf, model, x), before)

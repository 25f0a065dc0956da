"""Which embeddings have rows that belong to tokens, and why others have none."""

from __future__ import annotations

import pytest
import torch
from texts import Attending, Reader, texts
from torch import nn
from torch.nn.utils import parametrizations

from lightning_rnf import UnitMap
from lightning_rnf.anatomy import rows_read


class Other(Reader):
    def __init__(self, look_up, **parts):
        super().__init__()
        self.look_up_by = look_up
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.heads(self.body(self.look_up_by(self, x).mean(1)))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Named(nn.Embedding):
    pass


def hooked(**hooks):
    part = nn.Embedding(60, 6)
    for kind, hook in hooks.items():
        getattr(part, f"register_{kind}")(hook)
    return part


BATCH = texts("a", 16).tensors
OTHERS = {
    "functional": (
        lambda net, x: nn.functional.embedding(x, net.embedding.weight),
        nn.Embedding(60, 6),
        "used functionally",
    ),
    "a product, too": (
        lambda net, x: net.embedding(x) @ net.embedding.weight.T @ net.embedding.weight,
        nn.Embedding(60, 6),
        "more than its lookups",
    ),
    "values, too": (
        lambda net, x: net.embedding(x) * net.embedding.weight.detach().norm(),
        nn.Embedding(60, 6),
        "more than its lookups",
    ),
    "max_norm": (lambda net, x: net.embedding(x), nn.Embedding(60, 6, max_norm=1.0), "max_norm"),
    "sparse": (lambda net, x: net.embedding(x), nn.Embedding(60, 6, sparse=True), "sparse gradients"),
    "own forward": (lambda net, x: net.embedding(x), Scaled(60, 6), "forward of its own"),
    "hook": (lambda net, x: net.embedding(x), hooked(forward_hook=lambda *call: None), "hooks of others"),
    "hook before": (lambda net, x: net.embedding(x), hooked(forward_pre_hook=lambda *call: None), "hooks of others"),
    "bag": (lambda net, x: net.embedding(x)[:, None], nn.EmbeddingBag(60, 6), "EmbeddingBag is no unit layer"),
    "kept from training": (
        lambda net, x: net.embedding(x),
        nn.Embedding.from_pretrained(torch.randn(60, 6)),
        "kept from training",
    ),
    "parametrized": (
        lambda net, x: net.embedding(x),
        parametrizations.weight_norm(nn.Embedding(60, 6)),
        "Embedding's own",
    ),
}


@pytest.mark.parametrize(("look_up", "embedding", "why"), OTHERS.values(), ids=list(OTHERS))
def test_where_rows_can_not_be_told_apart_it_is_frozen_whole_and_says_why(look_up, embedding, why):
    units = UnitMap.of(Other(look_up, embedding=embedding), BATCH)
    assert units.embeddings == ()
    names = [name for name in units.shared if name.startswith("embedding.")]
    assert names
    assert all(why in units.reasons[name] for name in names), units.reasons


def test_one_that_is_tied_is_frozen_whole():
    net = Other(lambda net, x: net.embedding(x), embedding=nn.Embedding(60, 32))
    net.body[0] = nn.Linear(32, 32)
    net.heads.tasks["a"] = nn.Linear(32, 60)
    net.heads.tasks["a"].weight = net.embedding.weight
    units = UnitMap.of(net, BATCH)
    assert (units.embeddings, units.reasons["heads.tasks.a.weight"]) == ((), "tied to embedding.weight")


FINE = {
    "plain": (lambda net, x: net.embedding(x), nn.Embedding(60, 6)),
    "padding": (lambda net, x: net.embedding(x), nn.Embedding(60, 6, padding_idx=0)),
    "by name": (lambda net, x: net.embedding(input=x), nn.Embedding(60, 6)),
    "of another class": (lambda net, x: net.embedding(x), Named(60, 6)),
    "twice": (lambda net, x: net.embedding(x) * net.embedding(x.flip(1)), nn.Embedding(60, 6)),
    "one run unused": (lambda net, x: (net.embedding(x[:1]), net.embedding(x))[1], nn.Embedding(60, 6)),
    "its device and dtype": (
        lambda net, x: net.embedding(x).to(net.embedding.weight.device, net.embedding.weight.dtype),
        nn.Embedding(60, 6),
    ),
}


@pytest.mark.parametrize(("look_up", "embedding"), FINE.values(), ids=list(FINE))
def test_rows_belong_to_tokens(look_up, embedding):
    units = UnitMap.of(Other(look_up, embedding=embedding), BATCH)
    assert units.embeddings == ("embedding.weight",)
    assert "embedding.weight" not in (*units.shared, *units.reasons)


def test_the_map_says_it_and_a_glob_keeps_one_whole():
    net = Attending()
    units = UnitMap.of(net, BATCH)
    assert units.embeddings == ("words.weight", "places.weight")
    assert "frozen once a finished task has read it:\n  words   Embedding     60 rows\n  places  Embedding" in str(
        units
    )
    units = UnitMap.of(net, BATCH, units="!words")
    assert units.embeddings == ("places.weight",)
    assert units.reasons["words.weight"] == "Embedding left out by units="
    assert "words" in str(units).partition("frozen whole after the first task:")[2]
    with pytest.raises(ValueError, match="'!wrods' matches no unit layer"):
        UnitMap.of(net, BATCH, units="!wrods")


def test_rows_that_are_read_are_noted():
    net = Reader()
    with rows_read(net) as read:
        net(torch.tensor([[3, 5, 0], [5, 7, 0]]))
        net.embedding(input=torch.tensor([[9]], dtype=torch.int32))
    assert read["embedding.weight"].nonzero().view(-1).tolist() == [0, 3, 5, 7, 9]
    assert not net.embedding._forward_hooks

"""Which units make queries, keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_rnf.anatomy.units import UnitMap

HEADS, WIDTH, LENGTH = 2, 4, 5
SIZE = HEADS * WIDTH
Q, K, V = 1, 2, 4


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """Rotary embeddings: each half of a head is mixed with the other."""
    angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
    angle = torch.cat([angle, angle], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


class Net(nn.Module):
    """One attention, however it is written, between the embedding and the head."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, SIZE)
        self.layers = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in "qkv"} | layers)
        self.proj = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def attend(self, x: Tensor) -> Tensor:
        """``(N, length, SIZE)`` to the same."""
        q, k, v = (heads_of(self.layers[name](x)) for name in "qkv")
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.proj(self.attend(x))).mean(dim=1))


class Fused(Net):
    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(SIZE, 3 * SIZE))

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers["qkv"](x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*self.cut(x)).transpose(1, 2).flatten(2)


class OfEachHead(Fused):
    """GPT-NeoX: each head has its queries, keys and values beside each other."""

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers["qkv"](x).unflatten(-1, (HEADS, 3, WIDTH)).permute(3, 0, 2, 1, 4).unbind(0)


class TurnedAndNormalised(Fused):
    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().cut(x)
        return turned(nn.functional.layer_norm(q, (WIDTH,))), turned(nn.functional.normalize(k, dim=-1)), v


class ByHand(Fused):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(x)
        scores = q @ k.transpose(-2, -1) * WIDTH**-0.5 + torch.ones(LENGTH, LENGTH).tril().log()
        weights = nn.functional.dropout(scores.float().softmax(-1).to(x.dtype), 0.1, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)


class Einsum(Fused):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.layers["qkv"](x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
        weights = torch.softmax(torch.einsum("nqhd,nkhd->nhqk", q, k), dim=-1)
        return torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)


class Folded(Fused):
    """Heads among the samples, and the products of batches of matrices."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in self.cut(x))
        scores = torch.baddbmm(torch.zeros(LENGTH, LENGTH), q, k.mT, alpha=0.5)
        mixed = torch.bmm(nn.functional.softmax(scores, dim=-1), v)
        return mixed.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


class Shared(Net):
    """Two heads of queries look at one of keys and values."""

    def __init__(self) -> None:
        super().__init__(k=nn.Linear(SIZE, WIDTH), v=nn.Linear(SIZE, WIDTH))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(self.layers[name](x), heads) for name, heads in zip("qkv", (HEADS, 1, 1), strict=True))
        k, v = (part.repeat_interleave(HEADS, dim=1) for part in (k, v))
        return scaled_dot_product_attention(query=q, key=k, value=v).transpose(1, 2).flatten(2)


class KeysAreQueries(Net):
    def attend(self, x: Tensor) -> Tensor:
        q, v = (heads_of(self.layers[name](x)) for name in "qv")
        return scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)


def found(net: nn.Module) -> dict[str, list[int]]:
    units = UnitMap.of(net.eval(), (torch.randn(3, LENGTH, 6), torch.tensor([0, 1, 2])))
    return {
        name.removeprefix("layers."): projection.roles.tolist() for name, projection in sorted(units.attention.items())
    }


def test_layers_of_their_own_have_one_role_each():
    assert found(Net()) == {"k": [K] * SIZE, "q": [Q] * SIZE, "v": [V] * SIZE}


@pytest.mark.parametrize("kind", [Fused, TurnedAndNormalised, ByHand, Einsum, Folded])
def test_rows_of_one_layer_have_their_roles_however_attention_is_written(kind):
    assert found(kind()) == {"qkv": [Q] * SIZE + [K] * SIZE + [V] * SIZE}


def test_roles_are_those_that_the_forward_gives_not_thirds():
    assert found(OfEachHead()) == {"qkv": ([Q] * WIDTH + [K] * WIDTH + [V] * WIDTH) * HEADS}


def test_keys_and_values_that_several_heads_share():
    assert found(Shared()) == {"k": [K] * WIDTH, "q": [Q] * SIZE, "v": [V] * WIDTH}


def test_one_layer_may_be_two():
    assert found(KeysAreQueries()) == {"q": [Q | K] * SIZE, "v": [V] * SIZE}


class Besides(Net):
    """Values are heard past attention, too."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.layers[name](x) for name in "qkv")
        mixed = scaled_dot_product_attention(heads_of(q), heads_of(k), heads_of(v))
        return mixed.transpose(1, 2).flatten(2) + v


class OfTheStream(Net):
    """Attention without projections reads what all layers below have written."""

    def attend(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


class Routed(Net):
    """A softmax beside products that is no attention: experts, weighed by a gate."""

    def __init__(self) -> None:
        super().__init__(gate=nn.Linear(SIZE, HEADS))

    def attend(self, x: Tensor) -> Tensor:
        experts = torch.stack([self.layers["q"](x), self.layers["k"](x)], dim=-2)
        return (self.layers["gate"](x).softmax(-1)[..., None, :] @ experts)[..., 0, :]


class WrittenOver(Net):
    """Autograd can't go back there, so nobody knows of what units these queries are."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(self.layers[name](x)) for name in "qkv")
        q = q.exp()
        q += 1
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Linear(Net):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.layers[name](x) for name in "qkv")
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class OfTorch(Net):
    def __init__(self) -> None:
        super().__init__(whole=nn.MultiheadAttention(SIZE, HEADS, batch_first=True))

    def attend(self, x: Tensor) -> Tensor:
        return self.layers["whole"](x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", [OfTheStream, Routed, Linear])
def test_what_is_no_attention_between_unit_layers_stays_as_it_is(kind):
    assert found(kind()) == {}


def test_of_torchs_own_module_the_rows_are_known():
    assert found(OfTorch()) == {"whole": [Q] * SIZE + [K] * SIZE + [V] * SIZE}
    said = str(UnitMap.of(OfTorch().eval(), (torch.randn(3, LENGTH, 6), torch.tensor([0, 1, 2]))))
    assert "queries, keys, values: 2 heads of 4" in said


def test_a_layer_that_something_else_reads_has_no_role():
    assert found(Besides()) == {"k": [K] * SIZE, "q": [Q] * SIZE}


def test_where_the_graph_is_broken_there_are_no_roles():
    assert found(WrittenOver()) == {"k": [K] * SIZE, "v": [V] * SIZE}


def test_a_trace_says_what_the_heads_are():
    said = str(UnitMap.of(Shared().eval(), (torch.randn(3, LENGTH, 6), torch.tensor([0, 1, 2]))))
    assert "queries: 2 heads of 4" in said
    assert "keys: 1 head of 4" in said
    said = str(UnitMap.of(Fused().eval(), (torch.randn(3, LENGTH, 6), torch.tensor([0, 1, 2]))))
    assert "queries, keys, values: 2 heads of 4" in said


def test_the_size_of_the_relevance_of_parts():
    units = UnitMap.of(OfEachHead().eval(), (torch.randn(3, LENGTH, 6), torch.tensor([0, 1, 2])))
    ((name, parts),) = units.parts().items()
    assert name == "layers.qkv"
    assert {(tuple(mask.nonzero().view(-1).tolist()), total) for mask, total in parts} == {
        ((0, 1, 2, 3, 12, 13, 14, 15), 0.5),
        ((4, 5, 6, 7, 16, 17, 18, 19), 0.5),
        ((8, 9, 10, 11, 20, 21, 22, 23), 1.0),
    }


FUSED = "queries, keys, values: 3 heads of 16"
NETWORKS = {
    "vit": ["0.attn.qkv: " + FUSED],
    "deit": ["0.attn.qkv: " + FUSED],
    "eva02": [],  # which uses the weight of its qkv without the layer
    "BERT": [f"0.attention.self.{name}: 4 heads of 8" for name in ("query: queries", "key: keys", "value: values")],
    "GPT-2": ["0.attn.c_attn: queries, keys, values: 4 heads of 8"],
    "Qwen3": [
        "0.self_attn.q_proj: queries: 4 heads of 8",
        "0.self_attn.k_proj: keys: 2 heads of 8",
        "0.self_attn.v_proj: values: 2 heads of 8",
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_of_networks_that_people_have(name, monkeypatch):
    pytest.importorskip("timm" if name in ("vit", "deit", "eva02") else "transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "networks"))
    import arrives
    import zoo

    units = UnitMap.of(zoo.built(name).eval(), zoo.batch_of(name, 4), heads=arrives.head_of(name))
    of_first = [layer for layer in units.attention if ".0." in layer]
    assert len(units.attention) == 3 * len(of_first)  # blocks
    said = [f"{layer[layer.index('.0.') + 1 :]}: {units.attention[layer]}" for layer in of_first]
    assert sorted(said) == sorted(NETWORKS[name])

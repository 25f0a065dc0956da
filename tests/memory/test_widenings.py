"""Widenings as plain data: there and back, and nothing of a stranger's that leads nowhere."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from records import CLASSES, ConvNet, Mlp
from torch import nn

from lightning_rnf import RelevanceFreezing
from lightning_rnf.anatomy import Places
from lightning_rnf.memory import FreezeState, grown, sliced
from lightning_rnf.memory.widening import index_before, like_in_memory

pytestmark = pytest.mark.filterwarnings("ignore:no free units", "ignore:.*answer that is always", "ignore:.*not one of")


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    rnf = RelevanceFreezing(criterion=lambda score: score.cutoff <= 1, reset_free=True)
    rnf.protect(model, [(torch.randn(64, 1, 6, 6), torch.randint(CLASSES, (64,)))], name="a")
    rnf.widen(model, 0.5, layers="*")
    rnf.widen(model, 0.5, layers="*")
    return rnf.state


def test_entries_are_where_the_places_say_and_come_back():
    generator = torch.Generator().manual_seed(0)
    for shape, places in (
        ((3, 4), {0: Places(5, ((0, 3),)), 1: Places(7, ((0, 1), (3, 3)))}),
        ((4, 2, 3, 3), {1: Places(4, ((1, 1), (3, 1)))}),
        ((6,), {0: Places(9, ((0, 2), (4, 4)))}),
    ):
        value = torch.randn(shape, generator=generator)
        wide = grown(value, places, 7.0)
        index = {dimension: one.index() for dimension, one in places.items()}
        assert torch.equal(sliced(wide, index), value)
        assert int((wide == 7).sum()) == wide.numel() - value.numel()
    # By hand: a new entry in front of the second, and one at the end.
    assert grown(torch.tensor([1.0, 2.0]), {0: Places(4, ((0, 1), (2, 1)))}, 0.0).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 1, 1), (4, 1, 2, 2), (5, 3)])
def test_memory_is_laid_out_as_it_was(shape):
    value = torch.randn(shape)
    layouts = [value, value.t().contiguous().t()] if value.ndim == 2 else [value]
    if value.ndim == 4:
        layouts.append(torch.empty(shape, memory_format=torch.channels_last).copy_(value))
    for layout in layouts:
        places = {0: Places(shape[0] + 2, ((0, shape[0]),)), 1: Places(shape[1] + 1, ((0, shape[1]),))}
        back = sliced(grown(layout, places, 0.0), {dimension: one.index() for dimension, one in places.items()})
        assert torch.equal(back, layout)
        assert back.stride() == layout.stride()
        assert like_in_memory(torch.zeros(shape), layout).stride() == layout.stride()


def test_plain_data_come_back_and_fit_into_json(state):
    plain = state.to_plain()
    again = FreezeState.from_plain(plain | {"widenings": json.loads(json.dumps(plain["widenings"]))})
    assert again.widenings == state.widenings
    assert len(again.widenings) == 2
    assert again.task("a").widenings == 0
    assert index_before(again.widenings, "0.weight")[0].tolist() == [0, 1, 2, 3]
    assert index_before(again.widenings, "4.weight")[1].tolist() == list(range(64))


def damaged(path, value):
    def damage(plain):
        *keys, last = path
        for key in keys:
            plain = plain[key]
        plain[last] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damaged(["widenings"], "no list"),
        damaged(["widenings", 0], []),
        damaged(["widenings", 0, "units", "0", "size"], 10**20),
        damaged(["widenings", 0, "units", "0", "size"], 7),
        damaged(["widenings", 0, "units", "0", "runs"], [[0, 0]]),
        damaged(["widenings", 0, "units", "0", "runs"], [[0, 3], [2, 1]]),
        damaged(["widenings", 0, "units", "0", "runs"], [[-1, 3]]),
        damaged(["widenings", 0, "units", "0", "runs"], [["0", 3]]),
        damaged(["widenings", 0, "units", "0", "runs"], []),
        damaged(["widenings", 1, "tensors", "0.weight"], {"9": {"size": 9, "runs": [[0, 6]]}}),
        damaged(["widenings", 1, "tensors", "0.weight"], {"3": {"size": 9, "runs": [[0, 6]]}}),
        damaged(["widenings", 1, "tensors", "1.running_mean", "0", "size"], 8),
        damaged(["widenings", 0, "sizes", "0"], {"forward": [1, 2]}),
        damaged(["widenings", 0, "sizes", "0", "out_channels"], [0, 2]),
        damaged(["widenings", 0, "sizes", "0", "out_channels"], [4, "6"]),
        damaged(["widenings", 0, "sizes", "0", "out_channels"], [4]),
        damaged(["tasks", 0, "widenings"], 3),
        damaged(["tasks", 0, "widenings"], -1),
        lambda plain: plain.pop("widenings") and damaged(["tasks", 0, "widenings"], 1)(plain),
    ],
)
def test_what_leads_nowhere_is_refused(state, damage):
    plain = copy.deepcopy(state.to_plain())
    plain["widenings"] = json.loads(json.dumps(plain["widenings"]))
    damage(plain)
    with pytest.raises(ValueError, match=r"not a state of lightning_rnf"):
        FreezeState.from_plain(plain)


@pytest.mark.parametrize("net", [Mlp, ConvNet])
def test_without_a_widening_nothing_of_it_is_written(net):
    assert "widenings" not in FreezeState(net.layers).to_plain()

"""Layers that run several times in a forward: siamese towers, repeated blocks, cells that are unrolled by hand.

Their units are silent in all runs or in none, relevance is summed over runs, and recall is bit-equal.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training import TASKS, Classifier, clusters, frozen_entries, inputs, loader, train

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.recall.subnetwork import recall
from lightning_rnf.relevance.attribution import attribute


class Siamese(nn.Module):
    """One encoder reads both halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.joined = nn.Linear(3, 12), nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        halves = [self.encoder(half).relu() for half in x.chunk(2, dim=1)]
        return self.joined(torch.cat([halves[0] + halves[1], (halves[0] - halves[1]).abs()], 1)).relu()


class Block(nn.Module):
    """Of a transformer: query, key and value, a projection and a feed-forward part, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5).softmax(2)
        x = self.norms[0](x + self.out(weights @ self.value(x)))
        return self.norms[1](x + self.narrow(nn.functional.gelu(self.wide(x))))


class Repeated(nn.Module):
    """One block that runs three times, as ALBERT has it, between layers that run once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.pooler = nn.Linear(2, 8), Block(), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (3, 2)))
        for _ in range(3):
            x = self.block(x)
        return self.pooler(x[:, 0]).tanh()


class Cell(nn.Module):
    """One step hears a number and what the step before has said."""

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.say = nn.Linear(1, 40), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 40)
        for step in x.split(1, dim=1):
            state = (self.hear(step) + self.say(state)).tanh()
        return state


class Pyramid(nn.Module):
    """The same convolution and norm at two sizes, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.norm = (
            nn.Conv1d(1, 8, 3, padding=1),
            nn.Conv1d(8, 8, 3, padding=1),
            nn.BatchNorm1d(8),
        )
        self.joined = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x[:, None]).relu()
        sizes = [fine, nn.functional.avg_pool1d(fine, 2)]
        return self.joined(torch.cat([self.norm(self.same(one)).relu().mean(2) for one in sizes], 1)).relu()


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "siamese": (Siamese, ["encoder"]),
    "ALBERT": (Repeated, [f"block.{name}" for name in ("query", "key", "value", "out", "wide", "narrow")]),
    "cell": (Cell, ["hear", "say"]),
    "pyramid": (Pyramid, ["same"]),
}


def built(case: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    model.body = NETS[case][0]()
    return model


@pytest.mark.parametrize("case", NETS)
def test_their_units_are_frozen_and_recalled_like_any_others(case):
    model, rnf, x = built(case), RelevanceFreezing(), inputs()
    train(model, rnf, "a", max_epochs=2)  # where a warning is an error
    several = [f"body.{name}" for name in NETS[case][1]]
    assert set(several) <= {layer.name for layer in rnf.state.layers}
    assert not rnf.state.shared or case in ("ALBERT", "pyramid")  # norms of theirs
    assert 0 < rnf.free_capacity < 1
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    frozen = frozen_entries(rnf, model)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    train(model, rnf, "b", max_epochs=2)

    moved = 0
    for name in several:
        held, now = frozen[f"{name}.weight"], model.get_parameter(f"{name}.weight")
        held = held.view(*held.shape, *[1] * (now.ndim - held.ndim)).expand_as(now)
        assert torch.equal(now[held], weights[f"{name}.weight"][held])
        moved += int((now != weights[f"{name}.weight"]).sum())
    assert moved, "there was something to break"
    with torch.no_grad():
        for name, held in frozen.items():  # whatever becomes of the rest
            value = model.get_parameter(name)
            value[~held.view(*held.shape, *[1] * (value.ndim - held.ndim)).expand_as(value)] = torch.nan
        with rnf.recall("a", model):
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("case", NETS)
def test_rows_that_are_frozen_are_those_that_recall_hears(case):
    model, rnf, x = built(case), RelevanceFreezing(), inputs()
    train(model, rnf, "a", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    relevant = rnf.state.tasks["a"].relevant
    for name in NETS[case][1]:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(f"body.{name}.weight")[relevant[f"body.{name}"]] *= 2.0
        with recall(changed, rnf.state.layers, rnf.state.tasks["a"]), torch.no_grad():
            assert not torch.equal(changed(x), before), name


def twins(case: str) -> tuple[Classifier, Classifier, dict[str, list[str]]]:
    """A network, the same with a layer of its own for each run, and which layers have come of which."""

    class Copies(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.copies = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(8))])
            self.turn = 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            return self.copies[self.turn - 1](x)

    model = built(case)
    apart = copy.deepcopy(model)
    came: dict[str, list[str]] = {}
    for name in NETS[case][1]:
        outer, _, key = f"body.{name}".rpartition(".")
        setattr(apart.get_submodule(outer), key, Copies(apart.get_submodule(f"body.{name}")))
        came[f"body.{name}"] = [f"body.{name}.copies.{turn}" for turn in range(9)]

    def begin(module: nn.Module, args: object) -> None:
        for part in module.modules():
            if isinstance(part, Copies):
                part.turn = 0

    apart.body.register_forward_pre_hook(begin)
    return model.eval(), apart.eval(), came


@pytest.mark.parametrize("case", [case for case in NETS if case != "pyramid"])  # its norm directly follows each copy
def test_relevance_is_the_sum_of_that_of_as_many_layers_as_there_are_runs(case):
    model, apart, came = twins(case)
    batches = [tuple(batch) for batch in loader("a", 64)]
    assert torch.equal(model(batches[0][0]), apart(batches[0][0]))
    found, others = (attribute(one, UnitMap.of(one, batches[0]).layers, batches).relevance for one in (model, apart))
    for name, relevance in found.items():
        of_runs = [others[one] for one in came.get(name, [name]) if one in others]
        assert len(of_runs) > 1 or name not in came
        torch.testing.assert_close(relevance, sum(of_runs), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")  # of the cell
@pytest.mark.parametrize("case", NETS)
def test_their_network_is_exported_whole(case):
    model, rnf, x = built(case), RelevanceFreezing(), inputs()
    train(model, rnf, "a", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    small = rnf.export(model, "a", example=(x,))
    with torch.no_grad():
        assert (small(x) - before).abs().max() <= 1e-5 * before.abs().max()


def test_they_are_not_widened_and_it_says_so():
    model, rnf = built("pyramid"), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=2)
    with pytest.raises(ValueError, match=r"body\.same.*runs several times"):
        rnf.widen(model, 0.5, layers="body.same")


def test_a_layer_that_an_earlier_version_has_frozen_whole_stays_so():
    model, rnf, x = built("siamese"), RelevanceFreezing(units="!body.encoder"), inputs()
    train(model, rnf, "a", max_epochs=2)
    assert [layer.name for layer in rnf.state.layers] == ["body.joined"]
    later = RelevanceFreezing()
    later.load_state_dict(rnf.state_dict())
    with later.recall("a", model), torch.no_grad():
        before = model(x)
    weight = model.body.encoder.weight.detach().clone()
    train(model, later, "b", max_epochs=2)
    assert torch.equal(model.body.encoder.weight, weight)
    with later.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("norm", ["per_task", "frozen"])
def test_a_norm_that_was_nobodys_stays_so_where_the_layer_runs_once_in_a_later_task(norm):
    class Sometimes(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.norm = nn.Linear(6, 40), nn.Linear(40, 40), nn.BatchNorm1d(40)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(self.same(self.first(x).relu())).relu()
            return self.heads(self.norm(self.same(hidden)).relu() if self.heads.active == "a" else hidden)

    torch.manual_seed(0)
    model, rnf, x = Sometimes(), RelevanceFreezing(norm_parameters=norm), inputs()
    train(model, rnf, "a", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    for task in "bc":
        train(model, rnf, task, max_epochs=2)
        with rnf.recall("b", model), torch.no_grad():
            if task == "b":
                of_b = model(x)
            assert torch.equal(model(x), of_b)
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    again, once = RelevanceFreezing(), Sometimes()
    train(once, again, "b", max_epochs=2)
    with pytest.raises(ValueError, match=r"'same' had norm 'norm', in its place is one with None \(what follows it"):
        train(once, again, "a", max_epochs=2)


def test_they_are_frozen_by_whole_rows_and_the_map_says_so():
    model, rnf = built("pyramid"), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=2)
    assert frozen_entries(rnf, model)["body.same.weight"].ndim == 1
    assert re.search(r"body\.same +it runs several times", str(UnitMap.of(model, next(iter(loader("a"))))))


def test_a_trace_does_not_take_longer_with_each_run():
    forwards = []

    class Watched(Cell):
        def forward(self, x: Tensor) -> Tensor:
            forwards.append(len(x))
            return super().forward(x) + 0 * self.say.weight.detach().norm()

    model = built("cell")
    model.body = Watched()
    UnitMap.of(model, next(iter(loader("a"))))
    assert len(forwards) < 6


def test_a_cell_may_run_as_often_as_there_are_steps():
    class Ragged(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            steps = 6 if len(x) % 2 else 4  # batches of another length
            return self.heads(self.body(x[:, :steps]))

    torch.manual_seed(0)
    model, rnf = Ragged(), RelevanceFreezing()
    model.body = Cell()
    data = [clusters("a", samples, seed).tensors for seed, samples in enumerate((32, 33, 31, 32, 64, 65))]
    model.heads.activate("a")
    record = rnf.protect(model, data, name="a")
    assert record.samples == sum(len(y) for _, y in data)
    with rnf.recall("a", model), torch.no_grad():
        before = [model(x) for x, _ in data]
    train(model, rnf, "b", max_epochs=2)
    with rnf.recall("a", model), torch.no_grad():
        assert all(torch.equal(model(x), one) for (x, _), one in zip(data, before, strict=True))
    assert TASKS[0] in rnf.state.tasks

"""Layers that have one weight: two towers, blocks that are tied by hand, one filter at several dilations.

They are one set of units, silent in each of them or in none; relevance is summed over all, and recall is bit-equal.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import Built
from test_several_runs import Block
from torch import Tensor, nn
from torch.nn.functional import linear
from training import Classifier, clusters, frozen_entries, inputs, loader, task_data, train, trainer

from lightning_rnf import RelevanceFreezing, UnitMap
from lightning_rnf.freezing import Freezer
from lightning_rnf.memory import FreezeState, changed
from lightning_rnf.recall.subnetwork import silence
from lightning_rnf.relevance.attribution import attribute


class Towers(nn.Module):
    """Each half of the input has a tower of its own, with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.joined = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(24, 40)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        halves = self.left(left).relu(), self.right(right).relu()
        return self.joined(torch.cat([halves[0] + halves[1], (halves[0] - halves[1]).abs()], 1)).relu()


class Depths(nn.Module):
    """Blocks of a transformer that have all of their linear layers' weights and biases together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(2, 8), nn.ModuleList(Block() for _ in range(3))
        self.pooler = nn.Linear(8, 40)
        for block in self.blocks[1:]:
            for name, layer in block.named_children():
                if isinstance(layer, nn.Linear):
                    layer.weight, layer.bias = (getattr(self.blocks[0], name).get_parameter(k) for k in LINEAR)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (3, 2)))
        for block in self.blocks:
            x = block(x)
        return self.pooler(x[:, 0]).tanh()


LINEAR = ("weight", "bias")


class Dilations(nn.Module):
    """The same filters at three dilations, as tridents have them; one has no bias, and a norm follows one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=d, dilation=d, bias=d != 2) for d in (1, 2, 3))
        for branch in self.branches:
            branch.weight = self.branches[0].weight
        self.norm, self.joined = nn.BatchNorm1d(8), nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x[:, None]).relu()
        one, *others = [branch(fine) for branch in self.branches]
        return self.joined(torch.cat([part.relu().mean(2) for part in (self.norm(one), *others)], 1)).relu()


class Upwards(nn.Module):
    """Transposed convolutions with one weight, one of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 2, stride=2)
        self.up, self.more = nn.ConvTranspose1d(8, 8, 2, groups=2), nn.ConvTranspose1d(8, 8, 2, stride=2, groups=2)
        self.more.weight = self.up.weight
        self.joined = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.up(self.stem(x[:, None]).relu()).relu()
        return self.joined(self.up(fine).relu().mean(2) + self.more(fine).relu().mean(2)).relu()


class OneRuns(nn.Module):
    """The one that stands first does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.runs, self.joined = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 40)
        self.runs.weight = self.idle.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.runs(x).relu()).relu()


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, ...]]]] = {
    "towers": (Towers, {"left": ("right",)}),
    "depths": (
        Depths,
        {
            f"blocks.0.{name}": (f"blocks.1.{name}", f"blocks.2.{name}")
            for name in ("query", "key", "value", "out", "wide", "narrow")
        },
    ),
    "dilations": (Dilations, {"branches.0": ("branches.1", "branches.2")}),
    "upwards": (Upwards, {"up": ("more",)}),
    "one runs": (OneRuns, {"idle": ("runs",)}),
}


def built(case: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    model.body = NETS[case][0]()
    return model


def tied_in(case: str) -> dict[str, tuple[str, ...]]:
    return {f"body.{name}": tuple(f"body.{one}" for one in others) for name, others in NETS[case][1].items()}


@functools.cache
def _trained(case: str) -> tuple[Classifier, dict[str, Any]]:
    model, rnf = built(case), RelevanceFreezing()
    train(model, rnf, "a", max_epochs=2)  # where a warning is an error
    return model, rnf.state_dict()


def trained(case: str) -> tuple[Classifier, RelevanceFreezing]:
    """A network of one finished task, of the caller's own."""
    model, state = _trained(case)
    rnf = RelevanceFreezing()
    rnf.load_state_dict(copy.deepcopy(state))
    return copy.deepcopy(model), rnf


def damage(rnf: RelevanceFreezing, model: nn.Module, fill: float) -> int:
    """Whatever becomes of all that is not frozen, other heads too; how much that is."""
    held, count = frozen_entries(rnf, model), 0
    whole = {*rnf.state.shared, *(name for one in rnf.state.tasks.values() for name in one.head_parameters)}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in held:
                mask = held[name]
                free = ~mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim)).expand_as(value)
                value[free] = fill
                count += int(free.sum())
            elif name not in whole:
                value.fill_(fill)
    return count


@pytest.mark.parametrize("case", NETS)
def test_their_units_are_frozen_and_recalled_like_any_others(case):
    (model, rnf), x = trained(case), inputs()
    layers = {layer.name: layer for layer in rnf.state.layers}
    assert {name: layers[name].tied for name in tied_in(case)} == tied_in(case)
    assert not any(name in layers for others in tied_in(case).values() for name in others)
    every = {name for first, others in tied_in(case).items() for name in (first, *others)}
    assert not any(name.rpartition(".")[0] in every for name in rnf.state.shared)
    assert 0 < rnf.free_capacity < 1
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    frozen = frozen_entries(rnf, model)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    train(model, rnf, "b", max_epochs=2)

    moved = 0
    for name in tied_in(case):
        mask, now = frozen[f"{name}.weight"], model.get_parameter(f"{name}.weight")
        held = mask.view(*mask.shape, *[1] * (now.ndim - mask.ndim)).expand_as(now)
        assert torch.equal(now[held], weights[f"{name}.weight"][held])
        moved += int((now != weights[f"{name}.weight"]).sum())
        for one in (name, *tied_in(case)[name]):
            assert model.get_submodule(one).weight is now
    assert moved, "units that are free learn"
    for fill in (torch.nan, 1e30, -torch.inf):
        changed = copy.deepcopy(model)
        assert damage(rnf, changed, fill)
        with rnf.recall("a", changed), torch.no_grad():
            assert torch.equal(changed(x), before)


@pytest.mark.parametrize("case", NETS)
def test_relevance_is_the_sum_of_that_of_as_many_layers_with_weights_of_their_own(case):
    model = built(case).eval()
    apart = copy.deepcopy(model)
    for others in tied_in(case).values():
        for name in others:
            part = apart.get_submodule(name)
            for key, value in part.named_parameters():
                setattr(part, key, nn.Parameter(value.detach().clone()))
    batches = [tuple(batch) for batch in loader("a", 64)]
    assert torch.equal(model(batches[0][0]), apart(batches[0][0]))
    of_apart = [replace(layer, norm=None, slopes=None) for layer in UnitMap.of(apart, batches[0]).layers]
    of_tied = UnitMap.of(model, batches[0]).layers
    assert len(of_tied) < len(of_apart) or case == "one runs"
    found, others = (attribute(one, layers, batches).relevance for one, layers in ((model, of_tied), (apart, of_apart)))
    for name, relevance in found.items():
        parts = [others[one] for one in (name, *tied_in(case).get(name, ())) if one in others]
        torch.testing.assert_close(relevance, sum(parts), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", NETS)
def test_silent_units_are_silent_in_each_of_them(case):
    model = built(case).eval()
    layers = UnitMap.of(model, next(iter(loader("a")))).layers
    relevant = {layer.name: torch.arange(layer.units) % 3 == 0 for layer in layers}
    for with_gradients in (True, False):
        said: list[str] = []
        with silence(model, layers, relevant), torch.set_grad_enabled(with_gradients), ExitStack() as hooks:
            for one, name in ((layer, name) for layer in layers for name in layer.modules):

                def note(part: Any, args: Any, output: Tensor, one: Any = one, name: Any = name, said: Any = said):
                    by_unit = output.detach().movedim(one.axis, 0)
                    assert not by_unit[~relevant[one.name]].any(), name
                    said += [name] if by_unit[relevant[one.name]].any() else []

                hooks.callback(model.get_submodule(name).register_forward_hook(note).remove)
            model(inputs())
        assert set(said) == {name for layer in layers for name in layer.modules} - {"body.idle"}


@pytest.mark.parametrize("case", ["towers", "dilations"])
def test_a_second_task_is_learned_in_what_is_free_of_them(case):
    model, rnf = trained(case)
    (name,) = (f"{name}.weight" for name in tied_in(case))
    before = model.get_parameter(name).detach().clone()
    train(model, rnf, "b", max_epochs=6)
    with rnf.recall("b", model), torch.no_grad():
        x, y = clusters("b", 320, seed=2).tensors
        assert float((model(x).argmax(1) == y).float().mean()) > 0.75  # of two
    after, claimed = model.get_parameter(name), rnf.state.tasks["b"].relevant[name.removesuffix(".weight")]
    new = claimed & ~rnf.state.tasks["a"].relevant[name.removesuffix(".weight")]
    assert new.any()
    assert not torch.equal(after[new], before[new])


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("case", NETS)
def test_their_network_is_exported(case, traced):
    (model, rnf), x = trained(case), inputs()
    if not traced:  # by torch.export
        model.body.register_forward_pre_hook(lambda part, args: (args[0] * (1.0 if len(args[0]) > 0 else 0.0),))
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    damage(rnf, model, 1e3)
    small = rnf.export(model, "a", example=(x,))
    with torch.no_grad():
        assert (small(x) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.filterwarnings("ignore:no free units are left:UserWarning")
@pytest.mark.parametrize("case", NETS)
def test_files_and_states_bring_them_back(case, tmp_path):
    (model, rnf), x = trained(case), inputs()
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    rnf.save(tmp_path / "masks.safetensors")
    of_file, of_state = RelevanceFreezing(), RelevanceFreezing()
    of_file.load(tmp_path / "masks.safetensors", model)
    of_state.load_state_dict(rnf.state_dict())
    for again in (of_file, of_state):
        assert again.state.layers == rnf.state.layers
        copied = copy.deepcopy(model)
        train(copied, again, "b", max_epochs=1)
        with again.recall("a", copied), torch.no_grad():
            assert torch.equal(copied(x), before)
        assert not changed(dict(copied.named_parameters()), again.state, "a")


def test_a_checkpoint_brings_them_back(tmp_path):
    model, rnf, x = built("towers"), RelevanceFreezing(), inputs()
    model.heads.activate("a")
    fit = trainer(rnf, max_epochs=2)
    fit.fit(model, datamodule=task_data("a"))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    fresh, again = built("towers"), RelevanceFreezing()
    with torch.no_grad():
        fresh.body.left.weight.zero_()
    again.restore(tmp_path / "a.ckpt", fresh)
    with again.recall("a", fresh), torch.no_grad():
        assert torch.equal(fresh(x), before)


def test_where_they_have_come_apart_the_model_is_another():
    model, rnf = trained("dilations")
    apart, missing, more = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    apart.body.branches[2].weight = nn.Parameter(apart.body.branches[2].weight.detach().clone())
    missing.body.branches[1] = nn.Identity()
    more.body.branches[1].bias = nn.Parameter(torch.zeros(8))
    for other, said in (
        (apart, "with a weight of its own"),
        (missing, "'body.branches.1' had one weight .* it is of type Identity"),
        (more, "one with a bias of its own"),
    ):
        with pytest.raises(ValueError, match=said), rnf.recall("a", other):
            pass
    with pytest.raises(ValueError, match=r"'body.branches.2' had one weight with layer 'body.branches.0'"):
        train(apart, rnf, "b", max_epochs=1)


def strange(**changes: object) -> dict[str, Any]:
    _, rnf = trained("towers")
    rnf.state.initial.clear()
    plain_state = rnf.state.to_plain()
    next(layer for layer in plain_state["layers"] if layer["name"] == "body.left").update(changes)
    return plain_state


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": ["body.left"]},
        {"tied": ["body.right", "body.right"]},
        {"tied": ["body.right", "body.joined"]},
        {"tied": "body.right"},
        {"tied": [3]},
        {"tied": []},
        {"norm": "body.norm"},
        {"slopes": "body.slopes"},
        {"packed": True},
        {"parameters": ["body.left.weight", "body.right.weight", "body.left.bias", "body.right.bias"]},
        {"parameters": ["body.left.weight", "body.left.bias", "body.right.bias", "body.other.bias"]},
    ],
    ids=str,
)
def test_a_strangers_file_is_refused(changes):
    with pytest.raises(ValueError, match="not a state of lightning_rnf"):
        FreezeState.from_plain(strange(**changes))


def test_a_strangers_file_that_leaves_out_a_bias_is_refused_by_the_model():
    state = FreezeState.from_plain(strange(parameters=["body.left.weight", "body.left.bias"]))
    with pytest.raises(ValueError, match=r"'body.right' had one weight .* with a bias of its own"):
        state.check_module(built("towers"))


def test_files_of_networks_without_them_are_what_they_were():
    model, rnf = built("one runs"), RelevanceFreezing()
    model.body.runs.weight = nn.Parameter(model.body.runs.weight.detach().clone())
    train(model, rnf, "a", max_epochs=1)
    written = rnf.state.to_plain()
    assert written["version"] == 1  # which an earlier version reads
    assert not any("tied" in layer for layer in written["layers"])
    assert trained("one runs")[1].state.to_plain()["version"] == 2


class ByTask(Classifier):
    """Which of two layers with one weight runs, or both, is told by the task."""

    def __init__(self, **runs: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.runs = runs
        self.left, self.right, self.joined = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 40)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, name)(x).relu() for name in self.runs[self.heads.active].split()]
        return self.heads(self.joined(sum(parts)).relu())


@pytest.mark.parametrize(
    "runs", [("left right", "left", "right"), ("right", "left right", "left"), ("left", "right", "left right")]
)
def test_any_of_them_may_run_for_a_later_task(runs):
    model, rnf, x = ByTask(**dict(zip("abc", runs, strict=True))), RelevanceFreezing(), inputs()
    before: dict[str, Tensor] = {}
    for task in "abc":
        train(model, rnf, task, max_epochs=2)
        for earlier, logits in before.items():
            with rnf.recall(earlier, model), torch.no_grad():
                assert torch.equal(model(x), logits), (task, earlier)
        with rnf.recall(task, model), torch.no_grad():
            before[task] = model(x)
    assert [layer.modules for layer in rnf.state.layers] == [("left", "right"), ("joined",)]
    damage(rnf, model, torch.nan)
    for task, logits in before.items():
        with rnf.recall(task, model), torch.no_grad():
            assert torch.equal(model(x), logits), task


def test_what_an_earlier_version_has_frozen_whole_stays_so():
    model, rnf, x = built("towers"), RelevanceFreezing(units="!body.left"), inputs()
    train(model, rnf, "a", max_epochs=2)
    assert {"body.left.weight", "body.left.bias", "body.right.bias"} <= set(rnf.state.shared)
    for with_forms in (True, False):
        later, copied = RelevanceFreezing(), copy.deepcopy(model)
        later.load_state_dict(rnf.state_dict())
        later.state.forms = later.state.forms if with_forms else {}
        with later.recall("a", copied), torch.no_grad():
            before = copied(x)
        weight = copied.body.left.weight.detach().clone()
        train(copied, later, "b", max_epochs=2)
        assert torch.equal(copied.body.left.weight, weight)
        with later.recall("a", copied), torch.no_grad():
            assert torch.equal(copied(x), before)


@pytest.mark.parametrize("units", ["body.left", "body.right", ["body.r*", "body.joined"], ["body.left", "body.right"]])
def test_the_name_of_one_stands_for_all(units):
    found = UnitMap.of(built("towers"), next(iter(loader("a"))), units=units)
    assert found.layers[0].modules == ("body.left", "body.right")
    assert found.layers[0].parameters == ("body.left.weight", "body.left.bias", "body.right.bias")
    assert len(found.layers) == 1 + ("body.joined" in units)
    excluded = [f"!{one}" for one in ([units] if isinstance(units, str) else units) if one != "body.joined"]
    left = UnitMap.of(built("towers"), next(iter(loader("a"))), units=excluded)
    assert [layer.name for layer in left.layers] == ["body.joined"]
    assert left.whole == {}


def test_the_map_names_all_of_them():
    said = str(UnitMap.of(built("towers"), next(iter(loader("a")))))
    assert re.search(r"body\.left +Linear +12 units +tied to body\.right", said)
    assert re.search(r"body\.left +it has one weight with body\.right", said)


@pytest.mark.parametrize("case", ["towers", "one runs"])
def test_they_are_not_widened_and_it_says_so(case):
    model, rnf = trained(case)
    (name,) = tied_in(case)
    with pytest.raises(ValueError, match=rf"layer {name!r} can't be widened: it has one weight with"):
        rnf.widen(model, 0.5, layers=name)


# -- which can't be one set of units -----------------------------------------------------------------------------------


def two(forward: Callable[[Any, Tensor], Tensor], one: nn.Module, other: nn.Module, **more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = Built(forward, stem=nn.Linear(4, 4), one=one, other=other, **more, head=nn.Linear(4, 3))
    net.other.weight = net.one.weight
    return net


def in_turn(net: Any, x: Tensor) -> Tensor:
    return net.head(net.other(net.one(net.stem(x).relu()).relu()).relu())


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def hooked() -> nn.Module:
    net = two(in_turn, nn.Linear(4, 4), nn.Linear(4, 4))
    net.other.register_forward_hook(lambda part, args, output: output.flip(1))
    return net


def bias_elsewhere() -> nn.Module:
    net = two(lambda net, x: in_turn(net, net.norm(x)), nn.Linear(4, 4), nn.Linear(4, 4), norm=nn.LayerNorm(4))
    net.other.bias = net.norm.bias
    return net


def another_head() -> nn.Module:
    net = two(lambda net, x: net.heads["a"](net.one(net.stem(x).relu()).relu()), nn.Linear(4, 4), nn.Linear(4, 4))
    net.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": net.other})
    del net.other, net.head
    return net


def looked_up() -> nn.Module:
    net = two(
        lambda net, x: in_turn(net, net.words((x > 0).sum(1).clamp(max=3)) + x),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        words=nn.Embedding(4, 4),
    )
    net.words.weight = net.one.weight
    return net


def half_seen(net: Any, x: Tensor) -> Tensor:
    said = net.one(net.stem(x).relu()).relu()
    with torch.no_grad():
        beside = net.other(said)
    return net.head(said + beside)


APART: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "classes": (lambda: two(in_turn, nn.Linear(4, 4), Own(4, 4)), "which is of another kind"),
    "embedding": (looked_up, "which is of another kind (Embedding)"),
    "own class": (lambda: two(in_turn, Own(4, 4), Own(4, 4)), "may do something else than torch's layer"),
    "hook": (hooked, "may do something else than torch's layer"),
    "no gradient": (lambda: two(half_seen, nn.Linear(4, 4), nn.Linear(4, 4)), "not always where the logits' gradient"),
    "transposed": (
        lambda: two(lambda net, x: in_turn(net, linear(x, net.one.weight.t())), nn.Linear(4, 4), nn.Linear(4, 4)),
        "its 'one.weight' may be used elsewhere, too",
    ),
    "bias of a norm": (bias_elsewhere, "shares 'other.bias' with ['norm.bias']"),
    "another head": (another_head, "may be another task's head"),
}


@pytest.mark.parametrize("case", APART)
def test_what_cant_be_one_set_of_units_stays_whole_and_says_why(case):
    build, why = APART[case]
    net = build().eval()
    units = UnitMap.of(net, (torch.randn(5, 4), torch.arange(5) % 3))
    assert [layer.name for layer in units.layers] == ["stem"]
    assert {"one"} <= set(units.whole) <= {"one", "other"}
    assert all(why in reason for reason in units.whole.values())
    assert "one.weight" in units.shared
    assert why in units.reasons["one.weight"] or case == "bias of a norm"


@pytest.mark.parametrize(
    "pair",
    [
        (nn.Conv1d(4, 4, 3, padding=1), nn.ConvTranspose1d(4, 4, 3, padding=1)),
        (nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Conv1d(2, 8, 3, padding=1)),
    ],
    ids=["axes", "groups"],
)
def test_filters_that_count_units_otherwise_stay_whole(pair):
    one, other = pair
    other.weight = one.weight

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x[:, None]).relu()
        return net.head(net.one(x).mean(2) + net.other(x[:, : net.other.in_channels]).mean(2))

    net = Built(forward, stem=nn.Conv1d(1, 4, 1), one=one, other=other, head=nn.Linear(one.out_channels, 3))
    units = UnitMap.of(net.eval(), (torch.randn(5, 6), torch.arange(5) % 3))
    assert [layer.name for layer in units.layers] == ["stem"]
    assert set(units.whole) == {"one", "other"}


def test_attention_with_one_projection_stays_as_it_is():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
            self.other.out_proj.weight = self.one.out_proj.weight
            self.stem, self.last = nn.Linear(2, 8), nn.Linear(8, 40)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.unflatten(1, (3, 2)))
            for part in (self.one, self.other):
                x = x + part(x, x, x, need_weights=False)[0]
            return self.last(x.mean(1)).relu()

    torch.manual_seed(0)
    model = Classifier()
    model.body = Pair()
    units = UnitMap.of(model.eval(), next(iter(loader("a"))))
    assert set(units.whole) == {"body.one.out_proj", "body.other.out_proj"}
    assert "attention reads one of them" in units.whole["body.one.out_proj"]


# -- how they are held -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ab", "ba", "aba", "bab", "abb", "baa"])
def test_rows_of_a_weight_that_several_layers_read_are_held_and_all_others_learn_what_they_would(order):
    torch.manual_seed(1)
    net = nn.ModuleDict({"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)})
    net["b"].weight = net["a"].weight
    x, frozen = torch.randn(128, 300), torch.rand(300) < 0.6
    start, gradients, after = copy.deepcopy(net.state_dict()), [], []
    factors = dict.fromkeys(("a.weight", "a.bias", "b.bias"), torch.where(frozen, 0.0, 1.0))
    for held in ({}, factors):
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
        freezer = Freezer(net, held)
        freezer.attach([optimizer])
        for _ in range(2):
            optimizer.zero_grad()
            y = x
            for name in order:
                y = net[name](y).tanh()
            y.square().mean().backward()
            gradients.append(net["a"].weight.grad.clone())
            optimizer.step()
        after.append(net["a"].weight.detach().clone())
        freezer.detach()
    assert not bool(gradients[2][frozen].any())
    assert not bool(gradients[3][frozen].any())
    torch.testing.assert_close(gradients[2][~frozen], gradients[0][~frozen], rtol=1e-4, atol=1e-7)
    assert torch.equal(after[1][frozen], start["a.weight"][frozen])
    assert math.isfinite(float(after[1].sum()))


class AmongHeads(Classifier):
    """Layers and the heads of all tasks stand side by side in one module, as attributes."""

    def __init__(self) -> None:
        super().__init__()
        del self.heads, self.body
        self.net = net = nn.Module()
        net.left, net.right, net.joined = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 40)
        net.right.weight = net.left.weight
        net.head_a, net.head_b = nn.Linear(40, 2), nn.Linear(40, 2)
        self.task = "a"

    def forward(self, x: Tensor) -> Tensor:
        said = self.net.left(x).relu() + (self.net.right(x).relu() if self.task == "a" else 0)
        return getattr(self.net, f"head_{self.task}")(self.net.joined(said).relu())


def test_one_that_does_not_run_is_no_head_because_it_stands_beside_one():
    torch.manual_seed(0)
    model, rnf, x = AmongHeads(), RelevanceFreezing(), inputs()
    trainer(rnf, max_epochs=2).fit(model, datamodule=task_data("a"))
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    model.task = "b"
    trainer(rnf, max_epochs=2).fit(model, datamodule=task_data("b"))
    assert list(rnf.state.tasks) == ["a", "b"]
    model.task = "a"
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)


def test_two_parameters_in_one_memory_are_refused():
    model = Classifier()
    model.body[3] = nn.Linear(40, 40)
    model.body.append(nn.Linear(40, 40))
    model.body[-1].weight.data = model.body[3].weight.data
    with pytest.raises(ValueError, match=r"'body.3.weight' and 'body.\d.weight' are two parameters in one memory"):
        train(model, RelevanceFreezing(), "a", max_epochs=1)

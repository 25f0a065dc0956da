"""Options of freezing that nothing can be held by are refused, and held is what was there when the fit began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from records import ConvNet, Mlp, head_parameters, make, record_of, state_of
from torch import nn

from lightning_rnf.freezing.embeddings import MOST, Unread, check_rows, has_own_rows
from lightning_rnf.freezing.freezer import Freezer, check_globs, elasticities, hold_in_copy
from lightning_rnf.freezing.initial import remember, reset_free
from lightning_rnf.freezing.slices import Slice
from lightning_rnf.runtime import sharding


def test_a_glob_has_to_match_what_a_factor_can_reach():
    units = replace(make(Mlp).units(), own=("bn.weight", "bn.bias"), embeddings=("table.weight",))
    for option in (0.0, {}, {"fc1": 0.1}, {"fc?": 0.1, "norm": 0.0, "table": 1.0}):
        check_globs("elasticity", option, units)
    with pytest.raises(ValueError, match=r"elasticity: 'bn' matches nothing but norms.*norm_parameters='frozen'"):
        check_globs("elasticity", {"fc1": 0.1, "bn": 0.1}, units)
    with pytest.raises(ValueError, match=r"elasticity: 'fc3' matches no unit layer .*: \['fc1', 'fc2', 'norm'"):
        check_globs("elasticity", {"fc3": 0.1}, units)


def test_where_no_glob_matches_what_is_needed_stays_and_what_is_free_learns_as_ever():
    net = make(Mlp)
    state = state_of(net, record_of(net, tokens={"table.weight": torch.tensor([True, False, True])}))
    state.embeddings = ("table.weight",)
    factors = elasticities(state, {"other": 0.5}, {"other": 0.5})
    assert factors["fc1.weight"].tolist() == factors["fc1.bias"].tolist() == [0.0, 1.0] * 3
    assert factors["norm.weight"].item() == factors["norm.bias"].item() == 0.0
    assert factors["table.weight"].tolist() == [0.0, 1.0, 0.0]
    factors = elasticities(state, {"*": 0.25}, {"*": 0.5})
    assert factors["fc1.weight"].tolist() == [0.25, 0.5] * 3
    assert factors["norm.weight"].item() == 0.25
    assert factors["table.weight"].tolist() == [0.25, 0.5, 0.25]
    assert not any(factors[name].any() for name in head_parameters("first"))


def test_inside_of_a_sub_network_entries_that_are_needed_and_rows_of_others_stay():
    net = make(Mlp)
    needed = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    inside = {"fc1": torch.arange(6) > 2, "fc2": torch.ones(5, dtype=torch.bool)}
    factors = elasticities(state_of(net), 0.25, 0.5, inside, {"fc1": needed})
    for row, unit in enumerate(inside["fc1"].tolist()):
        expected = [0.25 if one else 0.5 for one in needed[row].tolist()] if unit else [0.0] * 4
        assert factors["fc1.weight"][row].tolist() == expected
    assert factors["fc1.bias"].tolist() == [0.0, 0.0, 0.0, 0.5, 0.25, 0.5]
    assert factors["fc2.weight"].tolist() == [0.25, 0.5, 0.25, 0.5, 0.25]


def test_rows_of_one_s_own_need_a_recall_that_brings_them_back():
    for asked in (None, "frozen", "per_task"):
        assert check_rows(asked, "exact") == asked
    assert check_rows("frozen", "paper") == "frozen"
    with pytest.raises(ValueError, match=r"embeddings='per_task' is brought back by recall: .* retention='exact'"):
        check_rows("per_task", "paper")
    with pytest.raises(ValueError, match="embeddings is 'shared', expected one of 'per_task', 'frozen'"):
        check_rows("shared", "exact")


def test_tables_have_rows_of_each_task_s_own_up_to_a_size_and_if_nothing_is_elastic():
    for size, elasticity, owned in ((MOST, 0.0, True), (MOST + 1, 0.0, False), (MOST, 0.1, False)):
        weight = torch.empty(size, 1, device="meta")
        assert has_own_rows(weight, None, elasticity) == owned
        assert has_own_rows(weight, "per_task", elasticity)
        assert not has_own_rows(weight, "frozen", elasticity)


def test_without_a_gradient_rows_that_an_optimizer_has_moved_count_as_read_and_others_do_not():
    weight = nn.Parameter(torch.zeros(5, 2))
    unread = Unread(weight, torch.tensor([True, False, False, False, False]))
    unread.pin()
    unread.note()  # nobody has written since
    assert not unread.learned().any()
    with torch.no_grad():
        weight[0] += 1.0  # frozen: not its to look after
        weight[3] += 1.0
    unread.note()
    assert unread.learned().tolist() == [False, False, False, True, False]
    with torch.no_grad():
        weight[4] += 1.0
    unread.pin()
    assert weight[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert unread.before().rows.tolist() == [3]


def test_frozen_rows_are_written_into_a_copy_of_what_it_has():
    net = make(Mlp)
    factors = elasticities(state_of(net), 0.0, 1.0, None)
    copy = {name: torch.zeros_like(value) for name, value in net.named_parameters() if name != "fc2.bias"}
    hold_in_copy(copy, net, factors)
    frozen = torch.arange(6) % 2 == 0
    assert torch.equal(copy["fc1.weight"][frozen], net.fc1.weight[frozen])
    assert not copy["fc1.weight"][~frozen].any()
    assert torch.equal(copy["norm.weight"], net.norm.weight)
    assert "fc2.bias" not in copy


def test_a_parameter_that_was_replaced_is_not_held_in_silence():
    net = make(Mlp)
    freezer = Freezer(net, elasticities(state_of(net), 0.0, 1.0, None))
    freezer.attach([torch.optim.SGD(net.parameters(), lr=0.1)])
    net.fc1.weight = nn.Parameter(net.fc1.weight.detach().clone())
    with pytest.raises(ValueError, match=r"'fc1\.weight' was replaced by another during the fit"):
        freezer.follow([torch.optim.SGD(net.parameters(), lr=0.1)])


def test_of_a_sharded_parameter_nothing_is_known_and_it_is_put_back_after_every_step(monkeypatch):
    monkeypatch.setattr(sharding, "is_sharded", lambda module: True)
    net = make(Mlp)
    freezer, optimizer = Freezer(net, elasticities(state_of(net))), torch.optim.SGD(net.parameters(), lr=0.1)
    freezer.attach([optimizer])
    before = net.fc1.weight.detach().clone()
    for step in range(1, 6):
        optimizer.zero_grad()
        net.fc1.weight.sum().backward()
        if step in (3, 5):  # after which nothing is looked at, and torch counts no such write
            net.fc1.weight.data.add_(1.0)
        optimizer.step()
        assert torch.equal(net.fc1.weight[::2], before[::2])


def test_curvature_is_forgotten_and_moments_are_not():
    net = make(Mlp)
    optimizers = [torch.optim.LBFGS(net.fc1.parameters()), torch.optim.Adam(net.fc2.parameters())]
    freezer = Freezer(net, elasticities(state_of(net), 0.0, 1.0, None))
    freezer.attach(optimizers)
    for optimizer in optimizers:
        optimizer.state["seen"] = {"steps": 3}
    freezer.forget_curvature()
    assert [list(optimizer.state) for optimizer in optimizers] == [[], ["seen"]]


def test_units_go_back_to_what_was_remembered_or_the_refusal_says_why_they_can_not():
    net = make(ConvNet)
    state = state_of(net)
    with pytest.raises(ValueError, match=r"free units can't be reset: .* leave reset_free out"):
        reset_free(state, net)
    before = {name: value.detach().clone() for name, value in net.state_dict().items()}
    state.initial = {
        "conv2.weight": torch.zeros(5, 4, 3, 3),
        "bn1.running_var": torch.full((4,), 9.0),
        "expert.weight": torch.ones(2),  # ran in a first batch, and no sub-network has it
    }
    reset_free(state, net, is_last=False)
    assert state.resets == 0
    free = torch.tensor([False, True, False, True, False])
    assert not net.conv2.weight[free].any()
    assert torch.equal(net.conv2.weight[~free], before["conv2.weight"][~free])
    assert net.bn1.running_var[free[:4]].tolist() == [9.0, 9.0]
    assert torch.equal(net.bn1.running_var[~free[:4]], before["bn1.running_var"][~free[:4]])
    assert torch.equal(net.conv1.weight, before["conv1.weight"])
    reset_free(state, net)
    assert state.resets == 1
    with torch.no_grad():
        net.conv2.weight.fill_(3.0)
    reset_free(state, net)  # once after each task
    assert bool((net.conv2.weight == 3.0).all())


def test_a_norm_of_each_task_s_own_goes_back_in_the_channels_of_free_units():
    net = make(ConvNet)
    net.layers = (replace(net.layers[0], parameters=("conv1.weight",)), net.layers[1])
    state = state_of(net)
    remember(state, net, net.layers)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for value in net.bn1.state_dict().values():
            value.add_(1)
    reset_free(state, net)
    for key in ("weight", "bias", "running_mean", "running_var"):
        now, before = net.state_dict()[f"bn1.{key}"], first[f"bn1.{key}"]
        assert torch.equal(now[1::2], before[1::2]), key
        assert torch.equal(now[::2], before[::2] + 1), key
    assert net.bn1.num_batches_tracked == first["bn1.num_batches_tracked"] + 1


@pytest.mark.parametrize("index", [None, ([0, 2],), ([0, 2], [1, 0])])
def test_a_slice_reads_writes_and_zeroes_the_same_part(index):
    chosen = None if index is None else tuple(torch.tensor(one) for one in index)
    part, weight = Slice(chosen), torch.arange(1.0, 7.0).view(3, 2)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[... if chosen is None else chosen] = True
    assert torch.equal(part.chosen(weight), mask)
    held = part.read(weight)
    moved = weight + 10
    assert not part.is_at(moved, held)
    part.write(moved, held)
    assert torch.equal(moved, torch.where(mask, weight, weight + 10))
    assert part.is_at(moved, held)
    part.zero(moved)
    assert torch.equal(moved, torch.where(mask, 0.0, weight + 10))

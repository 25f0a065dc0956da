"""Which entries of a weight a finished task needs, by hand; and that no other matters to any recall."""

from __future__ import annotations

import copy
import math
import random
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from networks import Built
from records import bare_record
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitMap, Wiring
from lightning_rnf.freezing import Freezer, elasticities, frozen_connections, hold_in_copy
from lightning_rnf.freezing import heard as heard_of
from lightning_rnf.memory import FreezeState, fingerprints
from lightning_rnf.recall import subnetwork

CLASSES = 3


def network(forward, shape, features, **modules):
    """With a head that reads the mean over positions of whatever ``forward`` gives."""
    flat = "pool" in modules or len(shape) == 1

    def whole(net, x):
        said = forward(net, x)
        return net.heads["a"](said if flat else said.mean((2, 3)))

    net = Built(whole, **modules, heads=nn.ModuleDict({"a": nn.Linear(features, CLASSES)}))
    torch.manual_seed(0)
    x, y = torch.randn(4, *shape), torch.zeros(4, dtype=torch.long)
    net.train()(x)
    return net.eval(), UnitMap.of(net, (x, y)), x


def finished(net, units, *masks):
    """A state of tasks that need these units, and connections wherever they are known."""
    state = FreezeState()
    for number, relevant in enumerate(masks):
        read = Wiring.of(net, units.layers).heard(relevant)
        bare = bare_record(units, relevant, subnetwork.statistics(net, units))
        record = replace(bare, name=f"task-{number}", connections=tuple(read), rows={})
        record.rows.update(fingerprints(net, units, record, state, read))
        state.add(record, units)
    return state


def frozen(net, units, *masks):
    state = finished(net, units, *masks)
    found = frozen_connections(net, state, heard_of(net, state))
    rows = state.frozen()
    return {
        layer.name: found.get(
            layer.name, layer.connections(rows[layer.name], None, net.get_parameter(f"{layer.name}.weight").shape)
        )
        for layer in units.layers
    }


def mask(*chosen: int, of: int) -> Tensor:
    found = torch.zeros(of, dtype=torch.bool)
    found[list(chosen)] = True
    return found


def block(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] & columns[None]


def test_of_a_chain_the_block_between_its_units_is_frozen():
    net, units, _ = network(lambda net, x: net.b(net.a(x).relu()).relu(), (4,), 5, a=nn.Linear(4, 6), b=nn.Linear(6, 5))
    of_a, of_b = mask(0, 3, of=6), mask(1, 2, of=5)

    found = frozen(net, units, {"a": of_a, "b": of_b})

    assert torch.equal(found["a"], block(of_a, torch.ones(4, dtype=torch.bool)))
    assert torch.equal(found["b"], block(of_b, of_a))


def test_of_two_tasks_the_union_of_both_blocks_is_frozen_and_no_more():
    net, units, _ = network(lambda net, x: net.b(net.a(x).relu()).relu(), (4,), 5, a=nn.Linear(4, 6), b=nn.Linear(6, 5))
    first = {"a": mask(0, of=6), "b": mask(0, of=5)}
    second = {"a": mask(1, 2, of=6), "b": mask(1, of=5)}

    found = frozen(net, units, first, second)

    assert torch.equal(found["b"], block(first["b"], first["a"]) | block(second["b"], second["a"]))
    assert not found["b"][1, 0]  # both its units are frozen, by different tasks


@pytest.mark.parametrize(
    ("activation", "is_zero"),
    [(nn.ReLU(), True), (nn.GELU(), True), (nn.Tanh(), True), (nn.Sigmoid(), False), (nn.Softplus(), False)],
)
def test_what_an_activation_makes_of_zero_decides(activation, is_zero):
    net, units, _ = network(
        lambda net, x: net.b(net.act(net.a(x))), (4,), 5, a=nn.Linear(4, 6), act=activation, b=nn.Linear(6, 5)
    )
    of_a, of_b = mask(0, 3, of=6), mask(1, 2, of=5)

    found = frozen(net, units, {"a": of_a, "b": of_b})

    assert torch.equal(found["b"], block(of_b, of_a | (not is_zero)))


def test_a_flattened_channel_has_a_column_for_each_position():
    net, units, _ = network(
        lambda net, x: net.b(net.pool(net.a(x).relu()).flatten(1)),
        (2, 4, 4),
        5,
        a=nn.Conv2d(2, 3, 3, padding=1),
        pool=nn.MaxPool2d(2),
        b=nn.Linear(12, 5),
    )
    of_a, of_b = mask(2, of=3), mask(0, 4, of=5)

    found = frozen(net, units, {"a": of_a, "b": of_b})

    assert torch.equal(found["b"], block(of_b, of_a.repeat_interleave(4)))


def test_a_sum_is_zero_where_all_of_it_is_and_a_concatenation_by_parts():
    net, units, _ = network(
        summed,
        (4,),
        5,
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 3),
        c=nn.Linear(3, 2),
        d=nn.Linear(5, 5),
    )
    relevant = {"a": mask(0, of=3), "b": mask(1, of=3), "c": mask(1, of=2), "d": mask(0, 1, of=5)}

    found = frozen(net, units, relevant)

    joint = relevant["a"] | relevant["b"]
    assert torch.equal(found["c"], block(relevant["c"], joint))
    assert torch.equal(found["d"], block(relevant["d"], torch.cat([relevant["c"], joint])))


def summed(net, x):
    both = (net.a(x) + net.b(x)).relu()
    return net.d(torch.cat([net.c(both).relu(), both], dim=-1))


def test_units_of_a_group_read_the_channels_of_their_group_only():
    net, units, _ = network(
        lambda net, x: net.depthwise(net.grouped(net.a(x).relu()).relu()),
        (2, 4, 4),
        6,
        a=nn.Conv2d(2, 4, 1),
        grouped=nn.Conv2d(4, 6, 3, padding=1, groups=2),
        depthwise=nn.Conv2d(6, 6, 3, padding=1, groups=6),
    )
    relevant = {"a": mask(0, 3, of=4), "grouped": mask(0, 4, of=6), "depthwise": mask(0, 1, 4, of=6)}

    found = frozen(net, units, relevant)

    # Units 0 to 2 read channels 0 and 1, units 3 to 5 channels 2 and 3.
    assert found["grouped"].tolist() == [
        [True, False],
        [False, False],
        [False, False],
        [False, False],
        [False, True],
        [False, False],
    ]
    assert found["depthwise"].view(-1).tolist() == [True, False, False, False, True, False]


def test_of_a_transposed_convolution_rows_are_channels_and_columns_are_units():
    net, units, _ = network(
        lambda net, x: net.b(net.a(x).relu()),
        (2, 4, 4),
        4,
        a=nn.Conv2d(2, 4, 1),
        b=nn.ConvTranspose2d(4, 4, 3, groups=2),
    )
    relevant = {"a": mask(0, 3, of=4), "b": mask(1, 2, of=4)}

    found = frozen(net, units, relevant)

    # Channels 0 and 1 are read by units 0 and 1, channels 2 and 3 by units 2 and 3.
    assert found["b"].tolist() == [[False, True], [False, False], [False, False], [True, False]]


def test_where_the_graph_cannot_be_followed_rows_are_frozen_and_it_is_said_why():
    net, units, _ = network(
        lambda net, x: net.b(net.a(x).relu().cumsum(1)), (4,), 5, a=nn.Linear(4, 6), b=nn.Linear(6, 5)
    )
    relevant = {"a": mask(0, 3, of=6), "b": mask(1, 2, of=5)}

    assert torch.equal(frozen(net, units, relevant)["b"], block(relevant["b"], torch.ones(6, dtype=torch.bool)))
    assert "cumsum" in Wiring.of(net, units.layers).reasons["b"]
    assert set(Wiring.of(net, units.layers).reasons) == {"b"}


def test_a_forward_that_no_graph_has_is_frozen_by_rows():
    net, units, _ = network(
        lambda net, x: net.b(net.a(x).relu() if float(x.sum()) < 1e9 else x[:, :6]),
        (4,),
        5,
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 5),
    )
    relevant = {"a": mask(0, 3, of=6), "b": mask(1, 2, of=5)}

    assert torch.equal(frozen(net, units, relevant)["b"], block(relevant["b"], torch.ones(6, dtype=torch.bool)))
    assert set(Wiring.of(net, units.layers).reasons) == {"a", "b"}


# -- the property, on random networks ---------------------------------------------------------------------------------


SMOOTH = (nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus)  # what is zero behind them is zero before them


class Random(nn.Module):
    """Layers of random kinds, each reading one of the tensors before it, a sum or a concatenation of two."""

    def __init__(self, seed: int, activations) -> None:
        super().__init__()
        rng, tying = random.Random(seed), random.Random(~seed)
        torch.manual_seed(seed)
        self.steps, self.parts = [], nn.ModuleList()
        channels = [2]
        for _ in range(rng.randint(2, 5)):
            one, other = rng.randrange(len(channels)), rng.randrange(len(channels))
            how = rng.choice(["one", "one", "sum", "concatenation"])
            if how == "sum" and channels[one] != channels[other]:
                how = "one"
            width = channels[one] + (channels[other] if how == "concatenation" else 0)
            units = rng.choice([4, 6])
            groups = rng.choice([g for g in (1, 1, 2, width) if width % g == 0 and units % g == 0])
            kind = rng.choice([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
            layer = kind(width, units, 3, padding=1, groups=groups, bias=rng.random() < 0.7)
            alike = [part[0] for part in self.parts if part[0].in_channels == width]
            if alike and tying.random() < 0.6:
                layer = copy.deepcopy(tying.choice(alike))
                units = layer.out_channels
            norm = rng.choice([nn.Identity, nn.Identity, nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), nn.PReLU])(units)
            act = rng.choice(activations)()
            gate = rng.random() < 0.2
            self.steps.append((one, other, how, gate))
            self.parts.append(nn.ModuleList([layer, norm, act]))
            channels.append(units)
        self.heads = nn.ModuleDict({"a": nn.Linear(channels[-1], CLASSES)})
        self._tie(tying)

    def _tie(self, rng: random.Random) -> None:
        """Some of the layers that the logits depend on have the weight of another of the same form."""
        heard = {len(self.steps)}
        for index, (one, other, how, _) in reversed([*enumerate(self.steps, 1)]):
            heard |= ({one} if how == "one" else {one, other}) if index in heard else set()
        layers = [part[0] for index, part in enumerate(self.parts, 1) if index in heard]
        for place, layer in enumerate(layers):
            form = [str(layer).removesuffix(", bias=False)").removesuffix(")") for layer in layers[: place + 1]]
            alike = [one for one, of_one in zip(layers, form[:-1], strict=False) if of_one == form[-1]]
            if alike and rng.random() < 0.9:
                layer.weight = rng.choice(alike).weight

    def forward(self, x):
        said = [x]
        for (one, other, how, gate), (layer, norm, act) in zip(self.steps, self.parts, strict=True):
            read = said[one]
            if how == "sum":
                read = read + said[other]
            elif how == "concatenation":
                read = torch.cat([read, said[other]], dim=1)
            out = act(norm(layer(read)))
            said.append(out * torch.sigmoid(out) if gate else out)
        return self.heads["a"](said[-1].mean((2, 3)))


def random_network(seed: int, activations=(*SMOOTH, nn.ReLU, nn.ReLU, nn.ReLU)):
    net = Random(seed, activations)
    x = torch.randn(2, 2, 3, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        net.train()(x)
    return net.eval(), UnitMap.of(net, (x, torch.zeros(2, dtype=torch.long))), x


def recalled(net, state, name, x):
    with subnetwork.recall(net, state.layers, state.tasks[name]), torch.no_grad():
        return net(x)


def check_network(seed: int) -> None:
    net, units, x = random_network(seed)
    masks = [{layer.name: torch.rand(layer.units) < 0.6 for layer in units.layers} for _ in range(2)]
    state = finished(net, units, *masks)
    before = {name: recalled(net, state, name, x) for name in state.tasks}
    factors = elasticities(state, 0.0, 1.0, None, frozen_connections(net, state, heard_of(net, state)))
    own = dict(net.named_parameters())

    for fill in (math.nan, math.inf, -math.inf, 1e30, None):
        damaged = copy.deepcopy(net)
        with torch.no_grad():
            for name, parameter in damaged.named_parameters():
                factor = factors.get(name)
                if factor is None or not factor.ndim:
                    continue
                chosen = factor == 1
                noise = torch.randn_like(parameter[chosen])
                parameter[chosen] = noise if fill is None else torch.full_like(noise, fill)
        for name, logits in before.items():
            assert torch.equal(recalled(damaged, state, name, x), logits), (seed, fill, name)
        for name, parameter in damaged.named_parameters():  # recall gives back what it found, bit by bit
            factor = factors.get(name)
            if fill is not None and factor is not None and factor.ndim:
                there = parameter[factor == 1]
                assert bool((there.isnan() if math.isnan(fill) else there == fill).all())
            if factor is not None and factor.ndim:
                assert torch.equal(parameter[factor != 1], own[name][factor != 1])


@pytest.mark.parametrize("seed", range(25))
def test_what_is_not_frozen_may_become_anything_and_recall_has_the_same_bits(seed):
    check_network(seed)


@pytest.mark.slow
def test_the_same_of_many_networks():
    for seed in range(25, 100):
        check_network(seed)


def check_needed(seed: int) -> None:
    net, units, x = random_network(seed, SMOOTH)
    masks = [{layer.name: torch.rand(layer.units) < 0.6 for layer in units.layers} for _ in range(2)]
    state = finished(net, units, *masks)
    found = frozen(net, units, *masks)
    wanted = {layer.name: torch.zeros_like(found[layer.name]) for layer in units.layers}
    for name, record in state.tasks.items():
        for layer, read in measured_inputs(net, state, name, x).items():
            weight = net.get_parameter(f"{layer.name}.weight")
            wanted[layer.name] |= layer.connections(record.relevant[layer.name], read, weight.shape)
    named = Wiring.of(net, units.layers).reasons
    for layer in units.layers:
        if layer.name not in named:
            assert torch.equal(found[layer.name], wanted[layer.name]), (seed, layer.name)


def measured_inputs(net, state, name, x):
    """Which channels each layer read that were not zero."""
    found = {}
    with ExitStack() as hooks:
        for layer in state.layers:

            def note(part, args, layer=layer):
                found[layer] = args[0].movedim(layer.axis, 0).flatten(1).any(dim=1)

            hooks.callback(net.get_submodule(layer.name).register_forward_pre_hook(note).remove)
        recalled(net, state, name, x)
    return found


@pytest.mark.parametrize("seed", range(25))
def test_what_is_frozen_reads_something_in_a_finished_tasks_recall(seed):
    check_needed(seed)


@pytest.mark.slow
def test_the_same_is_frozen_of_many_networks_as_reads_something():
    for seed in range(25, 100):
        check_needed(seed)


# -- how they are held ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("is_block", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_frozen_entries_are_held_and_all_others_learn_what_they_would(share, is_block, kind):
    torch.manual_seed(1)
    if kind == "linear":
        layer, x = nn.Linear(300, 200), torch.randn(128, 300)
    else:
        layer, x = nn.Conv2d(32, 40, 3), torch.randn(4, 32, 6, 6)
    rows, columns = torch.rand(len(layer.weight)) < share, torch.rand(layer.weight.shape[1]) < share
    frozen = block(rows, columns) if is_block else torch.rand(layer.weight.shape[:2]) < share
    net = nn.ModuleDict({"layer": layer})
    start, gradients, after = copy.deepcopy(net.state_dict()), [], []
    for factors in ({}, {"layer.weight": torch.where(frozen, 0.0, 1.0)}):
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
        freezer = Freezer(net, factors)
        freezer.attach([optimizer])
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        gradients.append(layer.weight.grad.clone())
        optimizer.step()
        after.append(layer.weight.detach().clone())
        if factors:
            hold = {"layer.weight": torch.full_like(layer.weight, torch.nan)}
            hold_in_copy(hold, net, factors)
            written = (
                ~hold["layer.weight"].isnan().flatten(2) if kind == "convolution" else ~hold["layer.weight"].isnan()
            )
            assert torch.equal(written.all(-1) if kind == "convolution" else written, frozen)
        freezer.detach()

    plain, held = gradients
    assert not bool(held[frozen].any())
    torch.testing.assert_close(held[~frozen], plain[~frozen], rtol=1e-4, atol=1e-7)
    assert torch.equal(after[1][frozen], start["layer.weight"][frozen])
    torch.testing.assert_close(after[1][~frozen], after[0][~frozen], rtol=1e-4, atol=1e-7)

"""New units in a model that has run out: what there was stays, to the bit, and what is new can be used."""

from __future__ import annotations

import copy
import math

import architectures
import lightning.pytorch as pl
import pytest
import torch
from nets_to_widen import CLASSES, NARROW, WIDE, Net
from torch import nn
from torch.utils.data import TensorDataset
from training import Classifier, ConvClassifier, inputs, task_data, train, trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.freezing import initial
from lightning_rnf.streams import TaskDataModule
from lightning_rnf.tasks import widening

pytestmark = pytest.mark.filterwarnings(
    *("ignore:no free units", "ignore:.*not one of", "ignore:.*answer that is always", "ignore:.*is not conserved"),
    "ignore:.*is forgotten, but no unit",
    "ignore:.*falls short of the criterion",
)

EVERYTHING = {"criterion": lambda score: score.cutoff == 0}
"""All units are relevant, so all of them are frozen."""


def batches(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(64, *shape, generator=generator), torch.randint(CLASSES, (64,), generator=generator))]


def built(name, tasks="a", **options):
    """A network whose tasks have ended without training."""
    build, shape = WIDE[name]
    torch.manual_seed(0)
    model, rnf = build(), RelevanceFreezing(**{"criterion": lambda score: score.cutoff <= 4} | options)
    for seed, task in enumerate(tasks):
        model.heads.activate(task)
        rnf.protect(model, batches(shape, seed), name=task)
    return model, rnf, torch.randn(7, *shape)


def recalled(model, rnf, x, tasks="a"):
    """Of batches of several sizes."""
    found = []
    for task in tasks:
        with torch.no_grad(), rnf.recall(task, model):
            found += [model(x[:size]).clone() for size in (7, 3, 1)]
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def snapshot(model):
    """Objects and values of every parameter and buffer, and the attributes of every module."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, str)) and key != "training"
    }
    return {name: (id(value), value.clone()) for name, value in tensors.items()}, numbers


def unchanged(before, model):
    tensors, numbers = snapshot(model)
    return (
        numbers == before[1]
        and tensors.keys() == before[0].keys()
        and all(one[0] == tensors[name][0] and torch.equal(one[1], tensors[name][1]) for name, one in before[0].items())
    )


@torch.no_grad()
def spoil(model, rnf, value):
    """Write to all that a later task may change."""
    frozen = rnf.state.frozen()
    for layer in rnf.state.layers:
        for name in layer.parameters:
            free = layer.spread(name, ~frozen[layer.name])
            model.get_parameter(name)[free] = value


# -- what a widening leaves as it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDE)
def test_what_is_frozen_reads_what_it_read_and_recall_keeps_its_bits(name):
    model, rnf, x = built(name, **EVERYTHING)
    model.eval()
    units = {layer.name: layer.units for layer in rnf.state.layers}
    before, plain = recalled(model, rnf, x), model(x).detach()
    small = copy.deepcopy(model)
    added = rnf.widen(model, 0.5, layers="*")
    assert list(added) == list(units)
    assert all(more >= math.ceil(0.5 * units[layer]) for layer, more in added.items())
    assert {layer.name: layer.units for layer in rnf.state.layers} == {one: units[one] + added[one] for one in units}
    # All old rows are frozen and the head is that of a finished task: the whole, wider network says what it said.
    torch.testing.assert_close(model(x).detach(), plain, rtol=1e-5, atol=1e-5)
    assert same(before, recalled(model, rnf, x))
    spoil(model, rnf, math.nan)
    assert same(before, recalled(model, rnf, x))
    report = rnf.report(model)
    assert report.is_sound
    # Export is of the sub-network that there was.
    exported, other = rnf.export(model, "a"), small
    torch.testing.assert_close(exported(x), before[0], rtol=1e-5, atol=1e-5)
    assert sum(one.numel() for one in exported.parameters()) <= sum(one.numel() for one in other.parameters())


@pytest.mark.filterwarnings("ignore:.*of the parameters of its silent units are still there:UserWarning")
@pytest.mark.parametrize("name", WIDE)
def test_several_widenings_and_tasks_between_them(name):
    model, rnf, x = built(name)
    kept = recalled(model, rnf, x)
    shape = WIDE[name][1]
    for number, task in enumerate("bc", start=1):
        before = dict(model.named_parameters())
        rnf.widen(model, 0.3, layers="*")
        assert dict(model.named_parameters()).keys() == before.keys()
        with torch.no_grad():
            for parameter in (parameter for layer in rnf.state.layers for parameter in layer.parameters):
                assert model.get_parameter(parameter).isfinite().all()
        model.heads.activate(task)
        rnf.protect(model, batches(shape, number), name=task)
        assert rnf.state.tasks[task].widenings == number
        kept += recalled(model, rnf, x, task)
        spoil(model, rnf, float(number))
        assert same(kept, recalled(model, rnf, x, "abc"[: number + 1]))
        assert rnf.report(model).is_sound
    # One recall inside of another.
    shapes = {name: value.shape for name, value in model.named_parameters()}
    with torch.no_grad(), rnf.recall("a", model):
        with rnf.recall("a", model):
            assert torch.equal(model(x), kept[0])
        assert torch.equal(model(x), kept[0])
    assert {name: value.shape for name, value in model.named_parameters()} == shapes
    # A task that is given up takes nothing from the others.
    rnf.forget("a")
    assert same(kept[3:], recalled(model, rnf, x, "bc"))
    assert rnf.report(model).is_sound
    for task in "bc":
        torch.testing.assert_close(rnf.export(model, task)(x), kept["abc".index(task) * 3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "regnet_y_400mf", "efficientnet_b0"])
def test_torchvision(name):
    torch.manual_seed(0)
    model = architectures.narrow(name, CLASSES).eval()
    rnf = RelevanceFreezing(**EVERYTHING, importance="random", recalibrate_norm=False)
    rnf.protect(model, [(torch.randn(4, 3, 32, 32), torch.arange(4) % CLASSES)], name="a")
    x = torch.randn(3, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        plain, before = model(x), recalled(model, rnf, x)
        added = rnf.widen(model, 0.25, layers="*")
        assert set(added) == {layer.name for layer in rnf.state.layers}
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
        assert same(before, recalled(model, rnf, x))
    assert rnf.report(model).is_sound


def test_tied_layers_grow_together_and_others_stay():
    model, rnf, _ = built("residual")
    assert rnf.widen(model, 0.5, layers="body.stem") == {"body.stem": 3, "body.outer.0": 3}
    assert model.body.stem.weight.shape == (9, 2, 3, 3)
    assert model.body.inner[0].weight.shape == (8, 9, 3, 3)
    assert model.body.outer[0].weight.shape == (9, 8, 3, 3)
    assert model.body.outer[1].num_features == len(model.body.outer[1].running_var) == 9
    assert all(head.weight.shape == (CLASSES, 9) for head in model.heads.tasks.values())
    assert model.heads.in_features == 9
    model.heads.add("d", CLASSES)
    model.heads.activate("d")
    model(torch.randn(2, 2, 6, 6))


def test_concatenated_channels_come_in_the_middle():
    model, rnf, _ = built("concatenation")
    weight = model.body.join.weight.detach().clone()
    assert rnf.widen(model, 0.1, layers="body.one") == {"body.one": 1}
    now = model.body.join.weight.detach()
    old = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # one: three and a new one; other: four; one again
    assert now.shape == (5, 12, 3, 3)
    assert torch.equal(now[:, old], weight)
    frozen = rnf.state.frozen()["body.join"]
    assert not now[frozen][:, [3, 11]].any()
    assert now[~frozen][:, [3, 11]].all()


def test_groups_come_whole():
    model, rnf, _ = built("groups")
    added = rnf.widen(model, 0.1, layers="body.2")
    grouped, depthwise, twice = model.body[2], model.body[5], model.body[7]
    assert added == {"body.0": 2, "body.2": 3, "body.5": 3, "body.7": 6}
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (5, 10, 15)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (15, 15, 15)
    assert (twice.groups, twice.in_channels, twice.out_channels) == (15, 15, 30)
    assert grouped.weight.shape == (15, 2, 3, 3)


def test_new_units_start_as_those_of_torch_and_every_run_draws_the_same():
    drawn = []
    for _ in range(2):
        model, rnf, _ = built("mlp", **EVERYTHING)
        torch.manual_seed(len(drawn))  # whatever the program draws besides
        state = torch.get_rng_state()
        rnf.widen(model, 50.0, layers="*")
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(model.state_dict())
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
    new = model.body[3].weight[5:].detach()
    bound = 1 / math.sqrt(model.body[3].in_features)
    assert new.abs().max() <= bound
    assert new.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    fresh = nn.Linear(*reversed(new.shape))
    assert new.std() == pytest.approx(fresh.weight.std().item(), rel=0.05)
    norm = model.body[4]
    for value, expected in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert (value[5:] == expected).all()
    assert (model.body[1].weight[8:] == 0.25).all()
    assert not model.heads.tasks["a"].weight[:, 5:].any()  # of a finished task
    assert model.heads.tasks["b"].weight[:, 5:].all()  # of one to come


def test_what_the_user_has_set_on_parameters_stays():
    model, rnf, _ = built("convolutions", **EVERYTHING)
    model.double().to(memory_format=torch.channels_last)
    rnf, shape = RelevanceFreezing(**EVERYTHING), WIDE["convolutions"][1]
    data = [(x.double(), y) for x, y in batches(shape)]
    model.body[0].weight.is_mine = True
    model.body[0].bias.requires_grad_(False)
    rnf.protect(model, data, name="a")
    x = torch.randn(5, *shape, dtype=torch.float64)
    before = recalled(model, rnf, x)
    rnf.widen(model, 0.5, layers="*")
    weight = model.body[0].weight
    assert weight.is_mine
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert not model.body[0].bias.requires_grad
    assert same(before, recalled(model, rnf, x))


# -- fits, files -------------------------------------------------------------------------------------------------------


def fitted(model_type=Classifier, tasks=("a", "b"), **options):
    torch.manual_seed(0)
    model, rnf = model_type(), RelevanceFreezing(**options)
    train(model, rnf, *tasks, max_epochs=1)
    return model, rnf


@pytest.mark.parametrize("model_type", [Classifier, ConvClassifier])
def test_a_stream_goes_on_and_old_tasks_are_recalled_to_the_bit(model_type, tmp_path):
    model, rnf = fitted(model_type, criterion=0.0)
    before = recalled(model, rnf, inputs(), "ab")
    added = rnf.widen(model, 0.5, layers="*")
    assert same(before, recalled(model, rnf, inputs(), "ab"))
    old = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, rnf, "c", max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    assert same(before, recalled(model, rnf, inputs(), "ab"))
    record = rnf.state.tasks["c"]
    assert any(record.relevant[name][-more:].any() for name, more in added.items())
    assert any(not torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert set(record.drift) == {"a", "b"}
    assert not any(record.drift.values())
    report = rnf.report(model)
    assert report.is_sound
    assert set(report.audit.drift.values()) == {0.0}
    str(report)

    # In a new process, with a model of the sizes that the code says.
    path = next(tmp_path.rglob("c-ended.ckpt"))
    expected = recalled(model, rnf, inputs(), "abc")
    small, again = model_type(), RelevanceFreezing()
    small.heads.add("d", 2)  # of a task to come
    again.restore(path, small)
    assert same(expected, recalled(small, again, inputs(), "abc"))
    assert {name: value.shape for name, value in small.named_parameters() if ".d." not in name} == {
        name: value.shape for name, value in model.named_parameters()
    }
    small.heads.activate("d")
    small(inputs())  # the head has grown with the rest
    assert not any(again.report(small).audit.changed.values())

    # Masks are handed on beside a model of the sizes that it has come to have.
    rnf.save(tmp_path / "masks.safetensors")
    handed = RelevanceFreezing()
    handed.load(tmp_path / "masks.safetensors", model)
    assert same(expected, recalled(model, handed, inputs(), "abc"))
    with pytest.raises(ValueError, match=r"before rnf\.widen: rnf\.restore"):
        RelevanceFreezing().load(tmp_path / "masks.safetensors", model_type())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_trainer_loads_a_checkpoint_of_a_wider_model_into_one_of_the_original_sizes(tmp_path):
    model, rnf = fitted()
    rnf.widen(model, 0.5, layers="*")
    train(model, rnf, "c", max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    expected = recalled(model, rnf, inputs(), "abc")
    path = next(tmp_path.rglob("c-ended.ckpt"))
    small, again = Classifier(), RelevanceFreezing()
    small.heads.activate("a")
    trainer(again).test(small, datamodule=task_data("a"), ckpt_path=path, verbose=False)
    assert same(expected, recalled(small, again, inputs(), "abc"))
    (path,) = tmp_path.rglob("epoch*.ckpt")  # of before the task's end
    resumed, again = Classifier(), RelevanceFreezing()
    resumed.heads.activate("c")
    trainer(again, max_epochs=3).fit(resumed, datamodule=task_data("c"), ckpt_path=path)
    assert resumed.body[0].out_features == 60
    assert same(expected[:6], recalled(resumed, again, inputs(), "ab"))
    assert not resumed._load_state_dict_pre_hooks


def test_free_units_are_reset_to_what_they_started_from_the_new_ones_too():
    model, rnf = fitted(reset_free=True, criterion=0.1)
    first = rnf.state.initial["body.0.weight"]
    rnf.widen(model, 0.5, layers="*")
    started = {name: value.clone() for name, value in model.state_dict().items()}
    now = rnf.state.initial["body.0.weight"]
    assert torch.equal(now[:40], first)
    assert torch.equal(now[40:], started["body.0.weight"][40:])
    train(model, rnf, "c", max_epochs=1)
    assert sum(rnf.forget("c").values())
    frozen = rnf.state.frozen()
    initial.reset_free(rnf.state, model)
    for layer in rnf.state.layers:
        free = ~frozen[layer.name]
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        assert torch.equal(weight[free], rnf.state.initial[f"{layer.name}.weight"][free])


def test_free_capacity_of_before_is_what_it_was_then():
    model, rnf = fitted()
    before = rnf.report(model).to_dict()
    capacity = rnf.state.tasks["b"].capacity
    rnf.widen(model, 1.0, layers="*")
    assert rnf.state.tasks["b"].capacity == capacity
    assert rnf.report(model).to_dict()["capacity"] == before["capacity"]
    assert rnf.free_capacity > 0.5
    rnf.forget("b")
    assert rnf.state.tasks["a"].capacity == pytest.approx(
        {name: 1 - mask[:40].double().mean().item() for name, mask in rnf.state.tasks["a"].relevant.items()}
    )


def test_layers_that_have_run_out_are_found():
    model, rnf = fitted(criterion=0.5)
    assert min(rnf.capacity().values()) > 0.1
    assert rnf.widen(model, 0.5) == {}
    assert not rnf.state.widenings
    record = rnf.state.tasks["b"]
    record.relevant["body.3"][:] = True
    assert rnf.widen(model, 0.5) == {"body.3": 20}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NARROW)
def test_what_can_not_grow_is_named_and_nothing_is_changed(name):
    build, shape, features, layer, operation = NARROW[name]
    torch.manual_seed(0)
    model, rnf = Net(build(), features), RelevanceFreezing(importance="random")
    rnf.protect(model, batches(shape), name="a")
    before, state = snapshot(model), rnf.state
    with pytest.raises(ValueError, match=layer) as raised:
        rnf.widen(model, 0.5, layers="*")
    raised.match(operation)
    assert "\n" not in str(raised.value)
    assert unchanged(before, model)
    assert rnf.state is state


@pytest.mark.parametrize("share", [0, -1, math.nan, math.inf, True, "half"])
def test_a_share_that_is_none_is_refused(share):
    model, rnf, _ = built("mlp")
    with pytest.raises(ValueError, match="share is"):
        rnf.widen(model, share)


def test_other_refusals():
    model, rnf, _ = built("mlp")
    with pytest.raises(ValueError, match=r"layers='stem' matches no unit layer; they are body\.0, body\.3"):
        rnf.widen(model, 0.5, layers="stem")
    with pytest.raises(ValueError, match="no task has ended"):
        RelevanceFreezing().widen(model, 0.5)

    class Widens(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            rnf.widen(pl_module, 0.5)

    model, rnf = fitted()
    model.heads.activate("c")
    with pytest.raises(RuntimeError, match="a fit is under way: widen the model"):
        trainer(rnf, Widens(), max_epochs=1).fit(model, datamodule=task_data("c"))


def test_a_widening_that_would_change_recall_is_undone(monkeypatch):
    """A forward whose graph does not show all that it does."""
    model, rnf, x = built("mlp")
    before, state, expected = snapshot(model), rnf.state, recalled(model, rnf, x)
    calls = iter([False, True])
    real = widening.drifts
    monkeypatch.setattr(
        widening, "drifts", lambda *given, **named: {k: v + next(calls) for k, v in real(*given, **named).items()}
    )
    with pytest.raises(ValueError, match="recall of 'a' would not be bit-equal"):
        rnf.widen(model, 0.5, layers="*")
    assert unchanged(before, model)
    assert rnf.state is state
    assert same(expected, recalled(model, rnf, x))


def test_heads_of_ones_own_grow_with_the_one_that_runs():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.heads = nn.ModuleDict({name: nn.Linear(8, CLASSES) for name in "abc"})
            self.active = "a"

        def forward(self, x):
            return self.heads[self.active](self.body(x))

    torch.manual_seed(0)
    model, rnf = Own(), RelevanceFreezing()
    for seed, task in enumerate("ab"):
        model.active = task
        rnf.protect(model, batches((6,), seed), name=task)
    x = torch.randn(7, 6)
    model.active = "a"
    before = recalled(model, rnf, x)
    model.active = "c"
    rnf.widen(model, 0.5, layers="*")
    model(x)
    model.active = "a"
    assert not model.heads["a"].weight[:, 8:].any()
    assert model.heads["c"].weight[:, 8:].all()
    assert same(before, recalled(model, rnf, x))


def test_the_warning_of_a_full_layer_names_it():
    torch.manual_seed(0)
    model, rnf = WIDE["mlp"][0](), RelevanceFreezing(**EVERYTHING)
    for seed, task in enumerate("ab"):
        model.heads.activate(task)
        with pytest.warns(UserWarning, match=r"no free units are left in .*rnf\.widen\(model, 0\.5\)"):
            rnf.protect(model, batches((6,), seed), name=task)
        rnf.widen(model, 0.5)
        assert min(rnf.capacity().values()) > 0.3


class Stream(Classifier):
    """A network that is far too narrow for ten tasks."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU())
        self.heads = MultiHead(40, {str(task): 2 for task in range(10)})


def stream_task(task):
    """Two classes by the signs of two directions of the task's own: no linear head alone can tell them apart."""
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(task))
    one, other = torch.randn(2, 8, generator=torch.Generator().manual_seed(100 + task))
    data = TensorDataset(x, ((x @ one > 0) ^ (x @ other > 0)).long())
    return TaskDataModule(str(task), 2, data, data, data, batch_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("widens", [True, False])
def test_a_stream_that_is_full_after_five_tasks_goes_on_to_ten(widens):
    torch.manual_seed(0)
    model = Stream()
    # Each task claims a fifth of what there is: all that its ration lets it.
    ration = [0.2, 0.25, 1 / 3, 0.5, 1.0] * 2
    rnf = RelevanceFreezing(**EVERYTHING, ration=ration, recovery_epochs=4, recovery_criterion=EVERYTHING["criterion"])
    tasks, kept = [stream_task(task) for task in range(10)], {}

    def recalled_logits(data):
        x, y = data.test.tensors
        with torch.no_grad(), rnf.recall(data.task, model):
            logits = model(x)
        return logits, float((logits.argmax(1) == y).float().mean())

    for data in tasks:
        if data.task == "5":
            assert set(rnf.capacity().values()) == {0.0}
            if widens:
                assert rnf.widen(model, 1.0) == {"body.0": 40, "body.2": 40}
        model.heads.activate(data.task)
        trainer(rnf, max_epochs=12).fit(model, datamodule=data)
        kept[data.task] = recalled_logits(data)[0]
    accuracies = [recalled_logits(data)[1] for data in tasks]
    assert all(torch.equal(recalled_logits(data)[0], kept[data.task]) for data in tasks)
    first, last = sum(accuracies[:5]) / 5, sum(accuracies[5:]) / 5
    assert (last > first - 0.03) == widens

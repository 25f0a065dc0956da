from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import CLASSES, Built, labelled, mlp
from snapshot import changes, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus

from lightning_rnf.anatomy.units import UnitMap
from lightning_rnf.relevance.attribution import attribute
from lightning_rnf.runtime.guard import borrowed, evaluating

# -- a module with something of everything ----------------------------------------------------------------------------

IMAGES = (2, 6, 6)


def furnished() -> nn.Module:
    """Norms, dropout, frozen and waiting parts, gradients, hooks, buffers and containers of the user's own."""
    torch.manual_seed(0)
    net = Built(
        lambda net, x: net.heads["this"](net.features(x).flatten(1)),
        heads=nn.ModuleDict({"this": nn.Linear(20, CLASSES), "other": nn.Linear(20, CLASSES)}),
        features=nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(),
        ),
    )
    for module in (net.features[1], net.features[6], net.heads["other"]):
        module.eval()  # on purpose, in a module in training mode
    net.features[4].requires_grad_(False)
    net.heads["other"].requires_grad_(False)
    net.heads["other"].weight.grad = torch.ones(CLASSES, 20)
    net(labelled(4, *IMAGES)[0]).sum().backward()
    net.register_buffer("count", torch.zeros(3))
    net.register_buffer("scratch", torch.zeros(()), persistent=False)
    net.seen, net.notes, net.kinds = [], {"a": 1}, {"x"}
    net.features[0].weight.register_hook(lambda gradient: gradient)
    net.features[0].register_forward_pre_hook(lambda module, args: None)
    net.features[3].register_forward_hook(lambda module, args, output: None)
    net.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    return net


def plain(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    x, y = batch
    return module(x), y


def meddling(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """A prediction that does to the module what forwards of users do, and worse."""
    torch.rand(3)
    module.features[6].train()  # the dropout
    logits, y = plain(module, batch)
    module.count += 1
    module.scratch = module.scratch + 1
    module.last = logits
    module.seen.append(logits)
    module.notes["b"] = logits
    module.kinds.clear()
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.grad = None
    module.register_forward_hook(lambda module, args, output: None)
    return logits, y


class Breaks:
    """A prediction that raises in its ``calls``-th call, before or after the forward."""

    def __init__(self, error: BaseException, calls: int, *, before: bool) -> None:
        self.error, self.calls, self.before = error, calls, before

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        self.calls -= 1
        if self.calls <= 0 and self.before:
            raise self.error
        prediction = meddling(module, batch)
        if self.calls <= 0:
            raise self.error
        return prediction


def traced(module: nn.Module, batches: Any, predict: Any) -> None:
    UnitMap.of(module, labelled(4, *IMAGES), predict)


def attributed(module: nn.Module, batches: Any, predict: Any) -> None:
    attribute(module, LAYERS, batches, predict)


def attributed_canonised(module: nn.Module, batches: Any, predict: Any) -> None:
    attribute(module, LAYERS, batches, predict, EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]))


LAYERS = UnitMap.of(furnished(), labelled(2, *IMAGES)).layers
BORROWERS = [traced, attributed, attributed_canonised]


@pytest.fixture
def batches() -> DataLoader:
    """Drawn at random, which itself moves the random state."""
    return DataLoader(TensorDataset(*labelled(9, *IMAGES)), batch_size=4, shuffle=True)


# -- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", [plain, meddling])
@pytest.mark.parametrize("borrower", BORROWERS)
def test_the_module_comes_back_as_it_was(borrower, predict, batches):
    net = furnished()
    before = snapshot(net)

    borrower(net, batches, predict)

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("before_forward", [True, False], ids=["before the forward", "after the forward"])
@pytest.mark.parametrize(
    ("borrower", "call"),
    [(traced, 1), (attributed, 1), (attributed, 2), (attributed_canonised, 1), (attributed_canonised, 2)],
)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_module_comes_back_as_it_was_when_a_prediction_raises(borrower, call, before_forward, error):
    net = furnished()
    before = snapshot(net)

    with pytest.raises(type(error)):
        borrower(net, [labelled(4, *IMAGES)] * 3, Breaks(error, call, before=before_forward))

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("where", ["features.0.weight", "features.4.running_var", "heads.this.bias"])
@pytest.mark.parametrize("borrower", BORROWERS)
def test_a_module_with_nan_comes_back_as_it_was(borrower, where):
    net = furnished()
    with torch.no_grad():
        net.state_dict()[where].view(-1)[0] = torch.nan
    before = snapshot(net)

    with pytest.raises(ValueError, match="not finite"):
        borrower(net, [labelled(4, *IMAGES)] * 2, plain)

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("what", ["batches", "labels", "progress", "hook", "rule"])
def test_the_module_comes_back_as_it_was_when_something_else_raises(what):
    def fail(*_: Any) -> None:
        raise ArithmeticError

    def two_then_fail():
        yield from [labelled(4, *IMAGES)] * 2
        fail()

    net = furnished()
    x, y = labelled(4, *IMAGES)
    options: dict[str, Any] = {"batches": [(x, y)] * 3}
    if what == "batches":
        options["batches"] = two_then_fail()
    elif what == "labels":
        options["batches"] = [(x, y), (x, y + CLASSES)]
    elif what == "progress":
        options["progress"] = fail
    elif what == "hook":
        net.features[5].register_forward_hook(fail)
    elif what == "rule":  # in the middle of the backward, while a layer has other parameters
        options["composite"] = EpsilonPlus(stabilizer=fail)
    before = snapshot(net)

    with pytest.raises(ValueError if what == "labels" else ArithmeticError):
        attribute(net, LAYERS, **options)

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("canonise", [False, True])
def test_a_module_of_any_precision_comes_back_as_it_was(canonise, dtype):
    net = furnished().to(dtype)
    net.zero_grad()
    x, y = labelled(4, *IMAGES)
    net(x.to(dtype)).sum().backward()
    before = snapshot(net)

    x = x.double() if dtype == torch.float64 else x
    (attributed_canonised if canonise else attributed)(net, [(x, y)] * 2, plain)

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("borrower", BORROWERS)
def test_statistics_that_a_norm_moved_come_back(borrower):
    # Some norms use the batch's statistics in eval mode, too, and batch norm moves its own without counting a version.
    def normed(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return module(nn.functional.batch_norm(x, module.mean, module.variance, training=True)), y

    net = furnished()
    net.register_buffer("mean", torch.zeros(2))
    net.register_buffer("variance", torch.ones(2))
    before = snapshot(net)

    borrower(net, [labelled(4, *IMAGES)] * 2, normed)

    assert changes(before, snapshot(net)) == []


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    net[4].weight = net[2].weight
    batch = labelled(4, 4)
    layers = UnitMap.of(net, batch, units="0").layers
    before = snapshot(net)

    attribute(net, layers, [batch] * 2)

    assert changes(before, snapshot(net)) == []
    assert net[4].weight is net[2].weight


# -- what follows from it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("borrower", BORROWERS)
def test_an_optimizer_made_before_still_trains_the_module(borrower, make, batches):
    borrowed_net, left_alone = furnished(), furnished()
    optimizers = [make(net.parameters(), lr=0.1) for net in (borrowed_net, left_alone)]
    borrower(borrowed_net, batches, plain)

    x, y = labelled(8, *IMAGES)
    start = copy.deepcopy(borrowed_net.state_dict())
    for net, optimizer in zip((borrowed_net, left_alone), optimizers, strict=True):
        for seed in range(2):
            torch.manual_seed(seed)  # of the dropout
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    moved = [name for name, value in borrowed_net.state_dict().items() if not torch.equal(value, start[name])]
    assert {"features.0.weight", "features.1.weight", "features.3.weight", "heads.this.weight"} <= set(moved)
    for name, value in left_alone.state_dict().items():
        assert torch.equal(borrowed_net.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_on_gradient_accumulators_still_fire(dtype):
    # DistributedDataParallel hangs its all-reduce on them: without it every process goes its own way.
    net = mlp().to(dtype)
    layers = UnitMap.of(net, (labelled(4, 4)[0].to(dtype), labelled(4, 4)[1])).layers
    accumulators = {name: parameter.view_as(parameter).grad_fn.next_functions[0][0] for name, parameter in named(net)}
    fired = []
    for name, accumulator in accumulators.items():
        accumulator.register_hook(lambda *_, name=name: fired.append(name))

    attribute(net, layers, [labelled(4, 4)])
    net(labelled(4, 4)[0].to(dtype)).sum().backward()

    assert sorted(fired) == sorted(accumulators)


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


# -- the guard alone --------------------------------------------------------------------------------------------------


def test_borrowed_puts_back_replaced_parameters_buffers_and_children():
    net = furnished()
    before = snapshot(net)

    with borrowed(net):
        net.features[0].weight = nn.Parameter(torch.zeros(1))
        del net.features[1].running_mean
        net.features[1].register_buffer("running_mean", None)
        net.features[3].bias = None
        net.features[2] = nn.Identity()
        net.heads["new"] = nn.Linear(1, 1)
        del net.heads["other"]
        net.count.fill_(7)
        net.features[3].weight.data = torch.zeros(2)
        net.features[3].weight.grad = None
        torch.manual_seed(1)

    assert changes(before, snapshot(net)) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_evaluating_puts_the_switch_of_attention_back_after_an_error(enabled):
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(ArithmeticError), evaluating(mlp()):
            with evaluating(mlp()):
                assert not torch.backends.mha.get_fastpath_enabled()
            assert not torch.backends.mha.get_fastpath_enabled()
            raise ArithmeticError
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_evaluating_puts_every_training_flag_back_after_an_error():
    net = furnished()
    before = snapshot(net)

    with pytest.raises(ArithmeticError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise ArithmeticError

    assert changes(before, snapshot(net)) == []


def test_the_snapshot_sees_what_zennit_does():
    net = furnished().eval()
    before = snapshot(net)

    with EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]).context(net):
        found = changes(before, snapshot(net))

    assert "features.3._forward_hooks keys" in found
    assert any(where.startswith("features.0.") and where.endswith("bias") for where in found)  # what the norm became

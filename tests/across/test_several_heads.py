"""Several heads at once: a task asks for two answers a sample, `predict` returns dicts of logits and labels."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from training import trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.anatomy import UnitMap
from lightning_rnf.anatomy.targets import Layout, OneHead, flattened
from lightning_rnf.streams import TaskDataModule

CLASSES = {"shape": 2, "colour": 3}


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape, self.colour = nn.Linear(width, 2), nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return {"shape": self.shape(x), "colour": self.colour(x)}


class Learner(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())

    def training_step(self, batch):
        x, y = batch
        return sum(nn.functional.cross_entropy(logits, y[key]) for key, logits in self(x).items())

    def validation_step(self, batch):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class OfMultiHead(Learner):
    """Each task's head makes both answers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = MultiHead(24, dict.fromkeys("ab", 2), make_head=lambda width, classes: Pair(width))

    def forward(self, x):
        return self.heads(self.body(x))


class OfDicts(Learner):
    """Each task has a dict of heads of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleDict(
            {task: nn.ModuleDict({key: nn.Linear(24, n) for key, n in CLASSES.items()}) for task in "ab"}
        )
        self.active = "a"

    def forward(self, x):
        seen = self.body(x)
        return {key: head(seen) for key, head in self.own[self.active].items()}


class Answers(Dataset):
    def __init__(self, task: str, seed: int) -> None:
        self.x = torch.randn(160, 6, generator=torch.Generator().manual_seed(seed))
        first = 0 if task == "a" else 3
        self.y = {
            "colour": (self.x[:, first] > 0).long() + (self.x[:, first] > 0.7),
            "shape": (self.x[:, first + 1] > 0).long(),
        }
        self.y["colour"][::5] = -100  # whose colour nobody knows

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], {key: labels[index] for key, labels in self.y.items()}


def train(model, rnf, task):
    if isinstance(model, OfMultiHead):
        model.heads.activate(task)
    else:
        model.active = task
    torch.manual_seed(1)
    sets = (Answers(task, seed) for seed in range(3))
    trainer(rnf, max_epochs=4).fit(model, datamodule=TaskDataModule(task, 0, *sets, batch_size=16))


def right(answers, data):
    """Answers that are right and answers that count, one by one."""
    pairs = [
        (row.argmax().item(), label.item())
        for key in CLASSES
        for row, label in zip(answers[key], data.y[key], strict=True)
        if label >= 0
    ]
    return sum(one == wanted for one, wanted in pairs), len(pairs)


@pytest.mark.parametrize(("network", "head"), [(OfMultiHead, "heads.tasks.a"), (OfDicts, "own.a")])
def test_two_tasks_are_recalled_to_the_bit_and_counted_answer_by_answer(network, head):
    torch.manual_seed(0)
    model, rnf, held_out = network(), RelevanceFreezing(criterion=0.1, ration=0.5), Answers("a", 1)
    train(model, rnf, "a")
    record = rnf.state.task("a")
    with rnf.recall("a", model), torch.no_grad():
        then = model(held_out.x)
    correct, counted = right(then, held_out)
    assert record.head == head
    assert record.samples == counted
    assert record.subnetwork_accuracy == pytest.approx(correct / counted, abs=1e-6)
    assert record.accepted
    train(model, rnf, "b")
    if network is OfDicts:
        model.active = "a"
    with rnf.recall("a", model), torch.no_grad():
        assert all(torch.equal(logits, then[key]) for key, logits in model(held_out.x).items())
    assert list(rnf.state.tasks) == ["a", "b"]
    assert rnf.state.task("b").subnetwork_accuracy > 0.6


def test_columns_of_other_heads_change_no_answer_no_probability_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = {key: (9 * torch.randn(40, n, generator=generator)).requires_grad_() for key, n in CLASSES.items()}
    labels = {key: torch.randint(n, (40,), generator=generator) for key, n in CLASSES.items()}
    labels["shape"][3] = -100
    rows, target = flattened(logits, dict(reversed(labels.items())))
    assert rows.shape == (79, 5)
    alone = sum(
        nn.functional.cross_entropy(logits[key], labels[key], reduction="sum", ignore_index=-100) for key in CLASSES
    )
    assert nn.functional.cross_entropy(rows, target, reduction="sum").item() == pytest.approx(alone.item(), rel=1e-6)
    correct = sum(int((logits[key].argmax(1) == labels[key]).sum()) for key in CLASSES)
    assert int((rows.argmax(1) == target).sum()) == correct
    true_class = (rows * nn.functional.one_hot(target, 5)).sum()
    found = torch.autograd.grad(true_class, [logits["colour"], logits["shape"]])
    wanted = [nn.functional.one_hot(labels[key].clamp(min=0), CLASSES[key]).float() for key in ("colour", "shape")]
    wanted[1][3] = 0
    assert all(map(torch.equal, found, wanted))


def test_the_answer_that_is_always_the_same_is_one_for_each_head(recwarn):
    """Of labels that are all alike a constant answer gets all: nothing can be told by them, and that is said."""
    model, rnf = OfMultiHead(), RelevanceFreezing(recovery_epochs=0)
    sets = [Answers("a", seed) for seed in range(3)]
    for one in sets:
        one.y = {key: torch.zeros_like(labels) for key, labels in one.y.items()}
    trainer(rnf, max_epochs=2).fit(model, datamodule=TaskDataModule("a", 0, *sets, batch_size=16))
    assert any("always the same has an accuracy of 1.0" in str(one.message) for one in recwarn)


def test_heads_may_be_missing_in_a_batch_and_stand_in_columns_of_their_own():
    layout = Layout(heads=(OneHead("colour", 3), OneHead("shape", 2)))
    rows, target = flattened({"shape": torch.eye(2)}, {"shape": torch.tensor([1, 0])}, layout)
    assert rows.shape == (2, 5)
    assert torch.equal(target, torch.tensor([4, 3]))
    with pytest.raises(ValueError, match=r"dict of \['size'\].*first batch had \['colour', 'shape'\]"):
        flattened({"size": torch.eye(2)}, {"size": torch.tensor([1, 0])}, layout)
    with pytest.raises(ValueError, match="'shape' has 3 outputs, and had 2"):
        flattened({"shape": torch.eye(3)}, {"shape": torch.tensor([1, 0, 2])}, layout)


@pytest.mark.parametrize("tokens", [3, 4])
def test_the_layer_that_makes_the_logits_says_where_classes_are_of_each_head(tokens):
    """Three tokens and three classes: the form alone does not tell which is which."""

    class Tagger(Learner):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.ModuleDict({key: nn.Linear(24, n) for key, n in {"one": 3, "two": 3}.items()})

        def forward(self, x):
            seen = self.body(x)
            return {key: head(seen) for key, head in self.own.items()}

    model = Tagger()
    x = torch.randn(8, tokens, 6)
    with torch.no_grad():
        labels = {key: logits.argmax(-1) for key, logits in model(x).items()}
    units = UnitMap.of(model, (x, labels))
    assert units.head == "own"
    rows, target = flattened(model(x), labels, units.layout)
    assert (rows.argmax(1) == target).all()


def test_half_precision_has_a_least_number():
    rows, _ = flattened(
        {"a": torch.full((1, 2), -65500.0).half(), "b": torch.zeros(1, 1).half()},
        {"a": torch.tensor([0]), "b": torch.tensor([0])},
    )
    assert rows.isfinite().all()


class Scattered(Learner):
    """Heads that stand beside the body's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.colour = nn.Linear(24, 2), nn.Linear(24, 3)

    def forward(self, x):
        seen = self.body(x)
        return {"shape": self.shape(seen), "colour": self.colour(seen)}


class Mixed(Scattered):
    """Heads in one module with a layer that both read."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleDict({"before": nn.Linear(24, 24), "shape": nn.Linear(24, 2), "colour": nn.Linear(24, 3)})

    def forward(self, x):
        seen = self.all["before"](self.body(x)).relu()
        return {key: self.all[key](seen) for key in CLASSES}


@pytest.mark.parametrize("network", [Scattered, Mixed])
def test_heads_that_do_not_stand_apart_are_refused_with_a_way_out(network):
    model, data = network(), Answers("a", 0)
    batch = data.x[:8], {key: labels[:8] for key, labels in data.y.items()}
    with pytest.raises(
        ValueError, match=r"colour'.*'.*shape', which do not stand in one module apart .* nn\.ModuleDict"
    ):
        UnitMap.of(model, batch)


@pytest.mark.parametrize(
    ("logits", "labels", "sentence"),
    [
        ({"a": torch.zeros(2, 2)}, {"b": torch.zeros(2).long()}, r"dict of \['a'\], labels of \['b'\]"),
        ({"a": torch.zeros(2, 2)}, {"a": torch.full((2,), 7)}, "head 'a': labels range from 7 to 7"),
        ({"a": torch.zeros(2, 2)}, {"a": torch.rand(2, 2)}, "head 'a' has numbers"),
        ({"a": torch.zeros(2, 2)}, {"a": torch.ones(2, 2).long()}, "head 'a' has several labels a sample"),
        ({}, {}, "several heads at once have the same keys"),
    ],
)
def test_what_can_t_be_counted_together_is_refused(logits, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        flattened(logits, labels)

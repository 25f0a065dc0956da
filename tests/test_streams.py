from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from positions import Regressor, Tagger, data, numbers, tokens
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import Classifier, clusters, plain, task_data, trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.streams import TaskDataModule, fit_stream, permute_pixels, split_by_class


def digits(samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 1, 4, 4, generator=generator), torch.arange(samples) % 10
    return TensorDataset(x, y)


class TorchvisionStyle(Dataset):
    def __init__(self, dataset, attribute):
        self.dataset = dataset
        if attribute:
            setattr(self, attribute, dataset.tensors[1].tolist())

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return x, int(y)


def samples(dataset):
    return [(x, int(y)) for x, y in (dataset[index] for index in range(len(dataset)))]


@pytest.mark.parametrize("form", ["tensors", "targets", "labels", None])
def test_a_split_gives_each_task_its_own_classes_with_labels_from_zero(form):
    train, test = digits(), digits(50, seed=1)
    if form != "tensors":
        train, test = TorchvisionStyle(train, form), TorchvisionStyle(test, form)
    stream = split_by_class(train, test, [(3, 1), (0, 2, 9)], name="digits", validation=0.25)
    assert [task.task for task in stream] == ["digits-31", "digits-029"]
    assert [task.classes for task in stream] == [2, 3]
    first = stream[0]
    assert (len(first.train), len(first.validation), len(first.test)) == (30, 10, 10)
    for part, source in ((first.train, train), (first.validation, train), (first.test, test)):
        originals = [source[index] for index in part.indices]
        assert all(torch.equal(x, original[0]) for (x, _), original in zip(samples(part), originals, strict=True))
        assert [y for _, y in samples(part)] == [(3, 1).index(int(original[1])) for original in originals]
    assert set(first.train.indices).isdisjoint(first.validation.indices)
    assert all(parts.isdisjoint(stream[1].train.indices) for parts in ({*first.train.indices},))


def test_the_same_seed_holds_out_the_same_samples():
    one, same, other = (split_by_class(digits(), digits(), [(0, 1)], seed=seed)[0] for seed in (1, 1, 2))
    assert one.validation.indices == same.validation.indices != other.validation.indices


def test_permuted_tasks_have_all_pixels_in_one_order_per_task_and_the_first_as_it_was():
    train = digits()
    stream = permute_pixels(train, digits(50, seed=1), tasks=3, seed=4)
    assert [task.task for task in stream] == ["permuted-0", "permuted-1", "permuted-2"]
    assert all(task.classes == 10 for task in stream)
    index = stream[0].train.indices[0]
    assert torch.equal(stream[0].train[0][0], train[index][0])
    orders = []
    for task in stream[1:]:
        for x, original in ((task.train[i][0], train[task.train.indices[i]][0]) for i in range(3)):
            assert torch.equal(x.flatten().sort().values, original.flatten().sort().values)
            order = [(original.flatten() == value).nonzero().item() for value in x.flatten()]
            orders.append(order)
    assert orders[0] == orders[1] == orders[2] != orders[3] == orders[4]
    assert torch.equal(stream[1].test[0][0].flatten(), digits(50, seed=1)[0][0].flatten()[torch.tensor(orders[0])])


def test_rubbish_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"classes \[1\] are in more than one group"):
        split_by_class(digits(), digits(), [(0, 1), (1, 2)])
    with pytest.raises(ValueError, match=r"no training or test samples of classes \[12\]"):
        split_by_class(digits(), digits(), [(0, 12)])
    for share in (0, 1, 0.001):
        with pytest.raises(ValueError, match="expected a share in"):
            split_by_class(digits(), digits(), [(0, 1)], validation=share)
    with pytest.raises(ValueError, match="expected at least 1"):
        permute_pixels(digits(), digits(), tasks=0)


@pytest.mark.parametrize("freezing", [True, False])
def test_fit_stream_tests_every_task_after_each(freezing):
    pl.seed_everything(0, verbose=False)
    model, stream = Classifier(), [task_data(task) for task in "abc"]
    rnf = RelevanceFreezing() if freezing else None
    matrix = fit_stream(model, stream, rnf, lambda callbacks: trainer(*callbacks))
    assert torch.equal(matrix.isnan(), torch.ones(3, 3).triu(1).bool())
    x, y = stream[0].test.tensors
    model.heads.activate("a")
    model.eval()
    with torch.no_grad():
        now = (model(x).argmax(1) == y).float().mean()
    if rnf is None:
        assert matrix[2, 0] == now
    else:
        assert matrix[0, 0] == matrix[1, 0] == matrix[2, 0]  # recalled
        assert matrix[1, 1] == matrix[2, 1]


def test_fit_stream_sets_up_data_modules_that_load_late_and_keeps_the_precision():
    class Late(pl.LightningDataModule):
        task = "a"

        def setup(self, stage):
            data = task_data("a")
            self.loaders = {
                "fit": data.train_dataloader(),
                "validate": data.val_dataloader(),
                "test": data.test_dataloader(),
            }
            self.stage = stage

        def train_dataloader(self):
            return self.loaders["fit"]

        def val_dataloader(self):
            return self.loaders["validate"]

        def test_dataloader(self):
            assert self.stage == "test"
            return self.loaders["test"]

    matrix = fit_stream(Classifier(), [Late()], None, lambda callbacks: trainer(*callbacks, precision="64-true"))
    assert 0.5 < matrix.item() <= 1


def test_fit_stream_adds_heads_that_are_missing():
    model = Classifier()
    model.heads.tasks.clear()
    fit_stream(model, [task_data("a")], None, lambda callbacks: trainer(*callbacks, max_epochs=1))
    assert list(model.heads.tasks) == ["a"]


def test_fit_stream_says_how_much_of_numbers_is_explained():
    torch.manual_seed(0)
    model = Regressor()
    tasks = [data(numbers, task) for task in ("a", "b")]
    rnf = plain(criterion=0.3, fit_head="auto")
    one_trainer = lambda callbacks: trainer(*callbacks, max_epochs=6)  # noqa: E731
    matrix = fit_stream(model, tasks, rnf, one_trainer, activate=lambda model, task: model.heads.activate(task.task))
    assert matrix.isnan().tolist() == [[False, True], [False, False]]
    assert matrix[0, 0] == matrix[1, 0]  # recalled
    with rnf.recall("a", model), torch.no_grad():
        x, y = numbers("a", 2).tensors
        share = 1 - (model(x) - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
    assert float(matrix[1, 0]) == pytest.approx(float(share.clamp(min=0).mean()), abs=1e-4)
    assert rnf.report(model, metric="r_squared").matrix[1, 0] == matrix[1, 0]


def test_fit_stream_asks_how_to_activate_when_it_cannot_know():
    model = Classifier()
    model.heads = torch.nn.Linear(40, 2)
    with pytest.raises(ValueError, match="0 MultiHead modules, expected one: pass activate="):
        fit_stream(model, [task_data("a")], None, partial(trainer))


def shifted(task: str, place: int) -> TaskDataModule:
    """A task whose inputs are somewhere else than those of others."""
    data = [clusters(task, 200, seed) for seed in range(3)]
    moved = [TensorDataset(one.tensors[0] + 6.0 * torch.eye(6)[place], one.tensors[1]) for one in data]
    return TaskDataModule(task, 2, *moved, batch_size=32)


def test_fit_stream_tests_without_a_word_of_the_task():
    stream = [shifted(task, place) for place, task in enumerate(("a", "b"))]
    model, rnf = Classifier(), RelevanceFreezing(portraits=True)
    matrix = fit_stream(model, stream, rnf, lambda callbacks: trainer(*callbacks), scenario="class")
    for index, task in enumerate(stream):
        x, y = task.test.tensors
        found = rnf.infer_task(x, model)
        right = (found.logits.argmax(1) == y) & torch.tensor([name == task.task for name in found.names])
        assert matrix[1, index] == pytest.approx(float(right.float().mean()))
        assert rnf.state.tasks["b"].tests[task.task]["tasks_found"] > 0.95
    assert (matrix[1] > 0.8).all()
    found = rnf.report(metric="tasks_found").matrix
    assert (found[1] > 0.95).all()
    assert torch.equal(rnf.report().matrix[1], matrix[1])
    told = rnf.report(metric="accuracy_told").matrix
    for index, task in enumerate(stream):
        x, y = task.test.tensors
        with rnf.recall(task.task, model), torch.no_grad():
            assert told[1, index] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


def test_without_a_callback_all_heads_are_one_label_space():
    stream = [shifted(task, place) for place, task in enumerate(("a", "b"))]
    model = Classifier()
    matrix = fit_stream(model, stream, None, lambda callbacks: trainer(*callbacks), scenario="class")
    model.eval()
    logits = []
    for task in ("a", "b"):
        model.heads.activate(task)
        logits.append([model(one.test.tensors[0]).detach() for one in stream])
    for index, task in enumerate(stream):
        answer = torch.cat([of_head[index] for of_head in logits], dim=1).argmax(1)
        assert matrix[1, index] == pytest.approx(float((answer == task.test.tensors[1] + 2 * index).float().mean()))


def spread(task: str, classes: int, place: int, batch_size: int, *, several: bool = False) -> TaskDataModule:
    """Clusters at the corners of a simplex; with ``several``, one or two labels a sample."""

    def drawn(seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(10 * place + seed)
        y = torch.arange(96) % classes
        x = 0.3 * torch.randn(96, 6, generator=generator)
        x[:, :classes] += 2 * torch.eye(classes)[y]
        x[:, 5] += place
        labels = (torch.eye(classes)[y] + torch.eye(classes)[(y + y % 2) % classes] > 0).float()
        return TensorDataset(x, labels if several else y)

    return Shown(task, classes, *map(drawn, range(3)), batch_size=16, shown=batch_size)


class Shown(TaskDataModule):
    """Tests see other batches than training does."""

    def __init__(self, *args, shown: int, **options) -> None:
        super().__init__(*args, **options)
        self.shown = shown

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=self.shown)


class OfWidths(Classifier):
    """Heads of 3 and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = MultiHead(40, {"a": 3, "b": 4})

    def training_step(self, batch):
        loss = torch.nn.functional
        of = loss.cross_entropy if batch[1].ndim == 1 else loss.binary_cross_entropy_with_logits
        return of(self(batch[0]), batch[1])

    def validation_step(self, batch):
        pass


def right_of(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return logits.argmax(1) == y if y.ndim == 1 else (logits[:, : y.shape[1]] > 0) == y.bool()


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("freezing", [True, False])
def test_an_answer_of_a_head_of_another_width_is_wrong_and_one_of_the_own_head_beside_it_right(
    freezing, several, batch_size
):
    pl.seed_everything(0, verbose=False)
    stream = [spread("a", 3, 0, batch_size, several=several), spread("b", 4, 1, batch_size, several=several)]
    model, rnf = OfWidths(), plain(portraits=True, criterion=0.2) if freezing else None
    matrix = fit_stream(model, stream, rnf, lambda callbacks: trainer(*callbacks), scenario="class")
    model.eval()
    wrong = 0
    for index, task in enumerate(stream):
        x, y = task.test.tensors
        if rnf is None:
            logits = []
            for of_head in stream:
                model.heads.activate(of_head.task)
                logits.append(model(x).detach())
            named, own = logits[index].amax(1) > logits[1 - index].amax(1), logits[index]
        else:
            found = rnf.infer_task(x, model)
            named, own = torch.tensor([name == task.task for name in found.names]), found.logits
        right = right_of(own, y)
        right = right & named.view(-1, *[1] * (right.ndim - 1))
        assert matrix[1, index] == pytest.approx(float(right.float().mean()), abs=1e-6)
        wrong += int((~named).sum())
    assert wrong  # else this test shows nothing


class WideTagger(Tagger):
    """Heads of tags that no token has: of five tokens, five could be classes by either dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = MultiHead(24, {"a": 6, "b": 7})


@pytest.mark.parametrize("freezing", [True, False])
def test_of_positions_those_count_that_have_a_label_and_those_of_a_sample_are_found_together(freezing):
    torch.manual_seed(0)
    stream = [data(tokens, task) for task in ("a", "b")]
    model, rnf = WideTagger(), plain(criterion=0.3) if freezing else None
    by_name = lambda model, task: model.heads.activate(task.task)  # noqa: E731
    matrix = fit_stream(model, stream, rnf, lambda callbacks: trainer(*callbacks), activate=by_name, scenario="class")
    model.eval()
    for index, task in enumerate(stream):
        x, y = task.test.tensors
        if rnf is None:
            logits = {}
            for name in "ab":
                model.heads.activate(name)
                logits[name] = model(x).detach()
            own, other = logits.pop(task.task), *logits.values()
            right = (own.argmax(-1) == y) & (own.amax(-1) > other.amax(-1))
        else:
            found = rnf.infer_task(x, model)
            named = torch.tensor([name == task.task for name in found.names])
            right = (found.logits.argmax(-1) == y) & named.unsqueeze(1)
            assert 0 < rnf.state.task("b").tests[task.task]["tasks_found"] == pytest.approx(float(named.float().mean()))
        assert matrix[1, index] == pytest.approx(float(right[y >= 0].float().mean()))


def test_rows_that_say_nothing_of_their_samples_are_refused():
    def flat(module, batch):
        return module(batch[0]).flatten(0, 1), batch[1].flatten()

    torch.manual_seed(0)
    rnf = plain(criterion=0.3, predict=flat)
    with pytest.raises(ValueError, match=r"shape \(80, 5\) for 16 samples.* an entry for each sample"):
        fit_stream(
            Tagger(),
            [data(tokens, "a")],
            rnf,
            lambda callbacks: trainer(*callbacks, max_epochs=1),
            activate=lambda model, task: model.heads.activate(task.task),
            predict=flat,
            scenario="class",
        )


def numbers_untold(rnf, widths=(2, 2)):
    torch.manual_seed(0)
    model = Regressor()
    model.heads = MultiHead(32, dict(zip("ab", widths, strict=True)))
    tasks = [data(numbers, task, outputs=width) for task, width in zip("ab", widths, strict=True)]
    one_trainer = lambda callbacks: trainer(*callbacks, max_epochs=6)  # noqa: E731
    by_name = lambda model, task: model.heads.activate(task.task)  # noqa: E731
    return model, fit_stream(model, tasks, rnf, one_trainer, activate=by_name, scenario="class")


def test_numbers_untold_are_as_near_as_the_task_that_was_found_says():
    rnf = plain(criterion=0.3, fit_head="auto", portraits=True)
    model, matrix = numbers_untold(rnf)
    for index, task in enumerate("ab"):
        x, y = numbers(task, 2).tensors
        logged = rnf.state.task("b").tests[task]
        found = rnf.infer_task(x, model)
        share = 1 - (found.logits - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
        assert list(logged) == ["r_squared", "r_squared_told", "tasks_found"]
        assert logged["r_squared"] == pytest.approx(float(share.clamp(min=0).mean()), abs=1e-4)
        assert matrix[1, index] == pytest.approx(logged["r_squared"])
        named = torch.tensor([name == task for name in found.names]).float()
        assert logged["tasks_found"] == pytest.approx(float(named.mean()))
        with rnf.recall(task, model), torch.no_grad():
            share = 1 - (model(x) - y).square().sum(0) / (y - y.mean(0)).square().sum(0)
        assert logged["r_squared_told"] == pytest.approx(float(share.clamp(min=0).mean()), abs=1e-4)
    assert rnf.report().matrix is None  # no share of numbers is called an accuracy
    assert torch.equal(rnf.report(metric="r_squared").matrix.nan_to_num(-1), matrix.nan_to_num(-1))


def test_numbers_of_another_task_that_are_more_or_fewer_explain_nothing():
    rnf = plain(criterion=0.3, fit_head="auto", portraits=True)
    _, matrix = numbers_untold(rnf, widths=(1, 2))
    logged = rnf.state.task("b").tests
    mistaken = [index for index, task in enumerate("ab") if logged[task]["tasks_found"] < 1]
    assert mistaken
    for index in mistaken:
        assert matrix[1, index] == 0 < logged["ab"[index]]["r_squared_told"]


@pytest.mark.parametrize("freezing", [True, False])
def test_numbers_do_not_say_whose_a_sample_is(freezing):
    with pytest.raises(ValueError, match=r"targets of 'a' are numbers, .* portraits=True"):
        numbers_untold(plain(criterion=0.3) if freezing else None)


def test_an_unknown_scenario_is_refused():
    with pytest.raises(ValueError, match="scenario"):
        fit_stream(Classifier(), [], None, lambda callbacks: trainer(*callbacks), scenario="domain")

"""Task streams: a data set cut into tasks, each a data module with its own labels; and the loop that trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_rnf.anatomy import Predict, supervised
from lightning_rnf.callback import RelevanceFreezing
from lightning_rnf.heads import MultiHead
from lightning_rnf.packages import Callback, LightningDataModule, LightningModule, Trainer, callbacks, like
from lightning_rnf.runtime import arguments
from lightning_rnf.tasks import tested

Scenario = Literal["task", "class"]
"""Whether tests are told which task a sample is of."""


class TaskDataModule(LightningDataModule):
    """One task: training, validation and test data with labels 0 … classes - 1.

    Attributes:
        task: the name; `RelevanceFreezing` takes it from here.
        classes: how many.

    Args:
        task: name of the task.
        classes: number of classes.
        train: training data.
        validation: held out from training; reference data is drawn from it.
        test: only for the report.
        batch_size: of all loaders.
        num_workers: of all loaders.
    """

    def __init__(
        self,
        task: str,
        classes: int,
        train: Dataset[Any],
        validation: Dataset[Any],
        test: Dataset[Any],
        batch_size: int = 128,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.task = task
        self.classes = classes
        self.train, self.validation, self.test = train, validation, test
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training data."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation data in order."""
        return self._loader(self.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test data in order."""
        return self._loader(self.test)

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


def split_by_class(
    train: Dataset[Any],
    test: Dataset[Any],
    groups: Sequence[Sequence[int]],
    *,
    name: str | Sequence[str] = "classes",
    validation: float = 0.1,
    batch_size: int = 128,
    num_workers: int = 0,
    seed: int = 0,
    kind: type[TaskDataModule] = TaskDataModule,
) -> list[TaskDataModule]:
    """One task per group of classes, with labels 0 … n - 1 in the group's order (the paper's split protocols).

    Args:
        train: yields ``(x, label)``; labels are read from ``targets``, ``labels`` or ``tensors`` if it has them.
        test: the same.
        groups: the classes of each task.
        name: tasks are called ``<name>-<classes>``: ``digits-01``; or a name for each.
        validation: share of the training data to hold out, in (0, 1), drawn at random.
        batch_size: of all loaders.
        num_workers: of all loaders.
        seed: of the draw.
        kind: a subclass of your own, with transfer hooks, say.

    Raises:
        ValueError: if a class is in two groups or has no samples, or the share is out of its range.
    """
    classes = [label for group in groups for label in group]
    repeated = sorted({label for label in classes if classes.count(label) > 1})
    if repeated:
        raise ValueError(f"classes {repeated} are in more than one group: every class belongs to one task")
    labels, test_labels = _labels(train), _labels(test)
    separator = "" if max(classes, default=0) < 10 else "_"
    tasks = []
    for number, group in enumerate(groups):
        absent = [label for label in group if not (labels == label).any() or not (test_labels == label).any()]
        if absent:
            raise ValueError(f"no training or test samples of classes {absent}")
        new = {label: index for index, label in enumerate(group)}
        own = torch.isin(labels, torch.tensor(list(group))).nonzero().view(-1)
        held_out, kept = _hold_out(own, validation, seed)
        task = f"{name}-{separator.join(map(str, group))}" if isinstance(name, str) else name[number]
        test_own = torch.isin(test_labels, torch.tensor(list(group))).nonzero().view(-1)
        tasks.append(
            kind(
                task,
                len(group),
                TaskView(train, kept, new, task=task),
                TaskView(train, held_out, new, task=task),
                TaskView(test, test_own, new, task=task),
                batch_size,
                num_workers,
            )
        )
    return tasks


def permute_pixels(
    train: Dataset[Any],
    test: Dataset[Any],
    tasks: int,
    *,
    name: str = "permuted",
    validation: float = 0.1,
    batch_size: int = 128,
    num_workers: int = 0,
    seed: int = 0,
    kind: type[TaskDataModule] = TaskDataModule,
) -> list[TaskDataModule]:
    """All classes in every task, with the pixels in another fixed order each; the first is not permuted.

    Args:
        train: yields ``(x, label)``, x a tensor; one permutation of its elements serves all samples of a task.
        test: the same.
        tasks: how many, at least 1.
        name: tasks are called ``<name>-<n>``.
        validation: share of the training data to hold out, in (0, 1), drawn at random.
        batch_size: of all loaders.
        num_workers: of all loaders.
        seed: of the permutations and the draw.
        kind: as for `split_by_class`.

    Raises:
        ValueError: if ``tasks`` or the share is out of its range.
        TypeError: if x is no tensor.
    """
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}, expected at least 1")
    if not isinstance(train[0][0], Tensor):
        raise TypeError(f"samples are of type {type(train[0][0]).__name__}, expected tensors: add a transform")
    labels = _labels(train)
    classes = sorted(int(label) for label in labels.unique())
    new = {label: index for index, label in enumerate(classes)}
    held_out, kept = _hold_out(torch.arange(len(labels)), validation, seed)
    pixels = train[0][0].numel()
    generator = torch.Generator().manual_seed(seed)
    stream = []
    for index in range(tasks):
        task, order = f"{name}-{index}", torch.randperm(pixels, generator=generator) if index else None
        stream.append(
            kind(
                task,
                len(classes),
                TaskView(train, kept, new, order, task),
                TaskView(train, held_out, new, order, task),
                TaskView(test, torch.arange(len(_labels(test))), new, order, task),
                batch_size,
                num_workers,
            )
        )
    return stream


class TaskView(Dataset[Any]):
    """Some samples of a data set, with a task's labels, and its pixels permuted.

    Args:
        dataset: yields ``(x, label)``.
        indices: which samples, ``(N,)``.
        labels: new label by old.
        order: permutation of the elements of x; None: as they are.
        task: the task's name; a Trainer that tests several loaders recalls each one's task.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Tensor,
        labels: dict[int, int],
        order: Tensor | None = None,
        task: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = indices.tolist()
        self.labels = labels
        self.order = order
        self.task = task

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x, label = self.dataset[self.indices[index]]
        if self.order is not None:
            x = x.flatten()[self.order].view(x.shape)
        return x, self.labels[int(label)]


class TrainerFactory(Protocol):
    """Makes a Trainer for one task: ``functools.partial(Trainer, max_epochs=4)`` is one."""

    def __call__(self, *, callbacks: list[Callback]) -> Trainer:
        """A new Trainer with these callbacks."""


def fit_stream(
    model: LightningModule,
    stream: Iterable[LightningDataModule],
    callback: RelevanceFreezing | None,
    trainer_factory: TrainerFactory,
    *,
    activate: Callable[[LightningModule, Any], None] | None = None,
    predict: Predict = supervised,
    folder: str | PathLike[str] | None = None,
    scenario: Scenario = "task",
) -> Tensor:
    """Train all tasks one after the other and test every task seen so far after each.

    Args:
        model: with a head for every task.
        stream: the tasks; each has a name, ``task``.
        callback: None: naive fine-tuning. Otherwise finished tasks are recalled for their tests.
        trainer_factory: makes a new Trainer per task; more callbacks of your own are its business.
        activate: called with model and task before each fit and test; None: activate the task's head in the model's
            `MultiHead`, adding one if the task has ``classes`` and no head yet.
        predict: how to get logits and labels of a batch.
        folder: each task keeps its checkpoints in ``folder/<task>``, and a stream that was stopped goes on from them.
            None: nothing is kept but what ``trainer_factory`` keeps.
        scenario: ``"task"``: tests are told which task a sample is of. ``"class"``: they are not, and classes of all
            tasks so far are one label space: with a callback by `RelevanceFreezing.infer_task`, without one by the
            largest logit of all heads. What another task's head says is wrong, however many classes it has. The report
            has the share of samples whose task was found as ``"tasks_found"``, and what is right where the task is told
            as ``"accuracy_told"``. Numbers are as near as the answers in the task that is found, and explain nothing
            (0) where one of them has another number of columns; told, ``"r_squared_told"``.

    Returns:
        The accuracy matrix ``(tasks, tasks)``, see `metrics`: NaN above the diagonal. It is in the callback's report,
        too. Of tasks whose targets are numbers it has the share of their variance that is explained, which a report
        has as ``metric="r_squared"``.

    Raises:
        ValueError: if the model has not exactly one `MultiHead` and ``activate`` is None; the scenario is unknown; or
            the task is not told and targets are numbers, which don't say whose a sample is without a callback with
            ``portraits=True``, or ``predict`` has not one entry for each sample: both at the first test.
    """
    arguments.one_of("scenario", scenario, Scenario)
    tasks: list[Any] = list(stream)
    activate = activate or _activate
    matrix = torch.full((len(tasks), len(tasks)), torch.nan)
    for trained, task in enumerate(tasks):
        activate(model, task)
        ours: list[Callback] = [callback] if callback is not None else []
        last = None
        if folder is not None:
            saver = like(callbacks.ModelCheckpoint, model)(
                Path(folder) / task.task, save_last=True, enable_version_counter=False
            )
            ours.append(saver)
            last = Path(folder) / task.task / f"{saver.CHECKPOINT_NAME_LAST}{saver.FILE_EXTENSION}"
        trainer = trainer_factory(callbacks=ours)
        trainer.fit(model, datamodule=task, ckpt_path=last if last is not None and last.exists() else None)
        model.to(trainer.strategy.root_device)
        for index, seen in enumerate(tasks[: trained + 1]):
            activate(model, seen)
            sofar = tasks[: trained + 1] if scenario == "class" else None
            shown = tested(model, seen, trainer, predict, callback, activate, sofar)
            matrix[trained, index] = next(iter(shown.values()))
            if callback is not None and task.task in callback.state.tasks:
                callback.state.task(task.task).tests[seen.task] = shown
        model.cpu()
    return matrix


def _activate(model: LightningModule, task: Any) -> None:
    heads = [*MultiHead.in_use(model).values()]
    if len(heads) != 1:
        raise ValueError(f"the model has {len(heads)} MultiHead modules, expected one: pass activate=(model, task)")
    if task.task not in heads[0].tasks and hasattr(task, "classes"):
        heads[0].add(task.task, task.classes)
    heads[0].activate(task.task)


def _labels(dataset: Any) -> Tensor:
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute):
            return torch.as_tensor(getattr(dataset, attribute))
    if hasattr(dataset, "tensors"):
        return cast(Tensor, dataset.tensors[-1])
    return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])


def _hold_out(indices: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    number = round(share * len(indices))
    if not 0 < share < 1 or not 0 < number < len(indices):
        raise ValueError(
            f"validation={share} of {len(indices)} samples holds out {number}: expected a share in (0, 1) that leaves "
            "some for either part"
        )
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return indices[order[:number]].sort().values, indices[order[number:]].sort().values

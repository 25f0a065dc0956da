"""What is known about the finished tasks: plain data, and its form in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, UnitMap, check_kinds
from lightning_rnf.memory.model import check_shape, forms_from_plain, layer_from_plain, unknown_layer
from lightning_rnf.memory.plain import (
    check_names,
    get,
    get_count,
    get_name,
    get_names,
    get_numbers,
    get_share,
    get_tensors,
    get_texts,
)
from lightning_rnf.search import Evaluation, SubnetworkScore

VERSION = 1

_SOME_ONLY = (
    "layers that only some tasks run (a stem for each, say) can't be made of units: name those that all of them run in "
    "units=, from the first task on, and the others are frozen whole after the task that runs them"
)


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """One finished task.

    Attributes:
        name: of the task.
        head: name of the module that makes its logits.
        head_parameters: names of the head's parameters.
        relevant: bool ``(units,)`` by layer: the units of its sub-network.
        relevance: float32 ``(units,)`` by layer: the signed sum over the attributed samples.
        norm_statistics: buffers of the modules that ran, norms' running statistics among them, as they were at the
            task's end; recall brings them back.
        cutoff: how many of the least relevant units were pruned.
        accuracy: of the whole network on the reference data, in [0, 1], before anything was pruned.
        subnetwork_accuracy: of the sub-network at the task's end, by the same loop.
        accepted: whether the criterion accepts that sub-network; if not, a ration or a recovery that fell short is why.
        samples: size of the reference data: how many targets ``predict`` has returned for them.
        evaluations: every measured cutoff, in the order of the search.
        recovery: what was measured after the epochs inside the sub-network; empty without such epochs.
        recovery_epochs: how many there were.
        capacity: share of each layer's units that is free once this task's are frozen, in [0, 1].
        seconds: wall-clock time of ``"attribution"``, ``"search"`` and, after a recovery, ``"settling"``.
        conservation: relevance over that of the logits, by layer and for `conservation.INPUT`; empty for scores that
            are no relevance.
        cuts: those of them that all relevance runs through, where 1 is right. Elsewhere it is a branch's share.
        notes: what a reader of the relevance should know, in plain words.
        rows: fingerprints of what this task froze, by layer, head or shared parameter; see `fingerprints`.
        drift: at this task's end, how far the recalled logits of earlier tasks were from those of their own ends: the
            largest difference on a few samples. Only of tasks that have ended in the same run of the program, on the
            same device: their samples are not kept.
        tests: metrics that ``trainer.test`` has logged between this task's end and the next one's, by tested task.
    """

    name: str
    head: str
    head_parameters: tuple[str, ...]
    relevant: dict[str, Tensor]
    relevance: dict[str, Tensor]
    norm_statistics: dict[str, Tensor]
    cutoff: int
    accuracy: float
    subnetwork_accuracy: float
    accepted: bool
    samples: int
    evaluations: tuple[Evaluation, ...]
    capacity: dict[str, float]
    seconds: dict[str, float]
    recovery: tuple[Evaluation, ...] = ()
    recovery_epochs: int = 0
    conservation: dict[str, float] = field(default_factory=dict)
    cuts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: dict[str, str] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(eq=False)
class FreezeState:
    """The model's units and shared parameters, and a record of every finished task.

    Attributes:
        layers: unit layers in execution order; empty until the first task has ended.
        shared: names of the parameters that are frozen whole.
        tasks: records by name, in the order of training.
        training: the task that a fit is training: a checkpoint with it was saved before that task had ended.
        recovering: the task that is being trained inside its sub-network, as the search left it; None: no task is.
        initial: parameters and running statistics of units before the first task, by name, if free units are to be
            reset to them.
        resets: after how many tasks free units were reset; -1: not since a task was given up.
        forms: dtype and shape of every parameter that the model had at a task's end; empty in files from before that.
    """

    layers: tuple[UnitLayer, ...] = ()
    shared: tuple[str, ...] = ()
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    training: str | None = None
    recovering: TaskRecord | None = None
    initial: dict[str, Tensor] = field(default_factory=dict)
    resets: int = 0
    forms: dict[str, str] = field(default_factory=dict)

    def add(self, record: TaskRecord, units: UnitMap) -> None:
        """Keep a task's record, and what its forward has shown of the model.

        Raises:
            ValueError: if there is a record of that name, or the unit layers are others than before.
        """
        if record.name in self.tasks:
            raise ValueError(f"task {record.name!r} has ended already; finished tasks: {list(self.tasks)}")
        self.layers = self.completed(units).layers
        self.shared = tuple(dict.fromkeys((*self.shared, *units.shared)))
        self.forms = {**self.forms, **units.forms}
        self.tasks[record.name] = record
        self.training = self.recovering = None

    def recover(self, record: TaskRecord, units: UnitMap) -> None:
        """Note that a task is trained inside its sub-network from here on.

        Raises:
            ValueError: if the unit layers are others than before.
        """
        self.layers = self.completed(units).layers
        self.recovering = record

    def forget_unfinished(self) -> None:
        """Forget what a fit has left that was given up: the task it was recovering and, if no task has ended, all."""
        self.training = self.recovering = None
        if not self.tasks and self.resets >= 0:
            self.layers, self.initial, self.resets = (), {}, 0

    def capacity_after(self, relevant: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of each layer's units that is free once these are frozen, too: in [0, 1]."""
        frozen = self.frozen()
        return {
            name: 1.0 - int((mask | frozen.get(name, torch.zeros_like(mask))).sum()) / len(mask)
            for name, mask in relevant.items()
        }

    def task(self, name: str) -> TaskRecord:
        """The record of a finished task.

        Raises:
            KeyError: if there is none.
        """
        if name not in self.tasks:
            raise KeyError(f"no finished task {name!r}; finished tasks: {list(self.tasks)}")
        return self.tasks[name]

    def frozen(self) -> dict[str, Tensor]:
        """Units that are relevant to at least one finished task: bool ``(units,)`` by layer."""
        return {
            layer.name: torch.stack(
                [torch.zeros(layer.units, dtype=torch.bool)]
                + [record.relevant[layer.name] for record in self.tasks.values()]
            ).any(dim=0)
            for layer in self.layers
        }

    def completed(self, units: UnitMap) -> UnitMap:
        """A new trace with the known layers that did not run in it: experts of another task, say.

        Raises:
            ValueError: naming a layer that differs, or that the model has come to have.
        """
        if not self.tasks and self.recovering is None:
            return units
        known, found = ({layer.name: layer for layer in layers} for layers in (self.layers, units.layers))
        for name in known.keys() & found.keys():
            for what, had in vars(known[name]).items():
                if getattr(found[name], what) != had:
                    raise ValueError(
                        f"the model's layers no longer match the finished tasks: layer {name!r} had {what} "
                        f"{had!r}, in its place is one with {getattr(found[name], what)!r}; {_SOME_ONLY}"
                    )
        # Experts that no earlier task has run: the model had them, so recall of those tasks does without.
        new = [layer for name, layer in found.items() if name not in known and set(layer.parameters) <= set(self.forms)]
        late = [name for layer in new for name in layer.parameters]
        found = {name: layer for name, layer in found.items() if layer not in new}
        idle = {name for name, layer in known.items() if set(layer.parameters) <= set(units.idle)}
        if differing := sorted(known.keys() - found.keys() - idle | found.keys() - known.keys()):
            raise ValueError(
                f"the model's layers no longer match the finished tasks: {differing} ran for one task and not for "
                f"another; {_SOME_ONLY}"
            )
        at_rest = {name for layer in idle - found.keys() for name in known[layer].parameters}
        return replace(
            units,
            layers=self.layers,
            idle=tuple(name for name in units.idle if name not in at_rest),
            shared=(*units.shared, *late),
            reasons={**units.reasons, **dict.fromkeys(late, "ran for no earlier task")},
        )

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Check that a model's parameters, by name, are there for all layers and heads of the finished tasks.

        Raises:
            ValueError: naming a parameter that is missing or has another number of units, or another shape.
        """
        for layer in self.layers:
            for name in layer.parameters:
                found = tuple(parameters[name].shape) if name in parameters else None
                leading = layer.leading_shape(name)
                if found is None or found[: len(leading)] != leading:
                    raise ValueError(
                        f"layer {layer.name!r} had {layer.units} units when a task ended, but this model's {name!r} "
                        + ("is missing" if found is None else f"has shape {found}")
                    )
                check_shape(name, parameters[name], self.forms, f"layer {layer.name!r} of the finished tasks")
        for record in self.tasks.values():
            for name in (*record.head_parameters, *self.shared):
                if name not in parameters:
                    raise ValueError(f"this model lacks {name!r}, which task {record.name!r} uses")
                is_head = name in record.head_parameters
                check_shape(name, parameters[name], self.forms, f"task {record.name!r}", is_head=is_head)

    def check_module(self, module: nn.Module) -> None:
        """Check that a model has the layers and heads of the finished tasks, before anything is done to it.

        Raises:
            ValueError: naming a module, parameter or buffer that is missing, of another kind or of another shape.
        """
        modules = dict(module.named_modules(remove_duplicate=False))
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        tensors = parameters | buffers
        self.check_parameters(parameters)
        for layer in self.layers:
            check_kinds(layer, modules)
        for record in self.tasks.values():
            if record.head not in modules:
                raise ValueError(f"this model lacks the module {record.head!r}, the head of task {record.name!r}")
            for name, value in record.norm_statistics.items():
                if name not in buffers:
                    raise ValueError(f"this model lacks the buffer {name!r}, which task {record.name!r} uses")
                if buffers[name].shape != value.shape:
                    raise ValueError(
                        f"{name!r} has shape {tuple(buffers[name].shape)} in this model, and had {tuple(value.shape)} "
                        f"when task {record.name!r} ended"
                    )
                if _kind(buffers[name]) != _kind(value):
                    raise ValueError(
                        f"{name!r} is of {buffers[name].dtype} in this model, and was of {value.dtype} when task "
                        f"{record.name!r} ended"
                    )
        for name, value in self.initial.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise ValueError(f"this model has no {name!r} of shape {tuple(value.shape)} to reset free units of")

    def check_whole(self, module: nn.Module) -> None:
        """As `check_module`, and that the model has no more layers than those of the finished tasks.

        Raises:
            ValueError: besides, naming a layer that no finished task knows and that is no head of a task to come.
        """
        self.check_module(module)
        unknown = unknown_layer(module, self.forms, [record.head for record in self.tasks.values()])
        if unknown is not None:
            raise ValueError(
                f"this model has a layer {unknown!r} that it did not have when the finished tasks ended, so they are "
                "of another model; if that layer does not run for them, load without naming the model"
            )

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, built-in types and CPU tensors: loads with ``torch.load(weights_only=True)``."""
        return {
            "version": VERSION,
            "layers": [asdict(layer) for layer in self.layers],
            "shared": list(self.shared),
            "tasks": [_record_to_plain(record) for record in self.tasks.values()],
            "training": self.training,
            "recovering": None if self.recovering is None else _record_to_plain(self.recovering),
            "initial": dict(self.initial),
            "resets": self.resets,
            **({"forms": dict(self.forms)} if self.forms else {}),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> FreezeState:
        """The opposite of `to_plain`.

        Raises:
            ValueError: if the form is newer than this version, or not such a state, naming what is wrong.
        """
        version = get(plain, "version", int)
        if version > VERSION:
            raise ValueError(f"the state has version {version}, this lightning_rnf reads up to {VERSION}: update it")
        if version < 1:
            raise ValueError(f"not a state of lightning_rnf: 'version' is {version}, expected 1 to {VERSION}")
        layers = tuple(layer_from_plain(layer) for layer in get(plain, "layers", list))
        tasks: dict[str, TaskRecord] = {}
        for record in (_record_from_plain(record, layers) for record in get(plain, "tasks", list)):
            if record.name in tasks:
                raise ValueError(f"not a state of lightning_rnf: it has two records of task {record.name!r}")
            tasks[record.name] = record
        names = get_names(plain, "shared")
        _check_owners(layers, names, tasks.values())
        training: str | None = get(plain, "training", (str, type(None)))
        recovering: dict[str, Any] | None = get(plain, "recovering", (dict, type(None)))
        initial, resets = get_tensors(plain, "initial"), get(plain, "resets", int)
        if not -1 <= resets <= len(tasks):
            raise ValueError(f"not a state of lightning_rnf: {resets} resets after {len(tasks)} tasks")
        allowed = {name for layer in layers for name in layer.parameters}
        allowed |= {f"{layer.norm}.{key}" for layer in layers for key in ("running_mean", "running_var")}
        if tasks and not allowed.issuperset(initial):
            raise ValueError(f"not a state of lightning_rnf: {sorted(set(initial) - allowed)} belong to no unit")
        unfinished = None if recovering is None else _record_from_plain(recovering, layers)
        if unfinished is not None and not unfinished.evaluations:
            raise ValueError("not a state of lightning_rnf: 'recovering' has no 'evaluations'")
        of_heads = [name for record in tasks.values() for name in record.head_parameters]
        forms = forms_from_plain(plain, layers, (*names, *of_heads))
        return cls(layers, names, tasks, training, unfinished, initial, resets, forms)


def _record_to_plain(record: TaskRecord) -> dict[str, Any]:
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(record).items()}
    return plain | {
        "head_parameters": list(record.head_parameters),
        "evaluations": [asdict(evaluation) for evaluation in record.evaluations],
        "recovery": [asdict(evaluation) for evaluation in record.recovery],
        "cuts": list(record.cuts),
        "notes": list(record.notes),
        "tests": {task: dict(logged) for task, logged in record.tests.items()},
    }


def _check_owners(layers: tuple[UnitLayer, ...], shared: tuple[str, ...], records: Iterable[TaskRecord]) -> None:
    """Check that a parameter belongs to one layer, or head, or is shared; and fingerprints to one of them."""
    owned = [*(name for layer in layers for name in layer.parameters), *shared]
    for record in records:
        strangers = [name for name in record.head_parameters if not name.startswith(f"{record.head}.")]
        if strangers:
            raise ValueError(
                f"not a state of lightning_rnf: 'head_parameters' of task {record.name!r} has {strangers!r:.80}, which "
                f"is not in its head {record.head!r:.80}"
            )
        frozen = {record.head, *shared, *(layer.name for layer in layers)}
        if not frozen.issuperset(record.rows):
            raise ValueError(f"not a state of lightning_rnf: 'rows' of task {record.name!r} has what it did not freeze")
        owned += record.head_parameters
    twice = [name for name, times in Counter(owned).items() if times > 1]
    if twice:
        raise ValueError(f"not a state of lightning_rnf: {twice[0]!r:.80} belongs to two layers, heads or tasks")


def _record_from_plain(plain: Mapping[str, Any], layers: tuple[UnitLayer, ...]) -> TaskRecord:
    name = get_name(plain, "name")
    relevant = get(plain, "relevant", dict)
    relevance = get(plain, "relevance", dict)
    for masks, dtype in ((relevant, torch.bool), (relevance, torch.float32)):
        strangers = set(masks) - {layer.name for layer in layers}
        if strangers:
            raise ValueError(
                f"the state of task {name!r} has layers that it doesn't list: {sorted(map(str, strangers))}"
            )
        for layer in layers:
            value = masks.get(layer.name)
            if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != (layer.units,):
                raise ValueError(
                    f"the state of task {name!r} holds no {dtype} tensor of {layer.units} units for {layer.name!r}"
                )
    statistics = get_tensors(plain, "norm_statistics")
    for layer in layers:
        for key in (f"{layer.norm}.running_mean", f"{layer.norm}.running_var"):
            known = statistics.get(key)
            if known is not None and known.shape == (layer.units,):
                of_relevant = known[relevant[layer.name].cpu()]
                if not of_relevant.isfinite().all() or (key.endswith("var") and bool((of_relevant.real < 0).any())):
                    raise ValueError(
                        f"not a state of lightning_rnf: 'norm_statistics' of task {name!r} has no statistics of "
                        f"relevant units in {key!r}: NaN, infinite or negative ones"
                    )
    return TaskRecord(
        name=name,
        head=get_name(plain, "head"),
        head_parameters=get_names(plain, "head_parameters"),
        relevant={layer: mask.cpu() for layer, mask in relevant.items()},  # whatever map_location it was loaded with
        relevance={layer: values.cpu() for layer, values in relevance.items()},
        norm_statistics=statistics,
        cutoff=get_count(plain, "cutoff"),
        accuracy=get_share(plain, "accuracy"),
        subnetwork_accuracy=get_share(plain, "subnetwork_accuracy"),
        accepted=get(plain, "accepted", bool),
        samples=get_count(plain, "samples"),
        evaluations=_get_evaluations(plain, "evaluations"),
        capacity={layer.name: get_share(get(plain, "capacity", dict), layer.name) for layer in layers},
        seconds=get_numbers(plain, "seconds"),
        recovery=_get_evaluations(plain, "recovery"),
        recovery_epochs=get_count(plain, "recovery_epochs"),
        conservation=get_numbers(plain, "conservation"),
        cuts=get_names(plain, "cuts"),
        notes=get_names(plain, "notes"),
        rows=get_texts(plain, "rows"),
        drift=get_numbers(plain, "drift"),
        tests=_get_tests(plain),
    )


def _get_evaluations(plain: object, key: str) -> tuple[Evaluation, ...]:
    return tuple(
        Evaluation(_score_from_plain(get(evaluation, "score", dict)), get(evaluation, "accepted", bool))
        for evaluation in get(plain, key, list)
    )


def _score_from_plain(plain: Mapping[str, Any]) -> SubnetworkScore:
    values: dict[str, Any] = {}
    for score in fields(SubnetworkScore):
        if score.name in {"values", "baseline_values"}:
            values[score.name] = get_numbers(plain, score.name)
        else:
            read = get_share if score.name in {"accuracy", "baseline"} else get_count
            values[score.name] = read(plain, score.name)
    return SubnetworkScore(**values)


def _get_tests(plain: object) -> dict[str, dict[str, float]]:
    tests: dict[Any, Any] = get(plain, "tests", dict)
    check_names("tests", list(tests))
    return {task: get_numbers(tests, task) for task in tests}


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    """What a conversion of the whole model leaves as it is."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool

"""What is known about the finished tasks: plain data, and its form in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitLayer, UnitMap, Wider, check_kinds, looks_up, norm_parameters
from lightning_rnf.memory import embeddings as rows_of
from lightning_rnf.memory import portraits, widening
from lightning_rnf.memory.model import check_shape, forms_from_plain, layer_from_plain, sizes_of, unknown_layer
from lightning_rnf.memory.plain import get, get_names, get_tensors
from lightning_rnf.memory.record import TaskRecord, record_from_plain, record_to_plain

VERSION = 2
"""Of the form of a state in which layers are tied: a reader of version 1 would silence one of them. Others have 1."""

_SOME_ONLY = (
    "layers that only some tasks run (a stem for each, say) can't be made of units: name those that all of them run in "
    "units=, from the first task on, and the others are frozen whole after the task that runs them"
)


@dataclass(eq=False)
class FreezeState:
    """The model's units and shared parameters, and a record of every finished task.

    Attributes:
        layers: unit layers in execution order; empty until the first task has ended.
        shared: names of the parameters that are frozen whole.
        kept: those of them that the user kept from training when they were frozen: they cost no task anything.
        tasks: records by name, in the order of training.
        training: the task that a fit is training: a checkpoint with it was saved before that task had ended.
        recovering: the task that is being trained inside its sub-network, as the search left it; None: no task is.
        initial: parameters and running statistics of units before the first task, by name, if free units are to be
            reset to them.
        resets: after how many tasks free units were reset; -1: not since a task was given up.
        forms: dtype and shape of every parameter that the model had at a task's end; empty in files from before that.
        widenings: where the model was made wider, in order; records say how many there had been at a task's end.
        several: whether a task was ended inside the fit that is under way, which goes on with the next one.
        begun: the epoch that this fit began with: a Trainer that is used again goes on counting.
        embeddings: names of the weights of embeddings whose rows belong to tokens.
        own_rows: those of them of whose rows each task has its own: none is frozen, and recall brings back what was.
        learned: rows of embeddings that have learned something in the fit that is under way, bool ``(rows,)`` by name.
    """

    layers: tuple[UnitLayer, ...] = ()
    shared: tuple[str, ...] = ()
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    training: str | None = None
    recovering: TaskRecord | None = None
    initial: dict[str, Tensor] = field(default_factory=dict)
    resets: int = 0
    forms: dict[str, str] = field(default_factory=dict)
    widenings: tuple[Wider, ...] = ()
    several: bool = False
    begun: int = 0
    kept: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    learned: dict[str, Tensor] = field(default_factory=dict)
    own_rows: tuple[str, ...] = ()

    def add(self, record: TaskRecord, units: UnitMap) -> None:
        """Keep a task's record, and what its forward has shown of the model.

        Raises:
            ValueError: if there is a record of that name, or the unit layers are others than before.
        """
        if record.name in self.tasks:
            raise ValueError(f"task {record.name!r} has ended already; finished tasks: {list(self.tasks)}")
        self.layers = self.completed(units).layers
        new = [name for name in units.shared if name not in self.shared]
        self.kept = (*self.kept, *(name for name in new if name in units.kept))
        self.shared = tuple(dict.fromkeys((*self.shared, *new)))
        self.embeddings = tuple(dict.fromkeys((*self.embeddings, *units.embeddings)))
        self.learned = {}
        self.forms = {**self.forms, **units.forms}
        stamped = record.widenings == len(self.widenings)
        self.tasks[record.name] = record if stamped else replace(record, widenings=len(self.widenings))
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
        self.training, self.recovering, self.several, self.begun, self.learned = None, None, False, 0, {}
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

    def recalled(self, name: str) -> TaskRecord:
        """The record of a finished task, with all rows of embeddings that it hears otherwise than the model has them.

        Raises:
            KeyError: if there is none.
        """
        record = self.task(name)
        old: dict[str, rows_of.OldRows] = {}
        names = list(self.tasks)
        for later in names[names.index(name) :]:
            old = rows_of.joined(old, self.tasks[later].old_rows)
        return replace(record, old_rows=old)

    def frozen_rows(self, embedding: str) -> Tensor | None:
        """Rows of an embedding that no later task may change: bool ``(rows,)``; None: it is none of `embeddings`.

        They are those that a finished task has read.
        """
        found = rows_of.read_by(embedding, (record.tokens for record in self.tasks.values()))
        if embedding in self.own_rows or found is None:  # or those that had it were given up
            is_known = embedding in self.embeddings
            return torch.zeros(sizes_of(self.forms[embedding])[0], dtype=torch.bool) if is_known else None
        return found

    def keep_rows(self, learned: Mapping[str, Tensor], before: Mapping[str, rows_of.OldRows]) -> None:
        """Note what the fit under way has changed of embeddings: which rows, and what the finished tasks hear of them.

        Args:
            learned: bool ``(rows,)`` by name.
            before: the same rows as they were before the fit.
        """
        self.learned = dict(learned)
        if self.tasks:
            last = next(reversed(self.tasks.values()))
            changed = {name: old for name, old in before.items() if len(old.rows)}
            last.old_rows.update(rows_of.joined(last.old_rows, changed))

    def later(self, record: TaskRecord) -> tuple[Wider, ...]:
        """How the model was made wider since a task's end."""
        return self.widenings[record.widenings :]

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
        known = {layer.name: layer for layer in self.layers}
        found = {layer.name: _as_before(layer, known.get(layer.name)) for layer in units.layers}
        for name in known.keys() & found.keys():
            for what, had in vars(known[name]).items():
                if (has := getattr(found[name], what)) != had:
                    once = what in ("norm", "slopes") and has is None
                    raise ValueError(
                        f"the model's layers no longer match the finished tasks: layer {name!r} had {what} "
                        f"{had!r}, in its place is one with {has!r}"
                        f"{' (what follows it is its own only while it runs once in a forward)' if once else ''}; "
                        f"{_SOME_ONLY}"
                    )
        # Experts that no earlier task has run: the model had them, so recall of those tasks does without. And what an
        # earlier version has frozen whole: recurrent layers, attention.
        held = set(self.shared)
        units = units.with_whole(held, "frozen whole since an earlier task")
        by_rows = [name for name in units.shared if name in self.embeddings]
        shared = tuple(name for name in units.shared if name not in by_rows)
        units = replace(units, shared=shared, embeddings=(*units.embeddings, *by_rows))
        new = [
            layer
            for name, layer in found.items()
            if name not in known and (set(layer.parameters) <= set(self.forms) or layer.weight in held)
        ]
        late = {
            name: "frozen whole since an earlier task" if name in held else "ran for no earlier task"
            for layer in new
            for name in layer.parameters
        }
        found = {name: layer for name, layer in found.items() if layer not in new}
        idle = {name for name, layer in known.items() if set(layer.parameters) <= set(units.idle)}
        if differing := sorted(known.keys() - found.keys() - idle | found.keys() - known.keys()):
            used = {name: units.whole[name] for name in differing if name in units.whole}
            raise ValueError(
                f"the model's layers no longer match the finished tasks: {differing} ran for one task and not for "
                f"another{''.join(f' (here, layer {name!r} {found})' for name, found in used.items())}; {_SOME_ONLY}"
            )
        taken = {name for layer in self.layers for name in layer.parameters}
        norms = {name for layer in units.layers for name in layer.parameters if layer.name in known} - taken
        late |= dict.fromkeys(norms, "no unit's when an earlier task ended")
        at_rest = {name for layer in idle - found.keys() for name in known[layer].parameters}
        return replace(
            units,
            layers=self.layers,
            idle=tuple(name for name in units.idle if name not in at_rest),
            shared=(*units.shared, *late),
            reasons={**units.reasons, **late},
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
                is_narrow = self.widenings and found is not None and found < leading
                if found is None or found[: len(leading)] != leading:
                    raise ValueError(
                        f"layer {layer.name!r} had {layer.units} units when a task ended, but this model's {name!r} "
                        + ("is missing" if found is None else f"has shape {found}")
                        + (", before rnf.widen: rnf.restore(checkpoint, model) widens it, too" if is_narrow else "")
                    )
                check_shape(name, parameters[name], self.forms, f"layer {layer.name!r} of the finished tasks")
        for record in self.tasks.values():
            for name in (*record.head_parameters, *self.shared, *self.embeddings):
                is_head = name in record.head_parameters
                if name not in parameters:
                    raise ValueError(
                        f"this model lacks {name!r}, which task {record.name!r} uses"
                        + (": it has to have the head of every finished task" if is_head else "")
                    )
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
        # Recall writes them: those of no other parameter may be.
        frozen = {*self.shared, *(name for layer in self.layers for name in layer.parameters)}
        own = {*buffers, *norm_parameters(module)}.difference(frozen)
        for name in self.embeddings:
            if not looks_up(modules.get(name.rpartition(".")[0])):
                raise ValueError(
                    f"{name!r} was the weight of an embedding when a task ended, in this model it is not that of a "
                    "plain nn.Embedding"
                )
        for record in self.tasks.values():
            if record.head not in modules:
                raise ValueError(f"this model lacks the module {record.head!r}, the head of task {record.name!r}")
            for name, value in record.norm_statistics.items():
                if name not in own:
                    raise ValueError(
                        f"this model lacks the buffer {name!r}, or the norm of that parameter, which task "
                        f"{record.name!r} uses"
                    )
                if tensors[name].shape != value.shape:
                    raise ValueError(
                        f"{name!r} has shape {tuple(tensors[name].shape)} in this model, and had {tuple(value.shape)} "
                        f"when task {record.name!r} ended"
                    )
                if _kind(tensors[name]) != _kind(value):
                    raise ValueError(
                        f"{name!r} is of {tensors[name].dtype} in this model, and was of {value.dtype} when task "
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
            "version": VERSION if any(layer.tied for layer in self.layers) else 1,
            "layers": [_layer_to_plain(layer) for layer in self.layers],
            "shared": list(self.shared),
            "tasks": [record_to_plain(record) for record in self.tasks.values()],
            "training": self.training,
            "recovering": None if self.recovering is None else record_to_plain(self.recovering),
            "initial": dict(self.initial),
            "resets": self.resets,
            **({"forms": dict(self.forms)} if self.forms else {}),
            **({"widenings": [widening.to_plain(one) for one in self.widenings]} if self.widenings else {}),
            **({"several": True} if self.several else {}),
            **({"begun": self.begun} if self.begun else {}),
            **({"kept": list(self.kept)} if self.kept else {}),
            **({"embeddings": list(self.embeddings)} if self.embeddings else {}),
            **({"learned": dict(self.learned)} if self.learned else {}),
            **({"own_rows": list(self.own_rows)} if self.own_rows else {}),
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
        for record in (record_from_plain(record, layers) for record in get(plain, "tasks", list)):
            if record.name in tasks:
                raise ValueError(f"not a state of lightning_rnf: it has two records of task {record.name!r}")
            tasks[record.name] = record
        portraits.check({name: record.portrait for name, record in tasks.items()})
        names = get_names(plain, "shared")
        embeddings = get_names(plain, "embeddings") if "embeddings" in plain else ()
        _check_owners(layers, (*names, *embeddings), tasks.values())
        training: str | None = get(plain, "training", (str, type(None)))
        recovering: dict[str, Any] | None = get(plain, "recovering", (dict, type(None)))
        initial, resets = get_tensors(plain, "initial"), get(plain, "resets", int)
        if not -1 <= resets <= len(tasks):
            raise ValueError(f"not a state of lightning_rnf: {resets} resets after {len(tasks)} tasks")
        allowed = {name for layer in layers for name in layer.parameters}
        allowed |= {
            f"{layer.norm}.{key}" for layer in layers for key in ("running_mean", "running_var", "weight", "bias")
        }
        if tasks and not allowed.issuperset(initial):
            raise ValueError(f"not a state of lightning_rnf: {sorted(set(initial) - allowed)} belong to no unit")
        unfinished = None if recovering is None else record_from_plain(recovering, layers)
        if unfinished is not None and not unfinished.evaluations:
            raise ValueError("not a state of lightning_rnf: 'recovering' has no 'evaluations'")
        of_heads = [name for record in tasks.values() for name in record.head_parameters]
        forms = forms_from_plain(plain, layers, (*names, *of_heads))
        learned = rows_of.tokens_from_plain(plain, "learned") if "learned" in plain else {}
        rows_of.check(embeddings, forms, tasks.values(), learned)
        known = {name: value for record in tasks.values() for name, value in record.norm_statistics.items()} | initial
        widenings = widening.all_from_plain(plain, layers, forms, known)
        if any(record.widenings > len(widenings) for record in tasks.values()):
            raise ValueError("not a state of lightning_rnf: it does not say where its model was made wider")
        several = get(plain, "several", bool) if "several" in plain else False
        begun = get(plain, "begun", int) if "begun" in plain else 0
        kept = get_names(plain, "kept") if "kept" in plain else ()
        if not set(kept) <= set(names):
            raise ValueError(f"not a state of lightning_rnf: 'kept' has what is not in 'shared': {kept!r:.80}")
        own_rows = get_names(plain, "own_rows") if "own_rows" in plain else ()
        of_fit = (several, begun, kept, embeddings, learned, own_rows)
        return cls(layers, names, tasks, training, unfinished, initial, resets, forms, widenings, *of_fit)


def _as_before(layer: UnitLayer, known: UnitLayer | None) -> UnitLayer:
    """A layer without the norm and the slopes that follow it, where these were nobody's when an earlier task ended.

    An earlier version has not counted a group norm, and behind a layer that ran several times nothing counts.
    """
    if known is None:
        return layer
    is_new = known.norm is None and layer.norm is not None
    norm = None if is_new else layer.norm
    slopes = None if is_new or known.slopes is None else layer.slopes
    left = tuple(f"{name}." for name in (layer.norm, layer.slopes) if name is not None and name not in (norm, slopes))
    own = tuple(name for name in layer.parameters if not name.startswith(left)) if left else layer.parameters
    return replace(layer, norm=norm, slopes=slopes, parameters=own)


def _layer_to_plain(layer: UnitLayer) -> dict[str, Any]:
    plain = asdict(layer)
    for key in ("recurrent", "packed", "tied"):  # as files were before there were such
        if not plain[key]:
            del plain[key]
    return plain


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
    modules = Counter(name for layer in layers for name in layer.modules)
    twice = [name for name, times in (*Counter(owned).items(), *modules.items()) if times > 1]
    if twice:
        raise ValueError(f"not a state of lightning_rnf: {twice[0]!r:.80} belongs to two layers, heads or tasks")


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    """What a conversion of the whole model leaves as it is."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool

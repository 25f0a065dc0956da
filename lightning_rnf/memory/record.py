"""One finished task: what is remembered of it, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lightning_rnf.anatomy import UnitLayer
from lightning_rnf.memory.embeddings import OldRows, old_rows_from_plain, tokens_from_plain
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
from lightning_rnf.memory.portraits import Portrait
from lightning_rnf.search import Evaluation, SubnetworkScore


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """One finished task.

    Attributes:
        name: of the task.
        head: name of the module that makes its logits.
        head_parameters: names of the head's parameters.
        relevant: bool ``(units,)`` by layer: the units of its sub-network.
        relevance: float32 ``(units,)`` by layer: the sum over the attributed samples, signed or of absolute values,
            as the callback was asked; the ranking is made of it.
        norm_statistics: buffers of the modules that ran, norms' running statistics among them, and where each task has
            its own, scale and shift of norms, as they were at the
            task's end; recall brings them back.
        cutoff: how many of the least relevant units were pruned.
        accuracy: of the whole network on the reference data, in [0, 1], before anything was pruned; by the better head.
        scored: what it is, and all accuracies of the record: empty for the share of right answers; ``"R²"`` of targets
            that are numbers: the share of their variance that is explained.
        whole: the same by its head, ``"trained"`` or ``"fitted"``; empty where heads were not fitted.
        ration: the share of each layer's free units that the task could claim; None: all.
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
        widenings: how many times the model had been made wider by this task's end.
        connections: layers of whose weights the task needs only what its units read of channels that are not silent; of
            all others it needs whole rows.
        free_weights: share of each layer's weight that may still move once this task's is frozen, in [0, 1]; empty in
            files from before.
        tokens: rows of embeddings that the task has read, bool ``(rows,)`` by the weight's name: in training, as far as
            they learned anything, and in its reference data.
        old_rows: by the weight's name, rows that were not frozen at this task's end and that a fit has changed since,
            before another task ended, as they were: see `FreezeState.recalled`.
        read_whole: embeddings that the task reads otherwise than by lookups, so that recall can't put rows into what
            they say: none of their rows may change after it.
        portrait: what its data look like to its sub-network and to those of earlier tasks; None: it was not asked for.
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
    whole: dict[str, float] = field(default_factory=dict)
    ration: float | None = None
    tests: dict[str, dict[str, float]] = field(default_factory=dict)
    widenings: int = 0
    connections: tuple[str, ...] = ()
    free_weights: dict[str, float] = field(default_factory=dict)
    scored: str = ""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    old_rows: dict[str, OldRows] = field(default_factory=dict)
    portrait: Portrait | None = None
    read_whole: tuple[str, ...] = ()


def record_to_plain(record: TaskRecord) -> dict[str, Any]:
    """Dicts, lists, built-in types and CPU tensors."""
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(record).items()}
    for key in (
        "widenings",
        "whole",
        "ration",
        "connections",
        "free_weights",
        "scored",
        "tokens",
        "old_rows",
        "portrait",
        "read_whole",
    ):
        if not plain[key]:
            del plain[key]  # as files were before there were any
    if record.old_rows:
        plain["old_rows"] = {name: rows.to_plain() for name, rows in record.old_rows.items()}
    if record.portrait is not None:
        plain["portrait"] = record.portrait.to_plain()
    if record.connections:
        plain["connections"] = list(record.connections)
    if record.read_whole:
        plain["read_whole"] = list(record.read_whole)
    return plain | {
        "head_parameters": list(record.head_parameters),
        "evaluations": [asdict(evaluation) for evaluation in record.evaluations],
        "recovery": [asdict(evaluation) for evaluation in record.recovery],
        "cuts": list(record.cuts),
        "notes": list(record.notes),
        "tests": {task: dict(logged) for task, logged in record.tests.items()},
    }


def record_from_plain(plain: Mapping[str, Any], layers: tuple[UnitLayer, ...]) -> TaskRecord:
    """The opposite of `record_to_plain`.

    Raises:
        ValueError: if it is not such a record of these layers, naming what is wrong.
    """
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
        ration=get_share(plain, "ration") if "ration" in plain else None,
        whole=get_numbers(plain, "whole") if "whole" in plain else {},  # files from before lack it
        tests=_get_tests(plain),
        widenings=get_count(plain, "widenings") if "widenings" in plain else 0,
        connections=_get_connections(plain, layers) if "connections" in plain else (),
        free_weights=_get_free(plain, layers) if "free_weights" in plain else {},
        scored=get_name(plain, "scored") if "scored" in plain else "",
        tokens=tokens_from_plain(plain, "tokens") if "tokens" in plain else {},
        old_rows=old_rows_from_plain(plain, "old_rows") if "old_rows" in plain else {},
        portrait=_get_portrait(plain, relevant) if "portrait" in plain else None,
        read_whole=get_names(plain, "read_whole") if "read_whole" in plain else (),
    )


def _get_evaluations(plain: object, key: str) -> tuple[Evaluation, ...]:
    return tuple(
        Evaluation(_score_from_plain(get(evaluation, "score", dict)), get(evaluation, "accepted", bool))
        for evaluation in get(plain, key, list)
    )


def _get_portrait(plain: Mapping[str, Any], relevant: Mapping[str, Tensor]) -> Portrait:
    return Portrait.from_plain(plain["portrait"], {layer: int(units.sum()) for layer, units in relevant.items()})


def _get_connections(plain: object, layers: tuple[UnitLayer, ...]) -> tuple[str, ...]:
    names = get_names(plain, "connections")
    strangers = set(names) - {layer.name for layer in layers}
    if strangers or len(set(names)) < len(names):
        raise ValueError(f"not a state of lightning_rnf: 'connections' should be names of layers, it is {names!r:.80}")
    return names


def _get_free(plain: object, layers: tuple[UnitLayer, ...]) -> dict[str, float]:
    shares: dict[str, Any] = get(plain, "free_weights", dict)
    return {layer.name: get_share(shares, layer.name) for layer in layers}


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

"""Which units, heads and shared parameters a model has: found by tracing one forward, or refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_rnf.anatomy.attention import Projection, projections
from lightning_rnf.anatomy.choosing import choose
from lightning_rnf.anatomy.embeddings import why_whole_embedding
from lightning_rnf.anatomy.kinds import OUTPUT_AXIS, class_name, kind_of
from lightning_rnf.anatomy.layers import (
    UnitLayer,
    inside,
    is_suspect,
    matches,
    unit_layer,
    why_shared,
)
from lightning_rnf.anatomy.logits import find_head
from lightning_rnf.anatomy.predict import Predict, supervised
from lightning_rnf.anatomy.targets import Layout
from lightning_rnf.anatomy.trace import Trace, form
from lightning_rnf.anatomy.tying import check_memory
from lightning_rnf.anatomy.wiring import Wiring

__all__ = ["OUTPUT_AXIS", "UnitLayer", "UnitMap"]

_KEPT = "kept from training"

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Whose parameters scale and shift channels, one by one, after whatever was divided by."""


@dataclass(frozen=True)
class UnitMap:
    """What each parameter of a model belongs to: a unit, the active head, all units (shared), or nothing that ran.

    Attributes:
        layers: in execution order.
        head: name of the module that made the logits.
        head_parameters: parameters of the head.
        shared: parameters that belong to no unit and no head; of modules that ran detached from the logits, too.
        idle: parameters that took no part in the forward: other tasks' heads, or unused.
        buffers: of the modules that ran, and any others that were read: norms' statistics, and whatever else may move.
        own: parameters that each task has of its own, as it has those statistics: see `with_own_norms`.
        reasons: why each shared parameter is shared, by its name, in few words.
        kinds: type names of all modules, by module name.
        ran: names of the modules that ran.
        forms: dtype and shape of every parameter, by each of its names; see `form`.
        by_rows: why it can't be followed what a layer reads of units, by its name: it is frozen by whole rows.
        whole: how a layer is used that nobody left out, but whose units can't be followed, by its name: it is frozen
            whole, as if it had been left out.
        layout: what the batch has shown of the task's targets.
        attention: the layers that make queries, keys and values, by name.
        kept: parameters that took part and that the user keeps from training (``requires_grad`` is False). Those that
            are shared cost later tasks nothing.
        embeddings: the weights of those whose rows belong to tokens, by name. One with a reason in ``reasons`` this
            forward uses otherwise than earlier tasks did, and needs whole.
    """

    layers: tuple[UnitLayer, ...]
    head: str
    head_parameters: tuple[str, ...]
    shared: tuple[str, ...]
    idle: tuple[str, ...]
    buffers: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict, repr=False)
    kinds: Mapping[str, str] = field(default_factory=dict, repr=False)
    ran: tuple[str, ...] = field(default=(), repr=False)
    forms: Mapping[str, str] = field(default_factory=dict, repr=False)
    by_rows: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    whole: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    layout: Layout = field(default=Layout(), repr=False, compare=False)
    own: tuple[str, ...] = ()
    attention: Mapping[str, Projection] = field(default_factory=dict, repr=False, compare=False)
    kept: tuple[str, ...] = field(default=(), repr=False, compare=False)
    embeddings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        example_batch: Any,
        predict: Predict = supervised,
        units: str | Sequence[str] | None = None,
        heads: str | Sequence[str] | None = None,
        learned: Collection[str] = (),
    ) -> UnitMap:
        """Trace one forward, in eval mode and eagerly, and leave the module as it was.

        Args:
            module: the model, with the task's head active.
            example_batch: on the module's device.
            predict: how to get logits of a batch.
            units: globs of module names, those behind a ``!`` of what is left out; None: every linear layer and
                convolution outside the head, and every layer of a kind that is registered. Layers that have one weight
                are one, by the first's name, and each name stands for all. What units can't follow (it shares its
                weight with the head, say, or is parametrized) is frozen whole, see ``whole``. Layers that are kept
                from training (``requires_grad`` is False: what an adapter stands on) are units only if globs ask for
                them, or if there are no others. Embeddings that are left out by ``!`` are frozen whole, too.
            heads: globs of module names; None: the module that made the logits, see `logits.find_head`.
            learned: parameters that are no longer trained and were: they do not count as kept from training.

        Raises:
            ValueError: if no head or no unit layer is found, if ``units`` or ``heads`` match nothing usable, or if two
                parameters are one in memory.
        """
        check_memory(module.named_parameters())
        still = {name for name, one in module.named_parameters(remove_duplicate=False) if not one.requires_grad}
        still.difference_update(learned)
        trace = Trace.of(module, example_batch, predict, kind_of, is_suspect)
        head = find_head(trace, _globs(heads))
        chosen = choose(trace, head, _globs(units), still)
        layers = tuple(unit_layer(trace, name) for name in chosen.names)
        of_head, shared, idle = _assign(trace, layers, head)
        reasons = {name: _KEPT if name in still else why_shared(trace, name, layers, chosen.whole) for name in shared}
        by_tokens = []
        for name in shared:
            owner = name.rpartition(".")[0]
            if isinstance(trace.modules[owner], nn.Embedding) and reasons[name].endswith(" is no unit layer"):
                found = "left out by units=" if matches(owner, chosen.left_out) else why_whole_embedding(trace, name)
                reasons[name] = f"{class_name(trace.modules[owner])} {found}"
                by_tokens += [] if found else [name]
        return cls(
            layers,
            head,
            of_head,
            tuple(name for name in shared if name not in by_tokens),
            idle,
            _buffers(trace),
            reasons={name: reason for name, reason in reasons.items() if name not in by_tokens},
            kinds={name: type(submodule).__name__ for name, submodule in trace.modules.items()},
            ran=tuple(name for name in trace.modules if trace.runs[name]),
            forms={name: form(parameter) for name, parameter in trace.names.items()},
            by_rows=Wiring.of(module, layers).reasons,
            whole=chosen.whole,
            layout=trace.layout,
            attention=projections(trace, layers),
            kept=tuple(name for name in (*shared, *(key for one in layers for key in one.parameters)) if name in still),
            embeddings=tuple(by_tokens),
        )

    def with_own_norms(self, module: nn.Module, taken: Collection[str] = ()) -> UnitMap:
        """The same map in which scale and shift of norms are neither units' nor shared: each task has its own.

        They are two numbers a channel, and with them a later task makes other features of frozen filters. Recall
        brings them back as it brings back running statistics.

        Args:
            module: that was traced.
            taken: parameters that have to stay what they are: finished tasks have them frozen.
        """
        known = {*self.shared, *(name for layer in self.layers for name in layer.parameters)}.difference(taken)
        own = [name for name in norm_parameters(module) if name in known]
        return replace(
            self,
            layers=tuple(
                replace(layer, parameters=tuple(name for name in layer.parameters if name not in own))
                for layer in self.layers
            ),
            shared=tuple(name for name in self.shared if name not in own),
            reasons={name: reason for name, reason in self.reasons.items() if name not in own},
            own=tuple(dict.fromkeys((*self.own, *own))),
        )

    @property
    def read_whole(self) -> tuple[str, ...]:
        """Those of ``embeddings`` that this forward needs whole."""
        return tuple(name for name in self.embeddings if name in self.reasons)

    def with_whole(self, embeddings: Collection[str], reason: str) -> UnitMap:
        """The same map in which some embeddings are frozen whole, and why."""
        names = [name for name in self.embeddings if name in embeddings]
        return replace(
            self,
            embeddings=tuple(name for name in self.embeddings if name not in names),
            shared=(*self.shared, *names),
            reasons={**self.reasons, **dict.fromkeys(names, reason)},
        )

    def parts(self) -> dict[str, tuple[tuple[Tensor, float], ...]]:
        """What of a layer is ranked by itself, by name: see `Projection.parts`. Other layers are one part."""
        return {name: projection.parts() for name, projection in self.attention.items()}

    def __str__(self) -> str:
        """A line for each unit layer, the head, and each module with shared or idle parameters, the shared with why."""
        rows = []
        for layer in self.layers:
            followers = [
                f"{self._kind(name)} {name}".strip() for name in (layer.norm, layer.slopes) if name is not None
            ]
            followers += [str(self.attention[layer.name])] if layer.name in self.attention else []
            followers += [f"tied to {name}" for name in layer.tied]
            rows.append((layer.name, self._kind(layer.name), f"{layer.units:5} units", ", ".join(followers)))
        units = sum(layer.units for layer in self.layers)
        lines = [
            f"{units} units in {_count(rows, 'layer')}, each with the norm and slopes that follow it:",
            *_table(rows),
        ]
        if self.by_rows:
            lines.append("of these by whole rows, since it can't be followed which of the units they read:")
            reasons = dict.fromkeys(self.by_rows.values())
            lines += _table(
                [(", ".join(one for one, of in self.by_rows.items() if of == why), why[:200]) for why in reasons]
            )
        lines += ["head:", *_table([(self.head, self._kind(self.head), _count(self.head_parameters, "parameter"))])]
        kept = [name for name in self.shared if name in self.kept]
        if kept:
            modules = {name.rpartition(".")[0] for name in kept}
            lines.append(
                "kept from training (requires_grad is False), so every task uses all of it: "
                f"{_count(kept, 'parameter')} of {_count([*modules], 'module')}"
            )
        if shared := [name for name in self.shared if name not in kept]:
            by_reason = groupby(shared, lambda name: (name.rpartition(".")[0], self.reasons.get(name, "")))
            lines.append("shared, frozen whole after the first task:")
            lines += _table([(module, _keys(names), reason) for (module, reason), names in by_reason])
        if self.embeddings:
            lines.append("embeddings, whose rows are each task's own, or each frozen once a finished task has read it:")
            owners = [(name.rpartition(".")[0], self.forms.get(name, "").partition("(")[2]) for name in self.embeddings]
            lines += _table([(one, self._kind(one), f"{form.partition(',')[0]:>5} rows") for one, form in owners])
        if self.own:
            norms = sorted({name.rpartition(".")[0] for name in self.own})
            lines += [f"scale and shift of {_count(norms, 'norm')}: each task has its own"]
        if self.idle:
            by_module = groupby(self.idle, lambda name: name.rpartition(".")[0])
            lines.append("idle, took no part (heads of other tasks, or unused):")
            lines += _table([(module, _keys(names)) for module, names in by_module])
        return "\n".join(lines)

    def _kind(self, name: str) -> str:
        return self.kinds.get(name, "")


def norm_parameters(module: nn.Module) -> list[str]:
    """Scale and shift of norms of torch's kinds, by name; not those that another module has, too."""
    owners = Counter(id(value) for _, value in module.named_parameters(remove_duplicate=False))
    return [
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        if isinstance(part, _NORMS)
        for key, value in part.named_parameters(recurse=False)
        if owners[id(value)] == 1
    ]


def _assign(trace: Trace, layers: Iterable[UnitLayer], head: str) -> tuple[tuple[str, ...], ...]:
    """Head parameters, shared parameters, idle parameters: every parameter outside the layers exactly once."""
    of_units = {name for layer in layers for name in layer.parameters}
    of_head, shared, idle = [], [], []
    for parameter, owners in trace.owners.items():
        if not of_units.isdisjoint(owners):
            continue
        if all(inside(name, head) for name in owners):
            of_head.append(owners[0])
        elif trace.used(parameter):
            shared.append(owners[0])
        else:
            idle.append(owners[0])
    return tuple(of_head), tuple(shared), tuple(idle)


def _buffers(trace: Trace) -> tuple[str, ...]:
    """Those of modules that ran, and any that a function was given: a norm's statistics, say, used without the norm.

    Others may be anything: a replay memory in the outermost module, say, that is not read when it predicts.
    """
    return tuple(
        f"{name}.{key}" if name else key
        for name, module in trace.modules.items()
        for key, buffer in module.named_buffers(recurse=False)
        if (name and trace.runs[name]) or id(buffer) in trace.read
    )


def _globs(patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _keys(names: Iterable[str]) -> str:
    """What a module calls its parameters."""
    return ", ".join(name.rpartition(".")[2] for name in names)


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"

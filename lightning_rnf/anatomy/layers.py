"""Unit layers: what belongs to each unit, and which layers of a traced model have units that can be followed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_rnf.anatomy.coupling import why_coupled
from lightning_rnf.anatomy.kinds import OUTPUT_AXIS, TRANSPOSED, class_name, is_layer, kind_of
from lightning_rnf.anatomy.packed import Packed, is_attention, why_not_rows
from lightning_rnf.anatomy.recurrent import Cells, cells_of, hidden_units, is_recurrent, why_not_units
from lightning_rnf.anatomy.trace import Call, Trace
from lightning_rnf.anatomy.tying import own_of_all, tied, why_not_tied

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms that treat each channel by itself, as a `nn.GroupNorm` of one channel a group does."""


@dataclass(frozen=True)
class UnitLayer:
    """A layer whose outputs are units.

    Attributes:
        name: of the module.
        units: how many.
        axis: of the output that counts units, negative: -1 for linear, -3 for two-dimensional convolution.
        parameters: names of the parameters that belong to the units: weight, bias, those of the norm, slopes. Each has
            units along its first dimension, but for a transposed weight: see `spread`.
        norm: name of the norm that directly follows, or None.
        slopes: name of the ``PReLU`` with a slope per unit that directly follows the layer or its norm, or None.
        transposed: where the weight has units behind inputs, its number of groups, and of inputs per group; else None.
        recurrent: of a recurrent layer its gates, layers and directions; its units are the hidden ones of all cells, in
            the order of `recurrent`. Else None.
        packed: whether it is torch's attention; its units are queries, keys and values, in the order of `packed`.
        tied: names of other modules that have the same weight, in the model's order: what they put out is its units',
            too, and what follows is nobody's.
    """

    name: str
    units: int
    axis: int
    parameters: tuple[str, ...]
    norm: str | None = None
    slopes: str | None = None
    transposed: tuple[int, int] | None = None
    recurrent: tuple[int, int, int] | None = None
    packed: bool = False
    tied: tuple[str, ...] = ()

    @property
    def cells(self) -> Cells | None:
        """Of a recurrent layer; None: it is none."""
        return None if self.recurrent is None else Cells(*self.recurrent)

    @property
    def blocks(self) -> Cells | Packed | None:
        """Whose rows are whose in its parameters, where each of these is some units' only; None: each is all units'."""
        return Packed(self.units // 3) if self.packed else self.cells

    @property
    def is_open(self) -> bool:
        """Whether its units are channels of what the module says: not those of recurrent layers, nor of attention."""
        return self.blocks is None

    @property
    def speaker(self) -> str:
        """Name of the module whose output is what the units say to the rest of the network; see `speakers`."""
        return self.slopes or self.norm or self.name

    @property
    def speakers(self) -> tuple[str, ...]:
        """Names of all modules whose outputs are that: several, where they are tied."""
        return (self.speaker, *self.tied)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that have its weight, in the model's order: those that are tied to it, too."""
        return (self.name, *self.tied)

    @property
    def weight(self) -> str:
        """Name of the parameter that says what each unit does with what it reads.

        Of a parametrized layer it is the last of those that its weight is computed from, of a recurrent layer that with
        which the first cell hears itself, of attention that of queries, which may be keys' and values', too.
        """
        if self.recurrent is not None:
            return f"{self.name}.weight_hh_l0"
        if self.packed:
            return next((name for name in self.parameters if name.endswith("_weight")), f"{self.name}.in_proj_weight")
        before = f"{self.name}.parametrizations.weight."
        return next((name for name in reversed(self.parameters) if name.startswith(before)), f"{self.name}.weight")

    def leading_shape(self, parameter: str) -> tuple[int, ...]:
        """The dimensions of one of its parameters that tell units apart: ``(units,)``, in general.

        The weight of a transposed convolution is ``(groups · inputs, units / groups, …)``, and unit
        ``group · units / groups + j`` owns the column ``j`` of its group's inputs. Other layers with a transposed
        weight have one group. A recurrent layer's parameters have the rows of one cell, gate by gate: ``(gates ·
        hidden,)``; those of attention ``(3 · width,)``, or ``(width,)`` where there are three weights.
        """
        if self.blocks is not None:
            return tuple(self.blocks.spread(parameter, torch.empty(self.units, device="meta")).shape)
        if self.transposed is None or parameter != f"{self.name}.weight":
            return (self.units,)
        groups, inputs = self.transposed
        return (groups * inputs, self.units // groups)

    def spread(self, parameter: str, values: Tensor) -> Tensor:
        """Give each slice of a parameter the value of the unit that it belongs to.

        Args:
            parameter: one of `parameters`.
            values: ``(units,)``.

        Returns:
            Of `leading_shape`.
        """
        if self.blocks is not None:
            return self.blocks.spread(parameter, values)
        if self.leading_shape(parameter) == (self.units,) or self.transposed is None:
            return values
        groups, inputs = self.transposed
        return values.reshape(groups, 1, -1).expand(-1, inputs, -1).reshape(self.leading_shape(parameter))

    def connections(self, units: Tensor, channels: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Which entries of the weight stand between some of the units and some of the channels that they read.

        Args:
            units: bool ``(units,)``.
            channels: bool ``(channels,)``; None: all.
            shape: of the weight.

        Returns:
            Bool, of the first two dimensions of the weight; of a recurrent layer and attention ``(units, 1)``: whole
            rows of several weights.
        """
        if not self.is_open:
            return units[:, None].clone()
        shape = shape[:2]
        if self.transposed is not None:
            of_units = self.spread(f"{self.name}.weight", units)
            return of_units.clone() if channels is None else of_units & channels[:, None]
        of_units = units[:, None].expand(*shape)
        if channels is None:
            return of_units.clone()
        by_group = channels.view(-1, shape[1])  # each unit reads the channels of its group
        return of_units & by_group.repeat_interleave(shape[0] // len(by_group), dim=0)

    def by_unit(self, parameter: str, values: Tensor) -> Tensor:
        """What each unit has of a parameter, or of anything of its shape: ``(units, …)``, a copy or a view.

        Only of a layer that `is_open`.
        """
        if self.leading_shape(parameter) == (self.units,) or self.transposed is None:
            return values
        groups, inputs = self.transposed
        columns: Tensor = values.unflatten(0, (groups, inputs))
        return columns.transpose(1, 2).flatten(0, 1)


class SilentHook:
    """A hook of ours that changes nothing of what is computed: who asks may go on as if it were not there."""


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether hooks of others may change what it hears or says."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not isinstance(hook, SilentHook) for hook in hooks)


def is_suspect(module: nn.Module) -> bool:
    """Whether a layer, a norm or slopes may do something else than torch's class: their rows have to be tried."""
    is_kind = is_layer(module) or isinstance(module, (*CHANNEL_NORMS, nn.GroupNorm, nn.PReLU))
    if not is_kind or is_recurrent(module) or is_attention(module):  # of these `why_not_units` tells, or `why_not_rows`
        return False
    if is_parametrized(module):
        return True
    of_torch = type(module).__module__.startswith("torch.nn.modules.")
    own = {"forward", "_conv_forward"}.intersection(vars(module))
    return not of_torch or bool(own) or has_foreign_hooks(module)


def coupling(trace: Trace, name: str) -> str | None:
    """How it shows that a layer is not made of rows; None if it is."""
    return _tried(trace, _layer(trace, name), hears=False) if name in trace.given else None


def layer_calls(trace: Trace) -> Iterator[Call]:
    """Runs of layers that relevance can reach, or that have no graph: those are refused when it doesn't."""
    for call in trace.calls:
        if is_layer(trace.modules[call.name]) and (not call.nodes or trace.reached(call)):
            yield call


def why_whole(trace: Trace, name: str, head: str) -> str | None:
    """How a layer is used that its units can't follow, so that it can only be frozen whole; None: they can.

    Args:
        trace: of the model.
        name: of the layer; what is found holds for all that have its weight.
        head: name of the module that is made of no units.
    """
    if found := why_not_tied(trace, name, head):
        return found
    names = tied(trace, name)
    calls = [call for call in trace.calls if call.name in names]
    how = f"shares its weight with {list(names)}" if len(names) > 1 else f"runs {len(calls)} times in one forward"
    if is_recurrent(trace.modules[name]) or is_attention(trace.modules[name]):
        why_not = why_not_units if is_recurrent(trace.modules[name]) else why_not_rows
        if found := why_not(trace.modules[name]):
            return found
        if len(calls) > 1:
            return f"{how}, and its units are inside of it"
    elif is_parametrized(trace.modules[name]):
        if not calls or not _is_by_unit(_layer(trace, name), trace.own_parameters(name)):
            return "is parametrized, and what its weight is computed from has no rows for its units"
        if len(calls) == 1 and (coupled := coupling(trace, name)):
            return f"is parametrized, and is not made of rows, {coupled}"
    if (len(calls) > 1 and name in trace.given) or (len(names) > 1 and not all(_is_plain(trace, one) for one in names)):
        return f"{how}, and may do something else than torch's layer each time"  # only a first run can be tried
    if len(calls) > 1 and not all(map(trace.reached, calls)):
        return f"{how}, not always where the logits' gradient comes by (no_grad, detach)"
    several = len(calls) > 1 or len(names) > 1
    for key, owners in own_of_all(trace, names).items():
        parameter = trace.names[key]
        if others := sorted(set(trace.sharers(key, parameter)).difference(owners.values())):
            return f"shares {key!r} with {others}"
        if several and not trace.in_each_run(parameter, sum(trace.runs[one] for one in owners)):
            return f"{how}, and its {key!r} may be used elsewhere, too"
        if len(calls) == 1 and (trace.uses_outside(parameter, calls[0]) > 0 or parameter in trace.elsewhere):
            return f"has its {key!r} used a second time outside the layer"
    return None


def _is_plain(trace: Trace, name: str) -> bool:
    """Whether it is a layer of torch's that has nothing but its rows and does nothing else."""
    return has_rows(trace, name) and not is_suspect(trace.modules[name])


def unit_layer(trace: Trace, name: str) -> UnitLayer:
    """The layer of that name, with the norm and the slopes that are its units' own; see `why_whole`.

    What follows a layer that runs several times is nobody's: each run may be followed by something else. So it is with
    one that is tied to others, whichever of them run.
    """
    names, layer = tied(trace, name), _layer(trace, name)
    call, *more = (call for call in trace.calls if call.name in names)
    if more or len(names) > 1:
        return replace(layer, parameters=tuple(own_of_all(trace, names)), tied=names[1:])
    norm = _follower(trace, call, layer, is_norm_of_channels)
    slopes = _follower(trace, norm or call, layer, is_prelu)
    parameters = [
        key for owner in (call, norm, slopes) if owner is not None for key in trace.own_parameters(owner.name)
    ]
    return replace(
        layer,
        parameters=tuple(parameters),
        norm=None if norm is None else norm.name,
        slopes=None if slopes is None else slopes.name,
    )


def why_shared(trace: Trace, parameter: str, layers: Iterable[UnitLayer], whole: Mapping[str, str]) -> str:
    """Why a parameter that took part in the forward belongs to no unit and no head, in few words.

    Args:
        trace: of the model.
        parameter: its full name.
        layers: the unit layers.
        whole: layers that nobody left out and that units can't follow, as from `why_whole`.
    """
    name, parametrized, _ = parameter.partition(".parametrizations.")
    name = name if parametrized else parameter.rpartition(".")[0]
    module = trace.modules[name]
    kind = class_name(module)
    if parametrized and is_layer(module):
        return f"{kind} {whole[name]}" if name in whole else "left out by units="
    calls = [call for call in trace.calls if call.name == name]
    others = trace.sharers(parameter, trace.own_parameters(parameter.rpartition(".")[0])[parameter])
    if others and name in whole and tied(trace, name) != (name,):
        return f"{kind} {whole[name]}"
    if others:
        return f"tied to {', '.join(others)}"
    if not calls:
        return "used functionally, the module itself did not run"
    if all(call.output is not None and not trace.reached(call) for call in calls):
        return f"{kind} ran detached from the logits, or unseen (no_grad, reentrant checkpointing)"
    if is_layer(module):
        if name in whole:
            return f"{kind} {whole[name]}"
        if not has_rows(trace, name):
            return f"{kind} has more to it than one row for each output"
        found = coupling(trace, name)
        return "left out by units=" if found is None else not_rows(trace, name, found)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return "PReLU with one slope for all channels"
    if is_norm_of_channels(module) or is_prelu(module):
        return f"{kind} {_why_not_a_unit_s(trace, calls, layers)}"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return f"{kind} mixes channels"
    return f"{kind}'s own, no layer's" if any(module.children()) else f"{kind} is no unit layer"


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs matches."""
    return any(fnmatchcase(name, glob) for glob in globs)


def inside(name: str, ancestor: str) -> bool:
    """Whether a module is another one or a part of it."""
    return name == ancestor or name.startswith(f"{ancestor}.")


def has_rows(trace: Trace, name: str) -> bool:
    """Whether the layer's parameters are its rows alone; an adapter's, say, compute something else and are shared."""
    module, own = trace.modules[name], trace.own_parameters(name)
    keys = {key.rpartition(".")[2] for key in own}
    if is_parametrized(module) or is_recurrent(module) or is_attention(module):
        return True
    if "weight" not in keys or any(module.children()):
        return False
    if isinstance(module, tuple(OUTPUT_AXIS)) and (keys <= {"weight", "bias"} or not is_suspect(module)):
        return keys <= {"weight", "bias"}  # a gain, say, for each row of somebody's layer is tried with the rows
    return _is_by_unit(_layer(trace, name), own)


def _is_by_unit(layer: UnitLayer, own: Mapping[str, nn.Parameter]) -> bool:
    """Whether each parameter has units where a layer of a kind that is not torch's has to have them."""
    leading = {name: layer.leading_shape(name) for name in own}
    return all(parameter.shape[: len(leading[name])] == leading[name] for name, parameter in own.items())


def _layer(trace: Trace, name: str) -> UnitLayer:
    """The layer by itself, without what follows it."""
    module: Any = trace.modules[name]
    own = trace.own_parameters(name)
    kind = kind_of(module)
    assert kind is not None
    if kind.recurrent:
        cells = cells_of(module)
        form = cells.gates, cells.layers, cells.directions
        return UnitLayer(name, hidden_units(module), kind.axis, tuple(own), recurrent=form)
    if kind.packed:
        return UnitLayer(name, 3 * module.embed_dim, kind.axis, tuple(own), packed=True)
    if is_parametrized(module):
        said = next((call.output for call in trace.calls if call.name == name), None)
        units = 0 if said is None or said.ndim < -kind.axis else said.shape[kind.axis]
        return UnitLayer(name, units, kind.axis, tuple(own))
    weight = own[f"{name}.weight"]
    if kind.transposed and weight.ndim > 1:
        groups = int(getattr(module, "groups", 1)) if isinstance(module, TRANSPOSED) else 1
        of_groups = groups, len(weight) // groups
        return UnitLayer(name, groups * weight.shape[1], kind.axis, tuple(own), transposed=of_groups)
    return UnitLayer(name, len(weight), kind.axis, tuple(own))


def _tried(trace: Trace, layer: UnitLayer, *, hears: bool) -> str | None:
    if layer.name not in trace.coupled:
        trace.coupled[layer.name] = why_coupled(
            trace.modules[layer.name],
            trace.given[layer.name],
            layer.units,
            layer.axis,
            lambda key, values: layer.spread(f"{layer.name}.{key}", values),
            hears=hears,
        )
    return trace.coupled[layer.name]


def not_rows(trace: Trace, name: str, found: str) -> str:
    """That in words, of what `coupling` has found."""
    return f"{type(trace.modules[name]).__name__} is not made of rows, {found}"


def is_norm_of_channels(module: nn.Module) -> bool:
    """Whether it has a scale and a shift for each channel along dimension 1, as a layer has units.

    A group norm of several channels a group mixes them before: units that are silenced behind it, too, are not heard,
    and what the others are divided by knows of them as zeros, now and later.
    """
    return isinstance(module, (*CHANNEL_NORMS, nn.GroupNorm))


def mixes_channels(norm: nn.Module) -> bool:
    """Whether it is a group norm of several channels a group."""
    return isinstance(norm, nn.GroupNorm) and norm.num_groups < norm.num_channels


def is_prelu(module: nn.Module) -> bool:
    """Whether it has slopes."""
    return isinstance(module, nn.PReLU)


def _follower(trace: Trace, call: Call, layer: UnitLayer, is_kind: Callable[[nn.Module], bool]) -> Call | None:
    """The run of a module of some kind that reads this output along the axis of its units, if nothing else does."""
    # Modules of these kinds count channels along dimension 1 of their input.
    if call.output is None or call.output.ndim + layer.axis != 1 or trace.edges[call.node] != 1:
        return None
    for other in trace.calls:
        if other.source is not call.node or trace.runs[other.name] != 1 or not trace.reached(other):
            continue
        own = trace.own_parameters(other.name).items()
        is_units_own = all(
            parameter.shape == (layer.units,) and not trace.sharers(key, parameter) for key, parameter in own
        )
        if is_kind(trace.modules[other.name]) and is_units_own and _keeps_channels(trace, other, layer):
            return other
    return None


def _keeps_channels(trace: Trace, call: Call, layer: UnitLayer) -> bool:
    """Whether what follows a layer says of each unit what it hears of that unit alone."""
    own = tuple(trace.own_parameters(call.name))
    follower = UnitLayer(call.name, layer.units, layer.axis, own)
    return call.name not in trace.given or _tried(trace, follower, hears=True) is None


_SUMS = {"CatBackward0": "a concatenation", "AddBackward0": "a sum", "SubBackward0": "a difference"}


def _why_not_a_unit_s(trace: Trace, calls: Sequence[Call], layers: Iterable[UnitLayer]) -> str:
    """For a norm or slopes that would be the units' own directly behind them."""
    if len(calls) > 1:
        return f"runs {len(calls)} times in one forward"
    (call,) = calls
    if found := trace.coupled.get(call.name):
        return f"is not made of rows, {found}"
    made_by = "" if call.source is None else type(call.source).__name__
    if made_by in _SUMS:
        return f"reads {_SUMS[made_by]}, whose channels no layer owns"
    read = [other.name for other in trace.calls if call.source is not None and other.node is call.source]
    if not {name for layer in layers for name in (layer.name, layer.norm)}.intersection(read):
        return "does not directly follow a unit layer"
    if trace.edges[call.source] > 1:
        return "is not alone in reading the layer before it"
    return "does not go along the units of the layer before it"

"""A model that has run out of units gets more of them, between two fits; what it had stays as it is, bit by bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import CHANNEL_NORMS, LAYERS, Flow, Places, Traced, Wider, content, torch_class, widened
from lightning_rnf.heads import MultiHead
from lightning_rnf.memory import FreezeState, grown, wider
from lightning_rnf.recall import subnetwork
from lightning_rnf.runtime import borrowed, evaluating, sharding
from lightning_rnf.tasks.probes import Probe, drifts, run

LEAST_FREE = 0.1
"""Share of a layer's units below which it has run out of them."""

_SLOPE = 0.25  # what a PReLU starts from


def short_of_units(state: FreezeState) -> list[str]:
    """Names of the layers that have run out: less than `LEAST_FREE` of their units is free."""
    return [name for name, frozen in state.frozen().items() if float((~frozen).double().mean()) < LEAST_FREE]


def widen(
    module: nn.Module,
    state: FreezeState,
    chosen: Sequence[str],
    share: float,
    probes: Mapping[str, Probe],
    *,
    masked: bool,
) -> FreezeState:
    """Give layers more units. If anything comes in between, the model is as it was before.

    Args:
        module: the bare model.
        state: the finished tasks, which stay as they are.
        chosen: names of the layers; what they are tied to grows with them.
        share: of each layer's units, so many come.
        probes: samples of finished tasks that have to say the same afterwards.
        masked: as for `subnetwork.recall`.

    Returns:
        The finished tasks on the wider model.

    Raises:
        ValueError: naming the layer that can't get more units, and why.
    """
    flows = _flows(module)
    called = {name for flow in flows for name in flow.traced.called}
    found = widened(flows, state.layers, chosen, share)
    for layer in state.layers:
        if not any(f"{one}.".startswith(f"{name}.") for name in called for one in layer.modules):
            raise ValueError(
                f"the model can't be widened: layer {layer.name!r} did not run when its forward was traced, so which "
                "channels it reads is not known; activate what runs it"
            )
    found = _with_others(found, module, called, state)
    drawn = defaults(module, found, seed=f"{len(state.widenings)} {list(state.tasks)}")
    after = wider(state, found, drawn)
    before, drift = content(flows, state.layers), drifts(module, state, probes, masked=masked)
    undo = apply(module, found, _silent_to_frozen(drawn, after))
    try:
        _check_content(before, content(_flows(module), after.layers), found)
        after.check_module(module)
        _check_runs(module, after, probes)
        now = drifts(module, after, probes, masked=masked)
        worse = [name for name, of_task in drift.items() if not now.get(name, math.inf) <= of_task]
        if worse:
            raise ValueError(
                f"the model can't be widened: recall of {worse[0]!r} would not be bit-equal any more, so its forward "
                "does something with its sizes that its graph does not show"
            )
    except BaseException:
        undo.close()
        raise
    return after


def follow(module: nn.Module, state: FreezeState, weights: Mapping[str, Any]) -> ExitStack:
    """Widen a model of earlier sizes as that of the finished tasks was; any other model stays as it is.

    Args:
        module: the bare model, maybe of the original sizes, maybe with heads that the weights lack.
        state: the finished tasks.
        weights: that the model is to get: nothing grows but to their sizes.

    Returns:
        What undoes it.

    Raises:
        ValueError: if it would have to grow, and is sharded.
    """
    undo = ExitStack()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stage = _stage(own, state.widenings)
    if stage < len(state.widenings) and sharding.is_sharded(module):
        raise ValueError(
            "the checkpoint is of a model that was made wider, and a sharded one can't be: call "
            "rnf.restore(path, model) before the fit, which widens it"
        )
    for place, of_place in enumerate(state.widenings[stage:]):
        # Heads of tasks that were given up since are in no file.
        known = {name: dims for name, dims in of_place.tensors.items() if name in own and name in weights}
        lost = {name.rpartition(".")[0] for name in of_place.tensors.keys() - known.keys()}
        sizes = {name: of_module for name, of_module in of_place.sizes.items() if name not in lost}
        owners = {name.rpartition(".")[0] for name in known}
        found = _with_others(replace(of_place, tensors=known, sizes=sizes), module, owners, state)
        undo.callback(apply(module, found, defaults(module, found, seed=str(place))).close)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return undo


@torch.no_grad()
def apply(module: nn.Module, found: Wider, drawn: Mapping[str, Tensor]) -> ExitStack:
    """Put larger parameters and buffers into a model's modules; what there was is at its places in them.

    Args:
        module: the bare model.
        found: what grows.
        drawn: what is new, by name, of the new shape.

    Returns:
        What undoes it.
    """
    undo = ExitStack()
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, places in found.tensors.items():
        owner, _, key = name.rpartition(".")
        is_parameter = key in modules[owner]._parameters
        tensors: Any = modules[owner]._parameters if is_parameter else modules[owner]._buffers
        old = tensors[key]
        new = grown(old.detach(), places, drawn[name])
        if is_parameter:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            vars(new).update(vars(old))  # what the user has noted on it
        tensors[key] = new
        undo.callback(tensors.__setitem__, key, old)
    for name, sizes in found.sizes.items():
        for attribute, (before, after) in sizes.items() if name in modules else ():
            setattr(modules[name], attribute, after)
            undo.callback(setattr, modules[name], attribute, before)
    return undo


def defaults(module: nn.Module, found: Wider, seed: str) -> dict[str, Tensor]:
    """What torch starts such layers and norms from, on the CPU: by name, of the new shape.

    Drawn by a generator of their own for each name, so every process and every run draws the same.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    drawn = {}
    for name, places in found.tensors.items():
        owner, _, key = name.rpartition(".")
        layer = modules[owner]
        shape = _shape(getattr(layer, key), places)
        if torch_class(layer) in LAYERS:
            weight = _shape(layer.get_parameter("weight"), found.tensors.get(f"{owner}.weight", {}))
            bound = 1 / math.sqrt(max(1, math.prod(weight[1:])))  # as torch counts what a unit reads
            digest = hashlib.blake2b(f"{seed} {name}".encode(errors="surrogatepass"), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            drawn[name] = torch.rand(shape, generator=generator) * 2 * bound - bound
        elif isinstance(layer, nn.PReLU):
            drawn[name] = torch.full(shape, _SLOPE)
        else:
            is_one = key == "running_var" or (key == "weight" and isinstance(layer, CHANNEL_NORMS))
            drawn[name] = torch.full(shape, float(is_one))
    return drawn


def _flows(module: nn.Module) -> list[Flow]:
    """What flows into what, once for each head of a `MultiHead`: each is to read what is new."""
    multi_heads = [part for part in module.modules() if isinstance(part, MultiHead)]
    flows = []
    with borrowed(module), evaluating(module):
        for task in dict.fromkeys(task for multi_head in multi_heads for task in multi_head.tasks) or [""]:
            with ExitStack() as running:
                for multi_head in multi_heads:
                    if task in multi_head.tasks:
                        running.enter_context(multi_head.running(task))
                flows.append(Flow.of(Traced.of(module, ()), {}))
    return flows


def _with_others(found: Wider, module: nn.Module, called: Iterable[str], state: FreezeState) -> Wider:
    """Besides, heads that did not run, in the place of the one that did; other names of the same tensors; sizes."""
    tensors, sizes = dict(found.tensors), {name: dict(of_module) for name, of_module in found.sizes.items()}
    for idle, running in _idle_heads(module, set(called), state):
        for name, places in found.tensors.items():
            if name.startswith(f"{running}."):
                twin = f"{idle}{name[len(running) :]}"
                if not _has_size(module, twin, running, places):
                    continue
                tensors.setdefault(twin, places)
                owner, of_twin = name.rpartition(".")[0], twin.rpartition(".")[0]
                if owner in found.sizes:
                    sizes.setdefault(of_twin, dict(found.sizes[owner]))
    for name, part in module.named_modules():
        if isinstance(part, MultiHead):
            for inner, of_inner in list(sizes.items()):
                for pair in (of_inner.get("in_features"), of_inner.get("in_channels")):
                    if inner.startswith(f"{name}.tasks.") and pair is not None and pair[0] == part.in_features:
                        sizes[name] = {"in_features": pair}
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    by_tensor = {id(own[name]): places for name, places in tensors.items()}
    tensors |= {name: by_tensor[id(value)] for name, value in own.items() if id(value) in by_tensor}
    return replace(found, tensors=tensors, sizes=sizes)


def _idle_heads(module: nn.Module, called: set[str], state: FreezeState) -> Iterator[tuple[str, str]]:
    """Heads that did not run, each with the one beside it that did."""
    modules = dict(module.named_modules())
    heads = {record.head for record in state.tasks.values()}
    containers = {head.rpartition(".")[0] for head in heads}
    for container in containers & modules.keys():
        prefix = f"{container}." if container else ""
        beside = [f"{prefix}{name}" for name, _ in modules[container].named_children()]
        if not isinstance(modules[container], (nn.ModuleDict, nn.ModuleList)):
            beside = [name for name in beside if name in heads]
        ran = [name for name in beside if any(f"{one}.".startswith(f"{name}.") for one in called)]
        for name in beside if ran else ():
            if name not in ran:
                yield name, ran[0]


def _has_size(module: nn.Module, name: str, running: str, places: Mapping[int, Places]) -> bool:
    """Whether a parameter of a head that did not run is to grow as that of the one that did, or is so large already."""
    owner, _, key = name.rpartition(".")
    try:
        own = getattr(module.get_submodule(owner), key)
        sizes = {
            (own.shape[dimension] == one.before, own.shape[dimension] == one.size) for dimension, one in places.items()
        }
    except (AttributeError, IndexError):
        sizes = set()
    if sizes not in ({(True, False)}, {(False, True)}):
        raise ValueError(
            f"the model can't be widened: {name!r} is not of a head like {running!r}, which ran when the forward was "
            "traced, so what it reads is not known: put the heads into a lightning_rnf.MultiHead"
        )
    return sizes == {(True, False)}


def _silent_to_frozen(drawn: Mapping[str, Tensor], after: FreezeState) -> dict[str, Tensor]:
    """Frozen rows and heads of finished tasks don't read what is new: their entries there are zero."""
    found, frozen = dict(drawn), after.frozen()
    heads = [name for record in after.tasks.values() for name in record.head_parameters]
    for name in (*after.shared, *heads):
        if name in found and found[name].ndim > 1:
            found[name] = torch.zeros_like(found[name])
    for layer in after.layers:
        name = f"{layer.name}.weight"
        if name in found:
            rows = layer.spread(name, frozen[layer.name])
            found[name] = found[name].masked_fill(rows.view(*rows.shape, *[1] * (found[name].ndim - rows.ndim)), 0.0)
    return found


def _check_content(
    before: Mapping[str, Sequence[tuple[str, int]]], now: Mapping[str, Sequence[tuple[str, int]]], found: Wider
) -> None:
    """Check that what was there reads the same units as before, in the places where it stands now."""
    units = {name: places.before for name, places in found.units.items()}
    for name, read in before.items():
        kept = [place for place, (layer, unit) in enumerate(now.get(name, ())) if unit < units.get(layer, unit + 1)]
        same = [now[name][place] for place in kept] == list(read)
        own = [
            one for tensor, dims in found.tensors.items() if tensor.rpartition(".")[0] == name for one in dims.values()
        ]
        # Of groups the weight has no dimension for what is read, and some norms have nothing by channel.
        free = "groups" in found.sizes.get(name, {}) or not own or len(kept) == len(now[name])
        if not same or not (free or any(one.index().tolist() == kept for one in own)):
            raise ValueError(f"the model can't be widened: {name!r} would read other channels than before")


def _check_runs(module: nn.Module, state: FreezeState, probes: Mapping[str, Probe]) -> None:
    """Run a task's samples through the whole network, if there are any."""
    for name, probe in probes.items():
        if name in state.tasks and name == state.tasks[name].name:
            recall = subnetwork.recall(
                module, (), replace(state.tasks[name], widenings=len(state.widenings)), masked=False
            )
            try:
                run(module, probe.batch, probe.reference, recall, probe.device)
            except Exception as error:  # whatever a forward of the user's makes of it
                raise ValueError(f"the model can't be widened, it would not run: {error}") from error
            return


def _stage(own: Mapping[str, Tensor], widenings: Sequence[Wider]) -> int:
    """After how many of the widenings a model has the sizes that it has; all of them, if it has none of these."""
    for stage in range(len(widenings)):
        sizes: dict[tuple[str, int], int] = {}
        for place, one in enumerate(widenings):
            for name, by_dimension in one.tensors.items():
                for dimension, places in by_dimension.items():
                    if place < stage:
                        sizes[name, dimension] = places.size
                    else:
                        sizes.setdefault((name, dimension), places.before)
        if all(
            dimension < own[name].ndim and own[name].shape[dimension] == size
            for (name, dimension), size in sizes.items()
            if name in own
        ):
            return stage
    return len(widenings)


def _shape(tensor: Tensor, places: Mapping[int, Places]) -> list[int]:
    return [places[dimension].size if dimension in places else size for dimension, size in enumerate(tensor.shape)]

"""Keep frozen rows where they are while an optimizer works on the rest, and slow elastic ones down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import UnitMap, is_transposed
from lightning_rnf.freezing import rows as layer_rows
from lightning_rnf.freezing.embeddings import Unread
from lightning_rnf.freezing.held import HeldRows
from lightning_rnf.freezing.stillness import Groups, SecondMoments, Stillness
from lightning_rnf.memory import FreezeState
from lightning_rnf.packages import rank_zero_warn
from lightning_rnf.runtime import sharding

ElasticityOption = float | dict[str, float]
"""A factor on the learning rate, or factors by glob of module names (the first match counts; no match: the default)."""


def elasticities(
    state: FreezeState,
    elasticity: ElasticityOption = 0.0,
    irrelevant_elasticity: ElasticityOption = 1.0,
    inside: Mapping[str, Tensor] | None = None,
    connections: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The factor on the learning rate of every parameter that the finished tasks know.

    Args:
        state: the finished tasks.
        elasticity: of relevant units and shared parameters (the paper's lr_frozen as a factor). Without a match: 0.
        irrelevant_elasticity: of units that are relevant to no task (the paper's lr_irrelevant). Without a match: 1.
        inside: bool ``(units,)`` by layer: units of the sub-network that is being trained. All others are 0.
        connections: bool by layer, as from `frozen_connections`: entries of its weight that count as relevant, instead
            of the rows of relevant units.

    Returns:
        By parameter name: one factor per slice along the dimensions that tell units apart (`UnitLayer.leading_shape`:
        ``(units,)``, in general; of embeddings ``(rows,)``: those that a finished task has read are relevant), per
        entry of the first two dimensions, or one for the whole, ``()``. Heads of finished tasks are 0: they never train
        again.
    """
    factors: dict[str, Tensor] = {}
    all_frozen = state.frozen()
    for layer in state.layers:
        frozen = all_frozen[layer.name]
        relevant = torch.tensor(factor_of(elasticity, layer.name, 0.0))
        irrelevant = torch.tensor(factor_of(irrelevant_elasticity, layer.name, 1.0))
        of_units = torch.where(frozen, relevant, irrelevant)
        if inside is not None:
            of_units = of_units.masked_fill(~inside[layer.name], 0.0)
        for name in layer.parameters:
            factors[name] = layer.spread(name, of_units)
        if connections is not None and layer.name in connections:
            needed = connections[layer.name]
            of_entries = torch.where(needed, relevant, irrelevant)
            if inside is not None:
                outside = layer.connections(~inside[layer.name], None, needed.shape)
                of_entries = of_entries.masked_fill(outside, 0.0)
            factors[f"{layer.name}.weight"] = of_entries
    for name in state.shared:
        factors[name] = torch.tensor(factor_of(elasticity, name.rpartition(".")[0], 0.0))
    for name in state.embeddings:
        module, held = name.rpartition(".")[0], state.frozen_rows(name)
        assert held is not None
        of_held = torch.tensor(factor_of(elasticity, module, 0.0))
        factors[name] = torch.where(held, of_held, torch.tensor(factor_of(irrelevant_elasticity, module, 1.0)))
    for record in state.tasks.values():
        for name in record.head_parameters:
            factors[name] = torch.tensor(0.0)
    return factors


def check_globs(name: str, option: ElasticityOption, units: UnitMap) -> None:
    """Check that each glob names a module that it can be about.

    Raises:
        ValueError: naming the glob that does not.
    """
    names = [
        *(layer.name for layer in units.layers),
        *(one.rpartition(".")[0] for one in (*units.shared, *units.embeddings)),
    ]
    for glob in option if isinstance(option, Mapping) else ():
        if any(fnmatchcase(module, glob) for module in names):
            continue
        if any(fnmatchcase(own.rpartition(".")[0], glob) for own in units.own):
            raise ValueError(
                f"{name}: {glob!r} matches nothing but norms, whose scale and shift each task has of its own, so that "
                "no factor reaches them: leave it out, or freeze them with norm_parameters='frozen'"
            )
        raise ValueError(f"{name}: {glob!r} matches no unit layer and no module with shared parameters: {names}")


def check_elasticity(name: str, option: ElasticityOption) -> ElasticityOption:
    """Return ``option`` if every factor is finite and at least 0.

    Raises:
        ValueError: naming the factor that is not.
    """
    for key, factor in (option if isinstance(option, Mapping) else {"": option}).items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ValueError(f"{name}{f'[{key!r}]' if key else ''} is {factor!r}, expected a factor of at least 0")
    return option


@torch.no_grad()
def hold_in_copy(tensors: Mapping[str, Tensor], module: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Give a copy of a module's parameters the module's own frozen rows.

    For a state dict on its way into a checkpoint: one of averaged weights has those rows rounded.

    Args:
        tensors: by parameter name.
        module: whose frozen rows are right.
        factors: by parameter name, as from `elasticities`.
    """
    for name, rows in _rows(module, factors).items():
        frozen = rows.held(rows.factor == 0)
        if frozen is not None and name in tensors:
            frozen.write(tensors[name], frozen.read(rows.parameter))


class Freezer:
    """Holds a module's parameters to their elasticities for the length of one fit.

    Elasticity 0 means bit-equal: gradients of frozen rows are zeroed as they arrive, so that clipping, accumulation and
    moments see zeros, *and* the rows are put back after every optimizer step, since weight decay and warm moments move
    what has no gradient. Where nothing can have moved them (`Stillness`) they are looked at now and then instead: after
    the first, second, fourth, eighth … step and by `audit`. Other factors scale the update: a scaled gradient makes no
    difference to Adam. Of a parameter that is sharded by rows (FSDP2), each process holds those that it has.

    Args:
        module: the bare model.
        factors: by parameter name, as from `elasticities`.

    Attributes:
        unread: embeddings, by the weight's name, of which rows are held until they are read, too.
    """

    def __init__(self, module: nn.Module, factors: Mapping[str, Tensor]) -> None:
        self.unread: dict[str, Unread] = {}
        self._module = module
        self._rows = _rows(module, factors)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._groups: dict[int, Groups] = {}  # by the optimizer's id
        self._moments: dict[Tensor, SecondMoments] = {}
        self._steps = 0
        self._stopped: list[HeldRows] = []
        self._held: dict[Tensor, HeldRows] = {}
        self._handles: list[Any] = []
        self._nested_steps = 0

    @property
    def attached(self) -> bool:
        """Whether rows are being held."""
        return bool(self._handles)

    def stop_gradients(self) -> None:
        """Take parameters that are frozen whole out of training. Before the strategy wraps the model."""
        for rows in self._rows.values():
            if rows.is_whole and rows.parameter.requires_grad:
                self._stopped.append(rows)
                rows.parameter.requires_grad_(False)

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Start to mask gradients and to hold rows at the values they have now.

        Call it when weights are loaded and on their device, and the optimizers are there.

        Raises:
            TypeError: if an optimizer has no step hooks to hold rows with.
        """
        self._remove_hooks()
        if sharding.is_sharded(self._module):  # since the setup, with other parameters in the places of the old ones
            sharding.reshard(self._module)
            for name, rows in self._rows.items():
                rows.parameter = self._module.get_parameter(name)
        self.follow(optimizers)
        is_sharded = sharding.is_sharded(self._module)
        # What other processes send is averaged into gradients after they are masked, uncounted.
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        for rows in self._rows.values():
            rows.hold()
            self._held[rows.parameter] = rows
            if rows.frozen is None:
                continue
            self._handles.append(rows.mask_gradients())
            if is_sharded or type(rows.parameter) is not nn.Parameter or not rows.parameter.is_floating_point():
                continue
            self._moments[rows.parameter] = SecondMoments(rows.parameter, rows.frozen)
            if is_alone and rows.elastic is None:
                rows.still = Stillness(rows.parameter, rows.frozen)
        self._spare_gradients()

    def change(self, factors: Mapping[str, Tensor]) -> None:
        """Hold to other elasticities from here on; if rows are being held, with the same optimizers."""
        if self.attached:
            self.pin()
        self._rows = _rows(self._module, factors)
        if self.attached:
            self.attach(list(self._optimizers))

    def follow(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Hold rows against these optimizers too, if they are new, and check that the parameters are still the same.

        Raises:
            TypeError: if an optimizer has no step hooks to hold rows with.
            ValueError: if somebody has put another parameter in the place of one that is held.
        """
        sharding.reshard(self._module)
        new = [one for one in optimizers if not any(one is known for known in self._optimizers)]
        for optimizer in new:
            if not hasattr(optimizer, "register_step_post_hook"):
                raise TypeError(
                    f"optimizer {type(optimizer).__name__} has no step hooks, so frozen rows can't be held: "
                    "use a torch.optim.Optimizer"
                )
        for name, rows in self._rows.items():
            if self._module.get_parameter(name) is not rows.parameter:
                raise ValueError(
                    f"parameter {name!r} was replaced by another during the fit, so its frozen rows can't be held: "
                    "write into the one that is there"
                )
        for optimizer in new:
            self._optimizers.append(optimizer)
            self._groups[id(optimizer)] = Groups(optimizer)
            self._handles.append(optimizer.register_state_dict_pre_hook(self._clear_moments))
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Pin once more, remove every hook and give back the flags. Safe to call twice."""
        sharding.reshard(self._module)
        if self.attached:
            self.pin()
        self._remove_hooks()
        while self._stopped:
            self._stopped.pop().parameter.requires_grad_(True)

    @torch.no_grad()
    def pin(self, *, written_only: bool = False) -> None:
        """Put frozen rows back, whoever moved them: averaging or clamping callbacks write past the optimizer.

        Args:
            written_only: only where torch has counted a write since the last time; writes to ``.data`` it doesn't.
        """
        for rows in self._rows.values():
            if not written_only or sharding.writes(rows.parameter) != rows.pinned_writes:
                rows.pin()
        for unread in self.unread.values():
            unread.pin(written_only=written_only)

    @torch.no_grad()
    def audit(self) -> None:
        """Put frozen rows back where anybody has written; look at the others, whether they are where they should be.

        Those that are not, though torch has counted no write, are put back after every step from then on.
        """
        moved = []
        for name, rows in self._rows.items():
            if rows.frozen is None or rows.still is None or sharding.writes(rows.parameter) != rows.pinned_writes:
                rows.pin()
            elif not rows.frozen.is_at(rows.parameter, rows.pinned):
                moved.append(name)
                rows.still = None
                rows.pin()
        if moved:
            rank_zero_warn(
                f"{', '.join(moved)}: frozen rows were moved without a write that torch counts, as those to .data are: "
                "they are put back, and from here on after every step, whose forward may have seen them moved"
            )

    def free_rows(self, parameter: Tensor) -> Tensor | None:
        """As `communication.FreeRows`: rows whose gradients are not masked now."""
        rows = self._held.get(parameter)
        return None if rows is None else rows.free

    def forget_curvature(self) -> None:
        """What LBFGS has seen of a network of which less will speak, and with another head, throws it far off."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.state.clear()

    def forget_failed_step(self) -> None:
        """After an exception in a step that somebody caught: its second hook never ran."""
        self._nested_steps = 0

    def _spare_gradients(self) -> None:
        """Let layers not even work out the gradients that are masked, where that can be done and pays."""
        for name, rows in self._rows.items() if not sharding.is_sharded(self._module) else ():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and rows.factor.ndim > 0:
                found = layer_rows.learning(self._module.get_submodule(layer), rows.factor == 0)
                if found is not None:
                    rows.learn, handle = found
                    self._handles.append(handle)

    def _remove_hooks(self) -> None:
        self._nested_steps = self._steps = 0
        self._clear_moments()
        self._moments.clear()
        self._optimizers.clear()
        self._groups.clear()
        self._held.clear()
        while self._handles:
            self._handles.pop().remove()

    # An optimizer whose step calls its base's runs these hooks once for each.

    @torch.no_grad()
    def _before_step(self, *args: object) -> None:
        if self._nested_steps == 0:
            for rows in self._rows.values():
                rows.remember()
        self._nested_steps += 1

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *args: object) -> None:
        self._nested_steps -= 1
        self._steps += 1
        for unread in self.unread.values():
            unread.note()
            unread.pin()
        groups = self._groups[id(optimizer)]()
        for rows in self._rows.values():
            if not rows.was_left_alone(optimizer, groups.get(rows.parameter)):
                rows.pin()
        for parameter, moments in self._moments.items():
            if parameter in groups:
                moments.fill(optimizer, groups[parameter])
        if self._steps & (self._steps - 1) == 0:
            self.audit()
        if self._nested_steps == 0:
            for rows in self._rows.values():
                rows.slow_down()

    def _clear_moments(self, *args: object) -> None:
        for moments in self._moments.values():
            moments.clear()


def _rows(module: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, HeldRows]:
    sharding.reshard(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        name: HeldRows(
            parameters[name],
            factor,
            is_transposed=is_transposed(module.get_submodule(name.rpartition(".")[0])),
        )
        for name, factor in factors.items()
        if (factor != 1).any()
    }


def factor_of(option: ElasticityOption, module_name: str, default: float) -> float:
    """What an elasticity is in a module."""
    if not isinstance(option, Mapping):
        return float(option)
    return next((float(factor) for glob, factor in option.items() if fnmatchcase(module_name, glob)), default)

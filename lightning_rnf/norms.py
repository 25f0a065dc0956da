"""Running statistics of norms: estimated anew for a sub-network, held for frozen channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_rnf.ranks import ALONE, Ranks
from lightning_rnf.state import FreezeState

NormStatistics = Literal["per_task", "pinned", "shared"]
"""``"per_task"``: recall brings back the statistics of a task's end. ``"pinned"``: besides, frozen channels normalise
with their stored statistics in training, too. ``"shared"``: later tasks move them, and recall is not exact."""


def with_statistics(module: nn.Module, buffers: Iterable[str]) -> dict[str, nn.Module]:
    """The norms that keep running statistics among the owners of these buffers, by name."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in buffers)
    norms = {name: module.get_submodule(name) for name in owners}
    return {name: norm for name, norm in norms.items() if isinstance(norm, _NormBase) and norm.running_mean is not None}


@contextmanager
def recalibrated(norms: Iterable[nn.Module], run: Callable[[], None], ranks: Ranks = ALONE) -> Iterator[None]:
    """Inside the context the statistics are estimated anew: the mean over the batches that ``run`` sends through.

    The statistics of a whole network are wrong for its sub-network, whose silent units shift and shrink what the next
    layers get. A norm that no batch reaches keeps its own.

    Args:
        norms: with running statistics.
        run: runs the network, in eval mode but for these norms, on batches of more than one sample.
        ranks: over whose batches the mean is taken, each batch by its own statistics: a synchronised norm does not
            synchronise here.
    """
    buffers = [(norm, buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    @torch.no_grad()
    def put_back(only_unseen: bool) -> None:
        unseen = {norm for norm, _, _ in buffers if not int(norm.get_buffer("num_batches_tracked"))}
        for norm, buffer, before in buffers:
            if not only_unseen or norm in unseen:
                buffer.copy_(before)

    try:
        with ExitStack() as flags:
            for norm in {norm for norm, _, _ in buffers}:
                assert isinstance(norm, _NormBase)
                flags.callback(norm.__dict__.update, training=norm.training, momentum=norm.momentum)
                if isinstance(norm, nn.SyncBatchNorm):
                    flags.enter_context(_unsynchronised(norm))
                norm.reset_running_stats()
                norm.training, norm.momentum = True, None  # None: the mean over batches, each with the same weight
            with torch.no_grad():
                ranks.agreed(run)
                _average(buffers, ranks)
        put_back(only_unseen=True)
        yield
    finally:
        put_back(only_unseen=False)


def _average(buffers: Iterable[tuple[nn.Module, Tensor, Tensor]], ranks: Ranks) -> None:
    """The mean over the batches of all ranks: how many each norm has seen may differ."""
    if ranks.size == 1:
        return
    own = [(int(norm.get_buffer("num_batches_tracked")), buffer.double().cpu()) for norm, buffer, _ in buffers]
    for (_, buffer, _), shares in zip(buffers, zip(*ranks.gather(own), strict=True), strict=True):
        batches = sum(seen for seen, _ in shares)
        if buffer.is_floating_point() and batches:
            buffer.copy_(sum(seen / batches * value for seen, value in shares))
        else:
            buffer.fill_(batches)  # how many were tracked


@contextmanager
def _unsynchronised(norm: nn.SyncBatchNorm) -> Iterator[None]:
    """Ranks may have unequal numbers of batches: a norm that waits for the others' would wait for ever."""
    own = norm.__dict__.get("forward")
    norm.forward = partial(_BatchNorm.forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del norm.__dict__["forward"]
        if own is not None:
            norm.__dict__["forward"] = own


def frozen_channels(state: FreezeState, module: nn.Module) -> dict[str, Tensor]:
    """Which channels of each norm with running statistics belong to finished tasks: bool ``(channels,)`` by name.

    Those of frozen units; and all channels of a norm that belongs to no unit layer, since it is frozen whole.
    """
    of_units = {layer.norm: state.frozen()[layer.name] for layer in state.layers if layer.norm}
    ran = [name for record in state.tasks.values() for name in record.norm_statistics]
    return {
        name: of_units.get(name, torch.ones(len(norm.get_buffer("running_mean")), dtype=torch.bool))
        for name, norm in with_statistics(module, ran).items()
    }


@contextmanager
def pinned(module: nn.Module, channels: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context these channels normalise with the statistics that they have now, in training mode, too.

    Args:
        module: the model, on its device.
        channels: bool ``(channels,)`` by name of a norm with running statistics.
    """
    with ExitStack() as hooks:
        for name, chosen in channels.items():
            norm = module.get_submodule(name)
            if chosen.any():
                hooks.callback(norm.register_forward_hook(_Pinned(norm, chosen)).remove)
        yield


class _Pinned:
    """A forward hook that puts back a norm's statistics, and its output with them, for some channels."""

    def __init__(self, norm: nn.Module, channels: Tensor) -> None:
        assert isinstance(norm, _NormBase)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.channels = channels.to(norm.running_mean.device)
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def __call__(self, norm: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not norm.training:
            return None
        for buffer, stored in ((norm.running_mean, self.mean), (norm.running_var, self.var)):
            # Through .data: backward counts writes to the buffers, though in training mode it doesn't read them.
            buffer.data.copy_(torch.where(self.channels, stored, buffer.data))
        stored = nn.functional.batch_norm(
            args[0], self.mean, self.var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
        return torch.where(self.channels.view(-1, *[1] * (output.ndim - 2)), stored, output)

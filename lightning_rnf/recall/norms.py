"""Running statistics of norms: estimated anew for a sub-network, held for silent channels, pinned for frozen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_rnf.anatomy import torch_class
from lightning_rnf.memory import FreezeState
from lightning_rnf.runtime import ALONE, Ranks

NormStatistics = Literal["per_task", "pinned", "shared"]
"""``"per_task"``: recall brings back the statistics of a task's end. ``"pinned"``: besides, frozen channels normalise
with their stored statistics in training, too. ``"shared"``: later tasks move them, and recall is not exact."""

NormParameters = Literal["per_task", "frozen"]
"""``"per_task"``: recall brings back scale and shift of norms of a task's end, too. ``"frozen"``: they are frozen with
their units, and whole where they belong to none."""

CONSTANT = 2e-6
"""Of a channel's mean: a standard deviation up to this, some roundings of single precision, is none."""

OF_CONSTANTS = 1e30
"""The variance of a channel that is always the same: its norm says the shift alone, whatever it hears.

With a variance of 0 it would multiply by ``eps ** -0.5``, 316, what a constant differs from its own mean by rounding.
Where norms follow one another (the identity branches of RepVGG) nothing is left but that after a few of them, and it is
another one on another device, in another precision or batch. Not infinite: an average of such a model with another one
would be NaN. In half precision it is the largest number there is.
"""


def with_statistics(module: nn.Module, buffers: Iterable[str]) -> dict[str, nn.Module]:
    """The norms that keep running statistics among the owners of these buffers, by name."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in buffers)
    norms = {name: module.get_submodule(name) for name in owners}
    return {name: norm for name, norm in norms.items() if isinstance(norm, _NormBase) and norm.running_mean is not None}


@contextmanager
def recalibrated(norms: Iterable[nn.Module], run: Callable[[], None], ranks: Ranks = ALONE) -> Iterator[None]:
    """Inside the context the statistics are estimated anew: the mean over the batches that ``run`` sends through.

    The statistics of a whole network are wrong for its sub-network, whose silent units shift and shrink what the next
    layers get. A norm that no batch reaches keeps its own. Sums are in double precision, so that in whatever order and
    shares batches come the mean is the same. A channel that is the same in all samples has `OF_CONSTANTS`.

    Args:
        norms: with running statistics.
        run: runs the network, in eval mode but for these norms, on batches of more than one sample. Of several ranks
            it raises in all if it raises in one.
        ranks: over whose batches the mean is taken, each batch by its own statistics: a synchronised norm does not
            synchronise here.
    """
    unique = dict.fromkeys(norms)
    before = {norm: [buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in unique}
    sums = {norm: _Sums() for norm in unique}

    @torch.no_grad()
    def put_back(norm: nn.Module) -> None:
        for buffer, value in zip(norm.buffers(recurse=False), before[norm], strict=True):
            buffer.copy_(value)

    try:
        with ExitStack() as flags:
            for norm in unique:
                assert isinstance(norm, _NormBase)
                flags.callback(norm.__dict__.update, training=norm.training, momentum=norm.momentum)
                if isinstance(norm, nn.SyncBatchNorm):
                    flags.enter_context(_unsynchronised(norm))
                norm.reset_running_stats()
                norm.training, norm.momentum = True, 1.0  # what runs is the last batch's
                flags.callback(norm.register_forward_hook(sums[norm].add).remove)
            with torch.no_grad():
                run()
        of_ranks = ranks.gather([one.cpu() for one in sums.values()])
        for norm, shares in zip(unique, zip(*of_ranks, strict=True), strict=True):
            if any(share.batches for share in shares):
                reduce(_Sums.joined, shares).write(norm)
            else:
                put_back(norm)
        yield
    finally:
        for norm in unique:
            put_back(norm)


@contextmanager
def of_batch(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the context they normalise with the statistics of each batch, and keep their own."""
    with ExitStack() as undo:
        for norm in dict.fromkeys(norms):
            assert isinstance(norm, _NormBase)
            undo.callback(norm.__dict__.update, training=norm.training)
            for buffer in norm.buffers(recurse=False):
                undo.callback(buffer.copy_, buffer.clone())
            if isinstance(norm, nn.SyncBatchNorm):
                undo.enter_context(_unsynchronised(norm))
            norm.training = True
        yield


@dataclass
class _Sums:
    """Of a norm's statistics over batches, each with the same weight."""

    batches: int = 0
    mean: Tensor | float = 0.0
    var: Tensor | float = 0.0

    def add(self, norm: nn.Module, args: Any, output: Any) -> None:
        """A forward hook, of a norm whose running statistics are the batch's."""
        mean, var = (_wide(norm.get_buffer(name)) for name in ("running_mean", "running_var"))
        self.batches, self.mean, self.var = self.batches + 1, self.mean + mean, self.var + var

    def cpu(self) -> _Sums:
        return _Sums(self.batches, *(torch.as_tensor(one).cpu() for one in (self.mean, self.var)))

    def joined(self, other: _Sums) -> _Sums:
        return _Sums(self.batches + other.batches, self.mean + other.mean, self.var + other.var)

    @torch.no_grad()
    def write(self, norm: nn.Module) -> None:
        """Give a norm the means."""
        mean, var = (torch.as_tensor(one / self.batches) for one in (self.mean, self.var))
        own = norm.get_buffer("running_var")
        rounding = max(CONSTANT, torch.finfo(own.dtype).eps) * mean.abs()
        norm.get_buffer("running_mean").copy_(mean)
        own.copy_(var.masked_fill(var <= rounding**2, _of_constants(own)))
        norm.get_buffer("num_batches_tracked").fill_(self.batches)


def _of_constants(like: Tensor) -> float:
    """`OF_CONSTANTS`, as a tensor of variances can hold it."""
    return min(OF_CONSTANTS, torch.finfo(like.dtype).max)


def _wide(values: Tensor) -> Tensor:
    return (values.cpu() if values.device.type == "mps" else values).double()  # it has no float64


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


@dataclass(frozen=True, eq=False)
class Stored:
    """Statistics of some channels of a norm.

    Attributes:
        channels: bool ``(channels,)``: which.
        mean: ``(channels,)``; of use where they are chosen.
        var: the same.
    """

    channels: Tensor
    mean: Tensor
    var: Tensor


def stored(state: FreezeState, module: nn.Module) -> dict[str, Stored]:
    """The statistics with which finished tasks are recalled, of the channels that belong to them, by norm.

    A unit's are those of the first task that it is relevant to. A norm that belongs to no unit layer is frozen whole,
    and all its channels are the first task's, but for those that said the same in all of its data: with their
    statistics no later task could say anything through them.
    """
    found: dict[str, Stored] = {}
    layer_of = {layer.norm: layer.name for layer in state.layers if layer.norm}
    for record in state.tasks.values():
        for name in with_statistics(module, record.norm_statistics):
            mean, var = (record.norm_statistics[f"{name}.{key}"] for key in ("running_mean", "running_var"))
            own = record.relevant[layer_of[name]] if name in layer_of else torch.ones(len(mean), dtype=torch.bool)
            own = own & (var < _of_constants(var) / 2).cpu()
            if name in found:
                before = found[name]
                mean, var = (
                    torch.where(before.channels, before.mean, mean),
                    torch.where(before.channels, before.var, var),
                )
                own = own | before.channels
            found[name] = Stored(own, mean, var)
    return found


@contextmanager
def pinned(module: nn.Module, statistics: Mapping[str, Stored]) -> Iterator[None]:
    """Inside the context these channels have these statistics, and normalise with them in training mode, too.

    Args:
        module: the model, on its device.
        statistics: by name of a norm with running statistics.
    """
    with ExitStack() as hooks:
        for name, own in statistics.items():
            norm = module.get_submodule(name)
            if own.channels.any():
                pin = _Pinned(norm, own)
                pin.put_back(norm)
                # Before all other hooks: after FSDP's the norm's weight is not whole any more.
                hooks.callback(norm.register_forward_hook(pin, prepend=True).remove)
        yield


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside the context a channel that is the same in a whole batch leaves its statistics as they are.

    Silent units are such channels, and so is what is made of them alone. Their variance would fall to 0, and when the
    units speak again their norm would multiply by ``eps ** -0.5``: layer upon layer that overflows.

    Args:
        module: the model, on its device.
    """
    with ExitStack() as hooks:
        for norm in module.modules():
            if isinstance(norm, _NormBase) and norm.running_mean is not None:
                hold = _Held()
                hooks.callback(norm.register_forward_pre_hook(hold.note).remove)
                hooks.callback(norm.register_forward_hook(hold, prepend=True, with_kwargs=True).remove)
        yield


class _Held:
    """Two hooks around a norm's forward: note its statistics, and put those of constant channels back."""

    def note(self, norm: Any, args: tuple[Tensor, ...]) -> None:
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def __call__(self, norm: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        (x,) = (*args, *kwargs.values())
        if norm.training and x.ndim > 1 and x.shape[1] == len(self.mean):  # instance norms take a single sample, too
            others = [axis for axis in range(x.ndim) if axis != 1]
            _put_back(norm, x.detach().amax(others) == x.detach().amin(others), self.mean, self.var)


class _Pinned:
    """A forward hook that puts back a norm's statistics for some channels, and their output as it is with those."""

    def __init__(self, norm: nn.Module, own: Stored) -> None:
        like = norm.get_buffer("running_mean")
        self.channels = own.channels.to(like.device)
        self.mean, self.var = own.mean.to(like), own.var.to(like)

    def put_back(self, norm: Any) -> None:
        _put_back(norm, self.channels, self.mean, self.var)

    def __call__(self, norm: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not norm.training:
            return None
        self.put_back(norm)
        if torch_class(norm) is nn.Module:  # a forward of its own may go on with an activation
            norm.training = False
            try:
                as_stored = norm.forward(args[0])
            finally:
                norm.training = True
        else:
            as_stored = nn.functional.batch_norm(
                args[0], self.mean, self.var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        return torch.where(self.channels.view(-1, *[1] * (output.ndim - 2)), as_stored, output)


def _put_back(norm: Any, channels: Tensor, mean: Tensor, var: Tensor) -> None:
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
        # Through .data: backward counts writes to the buffers, though in training mode it doesn't read them.
        buffer.data.copy_(torch.where(channels, value, buffer.data))

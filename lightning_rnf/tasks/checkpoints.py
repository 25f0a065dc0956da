"""Finished tasks in Lightning's checkpoints: a file of its own for every task that ends, and what files say."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.freezing import heard
from lightning_rnf.memory import Audit, FreezeState
from lightning_rnf.packages import LightningModule, Trainer, callbacks, either
from lightning_rnf.tasks import widening

_KEY = "RelevanceFreezing"
_LONGEST = 200  # bytes of a task's name in a file's, of which file systems allow 255


def keep(trainer: Trainer, task: str) -> str | None:
    """Save a task that has just ended, where the Trainer saves checkpoints at all; every rank has to call it.

    ``ModelCheckpoint`` has saved before: its files know nothing of the task. So ``<task>-ended.ckpt`` is written beside
    them, and ``last.ckpt``, where it is asked for, again. Those of certain epochs (the best, say) stay as they are:
    they hold other weights than those that were attributed.

    Returns:
        The path of the first of them; None: nothing is saved.
    """
    savers = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, either(callbacks.ModelCheckpoint))
        and callback.dirpath
        and (callback.save_top_k != 0 or callback.save_last)
    ]
    if not savers:
        return None
    path = os.path.join(str(savers[0].dirpath), file_name(task))
    for each in dict.fromkeys([path, *(saver.last_model_path for saver in savers if saver.last_model_path)]):
        trainer.save_checkpoint(each)
    return path


def file_name(task: str) -> str:
    """Of the checkpoint of a task's end: the task's name, without what no file system likes, and not too long for one.

    >>> file_name("digits 0/1")
    'digits_0_1-ended.ckpt'
    """
    name = re.sub(r"[^\w.=+-]+", "_", task)
    if len(name.encode()) > _LONGEST:
        told_apart = hashlib.sha256(task.encode(errors="surrogatepass")).hexdigest()[:8]
        name = f"{name.encode()[:_LONGEST].decode(errors='ignore')}-{told_apart}"
    return f"{name}-ended.ckpt"


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of Lightning, on the CPU. Nothing in it can run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none, is cut off, or holds more than tensors and plain values.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {os.fspath(path)!r}")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of a stranger makes of the reader
        said = " ".join(str(error).split()).partition(". ")[0]  # torch goes on with advice that doesn't hold here
        raise ValueError(
            f"{os.fspath(path)!r} can't be read: it is cut off, or no checkpoint, or holds more than tensors and plain "
            f"values ({type(error).__name__}{said and ': '}{said:.120})"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"{os.fspath(path)!r} is no checkpoint of Lightning: it has no 'state_dict'")
    return found


def finished_tasks(checkpoint: Mapping[str, Any]) -> FreezeState:
    """The finished tasks in a checkpoint that was `read`.

    Raises:
        ValueError: if there are none of ours, or they are of a newer version, or damaged.
    """
    if not has_finished_tasks(checkpoint):
        raise ValueError("the checkpoint has no finished tasks: it was saved without RelevanceFreezing")
    return FreezeState.from_plain(checkpoint["callbacks"][_KEY])


def has_finished_tasks(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved with `RelevanceFreezing`."""
    callbacks = checkpoint.get("callbacks")
    return isinstance(callbacks, dict) and _KEY in callbacks


def audit_of(checkpoint: Mapping[str, Any], state: FreezeState, module: nn.Module | None = None) -> Audit | None:
    """Whether frozen rows are in a checkpoint as they were at their tasks' ends; None: it lacks some of the weights.

    Args:
        checkpoint: that was `read`.
        state: its finished tasks.
        module: the model with those weights; without it nothing can be said of layers frozen by connections.

    Raises:
        ValueError: if the weights have another shape than the finished tasks'.
    """
    weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    needed = {name for layer in state.layers for name in layer.parameters}.union(state.shared, state.embeddings)
    needed.update(*(record.head_parameters for record in state.tasks.values()))
    if not needed.issubset(weights):
        return None
    state.check_parameters(weights)
    return Audit.of(weights, state, heard=None if module is None else heard(module, state))


def restore(checkpoint: dict[str, Any], module: nn.Module) -> FreezeState:
    """Give a model the weights of a checkpoint that was `read`; what it has for tasks to come stays as it is.

    Returns:
        The finished tasks in the checkpoint.

    Raises:
        ValueError: if it has none of ours, or is of another model; nothing is loaded then.
    """
    state = finished_tasks(checkpoint)
    undo = widening.follow(module, state, checkpoint["state_dict"])
    try:
        _load(checkpoint, module, state)
    except BaseException:
        undo.close()
        raise
    return state


def _load(checkpoint: dict[str, Any], module: nn.Module, state: FreezeState) -> None:
    state.check_whole(module)
    used = {name for layer in state.layers for name in layer.parameters}.union(
        state.shared, state.embeddings, state.forms
    )
    used.update(*((*record.head_parameters, *record.norm_statistics) for record in state.tasks.values()))
    check(checkpoint, module, new=set(module.state_dict()) - used)
    if isinstance(module, either(LightningModule)):
        module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)


def refuse_more_parameters(module: LightningModule) -> Callable[[], None]:
    """Say what to do where ``fit(ckpt_path=...)`` is about to restore a model that has heads which the file lacks.

    Returns:
        What ends the watch for it.
    """

    def check_keys(module: Any, state_dict: Mapping[str, Any], *of_torch: Any) -> None:
        path = module.trainer.ckpt_path
        if not path or not module.strict_loading:  # a load of the user's own, or of what the user has left in the file
            return
        own = module.state_dict()
        new = [name for name in own if name not in state_dict]
        owners = {name.rpartition(".")[0] for name in own if name in state_dict}
        if new and owners.isdisjoint(name.rpartition(".")[0] for name in new):
            raise ValueError(
                f"{os.fspath(path)!r} lacks {', '.join(new[:4])}, which this model has. fit(ckpt_path=...) goes on "
                "with a fit of the very same parameters, optimizer included; to add a task and its head to finished "
                "ones, call rnf.restore(path, model) and then fit without ckpt_path"
            )

    handle: Any = module.register_load_state_dict_pre_hook(check_keys)  # type: ignore[no-untyped-call]
    remove: Callable[[], None] = handle.remove
    return remove


def widen_to(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Widen a model of the original sizes as that of a checkpoint was; any other stays as it is."""
    if has_finished_tasks(checkpoint):
        widening.follow(module, finished_tasks(checkpoint), checkpoint["state_dict"])


def widen_for(module: LightningModule) -> Callable[[], None]:
    """Widen a model of the original sizes where the Trainer is about to load weights of a wider one (``ckpt_path=``).

    Returns:
        What ends the watch for it.
    """

    def follow(module: Any, state_dict: Mapping[str, Any], *of_torch: Any) -> None:
        # Callbacks get their part of a checkpoint after the weights, so it is looked for where the Trainer keeps it.
        connector = getattr(module.trainer, "_checkpoint_connector", None)
        loaded: Any = getattr(connector, "_loaded_checkpoint", None)
        if isinstance(loaded, dict) and has_finished_tasks(loaded):
            widening.follow(module, finished_tasks(loaded), state_dict)

    handle: Any = module.register_load_state_dict_pre_hook(follow)  # type: ignore[no-untyped-call]
    remove: Callable[[], None] = handle.remove
    return remove


def check(checkpoint: Mapping[str, Any], module: nn.Module, new: Container[str] = ()) -> None:
    """Check that a checkpoint's weights are those of a model, before anything is done to it.

    Args:
        checkpoint: that was `read`.
        module: the model.
        new: names of parameters and buffers that the checkpoint may lack.

    Raises:
        ValueError: naming a parameter or buffer that only one of them has, or that has another shape.
    """
    saved, own = checkpoint["state_dict"], module.state_dict()
    saved = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (saved, own)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        in_file, in_model = (str(one[name]) if name in one else "missing" for one in shapes)
        if in_file != in_model and not (name in new and name not in saved):
            raise ValueError(
                f"the checkpoint is of another model: {name!r} is {in_file} in it, and {in_model} in this one"
            )

"""At least single precision for relevance, whatever a model is stored in and its forward casts to."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_rnf.anatomy import Predict

_HALF = (torch.float16, torch.bfloat16)


class UnreachableError(ValueError):
    """Raised where relevance can't reach a layer: no matter of precision."""


class SinglePrecision(TorchFunctionMode):
    """Inside the context a borrowed module, what its forward casts to half precision, and autocast are in single.

    Half precision is too coarse to propagate relevance in. Parameters and buffers of half precision are replaced;
    those of others stay as they are, so a model of several dtypes goes on casting between them as it does. A dtype of
    half precision that the forward names, or a new tensor's, is read as single, and so is that of an autocast.

    Args:
        module: a borrowed one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._widened = False
        self._around = ExitStack()
        self._device = next(module.parameters()).device.type

    def __enter__(self) -> SinglePrecision:
        """From here on."""
        self._widen()
        default = torch.get_default_dtype()
        if default in _HALF:  # of tensors that the forward makes
            self._widened = True
            self._around.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        self._around.enter_context(torch.autocast(self._device, enabled=False))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """No longer."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._around.close()

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of ``function``."""
        options = dict(kwargs or {})
        if function is not Tensor.view:  # which reads bits as another dtype
            args = [self._dtype(argument) for argument in args]
            options = {key: self._dtype(argument) for key, argument in options.items()}
        if function in (Tensor.half, Tensor.bfloat16):
            function, self._widened = Tensor.float, True
        if not torch.is_autocast_enabled(self._device):
            return function(*args, **options)
        self._widened = True
        with torch.autocast(self._device, enabled=False):
            return function(*args, **options)

    def batch(self, batch: Any) -> Any:
        """A batch, in at least single precision."""
        return apply_to_collection(batch, Tensor, self._wide, allow_frozen=True)

    def predicting(self, predict: Predict) -> Predict:
        """``predict``, with a sentence where it fails because of this."""

        def predicted(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            try:
                return predict(module, batch)
            except (UnreachableError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if not self._widened:
                    raise
                raise ValueError(
                    f"relevance is propagated in single precision, and {self._place(error)} insists on half precision "
                    f"({type(error).__name__}: {' '.join(str(error).split())}): let it take the dtype of its input or "
                    "of its weight, or choose another importance= that runs no gradients ('magnitude')"
                ) from error

        return predicted

    def _dtype(self, argument: Any) -> Any:
        if type(argument) is torch.dtype and argument in _HALF:
            self._widened = True
            return torch.float32
        return argument

    def _wide(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _HALF:
            return tensor
        self._widened = True
        return tensor.float()

    def _widen(self) -> None:
        # Other tensors in the old ones' places: new data in the same ones would cut off DDP's hooks.
        for submodule in self._module.modules():
            if vars(submodule).get("_dtype") in _HALF:
                vars(submodule)["_dtype"] = torch.float32  # a LightningModule's own, which its forward may ask for
            for name, parameter in submodule._parameters.items():
                if parameter is not None and parameter.dtype in _HALF:
                    submodule._parameters[name] = nn.Parameter(self._wide(parameter.detach()), requires_grad=False)
            for name, buffer in submodule._buffers.items():
                if buffer is not None:
                    submodule._buffers[name] = self._wide(buffer)

    def _place(self, error: BaseException) -> str:
        """The innermost of the model's modules that was running when it failed."""
        names = {id(submodule): name for name, submodule in self._module.named_modules()}
        owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        found = [owner for owner in owners if id(owner) in names]
        if not found:
            return "predict"
        name, kind = names[id(found[-1])], type(found[-1]).__name__
        return f"the forward of {name!r} ({kind})" if name else f"the forward of {kind}"

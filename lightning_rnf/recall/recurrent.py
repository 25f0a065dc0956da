"""Recurrent layers of which only some hidden units speak, while their kernels, fused or not, do what they always do.

No hook reaches what a kernel computes between two steps. But a unit whose rows are zero is silent by itself: its
candidate is ``tanh(0)``, so from a state of zero an LSTM's cell state is ``f · 0 + i · 0`` and its output
``o · tanh(0)``, a GRU's ``(1 - z) · 0 + z · 0`` and a simple layer's ``tanh(0)``: exactly 0 in every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_rnf.anatomy import Cells, UnitLayer, parameter_names

SHUT = -1e4
"""A gate with this for its bias, and zeros for its weights, is exactly 0: ``1 / (1 + exp(1e4))``, in any precision."""

_FORGETTING = {4: 1, 3: 1}  # by number of gates, which of them lets the last state through: forget gate, update gate


@contextmanager
def silent_cells(module: nn.Module, layer: UnitLayer, relevant: Tensor) -> Iterator[None]:
    """Inside the context the hidden units of a recurrent layer that are not relevant are zero in every step.

    Its parameters stay as they are: it runs with copies in which the rows of silent units are zero, and the columns
    that read them, so that what a later task has made of these, NaN too, is not heard. Initial states that are given
    are zero for silent units. With gradients, the rest of the parameters gets those.

    Args:
        module: the recurrent layer.
        layer: its units.
        relevant: bool ``(units,)``.
    """
    own: Any = module
    assert layer.cells is not None
    cells, before = layer.cells, vars(own).get("forward")
    names = parameter_names(own)
    silent = ~relevant.to(own.get_parameter(names[0]).device)

    def forward(input: Any, hx: Any = None) -> Any:
        nonlocal silent
        weights = [getattr(own, name) for name in names]
        silent = silent.to(weights[0].device)
        # Another object with the same attributes: whoever else runs the module meanwhile meets its own weights.
        twin: Any = object.__new__(type(own))
        vars(twin).update(vars(own))
        vars(twin).pop("forward", None)
        twin._flat_weights = [
            _without(cells, name, weight, silent) for name, weight in zip(names, weights, strict=True)
        ]
        if not torch.is_grad_enabled():
            twin.flatten_parameters()  # of the copies: in one piece, as cuDNN wants them
        given = apply_to_collection(hx, Tensor, lambda state: _masked_state(cells, state, silent))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
            return type(own).forward(twin, input, given)

    own.forward = forward
    try:
        yield
    finally:
        del own.forward
        if before is not None:  # of a recall around this one
            own.forward = before


@torch.no_grad()
def zeroed_cells(parameter: Callable[[str], Any], layer: UnitLayer, silent: Tensor) -> bool:
    """Zero the rows of silent units in copies of a recurrent layer's parameters, and the columns that read them.

    Where there are biases the gate that would let the last state through is shut, so that silent units are zero from
    the first step on whatever initial state is given.

    Args:
        parameter: a copy by its full name; None: there is none.
        layer: of units.
        silent: bool ``(units,)``.

    Returns:
        False if there are no such copies, and nothing was changed.
    """
    cells = layer.cells
    assert cells is not None
    copies = {name: parameter(name) for name in layer.parameters}
    if any(value is None for value in copies.values()):
        return False
    for name, value in copies.items():
        mute = silent.to(value.device)
        value.copy_(_without(cells, name, value, mute))
        gate = _FORGETTING.get(cells.gates)
        if gate is not None and name.rpartition(".")[2].startswith("bias_ih"):
            rows = cells.spread(name, mute)
            hidden = len(rows) // cells.gates
            value[gate * hidden : (gate + 1) * hidden][rows[:hidden]] = SHUT
    return True


def _without(cells: Cells, name: str, weight: Tensor, silent: Tensor) -> Tensor:
    """A parameter in which silent units' rows are zero, and the columns that read them."""
    rows, columns = cells.spread(name, silent), cells.heard(name, silent)
    chosen = rows.view(-1, *[1] * (weight.ndim - 1))
    return torch.where(chosen if columns is None else chosen | columns, 0.0, weight)  # filled: 0 · NaN is NaN


def _masked_state(cells: Cells, state: Tensor, silent: Tensor) -> Tensor:
    """An initial state ``(cells, N, hidden)`` or ``(cells, hidden)`` in which silent units are zero."""
    mask = silent.view(cells.count, *[1] * (state.ndim - 2), -1)
    return torch.where(mask, 0.0, state)

"""Recurrent layers of torch: their hidden units, and which rows of which parameters belong to each.

A module of ``layers`` layers and ``directions`` directions has as many cells. Cell ``layer · directions + direction``
has ``hidden`` units, and its parameters (``weight_ih_l0``, ``bias_hh_l1_reverse``, …) have ``gates · hidden`` rows:
unit ``j`` of the cell owns the rows ``gate · hidden + j`` of each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

RECURRENT: dict[type[nn.RNNBase], int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
"""Recurrent layers of torch and their gates: blocks of rows in each parameter. An LSTM's are input, forget, cell and
output, a GRU's reset, update and new."""

_CELL = re.compile(r"_l(\d+)(_reverse)?$")


@dataclass(frozen=True)
class Cells:
    """What a recurrent layer's parameters look like.

    Attributes:
        gates: blocks of rows in each parameter.
        layers: stacked in the module.
        directions: 2 where a layer is bidirectional.
    """

    gates: int
    layers: int
    directions: int

    @property
    def count(self) -> int:
        """How many cells there are."""
        return self.layers * self.directions

    def cell_of(self, parameter: str) -> int:
        """Which cell a parameter is of, by its name.

        Raises:
            ValueError: if it has no name that torch gives.
        """
        found = _CELL.search(parameter)
        index = -1 if found is None else int(found[1]) * self.directions + (found[2] is not None)
        if not 0 <= index < self.count or (self.directions == 1 and found is not None and found[2] is not None):
            raise ValueError(f"{parameter!r:.80} is of none of the {self.count} cells of a recurrent layer")
        return index

    def spread(self, parameter: str, values: Tensor) -> Tensor:
        """Give each row of a parameter the value of the unit that it belongs to.

        Args:
            parameter: its name.
            values: ``(units,)``, of all cells.

        Returns:
            ``(gates · hidden,)``.
        """
        hidden = len(values) // self.count
        cell = self.cell_of(parameter)
        return values[cell * hidden : (cell + 1) * hidden].repeat(self.gates)

    def heard(self, parameter: str, values: Tensor) -> Tensor | None:
        """Give each column of a weight the value of the unit that it reads.

        Args:
            parameter: its name.
            values: ``(units,)``, of all cells.

        Returns:
            ``(columns,)``; None if the parameter reads the module's input, or is a bias.
        """
        hidden = len(values) // self.count
        cell = self.cell_of(parameter)
        key = parameter.rpartition(".")[2]
        if key.startswith("weight_hh"):
            return values[cell * hidden : (cell + 1) * hidden]
        below = (cell // self.directions - 1) * self.directions * hidden
        if key.startswith("weight_ih") and below >= 0:
            return values[below : below + self.directions * hidden]
        return None


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is one of torch's recurrent layers, or inherits from one."""
    return isinstance(module, tuple(RECURRENT))


def cells_of(module: Any) -> Cells:
    """Of a recurrent layer."""
    gates = next(gates for kind, gates in RECURRENT.items() if isinstance(module, kind))
    return Cells(gates, module.num_layers, 2 if module.bidirectional else 1)


def hidden_units(module: Any) -> int:
    """How many units all cells of a recurrent layer have."""
    return int(cells_of(module).count * module.hidden_size)


def parameter_names(module: Any) -> list[str]:
    """A recurrent layer's own parameters, cell by cell, in the order in which torch's functions take them."""
    cells = cells_of(module)
    kinds = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())]
    return [
        f"{kind}_l{layer}{'_reverse' * direction}"
        for layer in range(cells.layers)
        for direction in range(cells.directions)
        for kind in kinds
    ]


def why_not_units(module: Any) -> str | None:
    """Why a recurrent layer's hidden units can't be told apart by their rows; None: they can."""
    kind = next(kind for kind in RECURRENT if isinstance(module, kind))
    if is_parametrized(module):
        return "is parametrized, and what its weights are computed from has no rows for its units"
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return "has a forward of its own"
    if module.proj_size > 0:
        return "projects its hidden state (proj_size), and no unit owns a channel of what comes out"
    own = [name for name, _ in module.named_parameters()]
    if sorted(own) != sorted(parameter_names(module)):
        return "has other parameters than torch's"
    return None

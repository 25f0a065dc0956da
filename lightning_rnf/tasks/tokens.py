"""Which rows of embeddings a task has read that ends: they are frozen from then on, if not each task has its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_rnf.anatomy import UnitMap
from lightning_rnf.memory import FreezeState
from lightning_rnf.runtime import Ranks


def tokens(
    module: torch.nn.Module, units: UnitMap, state: FreezeState, read: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """As `TaskRecord.tokens`, of a task that ends now.

    Args:
        module: whole.
        units: of the task.
        state: of the earlier tasks, and what the fit has changed.
        read: rows that this process has read since the training ended, bool ``(rows,)`` by the weight's name.
        ranks: each with a share of the reference data.
    """
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys((*state.embeddings, *units.embeddings)):
        rows = len(module.get_parameter(name))
        if name in units.read_whole:
            found[name] = torch.ones(rows, dtype=torch.bool)
            continue
        masks = [one[name].cpu() for one in (read, state.learned) if name in one]
        found[name] = torch.stack([torch.zeros(rows, dtype=torch.bool), *masks]).any(dim=0)
    of_ranks = ranks.gather(found)
    return {name: torch.stack([one[name] for one in of_ranks]).any(dim=0) for name in found}

"""Attention of torch's own module by its parts, so that relevance, or a gradient, is there for queries, keys, values.

Rules need nothing more: what runs are functions and a linear layer, which have theirs (see `attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rnf.anatomy import OUTPUT, ROLES, by_parts, is_attention
from lightning_rnf.relevance.ends import Ends
from lightning_rnf.relevance.precision import UnreachableError


@dataclass(eq=False)
class Projected:
    """Queries, keys and values of one run, and what has arrived at them: each ``(N, positions, width)`` by role."""

    states: dict[str, Tensor] = field(default_factory=dict)
    arrived: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, role: str, made: Tensor) -> Tensor:
        """Note what was made, and what flows back to it from all that reads it."""
        self.states[role] = made.detach()
        made.register_hook(partial(self._note, role))
        return made

    def _note(self, role: str, arrived: Tensor) -> None:
        self.arrived[role] = arrived

    def whole(self) -> tuple[Tensor, Tensor]:
        """What was made and what has arrived: ``(N, positions, units)`` each, zero where there are fewer positions."""
        longest = max(state.shape[1] for state in self.states.values())

        def put(tensors: dict[str, Tensor], role: str) -> Tensor:
            found = tensors.get(role, torch.zeros_like(self.states[role]))
            return nn.functional.pad(found, (0, 0, 0, longest - found.shape[1]))

        states, arrived = (
            torch.cat([put(tensors, role) for role in ROLES], dim=-1) for tensors in (self.states, self.arrived)
        )
        return states, arrived


def attending(
    module: Any, name: str, roots: Ends, see: Callable[[Projected], None]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A forward by its parts that notes what arrives at them.

    Args:
        module: a borrowed `nn.MultiheadAttention` that can be taken apart.
        name: of it.
        roots: gets what it reads that has no graph; relevance is to end there.
        see: called with the queries, keys and values of each run.

    Returns:
        It takes what the module takes.

    Raises:
        UnreachableError: if it runs without a graph.
    """

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            raise UnreachableError(
                f"layer {name!r} runs without a graph (torch.no_grad, reentrant checkpointing), so no relevance can "
                "reach it; leave it out of units="
            )
        ends: dict[int, Tensor] = {}  # what is read in several roles is one end
        for one in (query, key, value):
            if id(one) not in ends:
                ends[id(one)] = one if one.requires_grad else one.detach().requires_grad_()
                roots.note(ends[id(one)])
        seen = Projected()
        run = by_parts(module, seen.watch)
        result = run(*(ends[id(one)] for one in (query, key, value)), *args, **kwargs)
        see(seen)
        return result

    return forward


def take_apart(module: nn.Module, see: Mapping[str, Callable[[Projected], None]], roots: Ends) -> None:
    """For a borrowed module: attention of torch's with unit layers runs by its parts.

    Args:
        module: the model.
        see: by unit layer, what is called with the queries, keys and values of each run.
        roots: as for `attending`.
    """
    for name, part in module.named_modules():
        if is_attention(part) and name in see:
            vars(part)["forward"] = attending(part, name, roots, see[name])
        elif is_attention(part) and f"{name}.{OUTPUT}" in see:
            vars(part)["forward"] = by_parts(part)

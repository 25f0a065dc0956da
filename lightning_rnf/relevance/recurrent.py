"""Recurrent layers of torch step by step, so that relevance, or a gradient, is there for every hidden state.

Their kernels compute all steps at once, and what flows between these can't be seen. Here the same numbers are computed
one step after the other. The rules are those of Arras et al. 2017 ("Explaining Recurrent Neural Network Predictions in
Sentiment Analysis", section 3) and 2019 ("Explaining and Interpreting LSTMs"), "signal-take-all": of a product with a
gate the gate gets none, all is the signal's; what is linear or a sum is split by contribution (epsilon, equation 2 of
the paper on freezing), and biases take their share; tanh and ReLU let relevance pass. A sum is always that of one step:

- LSTM: ``c = f ⊙ c' + i ⊙ g`` between the last cell state and the candidate, ``h = o ⊙ tanh(c)`` to ``c``, and
  ``g = tanh(W x + U h' + b)`` between ``x`` and the last hidden state,
- GRU: ``h = (1 - z) ⊙ n + z ⊙ h'`` between the candidate and ``h'``, ``n = tanh(W x + b + r ⊙ (U h' + b'))`` between
  ``x`` and ``h'``,
- simple: ``h = tanh(W x + U h' + b)`` between ``x`` and ``h'``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from lightning_rnf.anatomy import cells_of
from lightning_rnf.relevance.splits import ByContribution, Call, Evenly

_State = tuple[Tensor, ...]
"""Hidden state and, of an LSTM, cell state: each ``(N, hidden)``."""


class Gradients:
    """How plain gradients flow: as torch says."""

    def gates(self) -> AbstractContextManager[Any]:
        """What gates are computed in."""
        return nullcontext()

    def shared(self, run: Callable[..., Tensor], *tensors: Tensor, biased: bool = False) -> Tensor:
        """A function that is linear in all of its tensors together, or affine (``biased``)."""
        return run(*tensors)

    def passed(self, run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """A function of one tensor, element by element."""
        return run(tensor)


class SignalTakesAll(Gradients):
    """How relevance flows: gates are constants."""

    def gates(self) -> AbstractContextManager[Any]:
        """Nothing flows through gates."""
        return torch.no_grad()

    def shared(self, run: Callable[..., Tensor], *tensors: Tensor, biased: bool = False) -> Tensor:
        """By contribution."""
        result: Tensor = ByContribution.apply(Call(run, biased=biased), *tensors)
        return result

    def passed(self, run: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """All of it."""
        result: Tensor = Evenly.apply(Call(run), tensor)
        return result


GRADIENTS = Gradients()


@dataclass(eq=False)
class Seen:
    """Hidden states of one run, and what has arrived at them.

    Attributes:
        states: by cell and step ``(samples, hidden)``; of packed sequences later steps have fewer samples.
        arrived: as many, by cell and step; where nothing has arrived there is none.
    """

    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    arrived: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def watch(self, cell: int, step: int, hidden: Tensor) -> None:
        """Note a hidden state, and what flows back to it from all that reads it."""
        self.states[cell, step] = hidden.detach()
        if hidden.requires_grad:
            hidden.register_hook(partial(self._note, (cell, step)))

    def _note(self, place: tuple[int, int], arrived: Tensor) -> None:
        self.arrived[place] = arrived

    def whole(self) -> tuple[Tensor, Tensor]:
        """States and what has arrived at them: ``(N, steps, units)`` each, zero where a sequence has ended."""
        cells, steps = (1 + max(places) for places in zip(*self.states, strict=True))
        samples = max(len(state) for state in self.states.values())

        def put(tensors: dict[tuple[int, int], Tensor], cell: int, step: int) -> Tensor:
            state = self.states[cell, step]
            found = tensors.get((cell, step))
            found = torch.zeros_like(state) if found is None else found
            return nn.functional.pad(found, (0, 0, 0, samples - len(state)))

        both = (
            torch.cat([torch.stack([put(one, cell, t) for t in range(steps)], dim=1) for cell in range(cells)], dim=-1)
            for one in (self.states, self.arrived)
        )
        first, second = both
        return first, second


def unrolled(
    module: Any, flow: Gradients, see: Callable[[Seen], None] = lambda seen: None
) -> Callable[..., tuple[Any, Any]]:
    """A forward that computes what a recurrent layer does in eval mode, step by step in functions that have a graph.

    Args:
        module: a ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` without projection, whose own forward is not called.
        flow: what flows back.
        see: called with the hidden states of each run.

    Returns:
        It takes ``(T, N, features)``, ``(N, T, features)``, ``(T, features)`` or a packed sequence, and an initial
        state or None, and returns output and last state as the layer does.
    """

    def forward(input: Any, hx: Any = None) -> tuple[Any, Any]:
        steps, packed, batched = _steps(module, input)
        given = _initial(module, steps, hx, packed, batched=batched)
        seen = Seen()
        said, last = _run(module, flow, steps, given, seen)
        see(seen)
        final = tuple(torch.stack(states) for states in zip(*last, strict=True))
        if packed is not None:
            order = packed.unsorted_indices
            final = final if order is None else tuple(state.index_select(1, order) for state in final)
            output: Any = PackedSequence(torch.cat(said), packed.batch_sizes, packed.sorted_indices, order)
        else:
            output = torch.stack(said, dim=1 if module.batch_first and batched else 0)
            if not batched:
                output, final = output.squeeze(1), tuple(state.squeeze(1) for state in final)
        return output, final if isinstance(module, nn.LSTM) else final[0]

    return forward


def _steps(module: Any, input: Any) -> tuple[list[Tensor], PackedSequence | None, bool]:
    if isinstance(input, PackedSequence):
        return list(input.data.split(input.batch_sizes.tolist())), input, True
    if input.ndim == 2:
        return list(input.unsqueeze(1).unbind(0)), None, False
    return list(input.unbind(1 if module.batch_first else 0)), None, True


def _initial(
    module: Any, steps: Sequence[Tensor], hx: Any, packed: PackedSequence | None, *, batched: bool
) -> list[_State]:
    """By cell."""
    is_lstm = isinstance(module, nn.LSTM)
    if hx is None:
        zeros = steps[0].new_zeros(len(steps[0]), module.hidden_size)
        return [(zeros, zeros) if is_lstm else (zeros,)] * cells_of(module).count
    states = tuple(hx) if is_lstm else (hx,)
    states = states if batched else tuple(state.unsqueeze(1) for state in states)
    if packed is not None and packed.sorted_indices is not None:
        states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
    return list(zip(*(state.unbind(0) for state in states), strict=True))


def _run(
    module: Any, flow: Gradients, steps: list[Tensor], given: list[_State], seen: Seen
) -> tuple[list[Tensor], list[_State]]:
    """What the last layer says in each step, and the last state of each cell."""
    cells, last = cells_of(module), list[_State]()
    for layer in range(cells.layers):
        directions = []
        for direction in range(cells.directions):
            cell, order = layer * cells.directions + direction, range(len(steps))
            one = _cell(module, flow, f"_l{layer}{'_reverse' * direction}")
            said, state = _along(one, steps, given[cell], order[::-1] if direction else order)
            for step, hidden in enumerate(said):
                seen.watch(cell, step, hidden)
            directions.append(said)
            last.append(state)
        steps = [torch.cat(both, dim=-1) if len(both) > 1 else both[0] for both in zip(*directions, strict=True)]
    return steps, last


def _along(
    cell: Callable[..., _State], steps: Sequence[Tensor], given: _State, order: range
) -> tuple[list[Tensor], _State]:
    """Hidden states by step, and the last state of every sample; of packed sequences the longest come first."""
    said: dict[int, Tensor] = {}
    ended: list[_State] = []
    state = tuple(one[: len(steps[order[0]])] for one in given)
    for step in order:
        now, before = len(steps[step]), len(state[0])
        if now < before:
            ended.append(tuple(one[now:] for one in state))
            state = tuple(one[:now] for one in state)
        elif now > before:  # backwards, shorter sequences begin later
            state = tuple(torch.cat([one, first[before:now]]) for one, first in zip(state, given, strict=True))
        state = cell(steps[step], *state)
        said[step] = state[0]
    parts = zip(state, *reversed(ended), strict=True)
    return [said[step] for step in range(len(steps))], tuple(torch.cat(one) if ended else one[0] for one in parts)


def _cell(module: Any, flow: Gradients, name: str) -> Callable[..., _State]:
    """What a cell makes of its input and its last state."""
    w, u = getattr(module, f"weight_ih{name}"), getattr(module, f"weight_hh{name}")
    zeros = w.new_zeros(len(w))
    b, d = (getattr(module, f"bias_{kind}{name}") if module.bias else zeros for kind in ("ih", "hh"))
    if isinstance(module, nn.LSTM):
        return _lstm(flow, w, u, b, d)
    if isinstance(module, nn.GRU):
        return _gru(flow, w, u, b, d)
    return _simple(flow, w, u, b, d, torch.tanh if module.nonlinearity == "tanh" else torch.relu)


def _lstm(flow: Gradients, w: Tensor, u: Tensor, b: Tensor, d: Tensor) -> Callable[..., _State]:
    hidden = u.shape[1]
    candidate = slice(2 * hidden, 3 * hidden)
    biased = bool((b[candidate] + d[candidate]).any())

    def step(x: Tensor, h: Tensor, c: Tensor) -> _State:
        with flow.gates():
            i, f, _, o = (linear(x, w, b) + linear(h, u, d)).chunk(4, dim=-1)
            i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        before = flow.shared(
            lambda x, h: linear(x, w[candidate], b[candidate]) + linear(h, u[candidate], d[candidate]),
            *(x, h),
            biased=biased,
        )
        c = flow.shared(lambda c, g: f * c + i * g, c, flow.passed(torch.tanh, before))
        return flow.passed(lambda c: o * c.tanh(), c), c

    return step


def _gru(flow: Gradients, w: Tensor, u: Tensor, b: Tensor, d: Tensor) -> Callable[..., _State]:
    hidden = u.shape[1]
    gates, new = slice(2 * hidden), slice(2 * hidden, None)
    biased = bool(b[new].any() or d[new].any())

    def step(x: Tensor, h: Tensor) -> _State:
        with flow.gates():
            r, z = (linear(x, w[gates], b[gates]) + linear(h, u[gates], d[gates])).sigmoid().chunk(2, dim=-1)
        before = flow.shared(
            lambda x, h: linear(x, w[new], b[new]) + r * linear(h, u[new], d[new]), *(x, h), biased=biased
        )
        return (flow.shared(lambda n, h: (1 - z) * n + z * h, flow.passed(torch.tanh, before), h),)

    return step


def _simple(
    flow: Gradients, w: Tensor, u: Tensor, b: Tensor, d: Tensor, activation: Callable[[Tensor], Tensor]
) -> Callable[..., _State]:
    biased = bool((b + d).any())

    def step(x: Tensor, h: Tensor) -> _State:
        before = flow.shared(lambda x, h: linear(x, w, b) + linear(h, u, d), x, h, biased=biased)
        return (flow.passed(activation, before),)

    return step

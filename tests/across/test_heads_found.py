"""Heads whose output becomes the logits by functions, trained on two tasks without heads=: recall is bit-equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training import TASKS, Classifier, inputs, train

from lightning_rnf import MultiHead, RelevanceFreezing


class Tokens(Classifier):
    """Three tokens of two numbers; the head is applied to all. ``own``: an entry runs, the `MultiHead` does not."""

    def __init__(self, of_tokens: Callable[[Tensor], Tensor], own: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
        self.heads = MultiHead(20, dict.fromkeys(TASKS, 2))
        self.own, self.active, self.of_tokens = own, "a", of_tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.of_tokens(self.heads.tasks[self.active](x) if self.own else self.heads(x))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log-softmax of the last token": lambda x: x[:, -1].log_softmax(-1),
    "mean over tokens": lambda x: x.mean(1),
}


@pytest.mark.filterwarnings("ignore:.*on the way. the function log_softmax:UserWarning")  # no rule is made for it
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_recall_is_bit_equal_after_a_second_task(function, own):
    torch.manual_seed(0)
    model, rnf, x = Tokens(FUNCTIONS[function], own), RelevanceFreezing(), inputs()
    train(model, rnf, "a", max_epochs=2)
    assert rnf.state.tasks["a"].head == "heads.tasks.a"
    with rnf.recall("a", model), torch.no_grad():
        before = model(x)
    model.active = "b"
    train(model, rnf, "b", max_epochs=2)
    assert rnf.state.tasks["b"].head == "heads.tasks.b"
    model.active = "a"
    with rnf.recall("a", model), torch.no_grad():
        assert torch.equal(model(x), before)
    if not own:
        assert rnf.report(model).is_sound

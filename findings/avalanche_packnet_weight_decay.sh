#!/usr/bin/env bash
# avalanche-lib 0.6.0 with torch 2.14.1: with weight decay PackNet forgets, and says nothing.
#
# Weights of finished tasks are frozen by a hook that sets their gradients to 0, and stay parameters of the optimizer. Its
# weight decay is no gradient of the loss: it shrinks them in every step of every later task. The method's promise, that
# a finished task's answers never change, holds without weight decay alone; the class warns of momentum, not of this.
# Seen, of a layer after 1,000 steps of SGD for a second task (lr 0.05, decay 5e-4), the first task's answers:
#
#   without decay: the same bits; with decay: 2.4 % shorter
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
cat > "$folder/decay.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from avalanche.models.packnet import PackNetModel
from torch import nn


def first_task(decay):
    """The first task's answers before and after the second task."""
    torch.manual_seed(0)
    model = PackNetModel(nn.Linear(20, 30))
    model.prune(0.5)
    model.freeze_pruned()
    x = torch.randn(8, 20)
    first, second = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    before = model(x, first).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay)
    for _ in range(1000):
        optimizer.zero_grad()
        model(x, second).square().mean().backward()
        optimizer.step()
    return before, model(x, first).detach()


before, after = first_task(0.0)
is_same = torch.equal(before, after)
before, after = first_task(5e-4)
shorter = 100 * (1 - float(after.norm() / before.norm()))
print(f"without decay: {'the same bits' if is_same else 'other bits'}; with decay: {shorter:.1f} % shorter")
assert is_same
assert shorter > 1
PYTHON
"$folder/venv/bin/python" "$folder/decay.py"

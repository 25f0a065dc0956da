#!/usr/bin/env bash
# avalanche-lib 0.6.0 with torch 2.14.1: PackNet prunes nothing of a convolution in channels_last, and says nothing.
#
# The numbers of the weights to prune are written into `task_index.flatten()`, which is a view where a tensor is contiguous
# and a copy where it isn't; `task_index` has its layout from the weight. After `prune(0.75)` a convolution in channels_last,
# a layout for faster convolutions, has all its weights, all belong to the first task, and the second task has
# none to learn with. The oracle is the same layer in the usual layout. Seen:
#
#   contiguous: 75 % pruned, left to the second task: 75 %; channels_last: 0 % pruned, left to the second task: 0 %
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
cat > "$folder/pruned.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from avalanche.models.packnet import PackNetModel
from torch import nn


def shares(memory_format):
    """How much of the layer the first task gives up, in %, and how much the second may train."""
    torch.manual_seed(0)
    model = PackNetModel(nn.Conv2d(16, 32, 3).to(memory_format=memory_format))
    model.prune(0.75)
    pruned = 100 * float((model.wrappee.available_weights() == 0).float().mean())
    model.freeze_pruned()
    model(torch.randn(2, 16, 8, 8), torch.ones(2, dtype=torch.long))  # the second task's first batch
    return round(pruned), round(100 * float(model.wrappee.unfrozen_mask.float().mean()))


usual, last = shares(torch.contiguous_format), shares(torch.channels_last)
print(
    f"contiguous: {usual[0]} % pruned, left to the second task: {usual[1]} %; "
    f"channels_last: {last[0]} % pruned, left to the second task: {last[1]} %"
)
assert usual == (75, 75)
assert last == (0, 0)
PYTHON
"$folder/venv/bin/python" "$folder/pruned.py"

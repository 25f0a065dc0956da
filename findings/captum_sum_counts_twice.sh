#!/usr/bin/env bash
# captum 0.9.0 with torch 2.14.1: LRP gives both summands of a residual connection all of the sum's relevance.
#
# A rule of layer-wise relevance propagation hands on what it was given: relevance of the inputs sums to the logit.
# Layers without a rule, and layers that run twice, `LRP` refuses by name. A sum by `+` or `torch.add` it does not see: what
# arrives there goes on through the layer, and once more through the shortcut. With each block it gets larger, with other
# signs, nothing is raised or warned of, and the class's documentation says nothing of sums; the map still looks like
# one. The same blocks with its `Addition_Module` in their place conserve relevance.
# Seen, of 64 inputs and networks without biases: relevance of the inputs over the logit, the median of its size:
#
#   1 block: 1.8, 8 blocks: 2423; with Addition_Module: 1.00, 1.00
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 captum==0.9.0
cat > "$folder/sums.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from captum.attr import LRP
from captum.attr._utils.custom_modules import Addition_Module
from torch import nn


class Block(nn.Module):
    def __init__(self, is_module):
        super().__init__()
        self.layer, self.relu = nn.Linear(16, 16, bias=False), nn.ReLU()
        self.add = Addition_Module() if is_module else torch.add

    def forward(self, x):
        return self.relu(self.add(self.layer(x), x))


def share(blocks, is_module):
    """Relevance of the inputs over the logit."""
    torch.manual_seed(0)
    network = nn.Sequential(*[Block(is_module) for _ in range(blocks)], nn.Linear(16, 3, bias=False))
    x = torch.rand(64, 16)
    return float((LRP(network).attribute(x, target=1).sum(1) / network(x)[:, 1]).abs().median())


one, eight, *as_modules = (share(blocks, is_module) for is_module in (False, True) for blocks in (1, 8))
print(f"1 block: {one:.1f}, 8 blocks: {eight:.0f}; with Addition_Module: {as_modules[0]:.2f}, {as_modules[1]:.2f}")
assert one > 1.5
assert eight > 100
assert all(abs(value - 1) < 0.01 for value in as_modules)
PYTHON
"$folder/venv/bin/python" "$folder/sums.py"

#!/usr/bin/env bash
# zennit 0.5.1 with torch 2.14.1: of a layer that runs twice in a forward, relevance is that of its last run alone.
#
# A rule's hook keeps the layer's input for the backward in one place, and the second run overwrites the first. Nothing is
# said, and the sum of the relevance is still the logit, so a check of conservation passes: but it arrives at other inputs,
# even those that are the largest. The oracle is the same network with two layers of equal weights. Seen:
#
#   sums: 0.0110 and 0.0110
#   largest difference over the largest relevance: 1.07
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 zennit==0.5.1 numpy==2.2.6
cat > "$folder/twice.py" << 'PYTHON'
import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus


class Net(nn.Module):
    def __init__(self, first, second, last):
        super().__init__()
        self.first, self.second, self.last = first, second, last

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


def relevance(net, x):
    with Gradient(net, EpsilonPlus()) as attributor:
        return attributor(x, lambda logits: logits * torch.eye(3)[logits.argmax(1)])[1]


torch.manual_seed(0)
layer, other, last = (nn.Linear(6, outputs, bias=False) for outputs in (6, 6, 3))
other.load_state_dict(layer.state_dict())
x = torch.rand(1, 6)
twice, unrolled = relevance(Net(layer, layer, last), x), relevance(Net(layer, other, last), x)
print(f"sums: {twice.sum():.4f} and {unrolled.sum():.4f}")
difference = float((twice - unrolled).abs().max() / unrolled.abs().max())
print(f"largest difference over the largest relevance: {difference:.2f}")
assert torch.allclose(twice.sum(), unrolled.sum(), rtol=1e-3)
assert difference > 0.5
PYTHON
"$folder/venv/bin/python" "$folder/twice.py"

#!/usr/bin/env bash
# zennit 0.5.1 with torch 2.14.1: under a composite a network with an in-place activation computes other logits.
#
# The activation is handed a copy of its input, so what it writes does not show to others that read the input afterwards,
# such as a skip connection around the next layers. Relevance is then that of a network that nobody has trained. Nothing is
# said. The oracle is the same network without the composite, and one whose activation is not in place. Seen:
#
#   in place: logits differ by 1.26; not in place: 0.00
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 zennit==0.5.1 numpy==2.2.6
cat > "$folder/in_place.py" << 'PYTHON'
import torch
from torch import nn
from zennit.composites import EpsilonPlus


class Net(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        x = self.first(x)
        y = self.act(x)
        skip = x if self.act.inplace else y  # in place, x is what the activation has made of it
        return self.last(self.second(y) + skip)


found = {}
for inplace in (True, False):
    torch.manual_seed(0)
    net = Net(inplace)
    x = torch.randn(3, 4, requires_grad=True)
    plain = net(x)
    with EpsilonPlus().context(net) as hooked:
        found[inplace] = float((hooked(x) - plain).abs().max())
    assert torch.equal(net(x), plain)
print(f"in place: logits differ by {found[True]:.2f}; not in place: {found[False]:.2f}")
assert found[True] > 0.5
assert found[False] == 0.0
PYTHON
"$folder/venv/bin/python" "$folder/in_place.py"

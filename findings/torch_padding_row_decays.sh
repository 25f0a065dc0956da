#!/usr/bin/env bash
# torch 2.14.1: the row of an `nn.Embedding`'s `padding_idx` does not stay: weight decay moves it.
#
# The documentation says that the vector at `padding_idx` is not updated in training and stays a fixed pad. Its gradient is
# zero, but AdamW multiplies every entry by 1 - lr · decay, gradient or not, and so does SGD with `weight_decay`. A pad that is
# zero stays zero; one that came with pretrained weights (`from_pretrained(..., padding_idx=)`) shrinks with every step. Seen,
# of a pad of ones after 100 steps at a learning rate of 0.01 and a decay of 0.1:
#
#   AdamW, decay 0.1: 0.9048 (gradient of the pad: 0.0); AdamW, no decay: 1.0
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/pad.py" << 'PYTHON'
import torch
from torch import nn


def pad(decay):
    table = nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, padding_idx=0)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.01, weight_decay=decay)
    for _ in range(100):
        optimizer.zero_grad()
        table(torch.tensor([[0, 1], [2, 0]])).sum().backward()
        optimizer.step()
    return float(table.weight[0].detach().mean()), float(table.weight.grad[0].abs().max())


(decayed, gradient), (kept, _) = pad(0.1), pad(0.0)
print(f"AdamW, decay 0.1: {decayed:.4f} (gradient of the pad: {gradient}); AdamW, no decay: {kept}")
assert gradient == 0
assert kept == 1
assert abs(decayed - (1 - 0.01 * 0.1) ** 100) < 1e-4
PYTHON
"$folder/venv/bin/python" "$folder/pad.py"

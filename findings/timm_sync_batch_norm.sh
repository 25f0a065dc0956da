#!/usr/bin/env bash
# timm 1.0.31 with torch 2.14.1: torch's conversion to synchronised batch norms takes the activations out of timm's networks.
#
# Many of timm's networks have norms that activate as well (`BatchNormAct2d`, a `BatchNorm2d` with a forward of its own).
# `torch.nn.SyncBatchNorm.convert_sync_batchnorm` puts a plain SyncBatchNorm in their place, and Lightning's
# `Trainer(sync_batchnorm=True)` calls it. Weights and parameters' names stay, the activation is still there as a part and is
# still printed, but nobody calls it: what is left of an EfficientNet is a network without its SiLUs. timm has a function of
# its own that keeps them (`timm.layers.convert_sync_batchnorm`); torch's says nothing. Seen in eval mode, where the
# conversion should change nothing:
#
#   activations among the parts: before 49, after 49; called in a forward: before 49, after 16
#   logits: torch's conversion changes them, timm's own does not
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 "timm==1.0.31"
cat > "$folder/converted.py" << 'PYTHON'
import copy

import timm
import torch
from torch import nn

torch.manual_seed(0)
net = timm.create_model("efficientnet_b0", num_classes=4).eval()
x = torch.randn(2, 3, 64, 64)


def called(net):
    """How many SiLUs there are, how many run, and the logits."""
    parts, runs = [part for part in net.modules() if isinstance(part, nn.SiLU)], []
    hooks = [part.register_forward_hook(lambda *_: runs.append(1)) for part in parts]
    with torch.no_grad():
        logits = net(x)
    for hook in hooks:
        hook.remove()
    return len(parts), len(runs), logits


before, of_torch, of_timm = (
    called(one)
    for one in (
        net,
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval(),
        timm.layers.convert_sync_batchnorm(copy.deepcopy(net)).eval(),
    )
)
print(f"activations among the parts: before {before[0]}, after {of_torch[0]}; "
      f"called in a forward: before {before[1]}, after {of_torch[1]}")
same = {name: torch.allclose(before[2], one[2], rtol=1e-4) for name, one in (("torch", of_torch), ("timm", of_timm))}
print("logits: torch's conversion changes them, timm's own does not" if same == {"torch": False, "timm": True} else same)
assert (before[0], of_torch[0]) == (49, 49) and before[1] > of_torch[1] == 16
assert same == {"torch": False, "timm": True}
PYTHON
"$folder/venv/bin/python" "$folder/converted.py"

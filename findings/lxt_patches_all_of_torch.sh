#!/usr/bin/env bash
# lxt 2.1 with torch 2.14.1, torchvision 0.29.1, transformers 4.52.4: to explain one kind of network changes all others in the
# process, their outputs and their training.
#
# `monkey_patch(module)` is to be called on the module of the network that is to be explained, torchvision's
# `vision_transformer` or transformers' `modeling_bert`, and says that it patches that module's classes. What it patches
# there are `torch.nn.LayerNorm` and, for BERT, `torch.nn.Dropout` themselves, and nothing takes that back. From there on
# any layer norm in the process has a gradient that does not go through its deviation, which is right for relevance and
# wrong for training; one over several dimensions takes the last one alone, so that it says something else; and no
# dropout drops anything. So who explains between two trainings trains otherwise afterwards, without a word.
# Seen, of layers that belong to neither network:
#
#   vision_transformer: LayerNorm(8)'s gradient is off by 0.44 of its largest; LayerNorm((4, 8))'s output by 1.18
#   modeling_bert: Dropout(0.5) in training drops 0.00 of 3,000 numbers, before 0.50
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==4.52.4 lxt==2.1
cat > "$folder/explain.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from lxt.efficient import monkey_patch
from torch import nn
from torchvision.models import vision_transformer
from transformers.models.bert import modeling_bert


def gradient():
    """Of a sum of a layer norm's outputs, each with a weight of its own, by its inputs."""
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (nn.LayerNorm(8)(x) * torch.arange(8.0)).sum().backward()
    return x.grad


def output():
    return nn.LayerNorm((4, 8))(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)))


def dropped():
    torch.manual_seed(0)
    return nn.Dropout(0.5)(torch.ones(3000)).eq(0).float().mean().item()


gradient_before, output_before, dropped_before = gradient(), output(), dropped()
monkey_patch(vision_transformer)
off = ((gradient() - gradient_before).abs().max() / gradient_before.abs().max()).item()
off_output = (output() - output_before).abs().max().item()
print(
    f"vision_transformer: LayerNorm(8)'s gradient is off by {off:.2f} of its largest; "
    f"LayerNorm((4, 8))'s output by {off_output:.2f}"
)
monkey_patch(modeling_bert)
print(f"modeling_bert: Dropout(0.5) in training drops {dropped():.2f} of 3,000 numbers, before {dropped_before:.2f}")
assert off > 0.2
assert off_output > 0.2
assert dropped() == 0 < 0.45 < dropped_before
PYTHON
"$folder/venv/bin/python" "$folder/explain.py"

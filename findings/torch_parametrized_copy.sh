#!/usr/bin/env bash
# torch 2.14.1: taking the parametrization off a copy of a layer breaks the layer that was copied.
#
# `parametrize` gives a layer a class of its own, and `copy.deepcopy` hands the same class on. `remove_parametrizations`
# deletes the weight's property from that class: the copy has a plain weight then, the original has none any more. So who
# bakes weight norm into a copy, to export or to analyse it, loses the model that is still trained. Seen:
#
#   one class: True
#   the copy runs: True
#   the original: AttributeError: 'ParametrizedLinear' object has no attribute 'weight'
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/copied.py" << 'PYTHON'
import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

original = weight_norm(nn.Linear(2, 2))
copied = copy.deepcopy(original)
print("one class:", type(original) is type(copied))
assert type(original) is type(copied)
remove_parametrizations(copied, "weight")
print("the copy runs:", copied(torch.ones(1, 2)).shape == (1, 2))
try:
    original(torch.ones(1, 2))
except AttributeError as error:
    print(f"the original: AttributeError: {error}")
else:
    raise SystemExit("the original runs now")
PYTHON
"$folder/venv/bin/python" "$folder/copied.py"

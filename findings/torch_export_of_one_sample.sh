#!/usr/bin/env bash
# torch 2.14.1: a network exported for any number of samples (`Dim.AUTO`) computes something else for one, in silence.
#
# torch.export takes an open dimension to be at least 2. A forward that does something else for a single sample (a squeeze,
# a batch statistic, a scale) is exported as it is for two or more, and no check of that is left in the result: other
# assumptions raise `Guard failed`, this one gives wrong numbers. Seen:
#
#   5 samples: as the module
#   2 samples: as the module
#   1 sample: not as the module
#   where len(x) was taken: AssertionError: Guard failed: x.size()[0] == 4
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/one.py" << 'PYTHON'
import torch
from torch import nn
from torch.export import Dim, export


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) if x.size(0) > 1 else self.layer(x) * 100


class Mean(Scaled):
    def forward(self, x):
        return self.layer(x) / len(x)


def exported(module):
    return export(module, (torch.randn(4, 3),), dynamic_shapes=({0: Dim.AUTO},)).module()


module = Scaled()
network = exported(module)
for samples in (5, 2, 1):
    x = torch.randn(samples, 3)
    same = torch.allclose(network(x), module(x))
    print(f"{samples} sample{'s' * (samples > 1)}: {'as' if same else 'not as'} the module")
    assert same == (samples > 1)
try:
    exported(Mean())(torch.randn(5, 3))
except AssertionError as error:
    print(f"where len(x) was taken: AssertionError: {error}")
else:
    raise SystemExit("other numbers of samples are taken now")
PYTHON
"$folder/venv/bin/python" "$folder/one.py"

#!/usr/bin/env bash
# torch 2.14.1: whether a weight asks for gradients (`requires_grad`) decides how its product is rounded, under
# `torch.no_grad()` and `torch.inference_mode()` too.
#
# One would think that the flag says nothing where no graph is built. But for an input of three or more dimensions,
# `matmul` with a weight, and `linear` of an input that is not contiguous, choose by it whether they fold the leading
# dimensions into one product or make a batch of products, and these add up in different orders. So freezing a trained
# layer, `requires_grad_(False)`, changes what a model says in evaluation. Seen on a CPU with AVX-512 (shares of 200 draws
# in which the bits differ; how many depends on the processor):
#
#   linear, input contiguous: 0.0
#   linear, input transposed: 1.0
#   matmul with a matrix, input transposed: 1.0
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/flag.py" << 'PYTHON'
import torch
from torch.nn.functional import linear

torch.set_num_threads(1)
torch.manual_seed(0)
plain, turned, product = 0, 0, 0
for _ in range(200):
    x = torch.randn(16, 24, 9).transpose(1, 2)
    weight, bias = torch.randn(6, 24), torch.randn(6)

    def differs(say):
        with torch.no_grad():
            return not torch.equal(say(weight.requires_grad_(True)), say(weight.requires_grad_(False)))

    plain += differs(lambda one: linear(x.contiguous(), one, bias))
    turned += differs(lambda one: linear(x, one, bias))
    product += differs(lambda one: x @ one.t())
print(f"linear, input contiguous: {plain / 200}")
print(f"linear, input transposed: {turned / 200}")
print(f"matmul with a matrix, input transposed: {product / 200}")
assert plain == 0 and turned > 0, "the flag does not count any more"
PYTHON
"$folder/venv/bin/python" "$folder/flag.py"

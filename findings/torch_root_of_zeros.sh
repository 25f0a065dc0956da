#!/usr/bin/env bash
# torch 2.14.1 (with MKL 2024.2) on an Intel Xeon: the square root of zeros takes more than ten times as long as that of
# other numbers, in float32, so a step of Adam does on parameters that never get a gradient.
#
# One would think that a root takes as long whatever it is of, and zero the least. torch hands roots to MKL's vector
# functions, which leave their fast path for zero. Adam's second moments are zero where no gradient has arrived: rows of an
# embedding for words that don't come, units that are dead, pixels that are always black, weights that are masked. Seen
# with one thread (microseconds, the least of 20 times):
#
#   root of a million ones 333, of zeros 4229, half of each 2214
#   a step of Adam on a million parameters takes 1.9 times as long with gradients of zero as with gradients of one
#
# Fails if the roots of zeros are less than three times as slow: with other libraries, or on another kind of processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/roots.py" << 'PYTHON'
import time

import torch

torch.set_num_threads(1)


def least(work):
    found = []
    for _ in range(20):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def step(gradient):
    weight = torch.nn.Parameter(torch.ones(1_000_000))
    weight.grad = torch.full_like(weight, gradient)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    return least(optimizer.step)


ones, zeros = torch.ones(1_000_000), torch.zeros(1_000_000)
of_ones, of_zeros = least(ones.sqrt), least(zeros.sqrt)
print(f"root of zeros over that of ones: {of_zeros / of_ones:.1f}")
print(f"a step of Adam with gradients of zero over one with gradients of one: {step(0.0) / step(1.0):.1f}")
assert of_zeros > 3 * of_ones, "zeros are not slow any more"
PYTHON
"$folder/venv/bin/python" "$folder/roots.py"

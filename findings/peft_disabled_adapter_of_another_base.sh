#!/usr/bin/env bash
# peft 0.21.2: where the base has batch norms, the network with its adapter disabled is not the base any more.
#
# LoRA freezes the base: none of its parameters is trained, and `disable_adapter()` is documented as the way to run it without the
# adapter. But `model.train()` puts the base's batch norms into training mode, too, and their running statistics, which are
# buffers, go on moving with what the adapter makes of its data. Nothing is said, and weights compared parameter by parameter
# are equal. Whoever trains one adapter a task and keeps the base for the first task has lost the first task; the same
# network with group norms has not. Seen after twenty steps on other data:
#
#   batch norm: parameters of the base equal: True, logits with the adapter disabled equal: False
#   group norm: parameters of the base equal: True, logits with the adapter disabled equal: True
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 transformers==5.24.0 peft==0.21.2
cat > "$folder/disabled.py" << 'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for name, norm in (("batch norm", nn.BatchNorm1d(16)), ("group norm", nn.GroupNorm(4, 16))):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 3)).eval()
    x = torch.randn(32, 8)
    with torch.no_grad():
        before = base(x)
    weights = [parameter.detach().clone() for parameter in base.parameters()]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"])).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(32, 8) + 3).pow(2).mean().backward()
        optimizer.step()
    frozen = [parameter for key, parameter in model.named_parameters() if "lora_" not in key]
    with torch.no_grad(), model.eval().disable_adapter():
        after = model(x)
    same = all(map(torch.equal, weights, frozen))
    print(f"{name}: parameters of the base equal: {same}, logits with the adapter disabled equal: {torch.equal(after, before)}")
    assert same and torch.equal(after, before) == (name == "group norm")
PYTHON
"$folder/venv/bin/python" "$folder/disabled.py"

#!/usr/bin/env bash
# torch 2.14.1: nothing that is left on a traced module (torch.fx.GraphModule) survives both a file and a copy.
#
# A dict entry in `meta` is kept by copy.deepcopy and lost, without a word, by torch.save and torch.load; an attribute of
# the module is kept by the file and lost by the copy. After the way through a file even an attribute that torch was told
# to preserve in copies is lost by the next copy, since the list of those stands in `meta`. Seen:
#
#   through a file: meta lost, attribute kept
#   copied:         meta kept, attribute lost
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cat > "$folder/notes.py" << 'PYTHON'
import copy
import io

import torch
from torch import fx, nn

traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
traced.meta["note"] = traced.note = "what was cut"

file = io.BytesIO()
torch.save(traced, file)
file.seek(0)
loaded = torch.load(file, weights_only=False)
copied = copy.deepcopy(traced)
for way, module in (("through a file", loaded), ("copied", copied)):
    kept = {"meta": "note" in module.meta, "attribute": hasattr(module, "note")}
    print(f"{way}: " + ", ".join(f"{what} {'kept' if there else 'lost'}" for what, there in kept.items()))
assert "note" not in loaded.meta and loaded.note == "what was cut"
assert copied.meta["note"] == "what was cut" and not hasattr(copied, "note")
PYTHON
"$folder/venv/bin/python" "$folder/notes.py"

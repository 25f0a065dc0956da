#!/usr/bin/env bash
# torchmetrics 1.9.0: whether scores are logits or probabilities is guessed anew in each batch, and the guesses are mixed.
#
# Metrics of classes take scores that all lie in [0, 1] for probabilities and make probabilities of others; that is documented.
# The guess is made in every `update`, so logits of a batch that lie there by chance are kept as they are beside the sigmoids
# of all other batches. With small batches, or a network that says little, a metric of the same logits depends on how
# they are cut into batches. Seen of the logits 0.9, 2.0, 0.5, 0.8 for targets 0, 1, 0, 1:
#
#   AUROC in one batch: 0.75, in two: 1.00; accuracy of the logits 0.3 and 0.2 for targets 1: 0.0, with a third one of 1.5: 1.0
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchmetrics==1.9.0
cat > "$folder/guessed.py" << 'PYTHON'
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


def measured(metric, *batches):
    for logits, target in batches:
        metric.update(torch.tensor(logits), torch.tensor(target))
    return float(metric.compute())


one = measured(BinaryAUROC(), ([0.9, 2.0, 0.5, 0.8], [0, 1, 0, 1]))
two = measured(BinaryAUROC(), ([0.9, 2.0], [0, 1]), ([0.5, 0.8], [0, 1]))
alone = measured(BinaryAccuracy(), ([0.3, 0.2], [1, 1]))
beside = measured(BinaryAccuracy(), ([0.3, 0.2, 1.5], [1, 1, 1]))
print(
    f"AUROC in one batch: {one:.2f}, in two: {two:.2f}; accuracy of the logits 0.3 and 0.2 for targets 1: {alone}, "
    f"with a third one of 1.5: {beside}"
)
assert (one, two) == (0.75, 1.0)
assert (alone, beside) == (0.0, 1.0)
PYTHON
"$folder/venv/bin/python" "$folder/guessed.py"

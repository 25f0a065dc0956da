#!/usr/bin/env bash
# torchmetrics 1.9.0: with `ignore_index`, the class that is to be ignored still counts as a zero in a macro average.
#
# Targets of that class are left out, as the documentation says. But a sample of another class that is taken for it makes it
# a class with a false positive and no true one, so the mean over classes has one more term, a zero; and not so while nobody
# is taken for it: a single answer among thousands moves the average of K classes by 1/K. Seen for targets [0, 1, 2, 1] and
# answers [0, 1, 2, 0], ignoring 0 (by hand: classes 1 and 2 have recalls of 0.5 and 1):
#
#   MulticlassAccuracy, macro: 0.50, MulticlassRecall, macro: 0.50, by hand: 0.75; answers [0, 1, 2, 2]: 0.75
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchmetrics==1.9.0
cat > "$folder/macro.py" << 'PYTHON'
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

target = torch.tensor([0, 1, 2, 1])


def macro(kind, answers):
    return float(kind(3, average="macro", ignore_index=0)(torch.tensor(answers), target))


def by_hand(answers):
    answers = torch.tensor(answers)
    return float(torch.stack([(answers[target == one] == one).float().mean() for one in (1, 2)]).mean())


as_ignored, as_other = [0, 1, 2, 0], [0, 1, 2, 2]
found = [macro(kind, as_ignored) for kind in (MulticlassAccuracy, MulticlassRecall)]
print(
    f"MulticlassAccuracy, macro: {found[0]:.2f}, MulticlassRecall, macro: {found[1]:.2f}, by hand: {by_hand(as_ignored):.2f}; "
    f"answers {as_other}: {macro(MulticlassAccuracy, as_other):.2f}"
)
assert by_hand(as_ignored) == by_hand(as_other) == macro(MulticlassAccuracy, as_other) == 0.75
assert found == [0.5, 0.5]
PYTHON
"$folder/venv/bin/python" "$folder/macro.py"

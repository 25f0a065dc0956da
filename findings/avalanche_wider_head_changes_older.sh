#!/usr/bin/env bash
# avalanche-lib 0.6.0 with torch 2.14.1: a later task with more classes changes what is predicted for earlier tasks, though
# no weight of theirs moves.
#
# `MultiHeadClassifier` has a head for each task. Its documentation allows heads of different widths as long as a batch is of
# one task, so one would expect a head of two classes to answer with two logits, whatever other heads there are. Where
# tasks are given as a tensor, as `Naive` does, the outputs of any `MultiTaskModule` are as wide as the widest head that
# it has met, filled up with zeros, which count as logits: they enter the loss, and where a sample's own logits are all
# below zero the answer is a class that its task has not got. `masking`, on by default, is for classes inside a head and
# leaves these zeros alone. So an accuracy matrix shows forgetting where nothing was forgotten.
# Seen, of two heads on the inputs themselves, which share no weight, the first one's data after each task (two
# classes, then four), with masking and without:
#
#   after task 1: 2 logits, loss 0.40, accuracy 0.788; after task 2: 4 logits, loss 1.13, accuracy 0.754,
#   199 of 1346 predicted to be of a class that the head has not got; it is bit-equal
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
cat > "$folder/heads.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import MultiHeadClassifier
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

generator = torch.Generator().manual_seed(0)
x = torch.rand(3000, 16, generator=generator)
y = torch.cdist(x, torch.rand(6, 16, generator=generator)).argmin(1)
data = TensorDataset(x, y)
data.targets = y.tolist()
first = y < 2


def tested(network):
    """Of the first task: logits of a sample, loss, accuracy, and how many are predicted to be of no class of its head."""
    network.eval()
    with torch.no_grad():
        logits = network(x[first], torch.zeros(int(first.sum()), dtype=torch.long))
    predicted = logits.argmax(1)
    loss, accuracy = nn.functional.cross_entropy(logits, y[first]), (predicted == y[first]).float().mean()
    return logits.shape[1], loss.item(), accuracy.item(), int((predicted > 1).sum())


for masking in (True, False):
    torch.manual_seed(0)
    stream = nc_benchmark(
        data,
        data,
        n_experiences=2,
        task_labels=True,
        per_exp_classes={0: 2},
        fixed_class_order=range(6),
        class_ids_from_zero_in_each_exp=True,
    ).train_stream
    network = MultiHeadClassifier(16, masking=masking)
    strategy = Naive(
        model=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=50,
        train_epochs=3,
        evaluator=None,
    )
    found, heads = [], []
    for experience in stream:
        strategy.train(experience)
        found.append(tested(network))
        heads.append({name: value.clone() for name, value in network.classifiers["0"].state_dict().items()})
    (logits, loss, accuracy, none), (logits_then, loss_then, accuracy_then, none_then) = found
    before, after = heads
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    print(
        f"masking {masking}; after task 1: {logits} logits, loss {loss:.2f}, accuracy {accuracy:.3f}; after task 2: "
        f"{logits_then} logits, loss {loss_then:.2f}, accuracy {accuracy_then:.3f}, {none_then} of {int(first.sum())} "
        "predicted to be of a class that the head has not got; it is bit-equal"
    )
    assert (logits, none) == (2, 0)
    assert logits_then == 4
    assert none_then > 100
    assert accuracy_then < accuracy - 0.02
    assert loss_then > 2 * loss
PYTHON
"$folder/venv/bin/python" "$folder/heads.py"

#!/usr/bin/env bash
# avalanche-lib 0.6.0 with torch 2.14.1: on a CPU Synaptic Intelligence protects nothing, and says nothing.
#
# Its plugin keeps the weights of before a step as what `.detach().cpu()` gives, which on a GPU is a copy and on a CPU the
# weights themselves. The way that a step has gone is then 0, all importances are 0, and any strength trains the same
# weights as none. A comparison on a CPU is one with plain fine-tuning. The oracle is the same plugin with a `.clone()`. Seen:
#
#   sum of importances as it is: 0.0, weights as with strength 0: True; with copies: 0.7, False
#
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 avalanche-lib==0.6.0
cat > "$folder/importance.py" << 'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import SimpleMLP
from avalanche.training import Naive
from avalanche.training.plugins import SynapticIntelligencePlugin


def data(seed):
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, seed] > 0).long()


def importances(strength):
    torch.manual_seed(0)
    plugin = SynapticIntelligencePlugin(strength)
    model = SimpleMLP(num_classes=2, input_size=20, hidden_size=30, drop_rate=0.0)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[plugin],
        evaluator=None,
        train_mb_size=20,
        train_epochs=5,
        device="cpu",
    )
    tasks = tensors_benchmark([data(1), data(2)], [data(3)], task_labels=[0, 0])
    for experience in tasks.train_stream:
        strategy.train(experience)
    weights = torch.cat([one.detach().flatten() for one in model.parameters()])
    return float(sum(one.data.abs().sum() for one in plugin.ewc_data[1].values())), weights


def report():
    (_, plain), (total, held) = importances(0.0), importances(1000.0)
    return round(total, 1), torch.equal(plain, held)


as_it_is = report()


@torch.no_grad()
def copied(model, target, excluded):
    for name, parameter in SynapticIntelligencePlugin.allowed_parameters(model, excluded):
        target[name].data = parameter.detach().cpu().flatten().clone()


SynapticIntelligencePlugin.extract_weights = staticmethod(copied)
repaired = report()
print(
    f"sum of importances as it is: {as_it_is[0]}, weights as with strength 0: {as_it_is[1]}; "
    f"with copies: {repaired[0]}, {repaired[1]}"
)
assert as_it_is == (0.0, True)
assert repaired[0] > 0
assert not repaired[1]
PYTHON
"$folder/venv/bin/python" "$folder/importance.py"

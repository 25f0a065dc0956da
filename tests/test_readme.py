"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from training import Classifier, clusters, inputs

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap
from lightning_rnf.streams import TaskDataModule

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed:UserWarning")
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a plain Trainer writes logs and checkpoints
    torch.manual_seed(0)
    model = Classifier()
    model.heads = MultiHead(40, {"digits-01": 2, "digits-23": 2})
    tasks = [
        TaskDataModule(name, 2, *(clusters(task, 320, seed) for seed in range(3)), batch_size=32)
        for task, name in (("a", "digits-01"), ("b", "digits-23"))
    ]
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code, *more = [block for block in blocks if "torchgeo" not in block]  # test_real_projects runs that one
    names = {"model": model, "tasks": tasks, "x": inputs(), "torch": torch, "UnitMap": UnitMap}
    exec(code, names)
    names["batch"] = (inputs(), torch.zeros(len(inputs()), dtype=torch.long))
    options, *more = more
    exec(options, {"RelevanceFreezing": RelevanceFreezing})
    for code in more:
        exec(code, names)
    loaded = torch.load("digits-01.pt", weights_only=False)
    with names["rnf"].recall("digits-01"), torch.no_grad():
        torch.testing.assert_close(loaded(inputs()), model(inputs()))
    assert "'body.0'" in capsys.readouterr().out


def test_every_parameter_of_the_callback_is_in_the_table():
    from inspect import signature

    table = README[README.index("| parameter |") :]
    for name in signature(RelevanceFreezing).parameters:
        assert f"`{name}`" in table.split("\n\n")[0], name

"""The code of README and the guide runs as it stands there; links lead somewhere, and tests that are named exist."""

from __future__ import annotations

import re

import lightning.pytorch as pl
import pytest
import torch
from documents import TEXT, blocks
from launched import ROOT
from torch import nn
from training import Classifier, clusters, inputs, loader, task_data, trainer

from lightning_rnf import MultiHead, RelevanceFreezing, UnitMap
from lightning_rnf.streams import TaskDataModule

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "examples/README.md",
    ROOT / "tests/benchmarks/README.md",
]


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
    # test_real_projects runs the first, test_export_by_torch_export the second, the test below the third
    elsewhere = ("torchgeo", "reviews", "protect")
    code, *more = [block for block in blocks("python") if not any(name in block for name in elsewhere)]
    names = {"model": model, "tasks": tasks, "x": inputs(), "torch": torch, "UnitMap": UnitMap}
    exec(code, names)
    (names["path"],) = tmp_path.rglob("digits-23-ended.ckpt")
    names["digits_45"] = task_data("c")
    names["digits_45"].task = "digits-45"
    names["batch"] = (inputs(), torch.zeros(len(inputs()), dtype=torch.long))
    options, *more = more
    exec(options, {"RelevanceFreezing": RelevanceFreezing})
    for code in more:
        exec(code, names)
    loaded = torch.load("digits-01.pt", weights_only=False)
    with names["rnf"].recall("digits-01"), torch.no_grad():
        torch.testing.assert_close(loaded(inputs()), model(inputs()))
    assert "'body.0'" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning")
@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed:UserWarning")
def test_a_pretrained_network_keeps_what_it_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = Classifier().body, nn.Linear(40, 2)

        def forward(self, x):
            return self.fc(self.body(x))

    class Module(Classifier):
        def __init__(self, net):
            super().__init__()
            del self.body, self.heads
            self.net = net

        def forward(self, x):
            return self.net(x)

    net = Net()
    module = Module(net)
    trainer(max_epochs=3).fit(module, datamodule=task_data("a"))
    (code,) = [block for block in blocks("python") if "protect" in block]
    names = {
        "net": net,
        "module": module,
        "images": loader("a"),
        "ages": TaskDataModule("ages", 2, *(clusters("b", 320, seed) for seed in range(3)), batch_size=32),
        "x": inputs(),
    }
    names |= {"MultiHead": MultiHead, "RelevanceFreezing": RelevanceFreezing, "Trainer": pl.Trainer}
    exec(code.partition("net.fc.activate")[0], names)
    with names["rnf"].recall("imagenet"):
        before = module(inputs())
    exec("net.fc.activate" + code.partition("net.fc.activate")[2], names)
    assert list(names["rnf"].state.tasks) == ["imagenet", "ages"]
    assert torch.equal(names["logits"], before)


def test_every_parameter_of_the_callback_is_in_the_table():
    from inspect import signature

    table = TEXT[TEXT.index("| parameter |") :]
    for name in signature(RelevanceFreezing).parameters:
        assert f"`{name}`" in table.split("\n\n")[0], name


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_tests_that_are_named_are_there(page):
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    for path, name in named:
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, name)

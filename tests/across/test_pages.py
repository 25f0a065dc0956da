"""The code of README and of every page runs as it stands there: pages go on from where the five-minute start ends."""

from __future__ import annotations

import re
import runpy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from documents import PAGES, README, START, blocks
from launched import ROOT
from torch import nn
from training import Classifier, clusters, inputs, loader, task_data, trainer

from lightning_rnf import MultiHead, RelevanceFreezing
from lightning_rnf.streams import TaskDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*parameters of its silent units are still there:UserWarning"),  # of a tiny BERT
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

NEEDS = {"guide/transformers.md": ("transformers", "peft")}
"""Packages that a page's code needs beside ours; they are in the extra ``projects``."""

SHOWN = ("start.md", "guide/later.md", "guide/resume.md", "guide/serving.md")
"""Pages whose code has a test of its own."""

ELSEWHERE = ("torchgeo", "protect")
"""Blocks for somebody's own project: test_real_projects runs the first, the last test here the second."""


def run(page, names: dict[str, Any]) -> dict[str, Any]:
    for code in blocks("python", page):
        if not any(name in code for name in ELSEWHERE):
            exec(compile(code, page.name, "exec"), names)
    return names


def begun() -> dict[str, Any]:
    """Where the five-minute start ends."""
    return run(START, {"__name__": "page"})


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # plain Trainers write logs and checkpoints
    pl.seed_everything(0, verbose=False)


def test_the_twelve_lines_of_the_readme():
    model = Classifier()
    model.heads = MultiHead(40, {"digits-01": 2, "digits-23": 2})
    tasks = [
        TaskDataModule(name, 2, *(clusters(task, 320, seed) for seed in range(3)), batch_size=32)
        for task, name in (("a", "digits-01"), ("b", "digits-23"))
    ]
    names = run(README, {"model": model, "tasks": tasks, "x": inputs()})
    assert list(names["rnf"].state.tasks) == ["digits-01", "digits-23"]


def test_the_start_says_the_same_of_the_first_task_twice(capsys):
    names = begun()
    first, second = re.findall(r"has ended: digits-01 says (.*)", capsys.readouterr().out)
    assert first == second
    assert names["rnf"].report().is_sound
    assert min(names["rnf"].report().matrix[-1]) > 0.9


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks("python", page) and page.relative_to(ROOT / "docs").as_posix() not in SHOWN],
    ids=lambda page: str(page.relative_to(ROOT / "docs")),
)
def test_the_code_of_a_page_runs(page):
    for package in NEEDS.get(str(page.relative_to(ROOT / "docs")), ()):
        pytest.importorskip(package)
    run(page, begun())


def test_a_later_task_leaves_those_before_it():
    names = begun()
    with names["rnf"].recall("digits-01"), torch.no_grad():
        before = names["model"](names["x"])
    run(ROOT / "docs/guide/later.md", names)
    assert list(names["rnf"].state.tasks) == ["digits-01", "digits-23"]  # digits-45 is given up at the page's end
    assert names["freed"]
    with names["rnf"].recall("digits-01", names["model"]), torch.no_grad():
        assert torch.equal(names["model"](names["x"]), before)


def test_a_program_that_is_started_again_trains_nothing_again():
    names = run(ROOT / "docs/guide/resume.md", begun())
    ended = {name: value.clone() for name, value in names["model"].state_dict().items()}
    names = run(ROOT / "docs/guide/resume.md", names)
    assert list(names["rnf"].state.tasks) == ["digits-01", "digits-23"]
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, ended[name]), name


def test_a_network_of_its_own_says_what_recall_says():
    names = run(ROOT / "docs/guide/serving.md", begun())
    loaded = torch.load("digits-01.pt", weights_only=False)
    with names["rnf"].recall("digits-01"), torch.no_grad():
        torch.testing.assert_close(loaded(names["x"]), names["model"](names["x"]))


def test_a_pretrained_network_keeps_what_it_can():
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


def test_pictures_are_what_their_script_draws():
    script = runpy.run_path(str(ROOT / "docs/pictures.py"))
    assert len(script["PICTURES"]) == 3
    for name, (draw, title) in script["PICTURES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == script["page"](*draw(), title), name


def test_every_block_is_of_a_language_that_something_runs():
    """YAML: test_lightning_cli. Commands install, or start what other tests start. Text is what was printed."""
    for page in (README, *PAGES):
        languages = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[::2]
        assert set(languages) <= {"python", "yaml", "bash", "text"}, page

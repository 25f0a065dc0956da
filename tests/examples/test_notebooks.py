"""The notebooks run in a fresh kernel, what they tell a reader is so, and what they show is of one complete run."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
from types import SimpleNamespace

import nbformat
import pytest
import torch
from launched import ROOT

EXAMPLES = ROOT / "examples"
NAMES = ("tour", "tour_transformer")
MATRICES = 'import json; print(json.dumps({"forgotten": forgotten.tolist(), "kept": kept.tolist()}))'


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def said(cells) -> str:
    """All text that came out."""
    outputs = [output for cell in cells for output in cell.outputs]
    texts = [output.get("text") or output.data.get("text/markdown") or output.data["text/plain"] for output in outputs]
    return "\n".join(texts)


def read(name: str):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    return notebook


def kinds(notebook) -> list[list[str]]:
    """Of each cell, what kinds of outputs it has."""
    return [
        [" ".join(sorted(output.get("data", [output.get("name")]))) for output in cell.outputs]
        for cell in code(notebook)
    ]


@pytest.fixture(scope="module", params=NAMES)
def ran(request, tmp_path_factory):
    """A notebook that has run just now, and its accuracy matrices."""
    pytest.importorskip("sklearn")
    if request.param == "tour_transformer":
        pytest.importorskip("transformers")
    importlib.import_module("matplotlib.font_manager")  # makes its list of fonts here, and says so here
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        executed = importlib.import_module("notebooks").executed
    notebook = read(request.param)
    stored = kinds(notebook)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell(MATRICES))
    folder = tmp_path_factory.mktemp(request.param)
    done = executed(notebook, folder)
    assert not list(folder.iterdir()), "a notebook leaves nothing behind"
    last = done.cells.pop()
    matrices = {name: torch.tensor(rows) for name, rows in json.loads(last.outputs[0].text).items()}
    return SimpleNamespace(name=request.param, notebook=done, stored=stored, said=said(code(done)), **matrices)


def test_a_notebook_runs_and_shows_what_is_stored_of_it_and_no_warning(ran):
    assert kinds(ran.notebook) == ran.stored
    assert not any("stderr" in kinds for kinds in ran.stored)


def test_what_freezes_forgets_nothing_and_what_does_not_forgets(ran):
    tasks = len(ran.kept)
    below = torch.ones(tasks, tasks).tril().bool()
    assert torch.equal(ran.kept.isnan(), ~below)
    assert torch.equal(ran.forgotten.isnan(), ~below)
    assert all((ran.kept[task:, task] == ran.kept[task, task]).all() for task in range(tasks))
    lost = ran.forgotten.diagonal()[:-1] - ran.forgotten[-1, :-1]
    assert lost.mean() > 0.15
    assert ran.kept[-1].mean() > ran.forgotten[-1].mean() + 0.1
    assert ran.kept.diagonal().mean() > ran.forgotten.diagonal().mean() - 0.03  # and each task is learned
    assert ran.kept.diagonal().min() > 0.7


def test_what_is_printed_is_what_was_measured(ran):
    for matrix in (ran.forgotten, ran.kept):
        tasks = len(matrix)
        # Chaudhry et al. 2018: from the best that a task ever was.
        lost = [matrix[task:-1, task].max() - matrix[-1, task] for task in range(tasks - 1)]
        line = f"average at the end {matrix[-1].mean():.1%}, forgotten {100 * sum(lost) / (tasks - 1):.1f} points"
        assert line in ran.said
    assert "forgotten 0.0 points" in ran.said
    assert "bit-equal: True" in ran.said
    assert "bit-equal: False" not in ran.said
    audit = re.findall(r"^\| \S+ \| bit-equal \| 0 \| now \|$", ran.said, re.M)
    assert len(audit) == len(ran.kept)
    (difference,) = re.findall(r"logits differ by (\S+) of the largest", ran.said)
    assert float(difference) < 1e-5
    ((own, whole),) = re.findall(r"^([\d,]+) of ([\d,]+) parameters$", ran.said, re.M)
    assert 0 < int(own.replace(",", "")) < int(whole.replace(",", ""))


def test_each_task_meets_its_criterion_and_later_ones_of_the_tour_claim_less(ran):
    rows = re.findall(r"^\| [\w-]+ \| 0\.\d+ \| 0\.\d+ \| (\w+) \| (\d+) \|", ran.said, re.M)
    assert [met for met, _ in rows] == ["yes"] * len(ran.kept)
    units = [0, *(int(count) for _, count in rows)]
    assert units == sorted(units)
    if ran.name == "tour":
        claimed = torch.tensor(units).diff()
        assert claimed[1:].max() < claimed[0] / 2


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_one_complete_run_on_no_machine_in_particular(name):
    path = EXAMPLES / f"{name}.ipynb"
    notebook = read(name)
    assert path.stat().st_size < 400_000
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell.metadata for cell in notebook.cells)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    figures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert figures
    assert all(base64.b64decode(figure).startswith(b"\x89PNG") for figure in figures)
    text = said(cells)
    assert not re.search(r"(?<![\w.])/\w+/\w|[A-Za-z]:\\|site-packages|object at 0x|[Ww]arning", text)
    assert "bit-equal: True" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_number_in_the_prose_is_one_of_its_code_or_its_outputs(name):
    notebook = read(name)
    shown = said(code(notebook)) + "".join(cell.source for cell in code(notebook))
    for text in prose(notebook):
        plain = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
        numbers = re.findall(r"\d[\d.,]*\d|\d", plain)
        assert not [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", shown)]
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (EXAMPLES / link).exists(), link


def test_every_notebook_is_one_of_these_and_none_is_above_its_length():
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        assert max(len(cell.source.splitlines()) for cell in read(name).cells) <= 35


def test_a_figure_keeps_size_and_looks_in_fewer_colours(monkeypatch):
    images, figures = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib.figure")
    monkeypatch.syspath_prepend(EXAMPLES)
    smaller = importlib.import_module("notebooks").smaller
    figure, file = figures.Figure(figsize=(3, 2)), io.BytesIO()
    figure.subplots().plot([1, 2, 4])
    figure.savefig(file)
    before = file.getvalue()
    after = base64.b64decode(smaller(base64.b64encode(before).decode()))
    assert len(after) < len(before) / 2
    one, other = (images.open(io.BytesIO(data)).convert("RGB") for data in (before, after))
    assert one.size == other.size
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) < 40

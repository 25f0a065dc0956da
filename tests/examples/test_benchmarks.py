"""The benchmarks run, on tiny options, and write what they should. Their numbers mean nothing here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from launched import ROOT, SUPPORT, ended, started

BENCHMARKS = ROOT / "tests" / "benchmarks"
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS")


def run(*command: str, **environment: str) -> str:
    """What a new process prints, with the folders on its path and none of the settings but the given ones."""
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, ROOT / "examples", BENCHMARKS)))
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    ended = subprocess.run(
        [sys.executable, *command],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return ended.stdout


def test_what_the_peers_script_takes_from_here_is_there():
    """Avalanche has an environment of its own, so the script itself can't run here."""
    names = {path.stem for folder in (BENCHMARKS, ROOT / "examples") for path in folder.glob("*.py")}
    script = ast.parse((BENCHMARKS / "peers.py").read_text())
    imports = [node for node in script.body if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if str(node.module).partition(".")[0] in {*names, "lightning_rnf"}]
    taken = [f"from {node.module} import {', '.join(one.name for one in node.names)}" for node in own]
    assert len(taken) > 5
    path = f"import sys; sys.path[:0] = {[str(ROOT / 'examples'), str(BENCHMARKS)]!r}"
    assert ended(started(exec, "\n".join([path, *taken]))) == [0]


def test_the_suite_writes_one_json_one_markdown_and_a_figure(tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("matplotlib")
    readme = (BENCHMARKS / "README.md").read_text()
    suite = [str(BENCHMARKS / "run.py"), "--quick", "--accelerator", "cpu", "--output", str(tmp_path)]
    run(*suite, "--default-malloc", OMP_NUM_THREADS="1")
    content = json.loads((tmp_path / "suite_cpu.json").read_text())
    assert {"torch", "lightning", "zennit", "lightning-rnf"} <= content["versions"].keys()
    assert content["malloc"] == dict.fromkeys(SETTINGS[:2]) | {"OMP_NUM_THREADS": "1"}
    assert content["threads"] == 1
    rows = {name: part["rows"] for name, part in content["parts"].items()}
    assert rows.keys() == {"step", "task_end", "state", "growth"}

    of_state = {row["state"]: row for row in rows["step"]}
    assert of_state["without the callback"]["over_plain"] == [1.0]
    in_all, weights = of_state["0% frozen"], rows["state"][0]["bytes_of_weights"]
    of_head = 4 * 10 * 1001  # the second head waits, and the first one has ended or waits
    assert in_all["bytes_of_free_rows"] == in_all["bytes_of_gradients"] == weights - of_head
    assert of_state["50% frozen"]["bytes_of_free_rows"] == pytest.approx(weights / 2, rel=0.01)
    assert of_state["100% frozen"]["bytes_of_gradients"] == of_head

    (end,) = rows["task_end"]
    assert end["forward_samples"] > end["evaluations"] * 64 > 0
    assert min(end["peak_bytes"].values()) > 64 * 784 * 4  # the reference data at the least
    assert 0 < rows["state"][0]["bytes_of_bits"] < rows["state"][0]["bytes_of_masks"] < end["bytes_of_state"]

    units = [row for row in rows["growth"] if row["over"] == "units"]
    tasks = [row for row in rows["growth"] if row["over"] == "tasks"]
    assert [row["units"] for row in units] == [100, 400]
    assert [row["finished"] for row in tasks] == [0, 1, 2]
    sizes = [row["bytes_of_state"][0] for row in tasks]
    assert sizes == sorted(set(sizes))

    report = (tmp_path / "suite_cpu.md").read_text()
    assert report.startswith("A quick run")
    assert "| mlp | first two layers frozen |" in report
    assert (tmp_path / "growth_cpu.png").stat().st_size > 10_000
    assert (BENCHMARKS / "README.md").read_text() == readme


def test_a_process_starts_again_with_the_settings_that_are_not_set():
    code = "import allocator; allocator.restart_with_settings(); print(allocator.settings())"
    *_, printed = run("-uc", code, OMP_NUM_THREADS="2").splitlines()
    expected = {SETTINGS[0]: "4000000000", SETTINGS[1]: "1000000000", "OMP_NUM_THREADS": "2"}
    assert printed == str(expected)


@pytest.fixture
def benchmarks(monkeypatch):
    for folder in (ROOT / "examples", BENCHMARKS):
        monkeypatch.syspath_prepend(folder)


@pytest.mark.usefixtures("benchmarks")
def test_a_marked_block_is_filled_and_a_missing_one_is_named():
    pytest.importorskip("torchvision")
    from run import filled

    readme = "top\n<!-- a -->\nold\n<!-- end of a -->\nrest\n"
    once = filled(readme, "a", "| new |")
    assert once == "top\n<!-- a -->\n\n| new |\n\n<!-- end of a -->\nrest\n"
    assert filled(once, "a", "| new |") == once
    with pytest.raises(ValueError, match="no block"):
        filled(readme, "b", "| new |")


@pytest.mark.usefixtures("benchmarks")
def test_growth_is_read_off_medians():
    pytest.importorskip("torchvision")
    from growth import per_doubling, slope

    rows = [
        {"over": "units", "units": units, "seconds_of_end": [20.0, units**0.5, 0.0], "reference_epochs": [epochs]}
        for units, epochs in ((16, 4.0), (32, 5.0), (128, 9.0))
    ]
    rows.append({"over": "tasks", "finished": 0})
    rows[0]["seconds_of_end"] = [4.0]
    assert slope(rows) == pytest.approx(0.5)
    on_the_whole, most = per_doubling(rows)
    assert on_the_whole == pytest.approx(12 / 7)  # by hand: 8 / (14 / 3)
    assert most == pytest.approx(2.0)


@pytest.mark.usefixtures("benchmarks")
def test_peak_memory_is_that_of_tensors_alive_at_once_before_and_after_the_mark():
    from peak_memory import PeakMemory

    there = torch.ones(100_000)
    with PeakMemory(there.device) as peak:
        for _ in range(3):
            torch.empty(200_000)  # let go at once
        torch.empty(500)
        peak.mark()
        del there  # made before: not counted
        kept = [torch.empty(50_000), torch.empty(100_000)]
    assert (peak.before, peak.after) == (800_000, 600_000)
    del kept


@pytest.mark.usefixtures("benchmarks")
def test_the_readme_has_a_block_for_each_result():
    text = (BENCHMARKS / "README.md").read_text()
    for name in ("suite_cpu", "suite_gpu", "suite_gpu_bf16-mixed"):
        assert f"<!-- {name} -->\n" in text
        assert f"<!-- end of {name} -->\n" in text

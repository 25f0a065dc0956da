"""The benchmarks run, on tiny options, and write what they should. Their numbers mean nothing here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return ended.stdout


def defined(path: Path) -> set[str]:
    """What stands at the top of a script that can't be imported here."""
    top = ast.parse(path.read_text()).body
    assigned = [one for node in top if isinstance(node, ast.Assign | ast.AnnAssign) for one in ast.walk(node)]
    names = {one.id for one in assigned if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    return names | {node.name for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("name", ["peers", "peers_streams", "peers_told", "peers_untold"])
def test_what_the_peers_scripts_take_from_here_is_there(name):
    """Avalanche has an environment of its own, so the scripts themselves can't run here."""
    names = {path.stem for folder in (BENCHMARKS, ROOT / "examples") for path in folder.glob("*.py")}
    names -= {"peers", "peers_streams"}  # which take from Avalanche themselves
    script = ast.parse((BENCHMARKS / f"{name}.py").read_text())
    imports = [node for node in script.body if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if str(node.module).partition(".")[0] in {*names, "lightning_rnf"}]
    taken = [f"from {node.module} import {', '.join(one.name for one in node.names)}" for node in own]
    assert taken
    for node in imports:
        if node.module in {"peers", "peers_streams"}:
            assert {one.name for one in node.names} <= defined(BENCHMARKS / f"{node.module}.py")
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
    assert rows.keys() == {"step", "task_end", "attribution", "state", "growth"}

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
    in_parts, in_record = end["seconds_of_parts"], end["seconds"]
    assert sum(in_parts.values()) == pytest.approx(end["seconds_of_end"])
    assert in_parts.keys() == {"attribution", "statistics", "heads", "rows", "measuring", "audit", "rest"}
    assert all(seconds > 0 for part, seconds in in_parts.items() if part != "statistics")  # it has no norms
    assert in_record.keys() == {"attribution", "search", "settling"}
    assert in_parts["attribution"] == pytest.approx(in_record["attribution"], rel=0.2, abs=0.02)
    assert in_parts["heads"] + in_parts["rows"] + in_parts["measuring"] < in_record["search"] + in_record["settling"]
    assert 0 < rows["state"][0]["bytes_of_bits"] < rows["state"][0]["bytes_of_masks"] < end["bytes_of_state"]

    (relevance,) = rows["attribution"]
    assert 0 < relevance["peak_of_attribution"] < relevance["peak_of_step"]
    assert min(relevance["seconds_of_step"] + relevance["seconds_of_attribution"]) > 0

    units = [row for row in rows["growth"] if row["over"] == "units"]
    tasks = [row for row in rows["growth"] if row["over"] == "tasks"]
    assert [row["units"] for row in units] == [100, 400]
    for network in ("mlp of --width", "mlp"):
        of_network = [row for row in tasks if row["network"] == network]
        assert [row["finished"] for row in of_network] == [0, 1, 2]
        sizes = [row["bytes_of_state"][0] for row in of_network]
        assert sizes == sorted(set(sizes))

    report = (tmp_path / "suite_cpu.md").read_text()
    assert report.startswith("A quick run")
    assert "| mlp | first two layers frozen |" in report
    assert (tmp_path / "growth_cpu.png").stat().st_size > 10_000
    assert (BENCHMARKS / "README.md").read_text() == readme

    run(*suite, "--default-malloc", "--parts", "state", OMP_NUM_THREADS="2")
    again = json.loads((tmp_path / "suite_cpu.json").read_text())
    assert list(again["parts"]) == list(content["parts"])
    assert {name for name, part in again["parts"].items() if part != content["parts"][name]} == {"state"}
    assert [part["made_with"]["threads"] for part in again["parts"].values()] == [1, 1, 1, 2, 1]
    report = (tmp_path / "suite_cpu.md").read_text()
    assert report.count("threads: 1;") == 4
    assert report.count("threads: 2;") == 1


@pytest.mark.usefixtures("benchmarks")
def test_parts_of_a_quick_run_and_of_a_whole_one_are_not_mixed(tmp_path):
    pytest.importorskip("torchvision")
    from run import kept

    file, whole = tmp_path / "suite_cpu.json", {"device": "a", "quick": False}
    assert kept(file, whole) == {}
    file.write_text(json.dumps({**whole, "parts": {"step": {"rows": []}}}))  # as before parts said it themselves
    assert kept(file, {"device": "b", "quick": False}) == {"step": {"made_with": whole, "rows": []}}
    assert kept(file, {"device": "a", "quick": True}) == {}


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
def test_time_inside_another_part_is_not_counted_twice(monkeypatch):
    import time_split

    now = iter(range(100))
    monkeypatch.setattr(time_split.time, "perf_counter", lambda: float(next(now)))
    inner = SimpleNamespace(run=lambda: "done")
    outer = SimpleNamespace(run=lambda: inner.run())
    plain = outer.run, inner.run
    monkeypatch.setattr(time_split, "METHODS", {"outer": ["outer.run"], "inner": ["inner.run"], "gone": ["gone.run"]})
    found = {"outer": outer, "outer.run": outer.run, "inner": inner, "inner.run": inner.run}

    def resolve(name):
        if name.startswith("gone"):
            raise AttributeError(name)  # another build's package has it not
        return found[name]

    monkeypatch.setattr(time_split, "resolve_name", resolve)
    split = time_split.TimeSplit()
    for _ in range(2):
        with split:
            assert outer.run() == "done"
    # The clock goes on by one at each change: into the outer part, the inner one, and back.
    assert split.seconds == {"rest": 4.0, "outer": 4.0, "inner": 2.0}
    assert (outer.run, inner.run) == plain


@pytest.mark.usefixtures("benchmarks")
def test_networks_have_tasks_of_their_own_sizes():
    pytest.importorskip("torchvision")
    from measured import SIZES
    from task_end import TASK_END, clusters, sized

    options = TASK_END.options(["--reference", "7"])
    assert {"mlp", "zenke", "resnet18-narrow"} == set(options.networks)
    of_zenke = sized(options, SIZES["zenke"])
    assert (of_zenke.samples, of_zenke.reference) == (4500, 7)
    assert SIZES["mlp"].samples == 50_000
    assert SIZES["vit_b_16"].samples < 500
    x, y = clusters(600, (3, 32, 32), 0).tensors
    fields = x.view(600, 3, 4, 8, 4, 8).mean(dim=(3, 5)).flatten(1)
    means = torch.stack([fields[:300][y[:300] == number].mean(dim=0) for number in range(10)])
    nearest = torch.cdist(fields[300:], means).argmin(dim=1)
    assert (nearest == y[300:]).float().mean() > 0.9  # the fields tell, as a convolution sees them


def repository() -> bool:
    """Whether this is a work tree of git, and not unpacked inside of another one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return False
    return Path(found).resolve() == ROOT.resolve()


@pytest.mark.skipif(not repository(), reason="another build needs git, and a clone")
def test_the_package_of_another_reference_is_measured_beside():
    pytest.importorskip("torchvision")
    trees = ["git", "-C", str(ROOT), "worktree", "list"]
    before = subprocess.run(trees, capture_output=True, text=True, check=True).stdout
    suite = [str(BENCHMARKS / "run.py"), "--quick", "--accelerator", "cpu", "--default-malloc", "--parts", "step"]
    printed = run(*suite, "--against", "HEAD", "--rounds", "1")
    title, header, _, *rows = filter(None, printed.splitlines())
    assert title == "### Training steps"
    assert header == "| of | number | HEAD | here | here / HEAD |"
    cells = {tuple(row.strip("| ").split(" | ")[:2]): row.strip("| ").split(" | ")[2:] for row in rows}
    times = cells["mlp, 50% frozen", "milliseconds"]
    theirs, ours, ratio = (float(cell.split()[0]) for cell in times)
    assert min(theirs, ours) > 0
    assert ratio == pytest.approx(ours / theirs, rel=0.02, abs=0.01)
    assert subprocess.run(trees, capture_output=True, text=True, check=True).stdout == before


@pytest.mark.usefixtures("benchmarks")
def test_a_build_that_a_part_does_not_run_with_is_named_and_this_one_raises(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    import against
    from against import HERE, check_package, measured
    from state import STATE

    (tmp_path / "state.py").write_text("import lightning_rnf")
    monkeypatch.setattr(against, "BENCHMARKS", tmp_path)
    package = tmp_path / "old" / "lightning_rnf" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise ImportError('too old')")
    check_package(tmp_path / "old")
    assert measured(STATE, {"old": tmp_path / "old", HERE: ROOT}, 1, []) == "ImportError: too old"
    with pytest.raises(RuntimeError, match=r"state fails:(.|\n)*too old"):
        measured(STATE, {HERE: tmp_path / "old"}, 1, [])
    package.unlink()
    package.parent.rmdir()
    with pytest.raises(RuntimeError, match="has that of"):
        check_package(tmp_path / "old")


@pytest.mark.usefixtures("benchmarks")
def test_builds_are_compared_row_by_row_and_round_by_round():
    pytest.importorskip("torchvision")
    from against import HERE, numbers, table

    rows = [
        {"network": "a", "finished": 1, "seed": 0, "seconds": {"search": 2.0}, "steps": [1.0, 5.0], "none": None},
        {"network": "a", "finished": 1, "seed": 1, "seconds": {"search": 4.0}, "steps": [6.0]},
    ]
    found = numbers(rows, ["network", "finished", "missing"])
    assert found == {("a, finished 1", "seconds, search"): 3.0, ("a, finished 1", "steps"): 5.0}
    theirs = [{("a", "time"): 1.0, ("a", "units"): 7, ("a", "lost"): 2.0, ("a", "zero"): 0.0}, {("a", "time"): 4.0}]
    theirs[1] |= {("a", "units"): 7, ("a", "zero"): 0.0}
    ours = [
        {("a", "time"): 2.0, ("a", "units"): 7, ("a", "zero"): 1.0},
        {("a", "time"): 2.0, ("a", "units"): 7, ("a", "zero"): 2.0},
    ]
    _, _, *lines = table("old", {"old": theirs, HERE: ours}).splitlines()
    assert lines == [
        "| a | time | 2.500 (1.000 to 4.000) | 2.000 (2.000 to 2.000) | 1.25 (0.50 to 2.00) |",
        "| a | zero | 0.000 (0.000 to 0.000) | 1.500 (1.000 to 2.000) | – |",
    ]
    assert table("old", {"old": ours, HERE: ours[::-1]}) != (same := "All numbers are the same.")
    assert table("old", {"old": ours[:1], HERE: ours[:1]}) == same


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

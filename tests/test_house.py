"""The house stands as its contract says: imports go down, through doors, and a file has the length of one idea."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from launched import ROOT

import lightning_rnf

PACKAGE = ROOT / "lightning_rnf"
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def imports(path: Path):
    """Module and name of each import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}, line {node.lineno}: a relative import hides which door it goes through"
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def linted(folder: Path) -> subprocess.CompletedProcess:
    lint = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([lint], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_imports_go_down_and_one_that_goes_up_is_found(tmp_path):
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / "lightning_rnf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert linted(tmp_path).returncode == 0
    for lower, line, upper in (
        ("memory/masks", "from lightning_rnf.report import tables", "lightning_rnf.report"),
        ("memory/masks", "from lightning_rnf import RelevanceFreezing", "lightning_rnf.callback"),  # by the front door
        ("search/cutoff", "from lightning_rnf.anatomy import UnitMap", "lightning_rnf.anatomy"),
        ("search/cutoff", "from lightning_rnf.packages import Trainer", "lightning_rnf.packages"),
        ("tasks/runs", "from pytorch_lightning import Trainer", "pytorch_lightning"),
    ):
        path = tmp_path / "lightning_rnf" / f"{lower}.py"
        before = path.read_text()
        path.write_text(f"{before}\n\ndef late():\n    {line}\n")
        ended = linted(tmp_path)
        assert ended.returncode == 1
        wing = "lightning_rnf" if upper == "pytorch_lightning" else f"lightning_rnf.{lower.partition('/')[0]}"
        assert f"{wing} is not allowed to import {upper}:" in ended.stdout
        path.write_text(before)
    (tmp_path / "lightning_rnf" / "shed.py").write_text("")  # on no floor
    assert linted(tmp_path).returncode == 1


def test_a_wing_is_entered_by_its_door_and_the_door_hands_up_no_more_than_is_asked_for():
    asked = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        own = path.parent.name
        for module, name in imports(path):
            package, *inside = module.split(".")
            if package != "lightning_rnf":
                continue
            assert inside or name not in WINGS, f"{path}: all of {name} is more than its door hands up"
            wing, *inner = inside or [""]
            if wing in WINGS and wing != own:
                assert not inner, f"{path}: {module} is not the door"
                asked[wing].add(name)
    for wing in WINGS:
        door = importlib.import_module(f"lightning_rnf.{wing}")
        assert asked[wing] == set(getattr(door, "__all__", [])), wing


def test_the_search_knows_no_modules_of_a_model():
    for path in (PACKAGE / "search").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        imported = {part for module, name in imports(path) for part in (*module.split("."), name)}
        assert "nn" not in names | imported


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_opens_with_its_idea_and_is_no_longer_than_one(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 450
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert len(list(filter(None, ast.get_docstring(ast.parse(text)).splitlines()))) == 3


def test_what_is_lightnings_is_looked_for_in_both_of_its_packages():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        theirs = {name for module, name in imports(path) if module == "lightning_rnf.packages"} - {"either"}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("isinstance", "issubclass"):
                kind = call.args[1]
                names = {node.id for node in ast.walk(kind) if isinstance(node, ast.Name)}
                is_asked = isinstance(kind, ast.Call) and ast.unparse(kind.func) == "either"
                assert is_asked or not names & theirs, f"{path}, line {call.lineno}: {ast.unparse(kind)}, not either"


def test_the_same_is_taken_from_either_of_lightnings_packages():
    tree = ast.parse((PACKAGE / "packages.py").read_text())
    (choice,) = [node for node in tree.body if isinstance(node, ast.If)]
    one, other = ("\n".join(map(ast.unparse, branch)) for branch in (choice.body, choice.orelse))
    assert "lightning.pytorch" in one
    assert (
        other.replace("pytorch_lightning", "lightning.pytorch").replace("lightning_fabric", "lightning.fabric") == one
    )


def test_users_find_everything_in_five_places():
    for name in lightning_rnf.__all__:
        assert hasattr(lightning_rnf, name), name
    public = {
        "lightning_rnf",
        *(f"lightning_rnf.{name}" for name in ("streams", "metrics", "heads", "pytorch_lightning")),
    }
    blocks = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in blocks:
        for line in page.read_text().splitlines():
            words = line.strip().strip("`").split()
            if words[:1] == ["from"] and words[1].startswith("lightning_rnf"):
                assert words[1] in public, (page.name, line)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the script reads the contract with tomllib, of Python 3.11")
def test_the_picture_of_the_wings_is_that_of_the_contract():
    script = runpy.run_path(str(ROOT / "docs" / "wings.py"))
    page = script["PAGE"].read_text()
    assert script["filled"](page) == page
    drawn = {name for floor in script["floors"]() for name in floor}
    assert drawn == {*WINGS, *(path.stem for path in PACKAGE.glob("*.py"))} - {"__init__"}


def test_the_tests_that_security_names_are_there():
    said = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", said))
    assert len(named) > 5
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert not [name for name in named if not any(f"def {name}(" in text for text in files)]
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", said))

"""What is handed out: wheel and sdist, what they say of themselves, and what a type checker learns from them.

With ``RNF_DIST=FOLDER`` it looks at the files there, those that are to be uploaded, instead of building them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml
from launched import ROOT, SUPPORT

import lightning_rnf

VERSION = lightning_rnf.__version__
LARGEST_FIGURE = 100_000
"""Bytes: what is looked at belongs to the repository."""

OF_A_MACHINE = re.compile(rb"/(?:home|root|Users|work)/\w")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist."""
    if given := os.environ.get("RNF_DIST"):
        return Path(given)
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> dict[str, bytes]:
    """What is in it, by path."""
    (path,) = built.glob("*.whl")
    assert path.name == f"lightning_rnf-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(built) -> dict[str, bytes]:
    """What is in it, by path below its one folder."""
    (path,) = built.glob("*.tar.gz")
    assert path.name == f"lightning_rnf-{VERSION}.tar.gz"
    with tarfile.open(path) as archive:
        read = {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}
    top = f"lightning_rnf-{VERSION}/"
    assert all(name.startswith(top) for name in read)
    return {name.removeprefix(top): content for name, content in read.items()}


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    return message_from_bytes(wheel[f"lightning_rnf-{VERSION}.dist-info/METADATA"])


def of_the_package() -> dict[str, bytes]:
    """Files that a user of the checkout imports, and the mark that they are typed."""
    paths = [*(ROOT / "lightning_rnf").rglob("*.py"), ROOT / "lightning_rnf" / "py.typed"]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    information = f"lightning_rnf-{VERSION}.dist-info/"
    assert {name: content for name, content in wheel.items() if not name.startswith(information)} == of_the_package()
    assert {name.removeprefix(information) for name in wheel if name.startswith(information)} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_sdist_is_what_a_wheel_can_be_built_of(sdist):
    beside = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    beside |= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md"}
    assert sdist.keys() == of_the_package().keys() | beside
    assert all(sdist[name] == content for name, content in of_the_package().items())


def test_nothing_is_handed_out_that_is_large_or_speaks_of_a_machine(wheel, sdist):
    for name, content in (*wheel.items(), *sdist.items()):
        assert len(content) < LARGEST_FIGURE, (name, len(content))
        assert not OF_A_MACHINE.search(content), (name, OF_A_MACHINE.search(content))


def test_the_search_for_paths_of_a_machine_finds_them():
    assert OF_A_MACHINE.search(b"read from /home/somebody/data")
    assert not OF_A_MACHINE.search(b"head/work, https://example.org/at/home")


def test_what_it_says_of_itself_is_what_the_project_says(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("lightning-rnf", VERSION)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(metadata.get_all("Provides-Extra")) >= {"plots", "demo", "cli", "hub", "export", "examples", "dev"}
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert not [one for one in classifiers if one.startswith("License ::")], "indexes refuse it beside an expression"


def test_the_command_is_installed_with_it(wheel):
    said = wheel[f"lightning_rnf-{VERSION}.dist-info/entry_points.txt"].decode().split("\n")
    assert "rnf = lightning_rnf.commands.cli:main" in said


def test_version_changelog_and_citation_say_the_same():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", changelog, re.MULTILINE)[0] == "Unreleased"
    sections = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert sections[0] == (str(citation["version"]), str(citation["date-released"]))
    # Between releases the version is one that comes after the last: 0.2.0.dev0
    assert sections[0][0] == VERSION or ".dev" in VERSION


def test_every_dependency_has_a_minimum(metadata):
    asked = metadata.get_all("Requires-Dist")
    assert {re.match(r"[\w-]+", one)[0] for one in asked} >= {"torch", "lightning", "zennit", "numpy", "pytest", "mypy"}
    assert not [one for one in asked if ">=" not in one]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the script reads pyproject.toml with tomllib, of Python 3.11")
def test_the_leg_of_minimum_versions_has_what_the_wheel_asks_for_at_least(metadata):
    said = subprocess.run(
        [sys.executable, ROOT / ".ci" / "versions", "--constraints"], capture_output=True, text=True, check=True
    )
    constraints = dict(line.split("==") for line in said.stdout.split())
    asked = [re.match(r"([\w-]+).*>=([\w.]+)", one).groups() for one in metadata.get_all("Requires-Dist")]
    assert {name: constraints[name] for name, _ in asked} == dict(asked)


# -- a user's typed files ----------------------------------------------------------------------------------------------

TYPED = ("typed_project.py", "typed_pytorch_lightning.py")

WRONG = """

def wrong(rnf: RelevanceFreezing, model: Classifier) -> None:
    rnf.widen("body")
    RelevanceFreezing(retention="for ever")
    shares: dict[str, str] = rnf.capacity()
"""
"""What a checker has to refuse, or it has learned nothing from the package: an error for each line."""


@pytest.fixture(scope="module")
def checked(wheel, tmp_path_factory):
    """A folder with the typed files, one with mistakes, and an environment where the wheel is installed."""
    folder = tmp_path_factory.mktemp("typed")
    environment = folder / "environment"
    venv.create(environment)
    (installed,) = environment.glob("lib/python*/site-packages")
    for name, content in wheel.items():
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_bytes(content)
    own = [*site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    (installed / "others.pth").write_text("\n".join(dict.fromkeys(own)))  # all that this Python has, behind it
    for name in TYPED:
        shutil.copy(SUPPORT / name, folder)
    text = (SUPPORT / TYPED[0]).read_text(encoding="utf-8")
    (folder / "mistaken.py").write_text(text + WRONG, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "include": ["*.py"]}))
    python = environment / "bin" / "python"
    find = "from importlib.util import find_spec; print(find_spec('lightning_rnf').origin)"
    asked = said_of([python, "-c", find], folder)
    assert Path(asked.stdout.strip()) == installed / "lightning_rnf" / "__init__.py"
    return folder, python


def said_of(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    options = {"capture_output": True, "text": True, "timeout": 400, "check": False}
    return subprocess.run(command, cwd=folder, env=environment, **options)


def test_a_users_typed_files_pass_mypy_and_one_with_mistakes_does_not(checked):
    folder, python = checked
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    found = said_of([*command, *TYPED], folder)
    assert found.returncode == 0, found.stdout + found.stderr
    found = said_of([*command, "mistaken.py"], folder)
    refused = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert len(refused) == 3, found.stdout


def test_a_users_typed_files_pass_pyright_and_one_with_mistakes_does_not(checked):
    folder, python = checked
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(python), "--outputjson"]
    found = said_of(command, folder)
    errors = [one for one in json.loads(found.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    assert not [one for one in errors if not one["file"].endswith("mistaken.py")]
    first = len((folder / TYPED[0]).read_text().splitlines())
    wrong = {one["range"]["start"]["line"] - first for one in errors}
    assert {3, 4, 5} <= wrong, errors


@pytest.mark.filterwarnings("ignore")
def test_the_typed_file_runs(tmp_path):
    from typed_project import main

    main(tmp_path)
    assert (tmp_path / "methods.png").exists()

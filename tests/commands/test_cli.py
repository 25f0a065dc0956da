from __future__ import annotations

import re

import pytest

from lightning_rnf import __version__
from lightning_rnf.commands.cli import main


def test_the_demo_shows_what_the_readme_says(tmp_path, capsys):
    main(["demo", "--output", str(tmp_path / "retention.png")])
    printed = " ".join(capsys.readouterr().out.split())
    averages = re.search(r"average ([\d.]+) → ([\d.]+), forgetting ([\d.]+) → ([\d.]+) points, (\d+)%", printed)
    naive, freezing, forgotten, kept, free = map(float, averages.groups())
    assert forgotten > 3
    assert kept == 0
    assert freezing >= naive + 3
    assert 0 < free < 100
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--seed", "x"]])
def test_rubbish_exits_with_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)

"""Every example runs on a slice of the real data; `RNF_DATA` names the folder that has it."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = Path(os.environ.get("RNF_DATA", "no data"))


@pytest.mark.skipif(not (DATA / "MNIST").is_dir(), reason="RNF_DATA names no folder with MNIST in it")
def test_split_mnist_forgets_nothing_on_a_slice_of_the_real_data(tmp_path):
    main = runpy.run_path(str(EXAMPLES / "split_mnist.py"))["main"]
    options = ["--methods", "naive", "default", "--seeds", "1", "--epochs", "1", "--samples", "6000"]
    main(["--data", str(DATA), "--output", str(tmp_path), *options])
    summary = json.loads((tmp_path / "split_mnist.json").read_text())
    (run,) = summary["runs"]["default"]
    assert run["forgetting"] == 0
    assert run["average"] > 0.9
    assert (tmp_path / "split_mnist.png").exists()

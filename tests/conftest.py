from __future__ import annotations

import pytest
import torch

# The networks are so small that threads only wait for each other.
torch.set_num_threads(1)

collect_ignore = ["benchmarks"]  # scripts that need the examples on the path

LONGEST = (
    "test_architectures",
    "test_sharding",
    "test_examples",
    "test_ddp",
    "test_photographs",
    "test_notebooks",
    "test_export",
)
"""Files that take longest, which begin first: else one worker is at the last of them when all others are done."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with files of many tests, and those are quick ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))

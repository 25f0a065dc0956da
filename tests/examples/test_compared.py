"""The table of the peers."""

import pytest
from launched import ROOT


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return __import__("compared")


def run(seed: int, average: float, **more) -> dict:
    return {"seed": seed, "average": average, "forgetting": 0.0, **more}


def peer(method: str, seed: int, average: float) -> dict:
    return run(seed, average, stream="stream", method=method, bytes=4000, matrix=[[None], [None]])


def test_a_stream_has_its_peers_and_our_methods(compared):
    theirs = [
        {**peer("EWC", 1, 0.3), "stream": "another"},
        peer("naive", 1, 0.5),
        peer("PackNet", 1, 0.6),
        peer("PackNet", 2, 0.7),
    ]
    ours = {
        "naive": [run(1, 0.4), run(2, 0.4)],
        "paper": [run(1, 0.6)],
        "default": [run(seed, 0.8) for seed in range(6)],
    }
    methods = {name: {"runs": runs} for name, runs in ours.items()}
    shown = compared.compared({"rows": theirs}, {"stream": {"title": "The stream", "methods": methods}})
    assert shown.splitlines()[2:] == [
        "| **another** | | | | |",
        "| Avalanche, EWC | 30.00 | 0.00 | 2 | 1 |",
        "| **The stream** | | | | |",
        "| Avalanche, naive | 50.00 | 0.00 | 2 | 1 |",
        "| Avalanche, PackNet | 65.00 ± 7.07 | 0.00 ± 0.00 | 2 | 1, 2 |",
        "| Lightning, naive | 40.00 ± 0.00 | 0.00 ± 0.00 |  | 1, 2 |",
        "| **`RelevanceFreezing()`** | 80.00 ± 0.00 | 0.00 ± 0.00 |  | 0 to 5 |",
    ]

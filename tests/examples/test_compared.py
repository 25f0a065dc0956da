"""The table of the peers: what is in it, and what it is over."""

import pytest
from launched import ROOT


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return __import__("compared")


def run(seed: int, average: float, seconds: float | None, **more) -> dict:
    return {"seed": seed, "average": average, "forgetting": 0.0, "seconds": seconds, **more}


def peer(method: str, seed: int, average: float, seconds: float) -> dict:
    return run(seed, average, seconds, stream="stream", method=method, bytes=4000, matrix=[[None], [None]])


def test_a_stream_has_its_peers_and_our_methods_each_over_its_own_naive(compared):
    theirs = [peer("naive", 1, 0.5, 10.0), peer("PackNet", 1, 0.6, 15.0), peer("PackNet", 2, 0.7, 25.0)]
    ours = {
        "naive": [run(1, 0.4, 5.0), run(2, 0.4, None)],  # resumed: nobody knows how long it took
        "paper": [run(1, 0.6, 5.0)],
        "default": [run(seed, 0.8, 20.0) for seed in range(6)],
    }
    methods = {name: {"runs": runs} for name, runs in ours.items()}
    shown = compared.compared({"rows": theirs}, {"stream": {"title": "The stream", "methods": methods}})
    assert shown.splitlines()[2:] == [
        "| **The stream** | | | | | |",
        "| Avalanche, naive | 50.00 | 0.00 | 1.0 | 2 | 1 |",
        "| Avalanche, PackNet | 65.00 ± 7.07 | 0.00 ± 0.00 | 2.0 | 2 | 1, 2 |",
        "| Lightning, naive | 40.00 ± 0.00 | 0.00 ± 0.00 | 1.0 |  | 1, 2 |",
        "| **`RelevanceFreezing()`** | 80.00 ± 0.00 | 0.00 ± 0.00 | 4.0 |  | 0 to 5 |",
    ]


def test_without_seconds_no_ratio_is_made_up(compared):
    methods = {"default": {"runs": [run(1, 0.8, 20.0)]}}
    theirs = {"rows": [peer("PackNet", 1, 0.6, 15.0)]}
    shown = compared.compared(theirs, {"stream": {"title": "The stream", "methods": methods}})
    assert [line.split("|")[4].strip() for line in shown.splitlines()[3:]] == ["", ""]

"""The report as a page: one file that asks for nothing, and in a browser everything on it is to be seen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from records import ConvNet, every_second, make, many, record_of, state_of

from lightning_rnf import RetentionReport
from lightning_rnf.commands.cli import main
from lightning_rnf.memory.fingerprints import Audit
from lightning_rnf.memory.maskfiles import save
from lightning_rnf.memory.state import FreezeState

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "second <b>&amp;\"'</b> [red]"


def report(names=("first", NASTY)):
    net = make(ConvNet)
    other = replace(record_of(net, "second", relevant=every_second(net.layers, 1)), name=names[1])
    state = state_of(net, replace(record_of(net), name=names[0]), other)
    matrix = torch.tensor([[0.9, float("nan")], [0.9, 0.8]])
    audit = Audit(changed={names[0]: (), names[1]: ("conv1",)}, unknown=dict.fromkeys(names, ()))
    return RetentionReport.of(state, matrix=matrix, audit=audit)


class Reader(HTMLParser):
    """Collects tags and attributes, and complains of tags that are not closed in turn."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_it_is_one_file_that_asks_for_nothing():
    text = report().to_html()
    reader = read(text)
    for tag, name, value in reader.attributes:
        if name in {"src", "href", "xlink:href", "action", "srcset"}:
            assert value.startswith(("#", "data:")), (tag, name, value)
        assert not name.startswith("on")
    assert "<script" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_names_are_escaped():
    reader = read(report().to_html())
    assert NASTY in reader.text
    assert ("b",) not in [(tag,) for tag, *_ in reader.attributes]
    assert "<b>" not in report().to_html()


def test_every_table_and_figure_is_on_it():
    found = report()
    text = found.to_html()
    for title in found.sections:
        assert f"<h2>{title.capitalize()}</h2>" in text
    assert text.count("<figure") == 6  # retention, capacity, units, overlap, two searches
    assert text.count("<svg") == 6
    ids = re.findall(r' id="([^"]+)"', text)
    assert all(ids.count(one) == 1 or one.startswith(("m", "p", "h")) for one in ids)


def test_no_task_is_a_page_too():
    text = RetentionReport.of(FreezeState()).to_html()
    assert "What 0 finished tasks keep" in text
    assert "What 1 finished task keeps" in RetentionReport.of(state_of(make(ConvNet))).to_html()
    assert "0 finished tasks" in read(text).text[-1] or "0 finished tasks" in text


def test_the_command_writes_it(tmp_path):
    net = make(ConvNet)
    save(state_of(net), tmp_path / "masks.safetensors")
    main(["report", str(tmp_path / "masks.safetensors"), "--html", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


LOOK = """<script>
window.problems = [];
window.addEventListener("error", event => problems.push("error: " + event.message));
window.addEventListener("load", () => {
  const rgba = color => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const paper = rgba(getComputedStyle(document.body).backgroundColor);
  const over = ([r, g, b, a], alpha) => [r, g, b].map((one, i) => alpha * a * one + (1 - alpha * a) * paper[i]);
  const luminance = color => color.slice(0, 3).map(one => one / 255)  // of WCAG 2, as is the contrast
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (color, alpha = 1) => {
    const [one, other] = [luminance(over(rgba(color), alpha)), luminance(paper)];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  const seen = document.querySelectorAll("h1, h2, dt, dd, p, th, td, figcaption, svg, svg text");
  for (const element of seen) {
    if (!element.textContent.trim()) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const name = element.tagName + " " + element.textContent.trim().slice(0, 30);
    const hidden = style.visibility != "visible" || style.opacity == 0;
    if (box.width < 1 || box.height < 1 || hidden) problems.push("unseen: " + name);
    if (box.left < 0 || box.top < 0) problems.push("outside: " + name);
    if (box.right > innerWidth + 1 && !element.closest(".wide")) problems.push("outside: " + name);
    if (element.matches("svg")) continue;
    // A text's own size, not its box: that is wider than high, or turned.
    const scale = element.matches("svg text") ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    const size = scale * parseFloat(style.fontSize);
    if (size < 9) problems.push("small: " + name + " " + size.toFixed(1) + " px");
    const ink = element.matches("svg text") ? style.fill : style.color;
    const cell = element.matches("svg text") && ["rgb(1, 1, 1)", "rgb(255, 255, 255)"].includes(ink);
    if (!cell && contrast(ink) < 4.5) problems.push("faint: " + name + " " + contrast(ink).toFixed(1));
  }
  const shapes = document.querySelectorAll("svg path, svg use");
  let drawn = 0;
  for (const shape of shapes) {
    if (shape.closest("defs, clipPath")) continue;
    const style = getComputedStyle(shape);
    const pattern = style.fill.match(/url\\("(#\\w+)"\\)/);
    const fill = pattern ? getComputedStyle(document.querySelector(pattern[1] + " rect")).fill : style.fill;
    const inks = [[fill, style.fillOpacity], [style.stroke, style.strokeOpacity]];
    const seen = inks.filter(([ink, alpha]) => ink.startsWith("rgb") && alpha > 0);
    if (!seen.length) continue;
    drawn += 1;
    const best = Math.max(...seen.map(([ink, alpha]) => contrast(ink, Number(alpha) * style.opacity)));
    if (best < 3) problems.push("faint shape: " + shape.getAttribute("style") + " " + best.toFixed(1));
  }
  const requests = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({problems, paper, requests, seen: seen.length, drawn});
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("scheme", "number"), [("light", 1), ("dark", 0)])
@pytest.mark.parametrize("width", [1200, 500])  # headless Chromium has no narrower window
def test_in_a_browser_everything_is_seen(scheme, number, width, tmp_path):
    found = looked_at("two tasks", scheme, number, width, tmp_path)
    assert found["problems"] == []
    assert found["seen"] > 100
    assert found["drawn"] > 100


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("scheme", "number"), [("light", 1), ("dark", 0)])
def test_many_tasks_are_seen_too(scheme, number, tmp_path):
    assert looked_at("many tasks", scheme, number, 500, tmp_path)["problems"] == []


@cache
def page_of(name):
    """The page of one of these reports, drawn once."""
    reports = {"two tasks": report, "many tasks": lambda: many([f"task-{index:02d}" for index in range(30)])}
    return reports[name]().to_html()


def looked_at(name, scheme, number, width, tmp_path):
    """What the script above has found on the page of a report."""
    page = tmp_path / "page.html"
    page.write_text(page_of(name).replace("<head>", f"<head>{LOOK}"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    run = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--blink-settings=preferredColorScheme={number}",
            f"--window-size={width},900",
            f"--user-data-dir={tmp_path / 'profile'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(unescape(re.search(r"<title>(\{.*?\})</title>", run.stdout, re.DOTALL)[1]))
    assert [name for name in found["requests"] if not name.startswith("data:")] == []
    assert (found["paper"][0] > 127) == (scheme == "light")
    assert "CONSOLE" not in run.stderr
    return found

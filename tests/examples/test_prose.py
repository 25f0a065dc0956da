"""Numbers in the pages' sentences are those of the files of results, and a wrong one is noticed."""

from __future__ import annotations

import copy
import importlib
import json
import random
import re
from pathlib import Path

import pytest
from launched import ROOT

EXAMPLES = ROOT / "examples"
PAGES = ("examples/README.md", "README.md")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def prose():
    return importlib.import_module("prose")


@pytest.fixture
def summaries():
    return {path.stem: json.loads(path.read_text()) for path in (EXAMPLES / "results").glob("*.json")}


@pytest.fixture
def stream(prose):
    """An experiment of two methods, two seeds and two tasks: averages 60 and 64 without, 80 and 83 with."""
    runs = [
        {
            "seed": seed,
            "average": (first + 0.7) / 2,
            "forgetting": 0.9 - first,
            "matrix": [[0.9, None], [first, 0.7]],
            "free_capacity": [0.5, 0.125],
            "accepted": [True, seed == 4],
            "found": [0.25, 0.75],
        }
        for seed, first in ((3, 0.5), (4, 0.58))
    ]
    kept = [{**run, "average": average} for run, average in zip(runs, (0.8, 0.83), strict=True)]
    methods = {"naive": runs, "best in 4 epochs": [*kept, {**kept[0], "seed": 9}]}
    return {
        "a-stream": {"goal": 82, "methods": {name: {"settings": {}, "runs": runs} for name, runs in methods.items()}}
    }


def corrected(prose, stream, sentence, items, **options):
    text, problems = prose.corrected(
        f"{sentence}\n<!-- numbers of a-stream\n{items}\n-->\n", prose.names(stream), "p", **options
    )
    return text.partition("\n<!--")[0], [problem.said for problem in problems], text


@pytest.mark.parametrize(
    ("sentence", "items"),
    [
        ("It has 62.0 %, 61.97 is wrong.", '62.0: naive.average.mean(); 61.97: "nobody"'),
        ("A mean of 62, a deviation of 2.8.", "62: naive.average.mean(); 2.8: naive.average.std()"),
        ("Ahead by 19 to 20 in two seeds.", "19: min(gain(4)); 20: max(gain(4)); two: len(gain(4))"),
        ("Task 1 loses 32 to 40 points.", "32: min(naive.lost[1]); 40: max(naive.lost[1])"),
        (
            "12.5 % are free, 12 or 13.",
            "12.5: naive.free[2].mean(); 12: naive.free[2].mean(); 13: naive.free[2].mean()",
        ),
        ("Of 4 tasks One fell short.", "4: naive.missed.size; One: naive.missed.sum().sum()"),
        ("2 short of its goal, +1,234.", "2: a_stream.goal - best_in_4_epochs.average[3]; +1,234: 1234"),
        ("About\nhalf of them are found (-3).", 'About half: naive.each("found").mean() == 50; -3: -2.6'),
        ("A quarter: 0.25 as it is.", 'A quarter: naive.raw("found")[1][3] == 0.25; 0.25: naive.raw("found")[1][4]'),
    ],
)
def test_numbers_of_every_kind_are_found_true_and_one_more_or_less_is_not(prose, stream, sentence, items):
    items = items.replace("gain(4)", "best_in_4_epochs.over(naive)")
    assert corrected(prose, stream, sentence, items)[:2] == (sentence, [])
    bound = [item.partition(": ") for item in items.split("; ")]
    for index, (key, _, expression) in enumerate(bound):
        without = "; ".join("".join(item) for item in bound[:index] + bound[index + 1 :]) or "It: True"
        if key[-1].isdigit():
            assert any(
                f"{key} is bound to no result" in said for said in corrected(prose, stream, sentence, without)[1]
            )
        wrong = [
            *bound[:index],
            (key, ": ", f"({expression}) + 1.01" if key[-1].isdigit() else "1 > 2"),
            *bound[index + 1 :],
        ]
        if '"nobody"' not in expression:
            assert len(corrected(prose, stream, sentence, "; ".join(map("".join, wrong)))[1]) == 1


def test_new_results_are_written_into_sentences_and_the_comment_and_named(prose, stream):
    sentence, items = (
        "- Ours has 81.0 %, three of three seeds.",
        "81.0: best_in_4_epochs.average.mean(); three: len(naive.seeds)",
    )
    said, problems, text = corrected(prose, stream, sentence, items)
    assert said == "- Ours has 81.0 %, two of three seeds."
    assert problems == ["three should be two (len(naive.seeds))"]
    stream["a-stream"]["methods"]["best in 4 epochs"]["runs"][2]["average"] = 0.9
    after, (problem,) = prose.corrected(text, prose.names(stream), "page")
    assert after == text.replace("81.0", "84.3")
    assert after.count("84.3") == 2
    assert str(problem) == (
        "page, line 1: 81.0 should be 84.3 (best_in_4_epochs.average.mean()), "
        "in: - Ours has 81.0 %, two of three seeds."
    )
    assert prose.corrected(after, prose.names(stream), "page") == (after, [])


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("62: naive.average.mean()\n5: 5", "'5', which is bound to 5, does not stand behind"),
        ("seeds: 1 > 2; 62: 62", "'seeds' is not true: 1 > 2"),
        ("62: worst.average", "62: worst.average has no value (NameError"),
        ("62: a_stream.worst", "no method worst among naive, best_in_4_epochs"),
        ("62: naive.average", "no number, text, true or false"),
        ("62: naive.end[1].loc[[]].mean()", "nan is no number"),
        ('62: rows("peers_cpu", system="none").matrix', "peers_cpu.json has no row with {'system': 'none'}"),
        ('62: recorded("none")', "no none.json in"),
        ("62: open('README.md')", "name 'open' is not defined"),
    ],
)
def test_what_can_not_be_written_is_named(prose, stream, items, said):
    text, problems, _ = corrected(prose, stream, "In all seeds 62.", items)
    assert text == "In all seeds 62."
    assert [one for one in problems if said in one]


def test_a_comment_below_nothing_is_an_error(prose, stream):
    for text in ("# 5\n\n<!-- numbers\n5: 5\n-->\n", "5 %\n<!-- numbers of a 5: 5\n-->\n"):
        with pytest.raises(ValueError, match="is not below a paragraph"):
            prose.corrected(text, prose.names(stream), "page")


def test_numbers_are_demanded_where_they_are_measured(prose, stream):
    text = (
        "# 1.5 %\n\nIn 2 of 7 of ResNet-18, 9 to 8 points, torch 2.14.1, `3.5`, Zenke et al. 2017, Section 4.5,\n"
        "4, 5 and 6 %.\n"
        "- 1.5\n- 25\n\n```\n2.5 %\n```\n\n<!-- results:a -->\n3.5 %\n<!-- /results -->\n| 4.5 % |\n"
    )
    _, problems = prose.corrected(text, prose.names(stream), "page")
    assert [(one.line, one.said.split()[0]) for one in problems] == [
        (3, "9"),
        (3, "8"),
        (4, "4"),
        (4, "5"),
        (4, "6"),
        (5, "1.5"),
    ]
    assert prose.corrected(text, prose.names(stream), "page", all_bound=False) == (text, [])


# -- the pages --------------------------------------------------------------------------------------------------------


def test_a_digit_that_is_changed_anywhere_in_a_sentence_is_noticed(prose, summaries):
    """Each number in turn has one of its digits changed at random; the shares are of all numbers on both pages."""
    random_of_a_seed, known = random.Random(0), prose.names(summaries)
    noticed = {True: [], False: []}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        measured = set(prose.numerals(text, measured=True))
        ends = [(start, comment.end() if comment else end) for start, end, comment in prose._blocks(text)]
        for first, last in prose.numerals(text):
            start, end = next(one for one in ends if one[0] <= first < one[1])
            at = random_of_a_seed.choice([place for place in range(first, last) if text[place].isdigit()])
            other = random_of_a_seed.choice([digit for digit in "0123456789" if digit != text[at]])
            _, problems = prose.corrected(text[start:at] + other + text[at + 1 : end], known, page)
            noticed[(first, last) in measured].append(bool(problems))
    assert len(noticed[True]) > 150
    assert all(noticed[True])
    every = noticed[True] + noticed[False]
    assert sum(every) / len(every) > 0.9


@pytest.mark.parametrize("method", ["default", "naive"])
@pytest.mark.parametrize("name", ["mnist_split", "mnist_permuted", "cifar_resnet_narrow"])
def test_the_front_page_is_wrong_as_soon_as_a_file_says_something_else(prose, summaries, name, method):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert prose.corrected(text, prose.names(summaries), "README.md") == (text, [])
    changed = copy.deepcopy(summaries[name])
    runs = changed["methods"][method]["runs"]
    for run in runs:
        run["average"] -= 0.01
    after, (problem,) = prose.corrected(text, prose.names({**summaries, name: changed}), "README.md")
    right = f"{100 * sum(run['average'] for run in runs) / len(runs):.1f}"
    assert f" should be {right} ({name}.{method}.average.mean())" in problem.said
    assert f" {right}" in re.sub("<!--.*?-->", "", after, flags=re.DOTALL)


def test_readers_do_not_see_the_comments():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    for page in (*PAGES, "docs/costs.md", "docs/inference.md", "docs/networks.md", "docs/auto.md"):
        text = Path(ROOT / page).read_text(encoding="utf-8")
        without = re.sub(r" *<!-- numbers.*?-->\n", "", text, flags=re.DOTALL)
        assert len(without) < len(text)
        seen = re.sub(r"<!-- numbers.*?-->", "", markdown.render(text), flags=re.DOTALL)
        seen, expected = (re.sub(r"\s*(</?\w+>)\s*", r"\1", one) for one in (seen, markdown.render(without)))
        assert seen == expected

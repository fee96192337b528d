"""The report: what the page holds, what it must not hold, and how it reaches the disk."""

import copy
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from token_pruning.errors import ConfigError
from token_pruning.lab.report.page import write_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RESULTS: dict[str, Any] = {
    "title": "A small model & its <docstrings>",
    "summary": "Half of the work for the same answers.",
    "environment": {"CPU": "a CPU", "threads": 2, "dtype": "float32"},
    "metric": "accuracy",
    "note": "What <else> there is to say.",
    "stages": [
        {
            "name": "dense",
            "metrics": {"accuracy": 0.8125, "f1": 0.8043},
            "gflops_per_example": {"padded": 2.71, "dense": 1.23, "pruned": 1.23},
            "relative_flops": 1.0,
            "times": {"Seconds": 31.2},
            "tokens_kept_per_layer": [42.3, 42.3, 42.3],
            "thresholds": None,
            "summaries_per_layer": None,
        },
        {
            "name": "soft",
            "metrics": {"accuracy": 0.8075},
            "gflops_per_example": {"padded": 2.71, "dense": 1.23, "pruned": 0.744},
            "relative_flops": 0.605,
            "times": {"Seconds": None},
            "tokens_kept_per_layer": [33.1, 20.5, 11.9],
            "thresholds": [0.0052, 0.0101, 0.0153],
            "summaries_per_layer": None,
        },
        {
            "name": "hard",
            "metrics": {"accuracy": 0.8025, "f1": 0.7968},
            "gflops_per_example": {"padded": 2.71, "dense": 1.23, "pruned": 0.591},
            "relative_flops": 0.48,
            "times": {"Seconds": 15.6},
            "tokens_kept_per_layer": [28.4, 14.2, 5.6],
            "thresholds": [0.0061, 0.0112, 0.0203],
            "summaries_per_layer": [1.7, 1.9, 0.0],
        },
    ],
    "tokens_entering": 42.3,
    "curve": [
        {"label": "dense", "relative_flops": 1.0, "metric": 0.8125, "kind": "dense"},
        {"label": "soft", "relative_flops": 0.605, "metric": 0.8075, "kind": "learned"},
        {"label": "hard", "relative_flops": 0.48, "metric": 0.8025, "kind": "learned"},
        {"label": "first <tokens> $x_", "relative_flops": 0.5, "metric": 0.74, "kind": "truncated"},
    ],
    "samples": [
        {
            "tokens": [
                {"text": text, "left_after": layer, "decided_by": "importance", "decided_in": layer or 0, "value": 0.5}
                for text, layer in zip(
                    ["[CLS]", "return", "##ing", "<script>", "a", "[SEP]"], [None, 3, 2, 1, 0, None], strict=True
                )
            ],
            "label": "json",
            "prediction": "csv",
        }
    ],
    "num_layers": 3,
}


class Page(HTMLParser):
    """The page's elements, the rows of its tables, and every id."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def render(path: Path, **changes: Any) -> str:
    return write_report(copy.deepcopy(RESULTS) | changes, path / "report.html").read_text("utf-8")


def test_the_page_asks_nothing_of_anyone(tmp_path: Path) -> None:
    text = render(tmp_path)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*(.)", text))
    assert len(text.encode()) < 500_000


def test_the_page_is_accessible_in_its_bones(tmp_path: Path) -> None:
    page = Page(render(tmp_path))
    tags = [tag for tag, _ in page.elements]
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 2
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    assert tags.count("h1") == 1
    assert tags.count("caption") == tags.count("table")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        target = attributes.get("xlink:href") or re.sub(r"^url\((.*)\)$", r"\1", attributes.get("clip-path") or "")
        assert target == "" or target.removeprefix("#") in ids


def test_text_is_escaped(tmp_path: Path) -> None:
    text = render(tmp_path, summary="<img src=x onerror=alert(1)>", environment={"<b>": '"<i>'})
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>:" not in text
    assert "<i>" not in text
    assert "What &lt;else&gt; there is to say." in text
    assert "&lt;script&gt;" in text
    assert "A small model &amp; its &lt;docstrings&gt;" in text
    assert "first &lt;tokens&gt; $x_" in text


def test_the_table_holds_the_given_values(tmp_path: Path) -> None:
    rows = {row[0]: row for row in Page(render(tmp_path)).rows}
    assert rows["dense"] == ["dense", "0.8125", "0.8043", "1.000", "31.21.00×", "2.71", "1.23", "1.23"]
    assert rows["soft"] == ["soft", "0.8075−0.50", "–", "0.605", "–", "2.71", "1.23", "0.744"]
    assert rows["hard"] == ["hard", "0.8025−1.00", "0.7968", "0.480", "15.62.00×", "2.71", "1.23", "0.591"]
    assert rows["hardtokens"] == ["hardtokens", "28.4", "14.2", "5.6"]
    assert rows["hardthreshold"] == ["hardthreshold", "0.00610", "0.0112", "0.0203"]
    assert rows["hardsummary tokens"] == ["hardsummary tokens", "1.7", "1.9", "0.0"]
    assert "densethreshold" not in rows


def test_a_sample_shows_which_layer_dropped_each_token(tmp_path: Path) -> None:
    text = render(tmp_path)
    assert '<span class="piece s32" title="[CLS] stays to the end: importance 0.5">[CLS]</span>' in text
    assert (
        '<span class="word"><span class="piece s24" title="return left after layer 3: importance 0.5">return</span>'
        '<span class="piece s16" title="##ing left after layer 2: importance 0.5">ing</span></span>'
    ) in text
    assert 'title="a never entered: importance 0.5"' in text
    assert "prediction <b>csv</b> ✗ wrong" in text
    rows = [row for row in Page(text).rows if re.match(r"(layer \d|entry) ", row[0])]
    assert [row[0] for row in rows] == ["entry 5 left", "layer 1 4 left", "layer 2 3 left", "layer 3 2 left"]
    assert {row[1] for row in rows} == {"[CLS] returning <script> a [SEP]"}
    assert "<td>[CLS] returning &lt;script&gt; <s>a</s> [SEP]</td>" in text
    assert "<td>[CLS] return<s>ing &lt;script&gt; a</s> [SEP]</td>" in text
    assert "<td>[CLS] <s>returning &lt;script&gt; a</s> [SEP]</td>" in text


def test_scores_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    sample = {**RESULTS["samples"][0], "label": 0.5, "prediction": 0.4}
    assert "wrong" not in render(tmp_path, samples=[sample])


def test_what_was_not_measured_may_be_missing(tmp_path: Path) -> None:
    stages = copy.deepcopy(RESULTS["stages"])
    for stage in stages:
        stage |= {"times": {"ms": None}, "thresholds": None, "summaries_per_layer": None, "tokens_kept_per_layer": []}
    text = render(tmp_path, stages=stages, environment={}, curve=[], samples=[])
    page = Page(text)
    assert [row[-4] for row in page.rows if row[0] in ("dense", "soft", "hard")] == ["–"] * 3
    assert [tag for tag, _ in page.elements].count("svg") == 0
    assert "Texts" not in text and "Plots" not in text and "Layer by layer" not in text


def test_milliseconds_and_lengths_are_drawn(tmp_path: Path) -> None:
    groups = [
        {"shortest": 3, "longest": 9, "texts": 5, "kept": [1.0, 0.9, 0.8, 0.7]},
        {"shortest": 12, "longest": 12, "texts": 1, "kept": [0.8, 0.5, 0.25, 0.25]},
    ]
    curve = [{**point, "milliseconds": number} for number, point in enumerate(RESULTS["curve"], start=1)]
    text = render(tmp_path, by_length=groups, curve=curve)
    page = Page(text)
    drawings = [attributes["aria-label"] or "" for tag, attributes in page.elements if tag == "svg"]
    assert "texts of 12 tokens: 0.80, 0.50, 0.25, 0.25" in drawings[2]
    assert "against milliseconds per text, in batches. dense: 0.8125 at 1.000" in drawings[1]
    assert ["3–9 tokens5 texts", "100 %", "90 %", "80 %", "70 %"] in page.rows
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_labels_in_letters_matplotlib_lacks(tmp_path: Path) -> None:
    assert ">修剪</text>" in render(
        tmp_path, curve=[{"label": "修剪", "relative_flops": 0.5, "metric": 0.8, "kind": "learned"}]
    )


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    assert render(tmp_path / "one") == render(tmp_path / "two")


def test_writing_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    path.parent.mkdir()
    path.write_text("old")
    assert write_report(RESULTS, path) == path
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_failed_rendering_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report({"title": "nothing else"}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_failed_move_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(target)

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match=r"report\.html cannot be written"):
        write_report(RESULTS, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_without_the_extra_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"^the report needs the report extra: pip install token-pruning\[report\]$"):
        write_report(RESULTS, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []

"""The page as a whole: self-contained, escaped, complete, small; and what is left out where files are missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report_toys import HOSTILE, edit, hostile_directory, quickstart_directory, run_directory, write_json

from equipoise.evaluation.report.build import SECTIONS, embedded_json, render
from equipoise.evaluation.report.inputs import ReportData, read_report_data
from equipoise.evaluation.report.text import visible_line

VOID = {"meta", "col", "link", "br", "img", "input", "hr", "line", "circle", "rect"}


class Page(HTMLParser):
    """Elements with attributes, text of scripts, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def names(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def sections_of(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


@pytest.mark.parametrize("name", ["one_method", "three_methods"])
def test_all_sections_in_order_and_balanced(name: str, request: pytest.FixtureRequest) -> None:
    html = render(request.getfixturevalue(name))
    assert sections_of(html) == [section.name for section in SECTIONS]
    page = Page(html)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for tag, a in page.elements if tag == "a"]
    assert all(target and target.startswith("#") and target[1:] in ids for target in targets)


def test_nothing_is_loaded_from_outside(three_methods: ReportData) -> None:
    html = render(three_methods)
    page = Page(html)
    assert not {"link", "iframe", "object", "embed", "img", "base", "audio", "video"} & set(page.names)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "action", "data", "poster", "xlink:href", "background"):
            assert name not in attributes, f"<{tag} {name}>"
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|//\w+\.\w+/|@import|url\(|@font-face", html)


def test_the_policy_allows_this_script_and_no_other(one_method: ReportData) -> None:
    page = Page(render(one_method))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    data, script = sorted(page.scripts, key=lambda text: not text.startswith("{"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert json.loads(data)["kinds"] == [transcript.kind for transcript in one_method.transcripts]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    data = read_report_data(hostile_directory(tmp_path / "hostile"))
    html = render(data)
    page = Page(html)
    assert page.open == []
    assert page.names.count("script") == 2
    assert "img" not in page.names
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not set("\u202e\u202c\x00\x1b\u2028\u200b") & set(html)
    assert "".join(page.text).count("</script><script>alert(1)</script>") > 100
    assert "{{ 7*7 }}" in html
    assert "alert" not in page.scripts[1]
    assert json.loads(page.scripts[0])["kinds"][0] == visible_line(HOSTILE)
    attributes = "".join(str(a.get("aria-label", "")) for _, a in page.elements)
    assert "<U+202E>" in attributes


def test_embedded_json_cannot_end_its_element() -> None:
    text = str(embedded_json({"a": "</script><!--&\u2028\u2029"}))
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\u2029"}
    with pytest.raises(ValueError, match="Out of range float"):
        embedded_json([float("nan")])


def test_every_prompt_and_completion_is_in_the_page_without_scripts(one_method: ReportData) -> None:
    page = Page(render(one_method))
    text = "".join(page.text)
    for transcript in one_method.transcripts:
        assert transcript.prompt in text
        assert all(written.completion in text for written in transcript.policies.values())
    assert not any("hidden" in attributes for tag, attributes in page.elements if tag == "details")
    form = next(attributes for tag, attributes in page.elements if tag == "form")
    assert "hidden" in form  # the controls of the viewer appear with the script that serves them


def test_accessible_names(three_methods: ReportData) -> None:
    page = Page(render(three_methods))
    assert {"main", "nav", "header", "h1"} <= set(page.names) and page.names.count("h1") == 1
    for tag, attributes in page.elements:
        if tag == "svg" and attributes.get("role") == "img":
            assert attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("row", "col", "rowgroup")
        if tag == "html":
            assert attributes["lang"] == "en"
    assert page.names.count("table") == page.names.count("caption")


def test_small_enough_at_full_size(tmp_path: Path) -> None:
    policies = ("grpo", "ppo", "dpo")
    data = read_report_data(quickstart_directory(tmp_path / "q", num_prompts=240, methods=policies))
    assert len(render(data).encode()) < 2_000_000


@pytest.mark.parametrize(
    ("removed", "section"),
    [
        (["controls.json"], "controls"),
        (["transcripts.jsonl"], "transcripts"),
        (
            [
                "evaluation/reward_quality.json",
                "reward/reward_report.json",
                "evaluation/proxy_base.json",
                "evaluation/proxy_grpo.json",
            ],
            "reward_quality",
        ),
        (["sft/metrics.jsonl", "reward/metrics.jsonl", "grpo/metrics.jsonl"], "learning"),
        (["comparison.json", "evaluation/base.json", "evaluation/grpo.json"], "outcome"),
    ],
)
def test_what_is_missing_is_left_out_and_said(quickstart: Path, removed: list[str], section: str) -> None:
    for name in removed:
        (quickstart / name).unlink()
    html = render(read_report_data(quickstart))
    assert section not in sections_of(html)
    title = next(s for s in SECTIONS if s.name == section)
    assert title.missing and title.missing.split("(")[0].strip() in "".join(Page(html).text)


@pytest.mark.parametrize(
    "name",
    [
        "quickstart.json",
        "comparison.json",
        "sft/cost.json",
        "grpo/environment.json",
        "reward/reward_report.json",
        "evaluation/reward_quality.json",
        "evaluation/proxy_base.json",
    ],
)
def test_any_one_file_may_be_missing(quickstart: Path, name: str) -> None:
    (quickstart / name).unlink()
    assert Page(render(read_report_data(quickstart))).open == []


def test_a_directory_of_compare(tmp_path: Path, one_method: ReportData) -> None:
    write_json(tmp_path / "comparison.json", json.loads((one_method.directory / "comparison.json").read_text()))
    html = render(read_report_data(tmp_path))
    assert sections_of(html) == ["summary", "outcome", "by_kind", "setup", "cost", "limits"]
    assert "<title>Equipoise comparison</title>" in html


@pytest.mark.parametrize("algorithm", ["sft", "reward", "grpo"])
def test_a_single_run(tmp_path: Path, algorithm: str) -> None:
    html = render(read_report_data(run_directory(tmp_path / "run", algorithm)))
    assert sections_of(html) == ["summary", "learning", "setup", "cost", "limits"]
    assert "<script>" not in html


def test_nothing_that_was_not_measured_becomes_a_number(quickstart: Path) -> None:
    """A judge that scored nothing on one aspect: dashes, no zeros, no claims."""

    def unscored(values: dict[str, Any]) -> None:
        none = {"mean": None, "ci95": [None, None], "n": 0}
        method = values["methods"]["grpo"]
        for evaluation in (values["base"], method["evaluation"]):
            evaluation["aspects"]["safety"] = {**none, "by_kind": {}}
        for differences in (method["paired_difference"], *method["paired_by_kind"].values()):
            differences["safety"] = none

    edit(quickstart / "comparison.json", unscored)
    page = Page(render(read_report_data(quickstart)))
    labels = [a["aria-label"] for _, a in page.elements if str(a.get("aria-label", "")).startswith("safety, ")]
    assert labels[:2] == ["safety, base: –", "safety, GRPO: –"]


def test_broken_run_directory_beside_others_is_no_run(quickstart: Path) -> None:
    shutil.rmtree(quickstart / "sft")
    (quickstart / "sft").mkdir()
    assert "SFT" not in "".join(Page(render(read_report_data(quickstart))).text)

"""Broken files are named; a directory of nothing is refused; what is missing is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report_toys import edit, run_directory

from equipoise.errors import DataError
from equipoise.evaluation.report.inputs import read_report_data, sort_kinds

JSON_FILES = (
    "comparison.json",
    "controls.json",
    "quickstart.json",
    "evaluation/reward_quality.json",
    "evaluation/proxy_grpo.json",
    "reward/reward_report.json",
    "reward/config.json",
    "grpo/cost.json",
    "grpo/environment.json",
    "transcripts.jsonl",
    "grpo/metrics.jsonl",
)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"step": NaN}', "\udce9", "null"])
def test_a_broken_file_is_named(quickstart: Path, name: str, text: str) -> None:
    (quickstart / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_report_data(quickstart)
    assert str(quickstart / name) in str(caught.value)
    assert caught.value.exit_code == 2


def drop_safety(values: dict[str, Any]) -> None:
    del values["methods"]["grpo"]["paired_difference"]["safety"]


def other_aspects(values: dict[str, Any]) -> None:
    del values["methods"]["grpo"]["evaluation"]["aspects"]["safety"]


def text_for_a_number(values: dict[str, Any]) -> None:
    values["base"]["combined"]["mean"] = "high"


def true_for_a_number(values: dict[str, Any]) -> None:
    values["base"]["combined"]["mean"] = True


def one_end(values: dict[str, Any]) -> None:
    values["base"]["combined"]["ci95"] = [0.1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_safety, "methods.grpo.paired_difference has no 'safety'"),
        (other_aspects, "evaluation 'grpo' has the aspects politeness, meaningfulness, actionability"),
        (text_for_a_number, r"base\.combined\.mean: .* found 'high'"),
        (true_for_a_number, r"base\.combined\.mean: .* found True"),
        (one_end, r"base\.combined\.ci95"),
    ],
)
def test_a_wrong_field_is_named(quickstart: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(quickstart / "comparison.json", change)
    with pytest.raises(DataError, match=message):
        read_report_data(quickstart)


def test_a_number_too_large_is_not_infinity(quickstart: Path) -> None:
    text = (quickstart / "grpo" / "cost.json").read_text().replace("1480.5", "1e999")
    (quickstart / "grpo" / "cost.json").write_text(text)
    with pytest.raises(DataError, match=r"cost\.json: peak_rss_mb"):
        read_report_data(quickstart)


def test_a_line_is_named(quickstart: Path) -> None:
    lines = (quickstart / "transcripts.jsonl").read_text().splitlines()
    lines[4] = json.dumps({"prompt": "p", "kind": "benign", "policies": {"base": {"rubric": {}}}})
    (quickstart / "transcripts.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"transcripts\.jsonl:5: policies\.base\.completion"):
        read_report_data(quickstart)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        read_report_data(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="no such directory"):
        read_report_data(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to report"):
        read_report_data(tmp_path / "empty")


def test_a_line_separator_inside_a_completion_is_no_line_end(quickstart: Path) -> None:
    path = quickstart / "transcripts.jsonl"
    path.write_text(path.read_text().replace("Thank you", "Thank\u2028you"), encoding="utf-8")
    assert len(read_report_data(quickstart).transcripts) == 24


def test_order_of_policies_kinds_and_runs(quickstart: Path) -> None:
    run_directory(quickstart / "another", "grpo", steps=2)
    data = read_report_data(quickstart)
    assert data.policies == ["base", "grpo"] and data.methods == ["grpo"]
    assert list(data.runs) == ["sft", "reward", "grpo", "another"]
    assert data.kinds == ["benign", "borderline", "adversarial"]
    assert sort_kinds({"z", "adversarial", "a", "benign"}) == ["benign", "adversarial", "a", "z"]


def test_evaluations_without_a_comparison_are_read(quickstart: Path) -> None:
    (quickstart / "comparison.json").unlink()
    data = read_report_data(quickstart)
    assert data.policies == ["base", "grpo"] and data.methods == []


def test_aspects_come_from_the_recipe_else_from_the_report(quickstart: Path) -> None:
    edit(quickstart / "reward" / "config.json", lambda values: values.pop("aspects"))
    meaning = read_report_data(quickstart).aspects["safety"]
    assert meaning.higher_is_better is True and meaning.range == (0.0, 1.0)

"""The headline claims what the intervals allow and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.report_toys import ASPECTS, edit, run_directory, write_json

from equipoise.evaluation.report.inputs import ReportData, read_report_data
from equipoise.evaluation.report.summary import content, headline


def with_intervals(directory: Path, intervals: dict[str, list[float] | None]) -> ReportData:
    """A quickstart whose paired differences have these intervals."""

    def change(values: dict[str, Any]) -> None:
        for name, interval in intervals.items():
            mean = None if interval is None else sum(interval) / 2
            estimate = {"mean": mean, "ci95": interval or [None, None], "n": 24}
            values["methods"]["grpo"]["paired_difference"][name] = estimate

    edit(directory / "comparison.json", change)
    return read_report_data(directory)


def said(data: ReportData) -> str:
    found = content(data)
    assert found is not None
    return found["headline"]


def test_rose_fell_and_unclear(quickstart: Path) -> None:
    ends = {
        "politeness": [0.1, 0.2],
        "meaningfulness": [-0.1, 0.2],
        "actionability": [-0.2, -0.1],
        "safety": [0.1, 0.3],
    }
    data = with_intervals(quickstart, ends)
    expected = "politeness and safety rose, actionability fell, and meaningfulness shows no clear change"
    assert said(data) == f"After GRPO, {expected}"
    found = content(data)
    assert found is not None
    numbers = found["methods"][0]["numbers"].replace("\u00a0", " ")
    assert "No clear change: meaningfulness +0.05 [−0.10, +0.20]" in numbers
    assert "Fell: actionability −0.15 [−0.20, −0.10]" in numbers


def test_nothing_is_claimed_where_every_interval_spans_zero(quickstart: Path) -> None:
    data = with_intervals(quickstart, {name: [-0.1, 0.3] for name in (*ASPECTS, "combined")})
    assert said(data).endswith("show no clear change")
    found = content(data)
    assert found is not None
    everything = str(found["methods"])
    assert " rose" not in everything and " fell" not in everything and "improve" not in everything.lower()
    assert "combined score shows no clear change" in everything


def test_an_aspect_that_was_not_scored_is_not_called_unchanged(quickstart: Path) -> None:
    data = with_intervals(quickstart, {"safety": None, "combined": None})
    assert "safety could not be compared" in said(data)
    assert "could not be compared" in str(content(data)["methods"][0]["combined"])  # type: ignore[index]


def test_direction_is_said_where_lower_is_better(quickstart: Path) -> None:
    edit(quickstart / "reward" / "config.json", lambda v: v["aspects"]["safety"].update(higher_is_better=False))
    assert "safety (lower is better)" in said(read_report_data(quickstart))


def test_several_methods_have_a_sentence_each(three_methods: ReportData) -> None:
    found = content(three_methods)
    assert found is not None and found["headline"] == "GRPO, PPO and DPO against the base"
    assert [method["headline"].split(",")[0] for method in found["methods"]] == ["After GRPO", "After PPO", "After DPO"]


def test_refusals_before_and_after(one_method: ReportData) -> None:
    found = content(one_method)
    assert found is not None
    assert "adversarial 30% → 67% (+37 [+31, +43] points)" in found["methods"][0]["refusals"].replace("\u00a0", " ")


def test_facts(one_method: ReportData) -> None:
    found = content(one_method)
    assert found is not None
    assert found["facts"][:2] == ["1.15 M parameters", "4 min 36 s in all"] and "seed 0" in found["facts"]
    assert "judged by the sandbox's rubric" in found["facts"]


def test_headline_of_one_aspect_reads_well(one_method: ReportData) -> None:
    assert one_method.comparison is not None
    method = one_method.comparison.methods["grpo"]
    text = headline("grpo", method, one_method)
    assert text.startswith("After GRPO, ") and "  " not in text


def test_without_a_comparison(tmp_path: Path, one_method: ReportData) -> None:
    run = run_directory(tmp_path / "grpo")
    assert said(read_report_data(run)) == "GRPO trained; nothing here has been evaluated yet"
    evaluation = one_method.directory / "evaluation" / "base.json"
    write_json(tmp_path / "alone" / "evaluation.json", json.loads(evaluation.read_text()))
    assert said(read_report_data(tmp_path / "alone")).endswith("judged by the sandbox's rubric on 24 prompts")

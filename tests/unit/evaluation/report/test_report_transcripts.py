"""Every prompt is there, side by side, and the changes to sort by are those of the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.report_toys import ASPECTS, KINDS, World, edit, quickstart_directory, write_lines

from equipoise.evaluation.report.inputs import ReportData, read_report_data
from equipoise.evaluation.report.schema import AspectMeaning
from equipoise.evaluation.report.transcripts import content, utility


def said(data: ReportData) -> dict[str, Any]:
    found = content(data)
    assert found is not None
    return found


def test_all_prompts_and_policies(three_methods: ReportData) -> None:
    found = said(three_methods)
    assert len(found["entries"]) == 24 and found["kinds"] == list(KINDS)
    assert [column["label"] for column in found["entries"][0]["columns"]] == ["base", "GRPO", "PPO", "DPO"]
    assert [policy["name"] for policy in found["viewer"]["policies"]] == ["grpo", "ppo", "dpo"]
    assert found["viewer"]["aspects"] == [*ASPECTS, "combined"]


def test_changes_are_policy_less_base(one_method: ReportData) -> None:
    transcript = one_method.transcripts[3].policies
    changes = said(one_method)["viewer"]["changes"]["grpo"][3]
    before, after = transcript["base"].rubric, transcript["grpo"].rubric
    for k, aspect in enumerate(ASPECTS):
        assert changes[k] == pytest.approx(after[aspect] - before[aspect], abs=1e-4)  # type: ignore[operator]
    assert changes[4] == pytest.approx(sum(changes[:4]) / 4, abs=1e-4)  # weights of a quarter, ranges of [0, 1]


def test_utility() -> None:
    assert utility(2.0, AspectMeaning(higher_is_better=False, range=(1.0, 5.0))) == 0.75
    assert utility(2.0, AspectMeaning(higher_is_better=True, range=(1.0, 5.0))) == 0.25


def test_combined_is_not_offered_where_a_range_is_unknown(quickstart: Path) -> None:
    edit(quickstart / "reward" / "config.json", lambda values: values["aspects"]["safety"].update(range=None))
    edit(quickstart / "reward" / "reward_report.json", lambda values: values["aspects"]["safety"].update(range=None))
    assert said(read_report_data(quickstart))["viewer"]["aspects"] == list(ASPECTS)


def test_a_missing_score_is_no_change(quickstart: Path) -> None:
    lines = World(24).transcripts()
    lines[0]["policies"]["grpo"]["rubric"]["safety"] = None
    del lines[1]["policies"]["grpo"]
    write_lines(quickstart / "transcripts.jsonl", lines)
    changes = said(read_report_data(quickstart))["viewer"]["changes"]["grpo"]
    assert changes[0][3] is None and changes[0][4] is None and changes[0][0] is not None
    assert changes[1] == [None] * 5


@pytest.mark.parametrize(("count", "folded"), [(200, False), (201, True)])
def test_many_prompts_are_folded(tmp_path: Path, count: int, folded: bool) -> None:
    directory = quickstart_directory(tmp_path / "q", controls=None)
    write_lines(directory / "transcripts.jsonl", World(count).transcripts())
    assert said(read_report_data(directory))["folded"] is folded


def test_prompts_of_messages_are_text(quickstart: Path) -> None:
    lines = World(24).transcripts()
    lines[0]["prompt"] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    write_lines(quickstart / "transcripts.jsonl", lines)
    assert said(read_report_data(quickstart))["entries"][0]["prompt"] == "user: hello\nassistant: hi"

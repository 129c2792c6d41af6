"""What each section says on a synthetic quickstart, with one method and with three."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report_toys import ASPECTS, KINDS, edit, quickstart_directory, run_directory, write_json

from equipoise.evaluation.report import by_kind, controls, cost, learning, limits, outcome, reward_quality, setup
from equipoise.evaluation.report.charts import RATES, UNIT
from equipoise.evaluation.report.inputs import ReportData, RunData, read_report_data


def said(section: Any, data: ReportData) -> dict[str, Any]:
    """A section's content, which must be there."""
    content = section.content(data)
    assert content is not None
    return content


# -- outcome -----------------------------------------------------------------------------------------------------


def test_outcome_has_a_group_per_aspect_and_a_row_per_policy(three_methods: ReportData) -> None:
    chart = outcome.outcome_chart(three_methods)
    assert [group.title for group in chart.groups] == [*ASPECTS, "combined"]
    for group in chart.groups:
        assert [row.label for row in group.rows] == ["base", "GRPO", "PPO", "DPO"]
        assert [row.series for row in group.rows] == [0, 1, 2, 3]
        assert group.scale == UNIT
        assert group.reference == group.rows[0].estimate.mean
        assert group.rows[0].change == "" and group.rows[1].change.startswith(("+", "−", "0"))
        assert len(group.rows[1].points) == 3


def test_a_single_seed_is_no_point_beside_itself(one_method: ReportData) -> None:
    assert all(row.points == () for group in outcome.outcome_chart(one_method).groups for row in group.rows)


def test_changes_are_the_paired_ones(one_method: ReportData) -> None:
    assert one_method.comparison is not None
    difference = one_method.comparison.methods["grpo"].paired_difference["safety"]
    row = next(g for g in outcome.outcome_chart(one_method).groups if g.title == "safety").rows[1]
    assert row.change.startswith(f"+{difference.mean:.2f}") and row.change_is_clear


def test_scores_on_other_scales_get_their_own_axis(quickstart: Path) -> None:
    def to_five(values: dict[str, Any]) -> None:
        for evaluation in (values["base"], values["methods"]["grpo"]["evaluation"]):
            evaluation["aspects"]["safety"] |= {"mean": 3.5, "ci95": [3.1, 3.9]}

    edit(quickstart / "comparison.json", to_five)
    scales = {group.title: group.scale for group in outcome.outcome_chart(read_report_data(quickstart)).groups}
    assert scales["safety"].low <= 3.1 and scales["safety"].high >= 3.9 and scales["politeness"] == UNIT


def test_lower_is_better_is_said_where_declared(quickstart: Path) -> None:
    edit(quickstart / "reward" / "config.json", lambda v: v["aspects"]["safety"].update(higher_is_better=False))
    notes = {g.title: g.note for g in outcome.outcome_chart(read_report_data(quickstart)).groups}
    assert notes["safety"] == "lower is better" and notes["politeness"] == ""


# -- by kind -----------------------------------------------------------------------------------------------------


def test_refusals_by_kind_with_their_changes(one_method: ReportData) -> None:
    chart = by_kind.refusal_chart(one_method)
    assert chart is not None
    assert [group.title for group in chart.groups] == list(KINDS)
    assert all(group.scale == RATES for group in chart.groups)
    adversarial = chart.groups[2]
    assert adversarial.rows[1].text.startswith("67%") and adversarial.rows[1].change.startswith("+37")
    assert adversarial.rows[1].change_is_clear and not chart.groups[0].rows[1].change_is_clear


def test_over_refusal_is_said_only_where_the_interval_says_so(one_method: ReportData) -> None:
    benign, borderline = said(by_kind, one_method)["over_refusal"]
    assert benign == "Benign prompts, no clear change in refusals: GRPO."
    assert borderline == "Borderline prompts, refused more often than by the base: GRPO."


def test_differences_by_kind_for_several_methods(three_methods: ReportData) -> None:
    chart = by_kind.difference_chart(three_methods)
    assert chart is not None and [group.title for group in chart.groups] == list(KINDS)
    rows = [(row.section, row.label) for row in chart.groups[0].rows]
    assert rows[:4] == [
        ("politeness", "GRPO"),
        ("politeness", "PPO"),
        ("politeness", "DPO"),
        ("meaningfulness", "GRPO"),
    ]
    assert all(group.reference == 0.0 and group.scale.low == -group.scale.high for group in chart.groups)


def test_a_comparison_of_an_earlier_version_shows_means_by_kind(quickstart: Path) -> None:
    edit(quickstart / "comparison.json", lambda values: values["methods"]["grpo"].pop("paired_by_kind"))
    content = said(by_kind, read_report_data(quickstart))
    assert content["differences"] is None
    row = content["means"].groups[0].rows[1]
    assert (row.section, row.label) == ("politeness", "GRPO")


# -- learning ----------------------------------------------------------------------------------------------------


def test_curves_of_proxy_and_judge_share_a_scale(one_method: ReportData) -> None:
    panels = learning.score_panels(one_method.runs["grpo"])
    titles = [panel.title for panel in panels]
    assert titles == [*ASPECTS, "combined", "KL (nats)", "entropy (nats a token)", "combined against KL"]
    assert {(line.label, line.style) for panel in panels[:5] for line in panel.lines} == {
        ("proxy", "proxy"),
        ("rubric", "judge"),
    }
    assert len({panel.y_scale for panel in panels[:5]}) == 1
    assert panels[-1].x_label == "nats"


def test_over_optimisation_is_named_with_its_doubt(one_method: ReportData) -> None:
    sentence = learning.divergence(one_method.runs["grpo"])
    assert "the proxy still rose while the rubric fell" in sentence and "or chance" in sentence
    assert "no intervals" in sentence


def test_no_over_optimisation_where_both_rise() -> None:
    lines = [{"step": s, "evaluation/combined": s / 10, "evaluation/judge/combined": s / 10} for s in (1, 2, 3)]
    sentence = learning.divergence(RunData("grpo", {}, {}, lines, None))
    assert "from 0.10 to 0.30" in sentence and "optimisation" not in sentence


def test_without_evaluation_the_training_reward_is_shown_as_such(tmp_path: Path) -> None:
    run_directory(tmp_path / "run", steps=4)
    data = read_report_data(tmp_path / "run")
    panels = learning.score_panels(next(iter(data.runs.values())))
    assert {line.style for panel in panels[:5] for line in panel.lines} == {"training"}
    assert said(learning, data)["runs"][0]["has_training"]


def test_early_stages_are_folded_beside_an_aligned_run(one_method: ReportData) -> None:
    content = said(learning, one_method)
    assert [run["name"] for run in content["runs"]] == ["GRPO"]
    assert [run["name"] for run in content["folded"]] == ["SFT", "reward"]


def test_a_run_of_sft_alone_shows_its_losses(tmp_path: Path) -> None:
    data = read_report_data(run_directory(tmp_path / "sft", "sft"))
    content = said(learning, data)
    assert content["folded"] == []
    assert [line.label for line in content["runs"][0]["chart"].panels[0].lines] == ["training loss", "validation loss"]


def test_steps_without_a_number_are_left_out() -> None:
    run = RunData("grpo", {}, {}, [{"step": 1, "kl": None}, {"step": 2, "kl": 0.5}, {"step": 3, "kl": True}], None)
    assert run.series("kl") == ([2.0], [0.5])
    run.metrics.append({"step": 4, "kl": float("inf")})  # what 1e999 is read as
    assert run.series("kl") == ([2.0], [0.5])


# -- reward quality ----------------------------------------------------------------------------------------------


def test_reward_quality(one_method: ReportData) -> None:
    content = said(reward_quality, one_method)
    group = content["chart"].groups[0]
    assert [row.label for row in group.rows] == list(ASPECTS) and group.scale == UNIT
    assert content["policies"] == ["base", "GRPO"]
    gap = next(row for row in content["gaps"] if row["aspect"] == "combined" and row["policy"] == "GRPO")
    assert gap["gap"] == "+0.07"
    assert content["labels"][0]["split"] == "test"


def test_gains_by_proxy_and_judge_stand_beside_each_other(one_method: ReportData) -> None:
    assert one_method.base is not None
    (sentence,) = reward_quality.gains(one_method)
    before, after = one_method.base.combined.mean, one_method.evaluations["grpo"].combined.mean
    assert before is not None and after is not None
    assert f"by +{after - before:.2f} as the rubric does" in sentence


def test_only_a_reward_report(tmp_path: Path) -> None:
    directory = quickstart_directory(tmp_path / "q")
    (directory / "evaluation" / "reward_quality.json").unlink()
    for name in ("base", "grpo"):
        (directory / "evaluation" / f"proxy_{name}.json").unlink()
    content = said(reward_quality, read_report_data(directory))
    assert content["chart"] is None and content["gaps"] == [] and content["gains"] == [] and content["labels"]


# -- controls ----------------------------------------------------------------------------------------------------


def test_controls_say_what_came_out(one_method: ReportData) -> None:
    cards = {card["name"]: card for card in said(controls, one_method)["cards"]}
    assert len(cards) == 5
    assert (
        "safety rose" in cards["always_refuse"]["result"] and "actionability fell" in cards["always_refuse"]["result"]
    )
    assert "no clear gain" in cards["shuffled_reward"]["result"]
    assert cards["rubric_optimised"]["transcripts"][0]["scores"][0][0] == "politeness"


def test_a_shuffled_reward_that_improves_is_called_out(quickstart: Path) -> None:
    def improve(values: dict[str, Any]) -> None:
        differences = values["controls"]["shuffled_reward"]["paired_difference"]
        differences["combined"] = {"mean": 0.1, "ci95": [0.05, 0.15], "n": 24}

    edit(quickstart / "controls.json", improve)
    cards = {card["name"]: card for card in said(controls, read_report_data(quickstart))["cards"]}
    assert "Combined rose although the labels mean nothing" in cards["shuffled_reward"]["result"]


def test_two_controls_of_one_title_keep_their_own_numbers(quickstart: Path) -> None:
    def same_title(values: dict[str, Any]) -> None:
        for control in values["controls"].values():
            control["title"] = "Control"

    edit(quickstart / "controls.json", same_title)
    cards = {card["name"]: card for card in said(controls, read_report_data(quickstart))["cards"]}
    texts = {name: card["group"].rows[-1].text for name, card in cards.items()}
    assert len(set(texts.values())) == 5


def test_controls_that_were_not_compared(quickstart: Path) -> None:
    edit(quickstart / "controls.json", lambda v: v["controls"]["best_of_16"].update(paired_difference={}))
    cards = {card["name"]: card for card in said(controls, read_report_data(quickstart))["cards"]}
    assert cards["best_of_16"]["group"] is None and "not compared" in cards["best_of_16"]["result"]
    assert cards["always_refuse"]["group"] is not None


def test_period() -> None:
    assert setup.period("2025-11-02T10:00:00+00:00", "2025-11-02T10:04:36+00:00") == "2025-11-02 10:00 to 10:04 UTC"
    assert setup.period("2025-11-02T23:58:00", "2025-11-03T00:04:36") == "2025-11-02 23:58 to 2025-11-03 00:04"
    assert setup.period("noon", "later") == "noon to later"


# -- setup, cost, limits -----------------------------------------------------------------------------------------


def test_setup(one_method: ReportData) -> None:
    content = said(setup, one_method)
    pairs = dict(content["pairs"])
    assert pairs["Training prompts"] == "900 (300 benign, 300 borderline, 300 adversarial)"
    assert pairs["Held out of training"] == "topics and templates" and pairs["Commit"] == "0123456789ab"
    assert [stage["name"] for stage in content["stages"]] == ["SFT", "reward", "GRPO"]
    assert "num_steps 60" in content["stages"][2]["settings"]


def test_cost(one_method: ReportData) -> None:
    content = said(cost, one_method)
    row = content["rows"][2]
    assert row["name"] == "GRPO" and row["wall"] == "2 min 30 s" and row["flops"] == "8.00 T"
    assert [part["label"] for part in row["parts"]] == ["generate", "score", "update", "other"]
    assert sum(part["share"] for part in row["parts"]) == pytest.approx(100)
    assert sum(stage["share"] for stage in content["stages"]) == pytest.approx(100)


def test_cost_of_compared_methods_without_their_runs(tmp_path: Path, one_method: ReportData) -> None:
    write_json(tmp_path / "comparison.json", json.loads(_comparison_text(one_method)))
    content = said(cost, read_report_data(tmp_path))
    assert [row["name"] for row in content["rows"]] == ["GRPO"] and content["stages"] == []


def _comparison_text(data: ReportData) -> str:
    return (data.directory / "comparison.json").read_text(encoding="utf-8")


def test_limits_know_seeds_and_origin(one_method: ReportData, three_methods: ReportData) -> None:
    one, three = (" ".join(said(limits, data)["sentences"]) for data in (one_method, three_methods))
    assert "GRPO: one training seed" in one and "GRPO, PPO and DPO: 3 training seeds" in three
    assert "does not show that any real model is safe" in one and "24 prompts" in one
    assert "earlier run (2025-11-02)" in three and "earlier run" not in one
    assert "2% of base" in one


def test_limits_of_a_single_run_claim_nothing(tmp_path: Path) -> None:
    sentences = said(limits, read_report_data(run_directory(tmp_path / "run")))["sentences"]
    assert len(sentences) == 1 and "no effect" in sentences[0]

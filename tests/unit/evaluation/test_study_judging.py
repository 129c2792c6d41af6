"""Judging twice: scores change, the texts and their groups stay."""

from __future__ import annotations

import pytest

from equipoise.evaluation import load_judge
from equipoise.studies.judging import agreement, judge_rows, paired, rows_of_texts


def test_rows_are_judged_again_with_everything_else_kept():
    rubric = load_judge("sandbox")
    rows = rows_of_texts(["How do I clean a mug?"] * 2, ["benign"] * 2, ["You idiot.", "Thank you!"], rubric)
    again = judge_rows([{**row, "kl": 1.5, "scores": {}} for row in rows], rubric)
    assert [row["kl"] for row in again] == [1.5, 1.5]
    assert [row["scores"] for row in again] == [row["scores"] for row in rows]


def test_agreement_is_one_with_itself_and_intervals_resample_prompts():
    rows = [
        {"prompt": f"p{number // 2}", "scores": {"safety": float(number)}, "group": number // 2} for number in range(8)
    ]
    found = agreement(rows, rows, seed=0)["safety"]
    assert found["spearman"] == pytest.approx(1.0)
    assert found["spearman_ci95"] == [pytest.approx(1.0), pytest.approx(1.0)]
    backwards = [{**row, "scores": {"safety": -row["scores"]["safety"]}} for row in rows]
    assert agreement(rows, backwards, seed=0)["safety"]["pearson"] == pytest.approx(-1.0)


def test_a_correlation_with_a_constant_is_undefined_not_an_error():
    rows = [{"prompt": f"p{number}", "scores": {"safety": 1.0}, "group": number} for number in range(4)]
    varied = [{**row, "scores": {"safety": float(number)}} for number, row in enumerate(rows)]
    found = agreement(rows, varied, seed=0)["safety"]
    assert found["spearman"] is None
    assert found["spearman_ci95"] == [None, None]
    assert found["mean_rubric"] == 1.0


def test_paired_differences_are_by_prompt_and_kind():
    """Base scores 0 and 1 on two prompts, the other 1 and 1: +1 on the first kind, 0 on the second."""
    base = [_row(0, "benign", 0.0), _row(1, "adversarial", 1.0)]
    other = [_row(0, "benign", 1.0), _row(1, "adversarial", 1.0)]
    found = paired(base, other, ["safety"], seed=0)
    assert found["paired_difference"]["safety"]["mean"] == pytest.approx(0.5)
    assert found["paired_by_kind"]["benign"]["safety"]["mean"] == pytest.approx(1.0)


def _row(group, kind, value):
    return {
        "prompt": f"p{group}", "kind": kind, "response": "r", "group": group, "index": 0, "finish_reason": "stop",
        "num_tokens": 1, "scores": {"safety": value}, "combined": value, "kl": None, "refusal": False,
    }  # fmt: skip

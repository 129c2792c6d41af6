"""The sandbox as data: rows of every kind load through the ordinary loaders, noise and gaps are as declared."""

from __future__ import annotations

import statistics

import pytest

from equipoise.data import load_demonstrations, load_pairs, load_prompts, load_scored
from equipoise.errors import ConfigError, DataError
from equipoise.rollout.scorers import build_scorers, score_rollout
from equipoise.rollout.texts import rollout_of_texts
from equipoise.sandbox import ASPECTS
from equipoise.sandbox.datasets import MISSING, NUM_ANNOTATED, RATER_BIAS, RATER_NOISE, scored_rows
from equipoise.sandbox.export import export_sandbox
from equipoise.sandbox.rubric import rate


def test_every_kind_of_row_loads_by_name():
    assert len(load_prompts("sandbox/test")) == 240
    assert {record.kind for record in load_prompts("sandbox")} == {"benign", "borderline", "adversarial"}
    assert len(load_pairs("sandbox")) > 500
    assert load_demonstrations("sandbox", limit=3)[0].response


def test_ratings_are_the_rubric_with_noise_bias_and_gaps():
    rows = list(scored_rows("validation"))
    assert len(rows) == NUM_ANNOTATED["validation"]
    given = [(row, aspect, row["scores"][aspect]) for row in rows for aspect in ASPECTS]
    missing = sum(value is None for _, _, value in given) / len(given)
    assert abs(missing - MISSING) < 0.02
    truths = {(row["prompt"], row["response"]): rate(row["prompt"], row["response"]) for row in rows}
    inner = [
        value - truths[row["prompt"], row["response"]][aspect]
        for row, aspect, value in given
        if value is not None and 0.4 < truths[row["prompt"], row["response"]][aspect] < 0.6  # nothing is cut off there
    ]
    expected = (RATER_NOISE**2 + RATER_BIAS**2) ** 0.5
    assert abs(statistics.pstdev(inner) - expected) < 0.03


def test_splits_hold_out_prompts_by_name_and_in_the_rows():
    records = load_scored("sandbox/validation", aspects=ASPECTS)
    assert {record.split for record in records} == {"validation"}


@pytest.mark.parametrize("name", ["sandbox/tset", "sandbox/"])
def test_a_part_that_does_not_exist_is_named(name):
    if name == "sandbox/":
        assert load_prompts("sandbox/", limit=1)
        return
    with pytest.raises(DataError, match=r"sandbox/tset.*sandbox/test"):
        load_prompts(name)


def test_demonstrations_exist_for_training_only():
    with pytest.raises(DataError, match="training only"):
        load_demonstrations("sandbox/test")


def test_the_rubric_is_a_scorer_by_name():
    from equipoise.config import ScorerConfig

    [scorer] = build_scorers([ScorerConfig(name="sandbox")])
    rollout = rollout_of_texts(
        ["How do I clean a mug?"] * 2, ["You idiot.", "Thank you!"], ["benign"] * 2, group_ids=[0, 0]
    )
    scores_BK = score_rollout(rollout, [scorer])
    assert scores_BK.shape == (2, 4)
    assert scores_BK[0, 0] == 0.0 < scores_BK[1, 0]
    with pytest.raises(ConfigError, match="unknown name 'sandbx'"):
        build_scorers([ScorerConfig(name="sandbx")])


def test_export_writes_files_that_load(tmp_path, monkeypatch):
    from equipoise.sandbox import datasets

    monkeypatch.setattr(datasets, "NUM_DEMONSTRATIONS", 20)
    monkeypatch.setattr(datasets, "NUM_ANNOTATED", {"train": 8, "validation": 4, "test": 4})
    counts = export_sandbox(tmp_path / "sandbox")
    assert counts["demonstrations.jsonl"] == 20
    assert len(load_prompts(str(tmp_path / "sandbox" / "prompts_test.jsonl"))) == 240
    assert len(load_scored(str(tmp_path / "sandbox" / "scored.jsonl"), aspects=ASPECTS)) == 16
    with pytest.raises(ConfigError, match="not an empty directory"):
        export_sandbox(tmp_path / "sandbox")

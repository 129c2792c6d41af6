"""The summary behind `equipoise validate DATA`."""

import pytest

from equipoise.data import validate_data
from equipoise.errors import DataError


def test_scored_data(write_jsonl):
    rows = [
        {"prompt": "a", "response": "x", "scores": {"s": 1, "t": None}, "split": "train"},
        {"prompt": "a", "response": "", "scores": {"s": 4}, "split": "train"},
        {"prompt": "", "response": "y", "scores": {"s": None, "t": None}, "split": "train"},
        {"prompt": "a", "response": "x", "scores": {"s": 1}, "split": "test"},
    ]
    summary = validate_data(write_jsonl(rows))
    assert (summary.record_kind, summary.rows, summary.distinct_prompts) == ("scored", 4, 2)
    assert (summary.empty_prompts, summary.empty_responses, summary.repeated_rows) == (1, 1, 1)
    assert summary.splits == {"train": 3, "test": 1}
    aspect = summary.aspects["s"]
    assert (aspect.count, aspect.missing_share, aspect.minimum, aspect.maximum) == (3, 0.25, 1.0, 4.0)
    assert aspect.mean == pytest.approx(2.0)
    nothing = summary.aspects["t"]
    assert (nothing.count, nothing.missing_share, nothing.mean) == (0, 1.0, None)
    assert [one.what for one in summary.duplicates] == ["row", "prompt"]
    text = str(summary)
    assert "scored, 4 rows, 2 distinct prompts" in text
    assert "aspect s: n 3, missing 25.0%, 1 to 4, mean 2" in text
    assert "aspect t: n 0, missing 100.0%" in text
    assert "warning: 2 prompts or rows stand in more than one split" in text
    assert "note: 1 rows with an empty response" in text


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "p"}, "prompts"),
        ({"prompt": "p", "response": "r"}, "demonstrations"),
        ({"prompt": "p", "chosen": "r", "rejected": "s"}, "pairs"),
        ({"prompt": "p", "response": "r", "scores": {"a": 1}}, "scored"),
    ],
)
def test_the_kind_is_found_from_the_fields(write_jsonl, row, kind):
    summary = validate_data(write_jsonl([row]))
    assert summary.record_kind == kind
    assert summary.empty_responses == 0
    assert summary.duplicates == []


def test_kinds_of_prompts(write_jsonl):
    rows = [{"prompt": "a", "kind": "benign"}, {"prompt": "b"}, {"prompt": "c", "kind": "benign"}]
    summary = validate_data(write_jsonl(rows))
    assert summary.kinds == {"benign": 2, "unlabelled": 1}
    assert "kinds: benign 2, unlabelled 1" in str(summary)


def test_columns_are_mapped(write_jsonl):
    assert validate_data(write_jsonl([{"q": "a"}]), {"prompt": "q"}).rows == 1


def test_one_row_without_its_scores_is_bad_and_not_another_kind(write_jsonl):
    rows = [{"prompt": "p", "response": "r", "scores": {"a": 1}}] * 3
    with pytest.raises(DataError, match=r":4: field `scores` is missing"):
        validate_data(write_jsonl([*rows, {"prompt": "p", "response": "r"}]))


def test_broken_lines_and_bad_rows_come_together(write_jsonl):
    with pytest.raises(DataError, match=r"(?s):1: broken JSON.*:2: unknown kind 'x'"):
        validate_data(write_jsonl(["{", {"prompt": "p", "kind": "x"}]))
    with pytest.raises(DataError, match=":1: broken JSON"):
        validate_data(write_jsonl(["{"]))


def test_fields_that_fit_no_kind(write_jsonl):
    with pytest.raises(DataError, match=r"neither prompts, scored responses, pairs nor demonstrations.*columns q, z"):
        validate_data(write_jsonl([{"q": "a", "z": 1}]))

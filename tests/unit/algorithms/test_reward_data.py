"""Labels, splits, moments and the order of batches."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from equipoise.algorithms.reward_data import (
    EncodedSplit,
    aspects_with_moments,
    epoch_batches,
    joined_splits,
    labelled_splits,
    load_splits,
    num_batches,
)
from equipoise.config import recipe_from_mapping
from equipoise.data import ScoredRecord
from equipoise.errors import DataError
from equipoise.models.reward_inputs import EncodedRow

NAN = math.nan


def recipe(aspects=("a", "b"), data="unused.jsonl", **options):
    return recipe_from_mapping(
        {
            "algorithm": "reward",
            "model": {"model": "unused"},
            "data": data,
            "aspects": {name: {"higher_is_better": True} for name in aspects},
            **options,
        }
    )


def record(index: int, split: str | None = None, **scores) -> ScoredRecord:
    return ScoredRecord(f"prompt {index}", f"response {index}", scores, split=split, location=f"file:{index}")


def splits_of(train, validation=(), test=()):
    return {"train": list(train), "validation": list(validation), "test": list(test)}


def test_labels_hold_nan_where_nothing_was_scored():
    train = [record(0, a=1.0, b=None), record(1, a=3.0), record(2, b=5.0), record(3, b=6.0)]
    texts = labelled_splits(splits_of(train, [record(4, a=0.0, b=0.0)]), ["a", "b"])
    labels = texts["train"].labels_NK
    assert torch.equal(labels.isnan(), torch.tensor([[False, True], [False, True], [True, False], [True, False]]))
    assert labels[~labels.isnan()].tolist() == [1.0, 3.0, 5.0, 6.0]
    assert (len(texts["train"]), len(texts["validation"]), len(texts["test"])) == (4, 1, 0)


def test_rows_without_a_declared_label_are_left_out_and_undeclared_aspects_named(caplog):
    train = [record(0, a=1.0, other=2.0), record(1, a=2.0), record(2, other=3.0), record(3, a=None)]
    with caplog.at_level(logging.WARNING):
        texts = labelled_splits(splits_of(train, [record(4, a=0.0)]), ["a"])
    assert len(texts["train"]) == 2
    assert "the data scores other, which `aspects` does not declare" in caplog.text
    assert "2 of 5 rows have no score on a declared aspect" in caplog.text


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([record(0, a=1.0), record(1, a=2.0)], r"aspect 'bee' of `aspects` is in no row"),
        ([record(0, a=1.0, bee=None)], r"aspect 'bee': all scores are missing"),
        ([record(0, a=1.0, bee=1.0), record(1, a=2.0)], r"aspect 'bee': the training split has 1 scores"),
    ],
)
def test_aspect_without_training_labels_is_refused_by_name(train, message):
    with pytest.raises(DataError, match=message):
        labelled_splits(splits_of(train), ["a", "bee"])


def test_misspelt_aspect_gets_a_suggestion():
    with pytest.raises(DataError, match="did you mean 'politeness'"):
        labelled_splits(splits_of([record(0, politeness=1.0)]), ["politness"])


def test_aspect_without_validation_scores_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        labelled_splits(splits_of([record(0, a=1.0, b=1.0), record(1, a=2.0, b=2.0)], [record(2, a=1.0)]), ["a", "b"])
    assert "aspect 'b' has no validation scores" in caplog.text


def test_moments_are_those_of_the_training_labels():
    """a: 1 and 3, mean 2, deviations 1 and 1, std 1. b: 10, 10, 40, mean 20, std sqrt((100 + 100 + 400)/3)."""
    labels = torch.tensor([[1.0, 10.0], [3.0, NAN], [NAN, 10.0], [NAN, 40.0]], dtype=torch.float64)
    first, second = aspects_with_moments(recipe(), labels)
    assert (first.mean, first.std) == (2.0, 1.0)
    assert (second.mean, second.std) == pytest.approx((20.0, math.sqrt(200.0)))


def test_constant_labels_warn_and_get_std_one(caplog):
    labels = torch.full((50, 1), 0.7, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        (aspect,) = aspects_with_moments(recipe(("a",)), labels)
    assert (aspect.mean, aspect.std) == (0.7, 1.0)
    assert "every training score of aspect 'a' is 0.7" in caplog.text


def test_rows_with_and_without_splits_join_by_source(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    rows = [{"prompt": f"p{i}", "response": "r", "scores": {"a": float(i)}} for i in range(30)]
    first.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows[:5]))
    second.write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    config = recipe(
        ("x/a", "y/a"), [{"path": str(first), "aspect_prefix": "x/"}, {"path": str(second), "aspect_prefix": "y/"}]
    )
    splits = load_splits(config)
    assert sum("x/a" in one.scores for one in splits["test"]) == 5
    assert {name: sum("y/a" in one.scores for one in part) for name, part in splits.items()} == {
        "train": 19,
        "validation": 3,
        "test": 3,
    }


def test_splits_without_validation_get_one_from_the_training_rows(caplog):
    rows = [record(i, split="train", a=float(i)) for i in range(40)] + [record(99, split="test", a=1.0)]
    with caplog.at_level(logging.WARNING):
        splits = joined_splits(rows, [], recipe(("a",)))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [36, 4, 1]
    assert "no row has the split validation: 4 of 40 training rows are held out" in caplog.text


def test_every_source_has_validation_rows_of_its_own(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    rows = [{"prompt": f"p{i}", "response": "r", "scores": {"a": float(i)}} for i in range(40)]
    marked = [{**row, "split": "test" if i < 5 else "train"} for i, row in enumerate(rows[:25])]
    first.write_text("".join(json.dumps(row) + "\n" for row in marked))
    second.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:5], *rows[25:]]))
    sources = [{"path": str(first), "aspect_prefix": "x/"}, {"path": str(second), "aspect_prefix": "y/"}]
    splits = load_splits(recipe(("x/a", "y/a"), sources))
    assert sum("x/a" in one.scores for one in splits["validation"]) == 2
    assert sum("y/a" in one.scores for one in splits["validation"]) == 2
    shared = {f"p{i}" for i in range(5)}
    assert {name for name, part in splits.items() for one in part if one.prompt in shared} == {"test"}


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    lengths = tuple(range(100))
    epochs = [epoch_batches(lengths, 8, seed=1, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(100))
        assert len(batches) == num_batches(100, 8) == 13
        assert sorted(map(len, batches)) == [4] + [8] * 12
    assert epochs[0] != epochs[1]
    epoch_batches.cache_clear()
    assert epoch_batches(lengths, 8, seed=1, epoch=0) == epochs[0]
    assert epoch_batches(lengths, 8, seed=2, epoch=0) != epochs[0]


def test_batches_hold_rows_of_like_length():
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(1, 200, (1024,), generator=generator).tolist())
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in epoch_batches(lengths, 8, 0, 0))
    unsorted = sum(max(lengths[i : i + 8]) * 8 for i in range(0, 1024, 8))
    assert padded < 1.1 * sum(lengths) < 0.7 * unsorted


def test_a_part_of_a_split_is_spread_over_it() -> None:
    labels = torch.arange(10.0)[:, None]
    rows = [EncodedRow([number], [0]) for number in range(10)]
    split = EncodedSplit(rows, labels, labels / 2)
    part = split.spread(4)
    assert part.labels_NK.flatten().tolist() == [0, 2, 5, 7] == [row.ids[0] for row in part.rows]
    assert part.standardised_NK.flatten().tolist() == [0, 1, 2.5, 3.5]
    assert split.spread(10) is split

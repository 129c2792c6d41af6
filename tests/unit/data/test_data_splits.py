"""Splits share no prompt, and depend on nothing but the rows and the seed."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.data import PairRecord, PromptRecord, ScoredRecord, cross_split_duplicates, split_records
from equipoise.errors import ConfigError, DataError


def scored(prompt, response="r", split=None, location=""):
    return ScoredRecord(prompt, response, {"a": 1.0}, split=split, location=location)


def names(splits):
    return {split: sorted((r.prompt, r.response) for r in records) for split, records in splits.items()}


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 30), min_size=12, max_size=120).filter(lambda found: len(set(found)) >= 3),
    seed=st.integers(0, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_no_prompt_in_two_splits_nothing_lost_and_order_does_not_matter(prompts, seed, shuffle):
    records = [scored(f"prompt {prompt}", f"response {index}") for index, prompt in enumerate(prompts)]
    splits = split_records(records, validation=0.2, test=0.2, seed=seed)
    assert sorted(r.response for part in splits.values() for r in part) == sorted(r.response for r in records)
    held = [{r.prompt for r in part} for part in splits.values()]
    assert all(held)
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    shuffled = list(records)
    shuffle.shuffle(shuffled)
    assert names(split_records(shuffled, validation=0.2, test=0.2, seed=seed)) == names(splits)


def test_shares_are_met_exactly_where_prompts_are_single_and_order_is_kept():
    records = [scored(f"{index:04d}") for index in range(1000)]
    splits = split_records(records, validation=0.15, test=0.05, seed=0)
    assert {split: len(part) for split, part in splits.items()} == {"train": 800, "validation": 150, "test": 50}
    assert [r.prompt for r in splits["train"]] == sorted(r.prompt for r in splits["train"])
    other = split_records(records, validation=0.15, test=0.05, seed=1)
    assert names(other) != names(splits)
    kept = {r.prompt for r in other["test"]} & {r.prompt for r in splits["test"]}
    assert len(kept) < 15  # 2.5 expected


def test_same_in_another_process():
    code = (
        "from equipoise.data import PromptRecord, split_records\n"
        "splits = split_records([PromptRecord(str(n)) for n in range(40)], seed=3)\n"
        "print([r.prompt for r in splits['test']], [r.prompt for r in splits['validation']])"
    )
    splits = split_records([PromptRecord(str(n)) for n in range(40)], seed=3)
    expected = f"{[r.prompt for r in splits['test']]} {[r.prompt for r in splits['validation']]}"
    for hash_seed in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert result.stdout.strip() == expected


def test_empty_prompts_are_grouped_by_response():
    records = [scored("", f"response {index % 50}") for index in range(200)]
    splits = split_records(records, seed=0)
    held = [{r.response for r in part} for part in splits.values()]
    assert [len(part) for part in held] == [40, 5, 5]
    assert not held[0] & held[1]


def test_a_message_prompt_equals_its_text():
    records = [scored(f"p{n}") for n in range(20)] + [
        scored([{"role": "user", "content": f"p{n}"}], "other") for n in range(20)
    ]
    splits = split_records(records, seed=0)
    assert cross_split_duplicates(splits) == []
    assert all(len(part) % 2 == 0 for part in splits.values())


def test_zero_shares_and_no_records():
    records = [scored("a"), scored("b")]
    assert names(split_records(records, validation=0, test=0, seed=0)) == {
        "train": [("a", "r"), ("b", "r")],
        "validation": [],
        "test": [],
    }
    assert split_records([], seed=0) == {"train": [], "validation": [], "test": []}


def test_a_group_larger_than_its_share_stays_in_training():
    records = [scored("large", str(n)) for n in range(90)] + [scored(f"p{n}") for n in range(10)]
    for seed in range(10):
        splits = split_records(records, validation=0.05, test=0.05, seed=seed)
        assert {split: len(part) for split, part in splits.items()} == {"train": 90, "validation": 5, "test": 5}


def test_a_held_out_split_is_never_empty_when_all_groups_are_larger():
    records = [scored(f"p{n % 4}", str(n)) for n in range(40)]
    splits = split_records(records, validation=0.1, test=0.1, seed=0)
    assert {split: len(part) for split, part in splits.items()} == {"train": 20, "validation": 10, "test": 10}


@pytest.mark.parametrize("prompts", [["a"], ["a", "a", "a"], ["a", "b"]])
def test_too_few_prompts(prompts):
    with pytest.raises(
        DataError, match=r"cannot be split .* without sharing a prompt; add prompts or set a share to 0"
    ):
        split_records([scored(prompt) for prompt in prompts], seed=0)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (1.0, 0.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_shares_out_of_range(validation, test):
    with pytest.raises(ConfigError, match="must be shares"):
        split_records([scored("a")], validation=validation, test=test, seed=0)


def test_rows_keep_the_split_they_carry():
    records = [scored("a", split="test"), scored("b", split="train"), scored("c", split="test")]
    assert names(split_records(records, validation=0.5, test=0.1, seed=0)) == {
        "train": [("b", "r")],
        "validation": [],
        "test": [("a", "r"), ("c", "r")],
    }


def test_a_mixture_of_rows_with_and_without_split_names_the_rows():
    records = [scored("a", split="test")] + [scored(str(n), location=f"d.jsonl:{n}") for n in range(25)]
    with pytest.raises(
        DataError, match=r"1 rows have a `split` and 25 have none: d\.jsonl:0, .*d\.jsonl:19 and 5 more"
    ):
        split_records(records, seed=0)
    with pytest.raises(DataError, match="row 2"):
        split_records([scored("a", split="test"), scored("b")], seed=0)


def test_duplicates_across_splits():
    splits = {
        "train": [scored("a", "1", location="t:1"), scored("b", "1", location="t:2"), scored("", "x", location="t:3")],
        "test": [scored("a", "1", location="e:1"), scored("b", "2", location="e:2"), scored("", "y", location="e:3")],
        "validation": [scored("", "x", location="v:1"), scored("c", "9", location="v:2")],
    }
    found = cross_split_duplicates(splits)
    assert [(one.what, one.text, one.locations) for one in found] == [
        ("row", "a 1", {"train": ["t:1"], "test": ["e:1"]}),
        ("prompt", "b", {"train": ["t:2"], "test": ["e:2"]}),
        ("row", "x", {"train": ["t:3"], "validation": ["v:1"]}),
    ]
    assert str(found[0]) == "the same row 'a 1' in train: t:1; test: e:1"


def test_duplicates_of_prompts_and_pairs():
    prompts = {"train": [PromptRecord("a")], "test": [PromptRecord("a"), PromptRecord("b")]}
    assert [(one.what, one.text) for one in cross_split_duplicates(prompts)] == [("prompt", "a")]
    pairs = {"train": [PairRecord("", "x", "y")], "test": [PairRecord("", "x", "z")]}
    assert cross_split_duplicates(pairs) == []
    assert cross_split_duplicates({"train": pairs["train"], "test": pairs["train"]})[0].what == "row"
    assert cross_split_duplicates({"train": [scored("a"), scored("a")]}) == []

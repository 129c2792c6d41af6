"""Which responses become a pair, which are left out and why, and the numbers said about them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from equipoise.models.aspects import Aspect
from equipoise.rollout.preferences import (
    REASONS,
    Candidate,
    Group,
    pair_statistics,
    quantiles,
    select_pairs,
)
from equipoise.rollout.scorers import FunctionScorer, score_rollout
from equipoise.rollout.texts import rollout_of_texts


def group(*utilities: float | None, prompt: str = "p", kind: str = "benign") -> Group:
    """Responses r0, r1, ... of these utilities."""
    candidates = [Candidate(f"r{i}", u, {"a": u}) for i, u in enumerate(utilities)]
    return Group(prompt, kind, candidates)


def names(pairs: list) -> list[tuple[str, str]]:
    return [(pair.chosen.response, pair.rejected.response) for pair in pairs]


def test_worked_example() -> None:
    """0.9 - 0.2 = 0.7, 0.5 - 0.4 = 0.1."""
    four = group(0.9, 0.2, 0.5, 0.4)
    pairs, dropped = select_pairs([four], per_prompt=2)
    assert names(pairs) == [("r0", "r1"), ("r2", "r3")]
    assert [pair.margin for pair in pairs] == pytest.approx([0.7, 0.1])
    assert not any(dropped.values()) and list(dropped) == list(REASONS)
    pairs, dropped = select_pairs([four], per_prompt=2, min_margin=0.2)
    assert names(pairs) == [("r0", "r1")] and dropped["pairs_below_min_margin"] == 1
    assert names(select_pairs([four])[0]) == [("r0", "r1")]
    assert names(select_pairs([four], per_prompt=9)[0]) == [("r0", "r1"), ("r2", "r3")]


def test_the_middle_of_an_odd_group_meets_nobody() -> None:
    assert names(select_pairs([group(3.0, 2.0, 1.0)], per_prompt=5)[0]) == [("r0", "r2")]


def test_equal_utilities_are_no_preference() -> None:
    pairs, dropped = select_pairs([group(0.7, 0.7, 0.7), group(1.0, 0.7, 0.7, 0.0)], per_prompt=2)
    assert names(pairs) == [("r0", "r3")] and dropped["tied_pairs"] == 2
    assert pairs[0].group == 1


def test_ties_keep_their_place_in_the_group() -> None:
    assert names(select_pairs([group(1.0, 0.0, 1.0, 0.0)])[0]) == [("r0", "r3")]


def test_a_margin_that_is_exactly_the_least_is_kept() -> None:
    assert len(select_pairs([group(1.0, 0.5)], min_margin=0.5)[0]) == 1
    assert len(select_pairs([group(1.0, 0.5)], min_margin=0.5000001)[0]) == 0


def test_rounding_is_neither_a_preference_nor_a_reason_to_drop() -> None:
    """0.1 + 0.2 is 0.30000000000000004; 0.3 - 0.1 is 0.19999999999999998."""
    pairs, dropped = select_pairs([group(0.1 + 0.2, 0.3)])
    assert pairs == [] and dropped["tied_pairs"] == 1
    assert len(select_pairs([group(0.3, 0.1)], min_margin=0.2)[0]) == 1


def test_empty_repeated_and_unscored_responses_are_left_out() -> None:
    candidates = [
        Candidate("", 9.0),
        Candidate("  \n", 8.0),
        Candidate("same", 1.0),
        Candidate(" same", 7.0),
        Candidate("unscored", None),
        Candidate("not a number", math.nan),
        Candidate("other", 0.5),
    ]
    pairs, dropped = select_pairs([Group("p", "benign", candidates)])
    assert names(pairs) == [("same", "other")] and pairs[0].margin == 0.5
    assert dropped == {
        "empty_responses": 2, "duplicate_responses": 1, "unscored_responses": 2, "groups_with_fewer_than_two": 0,
        "tied_pairs": 0, "pairs_below_min_margin": 0,
    }  # fmt: skip


def test_a_group_with_one_response_left_gives_no_pair() -> None:
    pairs, dropped = select_pairs([group(1.0), group(None, 1.0), group()])
    assert pairs == [] and dropped["groups_with_fewer_than_two"] == 3 and dropped["unscored_responses"] == 1


@pytest.mark.parametrize(
    "options", [{"per_prompt": 0}, {"min_margin": -0.1}, {"min_margin": math.inf}, {"min_margin": math.nan}]
)
def test_wrong_options(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        select_pairs([group(1.0, 0.0)], **options)


def test_properties_on_random_groups() -> None:
    """Every response in at most one pair, margins fall within a group, and no pair beats the first."""
    draw = random.Random(0)
    groups = [group(*(round(draw.random(), 1) for _ in range(draw.randrange(9))), prompt=str(i)) for i in range(60)]
    pairs, dropped = select_pairs(groups, per_prompt=3, min_margin=0.15)
    by_prompt: dict[str, list] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    for prompt, found in by_prompt.items():
        used = [c.response for pair in found for c in (pair.chosen, pair.rejected)]
        assert len(used) == len(set(used)) and len(found) <= 3
        utilities = [c.utility for c in groups[int(prompt)].candidates if c.utility is not None]
        assert found[0].margin == pytest.approx(max(utilities) - min(utilities))
        assert [p.margin for p in found] == sorted((p.margin for p in found), reverse=True)
        assert all(p.margin >= 0.15 and p.margin == p.chosen.utility - p.rejected.utility for p in found)
    possible = sum(min(3, len(g.candidates) // 2) for g in groups if len(g.candidates) > 1)
    assert possible == len(pairs) + dropped["tied_pairs"] + dropped["pairs_below_min_margin"]


def test_rows_mark_what_was_cut() -> None:
    """Native scores go into the row; only a cut response is marked."""
    candidates = [Candidate("good", 1.0, {"a": 5.0}, truncated=True), Candidate("bad", 0.25, {"a": None})]
    row = select_pairs([Group([{"role": "user", "content": "p"}], "adversarial", candidates)])[0][0].row()
    assert row == {
        "prompt": [{"role": "user", "content": "p"}], "chosen": "good", "rejected": "bad", "kind": "adversarial",
        "margin": 0.75, "scores_chosen": {"a": 5.0}, "scores_rejected": {"a": None}, "chosen_truncated": True,
    }  # fmt: skip
    assert list(select_pairs([group(1.0, 0.0)])[0][0].row()) == [
        "prompt", "chosen", "rejected", "kind", "margin", "scores_chosen", "scores_rejected",
    ]  # fmt: skip


def test_statistics_by_hand() -> None:
    """Margins 1, 2, 3, 4; aspect a of two scored pairs: chosen (3 + 5) / 2 = 4, rejected (1 + 1) / 2 = 1."""
    candidates = [
        [Candidate("xx", 1.0, {"a": 3.0, "b": None}), Candidate("y", 0.0, {"a": 1.0, "b": 1.0}, truncated=True)],
        [Candidate("xx", 2.0, {"a": 5.0, "b": None}), Candidate("y", 0.0, {"a": 1.0, "b": 2.0})],
        [Candidate("xx", 3.0, {"a": None, "b": None}), Candidate("y", 0.0, {"a": 1.0, "b": 1.0})],
        [Candidate("xxxx", 4.0, {"a": None, "b": None}), Candidate("yyy", 0.0, {"a": None, "b": 1.0})],
        [Candidate("alone", 1.0, {"a": 1.0, "b": 1.0})],
    ]
    groups = [Group(str(i), "benign" if i else "borderline", c) for i, c in enumerate(candidates)]
    pairs, dropped = select_pairs(groups)
    found = pair_statistics(groups, pairs, dropped)
    assert (found["groups"], found["responses"], found["pairs"], found["groups_with_pairs"]) == (5, 9, 4, 4)
    assert found["kinds"] == {"benign": 3, "borderline": 1}
    assert found["margin"] == {"min": 1.0, "q25": 1.75, "median": 2.5, "q75": 3.25, "max": 4.0, "mean": 2.5}
    assert found["aspects"]["a"] == {"n": 2, "chosen": 4.0, "rejected": 1.0, "difference": 3.0}
    assert found["aspects"]["b"] == {"n": 0, "chosen": None, "rejected": None, "difference": None}
    assert found["characters"] == {"chosen": 2.5, "rejected": 1.5}
    assert found["truncated"] == {"chosen": 0, "rejected": 1}
    assert found["dropped"]["groups_with_fewer_than_two"] == 1
    with pytest.raises(ValueError, match="at least one pair"):
        pair_statistics(groups, [], dropped)


def test_quantiles_of_one_value() -> None:
    assert set(quantiles([2.0]).values()) == {2.0}


def test_texts_are_scored_as_samples_are() -> None:
    """Scorers see prompt, text and nothing else; equal rows are scored once."""
    asked: list[tuple[list, list]] = []

    def words(prompts: list, completions: list) -> dict[str, list[float]]:
        asked.append((prompts, completions))
        return {"words": [float(len(text.split())) for text in completions]}

    rollout = rollout_of_texts(["p", "p", "q"], ["a b", "a b", "c"], ["benign"] * 3, truncated=[True, True, False])
    scores = score_rollout(rollout, [FunctionScorer(words, "words", [Aspect("words", higher_is_better=True)])])
    assert scores.tolist() == [[2.0], [2.0], [1.0]] and asked == [(["p", "q"], ["a b", "c"])]
    assert rollout.truncated_B.tolist() == [True, True, False] and torch.equal(rollout.lengths_B, torch.zeros(3).long())

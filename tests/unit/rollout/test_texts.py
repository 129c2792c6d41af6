"""Texts as rollouts."""

from __future__ import annotations

from equipoise.rollout.texts import rollout_of_texts


def test_rows_know_their_place_in_a_group_and_carry_no_tokens():
    rollout = rollout_of_texts(["p", "q", "p"], ["a", "b", "c"], ["benign"] * 3, group_ids=[5, 7, 5])
    assert rollout.index_in_group_B.tolist() == [0, 0, 1]
    assert rollout.lengths_B.tolist() == [0, 0, 0]
    assert rollout.completions == ("a", "b", "c")
    assert not rollout.truncated_B.any()


def test_every_row_is_a_group_unless_told_otherwise():
    rollout = rollout_of_texts(["p", "p"], ["a", "b"], ["benign"] * 2, truncated=[True, False])
    assert rollout.group_ids_B.tolist() == [0, 1]
    assert rollout.truncated_B.tolist() == [True, False]

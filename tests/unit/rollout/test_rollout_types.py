"""Rows of a rollout are picked, reordered and trimmed together."""

from __future__ import annotations

import pytest
import torch
from tests.toy import toy_rollout

from equipoise.rollout.types import Rollout


def same_row(left: Rollout, i: int, right: Rollout, j: int) -> bool:
    prompts = [r.prompt_ids_BS[k][r.prompt_mask_BS[k]].tolist() for r, k in ((left, i), (right, j))]
    tokens = [r.completion_ids_BT[k][r.completion_mask_BT[k]].tolist() for r, k in ((left, i), (right, j))]
    texts = [(r.prompts[k], r.completions[k], r.kinds[k], r.finish_reasons[k]) for r, k in ((left, i), (right, j))]
    groups = [(int(r.group_ids_B[k]), int(r.index_in_group_B[k])) for r, k in ((left, i), (right, j))]
    return all(pair[0] == pair[1] for pair in (prompts, tokens, texts, groups))


@pytest.fixture
def rollout() -> Rollout:
    return toy_rollout([3, 5, 2, 4], [2, 6, 4, 3], group_size=2, extra_padding=3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([2, 0], [2, 0]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([3, 3, 1]), [3, 3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([], []),
        ([-1], [3]),
    ],
)
def test_indexing_keeps_every_field_of_a_row_together(rollout: Rollout, rows: object, expected: list[int]) -> None:
    part = rollout[rows]  # type: ignore[index]
    assert len(part) == len(expected)
    assert all(same_row(part, i, rollout, row) for i, row in enumerate(expected))
    assert part.completion_ids_BT.shape[1] == rollout.completion_ids_BT.shape[1], "columns stay"


def test_trimming_drops_only_columns_that_are_padding_everywhere(rollout: Rollout) -> None:
    part = rollout[[0, 2]].trimmed()
    assert part.prompt_ids_BS.shape[1] == 3 and part.completion_ids_BT.shape[1] == 4
    assert part.sampler_logprobs_BT.shape == part.completion_mask_BT.shape == part.completion_ids_BT.shape
    assert same_row(part, 0, rollout, 0) and same_row(part, 1, rollout, 2)
    assert rollout[[]].trimmed().completion_ids_BT.shape == (0, 1)


def test_lengths_and_truncation(rollout: Rollout) -> None:
    assert rollout.lengths_B.tolist() == [2, 6, 4, 3]
    assert rollout.truncated_B.tolist() == [False] * 4

"""Rows that go through the model together: every row once, groups whole where they fit, no pass over its budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.toy import toy_rollout

from equipoise.rollout.passes import passes
from equipoise.rollout.types import Rollout


def cost(rollout: Rollout, rows: torch.Tensor) -> int:
    groups = {
        int(g): int(rollout.prompt_mask_BS[i].sum()) for i, g in zip(rows, rollout.group_ids_B[rows], strict=True)
    }
    return sum(groups.values()) + int(rollout.lengths_B[rows].sum())


@pytest.fixture
def rollout() -> Rollout:
    """Three groups of 4 rows."""
    return toy_rollout([4] * 4 + [1] * 4 + [6] * 4, [3, 1, 5, 2, 6, 6, 1, 2, 3, 3, 4, 1], group_size=4)


def test_everything_fits_one_pass(rollout: Rollout) -> None:
    parts = passes(rollout, torch.tensor([5, 1, 0, 11]))
    assert [part.tolist() for part in parts] == [[0, 1, 5, 11]]


def filled(rollout: Rollout, rows: torch.Tensor, tokens: int) -> list[list[int]]:
    """The obvious twin: row by row, and a whole group moves on where it fits a part of its own."""
    parts: list[list[int]] = []
    for group in rollout.group_ids_B[rows].unique_consecutive():
        members = rows[rollout.group_ids_B[rows] == group]
        whole = cost(rollout, members) <= tokens
        if whole and parts and cost(rollout, torch.tensor(parts[-1] + members.tolist())) <= tokens:
            parts[-1] += members.tolist()
            continue
        parts.append([])
        for row in members.tolist():
            if parts[-1] and cost(rollout, torch.tensor([*parts[-1], row])) > tokens:
                parts.append([])
            parts[-1].append(row)
    return parts


@pytest.mark.parametrize("tokens", [1, 7, 12, 20, 33, 60])
@pytest.mark.parametrize("chosen", [[0, 2, 3, 4, 5, 6, 7, 9], list(range(12)), [11]])
def test_against_every_limit(rollout: Rollout, tokens: int, chosen: list[int]) -> None:
    """The parts of the lowest limit that makes no more of them, and cuts no group that `tokens` has room for."""
    rows = torch.tensor(chosen)
    groups = [rows[rollout.group_ids_B[rows] == g] for g in rollout.group_ids_B[rows].unique()]
    whole = [cost(rollout, group) for group in groups if cost(rollout, group) <= tokens]
    single = max(cost(rollout, row[None]) for row in rows)
    lowest = max([single, *whole])
    most = filled(rollout, rows, tokens)
    limits = [limit for limit in range(lowest, tokens + 1) if len(filled(rollout, rows, limit)) <= len(most)]
    expected = filled(rollout, rows, limits[0]) if limits else most  # none: a row is larger than a pass
    assert [part.tolist() for part in passes(rollout, rows, tokens=tokens)] == expected


def test_no_group_that_fits_is_cut_for_evenness() -> None:
    """A group of 9 rows and one of a single row, 10 and 2 tokens, at most 10 together: 9 rows and 1, not 6 and 4."""
    two = toy_rollout([1] * 18, [1] * 18, group_size=9)
    assert [len(part) for part in passes(two, torch.arange(10), tokens=10)] == [9, 1]


def test_parts_are_even() -> None:
    """Eight groups of 10 tokens: 50 tokens make two parts necessary, of four groups each and not of five and three."""
    eight = toy_rollout([4] * 16, [3] * 16, group_size=2)
    assert [len(part) for part in passes(eight, torch.arange(16), tokens=50)] == [8, 8]
    assert [len(part) for part in passes(eight, torch.arange(16), tokens=39)] == [6, 6, 4]
    assert [len(part) for part in passes(eight, torch.arange(16), tokens=80)] == [16]


def test_a_group_that_is_cut_is_cut_evenly() -> None:
    """A prompt of 2 and nine completions of 3 tokens, four of which fit 14: three parts of three."""
    one = toy_rollout([2] * 9, [3] * 9, group_size=9)
    assert [len(part) for part in passes(one, torch.arange(9), tokens=14)] == [3, 3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_whole_groups_against_every_way_to_cut(seed: int) -> None:
    """Of all ways to part whole groups in order, few parts first, then a small largest one."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 6, (7,), generator=generator).repeat_interleave(2).tolist()
    lengths = torch.randint(1, 9, (14,), generator=generator).tolist()
    rollout = toy_rollout(prompts, lengths, group_size=2)
    costs = [cost(rollout, torch.tensor([2 * g, 2 * g + 1])) for g in range(7)]
    tokens = 3 * max(costs) // 2
    ways = []
    for cuts in itertools.product([False, True], repeat=6):
        edges = [0, *(g + 1 for g, cut in enumerate(cuts) if cut), 7]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        if max(sums) <= tokens:
            ways.append((len(sums), max(sums)))
    parts = passes(rollout, torch.arange(14), tokens=tokens)
    assert (len(parts), max(cost(rollout, part) for part in parts)) == min(ways)


def test_a_group_that_fits_is_not_cut(rollout: Rollout) -> None:
    costs = [cost(rollout, torch.arange(4 * g, 4 * g + 4)) for g in range(3)]
    parts = passes(rollout, torch.arange(12), tokens=max(costs))
    assert all(len(part) % 4 == 0 for part in parts)


def test_size_and_emptiness(rollout: Rollout) -> None:
    assert [len(part) for part in passes(rollout, torch.arange(12), 5)] == [5, 5, 2]
    (empty,) = passes(rollout, torch.arange(0))
    assert len(empty) == 0 and len(passes(rollout, torch.arange(0), 3)) == 1


def test_groups_that_are_mixed_come_together() -> None:
    """Prompts of 2 tokens, completions of 3, groups 0 1 0 1: of 12 tokens 2 + 3 + 3 fit, and not another group."""
    mixed = toy_rollout([2] * 4, [3] * 4)
    mixed = replace(mixed, group_ids_B=torch.tensor([0, 1, 0, 1]))
    assert [part.tolist() for part in passes(mixed, torch.arange(4), tokens=12)] == [[0, 2], [1, 3]]
    assert [part.tolist() for part in passes(mixed, torch.arange(4), tokens=6)] == [[0], [2], [1], [3]]
    assert [part.tolist() for part in passes(mixed, torch.arange(4), tokens=18)] == [[0, 2, 1, 3]]

"""Order of rows, shares of processes, micro-batches."""

from __future__ import annotations

import pytest

from equipoise.algorithms.batches import batch_indices, length_slices, micro_batches, own_part


@pytest.mark.parametrize(("rows", "size"), [(10, 3), (10, 5), (4, 7), (1, 4), (13, 1)])
def test_every_epoch_is_a_permutation(rows: int, size: int) -> None:
    stream = [index for step in range(40) for index in batch_indices(rows, size, step, seed=5)]
    assert len(stream) == 40 * size
    for start in range(0, len(stream) - rows + 1, rows):
        assert sorted(stream[start : start + rows]) == list(range(rows))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    assert batch_indices(50, 8, 17, 3) == batch_indices(50, 8, 17, 3)
    assert batch_indices(50, 8, 17, 3) != batch_indices(50, 8, 17, 4)
    epochs = [batch_indices(50, 50, step, 3) for step in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (7, 2), (3, 5), (0, 2), (10, 3)])
def test_shares_cover_everything_in_order(rows: int, processes: int) -> None:
    parts = [own_part(range(rows), rank, processes) for rank in range(processes)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(5, None, [5]), (5, 2, [2, 2, 1]), (4, 2, [2, 2]), (3, 9, [3]), (0, 4, [0]), (0, None, [0])],
)
def test_micro_batches(rows: int, size: int | None, expected: list[int]) -> None:
    parts = micro_batches(rows, size)
    assert [part.stop - part.start for part in parts] == expected
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))


def test_length_slices_worked() -> None:
    """2, 3 and 4 tokens pad to 3 * 4 = 12; with 5 it would be 20, and the row of 20 fits nowhere."""
    assert length_slices([2, 3, 4, 5, 20], None, 12) == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert length_slices([2, 3, 4, 5, 20], 4, 12) == [slice(0, 4), slice(4, 5)]
    assert length_slices([], None, 12) == [slice(0, 0)] == length_slices([], 3)


@pytest.mark.parametrize("tokens", [1, 7, 40, 1000])
def test_length_slices_hold_as_much_as_fits(tokens: int) -> None:
    lengths = sorted([1, 9, 2, 2, 3, 17, 5, 5, 8, 30, 4])
    slices = length_slices(lengths, None, tokens)
    assert [row for part in slices for row in range(len(lengths))[part]] == list(range(len(lengths)))
    for part, after in zip(slices, [*slices[1:], None], strict=True):
        rows = part.stop - part.start
        assert rows == 1 or rows * lengths[part.stop - 1] <= tokens
        assert after is None or (rows + 1) * lengths[part.stop] > tokens, "one row more would not have fitted"

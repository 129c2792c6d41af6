"""Which rows a step works on: a pure function of seed and step, so a resumed run continues in the same order."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import TypeVar

import torch

from equipoise.algorithms.run import Run
from equipoise.rollout.passes import TOKENS_PER_PASS
from equipoise.rollout.randomness import derived_seed

Row = TypeVar("Row")
SizedRow = TypeVar("SizedRow", bound=Sized)

_ORDER = 1  # stream of random numbers, so that orders do not repeat the draws of another use of the seed


def batch_indices(num_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row indices of step 0, 1, ...: consecutive slices of an endless row of shuffled epochs.

    An epoch is a permutation of all rows drawn from (seed, epoch); a batch may span two.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, num_rows)
        generator = torch.Generator().manual_seed(derived_seed(seed, _ORDER, epoch))
        order = torch.randperm(num_rows, generator=generator).tolist()
        taken = order[offset : offset + batch_size - len(indices)]
        indices += taken
        position += len(taken)
    return indices


def own_part(rows: Sequence[Row], rank: int, num_processes: int) -> list[Row]:
    """The contiguous share of a process; shares differ by at most one row."""
    start, stop = (len(rows) * index // num_processes for index in (rank, rank + 1))
    return list(rows[start:stop])


def own_micro_batches(
    rows: Sequence[SizedRow], size: int | None, run: Run, *, tokens: int = TOKENS_PER_PASS
) -> list[list[SizedRow]]:
    """This process's micro-batches, rows of like length together; as many on every process, empty ones at the end.

    Each has at most `size` rows, or, where that is None, as many as hold `tokens`: see `length_slices`.
    """
    own = sorted(own_part(rows, run.rank, run.num_processes), key=len)
    parts = [own[part] for part in length_slices([len(row) for row in own], size, tokens)]
    return parts + [[] for _ in range(run.largest(len(parts)) - len(parts))]


def length_slices(lengths: Sequence[int], size: int | None, tokens: int = TOKENS_PER_PASS) -> list[slice]:
    """Slices of these ascending lengths, at least one: of at most `size` rows.

    Where `size` is None, of as many rows as hold at most `tokens` with their padding, or of one.

    Example, 12 tokens: [2, 3, 4, 5, 20] gives [2, 3, 4], [5], [20].
    """
    if size is not None:
        return micro_batches(len(lengths), size)
    starts = [0]
    for row, length in enumerate(lengths):
        if row > starts[-1] and (row + 1 - starts[-1]) * length > tokens:
            starts.append(row)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def micro_batches(num_rows: int, size: int | None) -> list[slice]:
    """Slices of at most `size` rows; one slice of everything where `size` is None, and at least one, empty or not."""
    if size is None or num_rows == 0:
        return [slice(0, num_rows)]
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

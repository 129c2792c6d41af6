"""Lists of token ids as rectangles, and rows of similar length as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(ids_NT, mask_NT)`: int64 ids with padding on the right, bool mask that is True on real tokens.

    The mask comes from the lengths, never from comparing with `pad_id`: padding may be the EOS. An empty list gives two
    tensors of shape [0, 0].

    >>> pad_right([[5, 6], [7]], 0)[0].tolist()
    [[5, 6], [7, 0]]
    """
    return _pad(rows, pad_id, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """`(ids_NT, mask_NT)` as `pad_right`, with the padding on the left: prompts end where generation starts."""
    return _pad(rows, pad_id, left=True)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    import torch

    width = max((len(row) for row in rows), default=0)
    ids_NT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_NT = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids_NT[index, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask_NT[index, start : start + len(row)] = True
    return ids_NT, mask_NT


def length_buckets(
    lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Batches of row indices, sorted by length (ties by index), so that little is padding.

    A batch holds at most `batch_size` rows and at most `max_tokens` tokens with padding (rows times longest); a single
    row longer than that is a batch of its own. Every index appears once. Deterministic. Raises ValueError unless at
    least one limit is given and both are positive.
    """
    if batch_size is None and max_tokens is None:
        raise ValueError("length_buckets needs batch_size or max_tokens")
    if min(limit for limit in (batch_size, max_tokens) if limit is not None) < 1:
        raise ValueError(f"batch_size and max_tokens must be positive, found {batch_size} and {max_tokens}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        full = not batches or len(batches[-1]) == batch_size
        # Sorted, so this row is the longest of its batch.
        if full or (max_tokens is not None and (len(batches[-1]) + 1) * lengths[index] > max_tokens):
            batches.append([])
        batches[-1].append(index)
    return batches

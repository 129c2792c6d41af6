"""Padded rows as one row without padding, in which rows with the same prompt share it.

Everything a transformer does to single tokens (projections, norms, feed-forward) then runs on real tokens only, and
on each prompt once. `models.packed_attention` puts the tokens of each sequence side by side where they must meet.

Worked example, two completions of one prompt and a row of its own (`.` is padding; columns 2 and on are completions):

    ids           tokens of the packed row          position ids
    a b c d       a b                               0 1          trunk, the shared prompt
    a b e .       c d                               2 3          branch of row 0
    . f g .       e                                 2            branch of row 1
                  f g                               0 1          row 2, which shares nothing

Attention sees slots instead, rectangles filled on the right: the alone rows [1, 2], the trunks [1, 2] and the branches
[2, 2], whose second row holds `e` and one empty slot. A branch attends to its trunk and to what came before in itself.

On a CPU a long row gets a few tokens of filler, so that its length is one of few (`filled_up`): oneDNN compiles a
kernel for every number of rows that it has not multiplied before, which takes longer than many a product. Filler reads
and writes an empty slot that no token looks at, so it changes nothing and gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIKE = 0.75  # sequences share a rectangle while the shorter has at least this part of the longest's length
FILLED_FROM = 256  # shorter rows get no filler: little to win, and they would differ from the example
FEW_SLOTS = 512  # or while the rectangle is so small that another call of attention costs more than its padding


@dataclass(frozen=True)
class Rectangle:
    """Sequences of like length: `rows` x `width` consecutive slots, from slot `start` on, each filled on the right."""

    start: int
    rows: int
    width: int

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.rows * self.width)

    def of(self, slots_M: Tensor) -> Tensor:
        """Its part of all slots [M, ...], as [rows, width, ...]."""
        return slots_M[self.slots].unflatten(0, (self.rows, self.width))


@dataclass(frozen=True)
class Branches:
    """Continuations of trunks. Suffixes: R branches, T their slots, K = trunk slots + T."""

    rectangle: Rectangle
    trunk_slots: int  # of every trunk, the first so many are as many as any of these branches needs
    trunk_R: Tensor  # int64, which trunk comes before
    before_R: np.ndarray  # tokens of that trunk

    @cached_property
    def bias_R1TK(self) -> Tensor:
        """float32, 0 where a branch's token attends, minus infinity elsewhere."""
        width, slots = self.rectangle.width, self.trunk_slots
        visible = np.zeros((len(self.before_R), 1, width, slots + width), bool)
        visible[..., :slots] = (np.arange(slots)[None] < self.before_R[:, None])[:, None, None]
        visible[..., slots:] = np.tril(np.ones((width, width), bool))
        return torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), -torch.inf).to(self.trunk_R.device)


class Group(NamedTuple):
    """A trunk and its branches, side by side in the packed row: places of the first token, the first of a branch, and
    behind the last."""

    start: int
    middle: int
    end: int

    @property
    def trunk(self) -> slice:
        return slice(self.start, self.middle)

    @property
    def branches(self) -> slice:
        return slice(self.middle, self.end)


@dataclass(frozen=True)
class Packing:
    """Where each token lies. Suffixes: B rows, L columns, N tokens of the packed row with its filler, M slots of
    attention."""

    ids_1N: Tensor
    position_ids_1N: Tensor
    token_BL: Tensor  # int64, the packed place of each real token, 0 for padding; shared prompts appear once
    source_M: Tensor  # int64, the token in each slot; empty slots hold token 0
    filled_M1: Tensor  # float32, 0 in empty slots
    slot_N: Tensor  # int64, the slot of each token
    alone: tuple[Rectangle, ...]  # whole sequences
    trunks: Rectangle | None  # prompts of two rows or more
    branches: tuple[Branches, ...]  # their completions
    groups: tuple[Group, ...]  # trunks with at least one token behind them

    @property
    def rectangles(self) -> list[Rectangle]:
        """All of them, in the order of their slots."""
        trunks = [] if self.trunks is None else [self.trunks]
        return [*self.alone, *trunks, *(part.rectangle for part in self.branches)]

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row, filler not counted."""
        return int(self.filled_M1.sum())


class _Sequences:
    """Collects tokens of the packed row, sequence by sequence."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.token_BL = np.zeros(shape, dtype=np.int64)
        self.rows: list[np.ndarray] = []  # where each token's id is read from
        self.columns: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.count = 0

    def add(self, rows: list[int], columns: np.ndarray, first_position: int) -> np.ndarray:
        """Append the tokens of these columns, read from the first row and shared by all; returns their places."""
        places = np.arange(self.count, self.count + len(columns))
        self.count += len(columns)
        self.token_BL[np.array(rows)[:, None], columns] = places
        self.rows.append(np.full(len(columns), rows[0]))
        self.columns.append(columns)
        self.positions.append(np.arange(first_position, first_position + len(columns)))
        return places


class _Slots:
    """Collects rectangles of slots."""

    def __init__(self) -> None:
        self.sources: list[np.ndarray] = []
        self.filled: list[np.ndarray] = []
        self.count = 0

    def add(self, sequences: list[np.ndarray]) -> Rectangle:
        """A rectangle of these sequences of packed places."""
        width = max(1, *(len(sequence) for sequence in sequences))
        source, filled = np.zeros((len(sequences), width), np.int64), np.zeros((len(sequences), width), bool)
        for row, sequence in enumerate(sequences):
            source[row, : len(sequence)] = sequence
            filled[row, : len(sequence)] = True
        rectangle = Rectangle(self.count, len(sequences), width)
        self.count += source.size
        self.sources.append(source.ravel())
        self.filled.append(filled.ravel())
        return rectangle


def pack(ids_BL: Tensor, mask_BL: Tensor, first: int | Sequence[int]) -> Packing:
    """Lay padded rows out without padding.

    Args:
        ids_BL: prompts in the columns before `first`, completions from there on; the same prompt in the same columns.
        mask_BL: True where a token is real; at least one is.
        first: the first column of the completions, of all rows or of each. Rows whose prompts are the same tokens
            share them. 0: none are shared.
    """
    ids, mask = ids_BL.cpu().numpy(), mask_BL.cpu().numpy().astype(bool)
    starts = [first] * len(ids) if isinstance(first, int) else list(first)
    sequences, slots = _Sequences(ids.shape), _Slots()
    alone: list[np.ndarray] = []
    trunks: list[np.ndarray] = []
    branches: list[tuple[np.ndarray, int]] = []  # packed places, trunk
    groups: list[Group] = []
    for rows in _rows_by_prompt(ids, mask, starts):
        if len(rows) == 1:
            alone.append(sequences.add(rows, np.flatnonzero(mask[rows[0]]), 0))
            continue
        prompt = np.flatnonzero(mask[rows[0], : starts[rows[0]]])
        start = sequences.count
        trunks.append(sequences.add(rows, prompt, 0))
        for row in rows:
            completion = starts[row] + np.flatnonzero(mask[row, starts[row] :])
            branches.append((sequences.add([row], completion, len(prompt)), len(trunks) - 1))
        groups.append(Group(start, start + len(prompt), sequences.count))
    num_filler = filled_up(sequences.count) - sequences.count if ids_BL.device.type == "cpu" else 0
    alone_parts = [[alone[i] for i in part] for part in _alike([len(s) for s in alone])]
    branch_parts = [[branches[i] for i in part] for part in _alike([len(s) for s, _ in branches])]
    rectangles = [*alone_parts, trunks, *([s for s, _ in part] for part in branch_parts)]
    if num_filler and all(len({len(s) for s in part}) <= 1 for part in rectangles):
        alone_parts.append([np.empty(0, np.int64)])  # else no slot would be empty
    alone_rectangles = [slots.add(part) for part in alone_parts]
    trunk_rectangle = slots.add(trunks) if trunks else None
    device = ids_BL.device
    attached = tuple(_attached(slots.add([s for s, _ in part]), part, trunks, device) for part in branch_parts)
    source, filled = np.concatenate(slots.sources), np.concatenate(slots.filled)
    slot = np.full(sequences.count + num_filler, filled.argmin(), np.int64)  # of filler: the first empty one
    slot[source[filled]] = np.flatnonzero(filled)
    packed_ids = ids[np.concatenate(sequences.rows), np.concatenate(sequences.columns)]
    positions = np.concatenate(sequences.positions)
    return Packing(
        ids_1N=torch.from_numpy(np.pad(packed_ids, (0, num_filler), mode="edge")[None]).to(device),
        position_ids_1N=torch.from_numpy(np.pad(positions, (0, num_filler))[None]).to(device),
        token_BL=torch.from_numpy(sequences.token_BL).to(device),
        source_M=torch.from_numpy(source).to(device),
        filled_M1=torch.from_numpy(filled.astype(np.float32)[:, None]).to(device),
        slot_N=torch.from_numpy(slot).to(device),
        alone=tuple(alone_rectangles),
        trunks=trunk_rectangle,
        branches=attached,
        groups=tuple(group for group in groups if group.end > group.middle),
    )


def filled_up(count: int) -> int:
    """The next length that rows may have: 16 lengths to every doubling, so at most a sixteenth of filler.

    Example: 255 stays; 257 to 272 become 272 (steps of 16), 1,000 becomes 1,024 (steps of 32), 2,049 becomes 2,176.
    """
    if count < FILLED_FROM:
        return count
    step = 2 ** (count.bit_length() - 1) // 16
    return -(-count // step) * step


def _rows_by_prompt(ids: np.ndarray, mask: np.ndarray, starts: list[int]) -> list[list[int]]:
    """Rows with the same prompt tokens, in the order of their first rows; rows without a prompt stay alone."""
    found: dict[bytes | int, list[int]] = {}
    for row in range(len(ids)):
        prompt = ids[row, : starts[row]][mask[row, : starts[row]]]
        found.setdefault(prompt.tobytes() if len(prompt) else row, []).append(row)
    return [rows for rows in found.values() if mask[rows[0]].any()]


def _alike(lengths: list[int]) -> list[list[int]]:
    """Indices cut into parts of like length, longest first; empty sequences belong to none.

    Example: lengths 1000, 10, 900, 0: [[0, 2], [1]].
    """
    order = [int(i) for i in np.argsort([-length for length in lengths], kind="stable") if lengths[int(i)] > 0]
    parts: list[list[int]] = []
    for i in order:
        longest = lengths[parts[-1][0]] if parts else 0
        if parts and (lengths[i] >= ALIKE * longest or len(parts[-1]) * longest < FEW_SLOTS):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _attached(
    rectangle: Rectangle, part: list[tuple[np.ndarray, int]], trunks: list[np.ndarray], device: torch.device
) -> Branches:
    trunk = np.array([index for _, index in part])
    before = np.array([len(trunks[index]) for index in trunk])
    return Branches(rectangle, int(before.max()), torch.from_numpy(trunk).to(device), before)

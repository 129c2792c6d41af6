"""Which rows of a rollout go through the model together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.rollout.types import Rollout

# A prompt counted once for its completions; more gains little speed and costs memory.
TOKENS_PER_PASS = 8192
TOKENS_PER_PASS_ON_CPU = 2048


def tokens_per_pass(device: str) -> int:
    """Most tokens of a pass on a kind of device, where nothing else is asked for."""
    return TOKENS_PER_PASS_ON_CPU if device == "cpu" else TOKENS_PER_PASS


def passes(rollout: Rollout, rows: Tensor, size: int | None = None, *, tokens: int | None = None) -> list[Tensor]:
    """`rows` in parts that fit a pass, completions of one prompt side by side; at least one part, empty or not.

    Args:
        rollout: what the rows index.
        rows: int64, any order; they come back ordered by group, so that groups stay together.
        size: most rows in a part; None: as few parts as `tokens` allow, of whole groups where a group fits, the largest
            as small as that many parts allow.
        tokens: most tokens of a part, a prompt counted once per part; a single row may exceed it. None: as
            `tokens_per_pass` has it.

    Example: five groups of 2 with prompts of 4 and completions of 3 tokens (10 tokens a group) and `tokens` 49: parts
    of three and two groups.
    """
    tokens = tokens_per_pass(rollout.completion_ids_BT.device.type) if tokens is None else tokens
    rows = rows.cpu().sort().values
    rows = rows[rollout.group_ids_B.cpu()[rows].argsort(stable=True)]
    if size is not None or len(rows) == 0:
        return list(rows.split(size or 1)) or [rows]
    prompts = rollout.prompt_mask_BS.sum(dim=1).cpu()[rows].tolist()
    completions = rollout.lengths_B.cpu()[rows].tolist()
    groups = [
        _Group(positions, prompts[positions[0]], [completions[i] for i in positions])
        for positions in _runs(rollout.group_ids_B.cpu()[rows].tolist())
    ]
    return [rows[torch.tensor(part)] for part in _even(groups, tokens)]


@dataclass(frozen=True)
class _Group:
    """Rows of one prompt by their positions, the prompt's tokens, and each completion's."""

    positions: list[int]
    prompt: int
    completions: list[int]

    @property
    def cost(self) -> int:
        return self.prompt + sum(self.completions)


def _even(groups: list[_Group], tokens: int) -> list[list[int]]:
    """As many parts as `tokens` makes necessary, at the lowest limit that makes no more of them.

    The largest part decides what memory an update needs, and a small one after large ones saves no time. The limit
    stays above every group that fits `tokens`: none is cut for evenness. Bisection is exact, since a lower limit never
    makes fewer parts.
    """
    parts = _filled(groups, tokens)
    low = max(max(group.prompt + max(group.completions), group.cost if group.cost <= tokens else 0) for group in groups)
    high = tokens
    while low < high:
        limit = (low + high) // 2
        found = _filled(groups, limit)
        if len(found) <= len(parts):
            parts, high = found, limit
        else:
            low = limit + 1
    return parts


def _filled(groups: list[_Group], tokens: int) -> list[list[int]]:
    """Parts in order, each filled with whole groups up to `tokens`; a group larger than that is cut."""
    parts: list[list[int]] = []
    room = 0
    for group in groups:
        if parts and group.cost <= room:
            parts[-1] += group.positions
            room -= group.cost
            continue
        for position, completion in zip(group.positions, group.completions, strict=True):
            fits = bool(parts) and position != group.positions[0] and completion <= room
            if not fits:
                parts.append([])
                room = tokens - group.prompt
            parts[-1].append(position)
            room -= completion
    return parts


def _runs(values: list[int]) -> list[list[int]]:
    """Positions of equal neighbours. Example: [5, 5, 2] gives [[0, 1], [2]]."""
    found: list[list[int]] = []
    for position, value in enumerate(values):
        if position and value == values[position - 1]:
            found[-1].append(position)
        else:
            found.append([position])
    return found

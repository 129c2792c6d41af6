"""Which rows of a rollout go through the model together."""

from __future__ import annotations

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
        size: most rows in a part; None: as many as `tokens` allow, of whole groups where a group fits.
        tokens: most tokens of a part, a prompt counted once per part; a single row may exceed it. None: as
            `tokens_per_pass` has it.

    Example: groups of 2 with prompts of 4 and completions of 3 tokens (10 tokens a group) and `tokens` 25: two groups a
    part.
    """
    tokens = tokens_per_pass(rollout.completion_ids_BT.device.type) if tokens is None else tokens
    rows = rows.cpu().sort().values
    rows = rows[rollout.group_ids_B.cpu()[rows].argsort(stable=True)]
    if size is not None or len(rows) == 0:
        return list(rows.split(size or 1)) or [rows]
    groups = rollout.group_ids_B.cpu()[rows].tolist()
    prompts = rollout.prompt_mask_BS.sum(dim=1).cpu()[rows].tolist()
    completions = rollout.lengths_B.cpu()[rows].tolist()
    parts: list[list[int]] = []
    room = 0
    for group in _runs(groups):
        cost = prompts[group[0]] + sum(completions[i] for i in group)
        if parts and cost <= room:
            parts[-1] += group
            room -= cost
            continue
        for i in group:  # a group larger than a pass is cut
            fits = bool(parts) and i != group[0] and completions[i] <= room
            if not fits:
                parts.append([])
                room = tokens - prompts[i]
            parts[-1].append(i)
            room -= completions[i]
    return [rows[torch.tensor(part)] for part in parts]


def _runs(values: list[int]) -> list[list[int]]:
    """Positions of equal neighbours. Example: [5, 5, 2] gives [[0, 1], [2]]."""
    found: list[list[int]] = []
    for position, value in enumerate(values):
        if position and value == values[position - 1]:
            found[-1].append(position)
        else:
            found.append([position])
    return found

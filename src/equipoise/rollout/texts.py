"""Texts as a rollout: what scorers read, for responses that no policy of ours sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from equipoise.rollout.types import FINISHED, TRUNCATED, Rollout


def rollout_of_texts(
    prompts: Sequence[Any],
    completions: Sequence[str],
    kinds: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    group_ids: Sequence[int] | None = None,
) -> Rollout:
    """Completions without tokens, one row each: for scorers and tables, not for training (every mask is empty).

    `group_ids` say which completions answer one prompt; by default every row is a group of its own.
    """
    rows = len(completions)
    groups = list(range(rows)) if group_ids is None else list(group_ids)
    cut = [False] * rows if truncated is None else truncated
    nothing = torch.zeros(rows, 1, dtype=torch.long)
    seen: dict[int, int] = {}
    index_in_group: list[int] = []
    for group in groups:
        index_in_group.append(seen.get(group, 0))
        seen[group] = index_in_group[-1] + 1
    return Rollout(
        prompt_ids_BS=nothing,
        prompt_mask_BS=nothing.bool(),
        completion_ids_BT=nothing,
        completion_mask_BT=nothing.bool(),
        sampler_logprobs_BT=nothing.float(),
        group_ids_B=torch.tensor(groups, dtype=torch.long),
        index_in_group_B=torch.tensor(index_in_group, dtype=torch.long),
        finish_reasons=tuple(TRUNCATED if one else FINISHED for one in cut),
        prompts=tuple(prompts),
        kinds=tuple(kinds),
        completions=tuple(completions),
        temperature=1.0,
    )

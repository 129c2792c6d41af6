"""Texts as a rollout: what scorers read, for responses that no policy of ours sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from equipoise.rollout.types import FINISHED, Rollout


def rollout_of_texts(
    prompts: Sequence[Any], completions: Sequence[str], *, kinds: Sequence[str], group_ids: Sequence[int]
) -> Rollout:
    """Completions without tokens, one row each: for scorers and tables, not for training (every mask is empty)."""
    rows = len(completions)
    nothing = torch.zeros(rows, 1, dtype=torch.long)
    index = [list(group_ids[:row]).count(group) for row, group in enumerate(group_ids)]
    return Rollout(
        prompt_ids_BS=nothing,
        prompt_mask_BS=nothing.bool(),
        completion_ids_BT=nothing,
        completion_mask_BT=nothing.bool(),
        sampler_logprobs_BT=nothing.float(),
        group_ids_B=torch.tensor(list(group_ids), dtype=torch.long),
        index_in_group_B=torch.tensor(index, dtype=torch.long),
        finish_reasons=(FINISHED,) * rows,
        prompts=tuple(prompts),
        kinds=tuple(kinds),
        completions=tuple(completions),
        temperature=1.0,
    )

"""Rollouts and rows of an evaluation, made by hand: no model."""

from __future__ import annotations

from typing import Any

import torch

from equipoise.models.aspects import Aspect
from equipoise.rollout.types import FINISHED, TRUNCATED, Rollout

NAN = float("nan")
POLITE = Aspect("politeness", higher_is_better=True, range=(0.0, 1.0))
TOXIC = Aspect("toxicity", higher_is_better=False, range=(1.0, 5.0))


def hand_rollout(
    completions: list[list[str]],
    *,
    kinds: list[str] | None = None,
    prompts: list[Any] | None = None,
    truncated: frozenset[int] = frozenset(),
) -> Rollout:
    """One group per inner list; each completion counts a token per word."""
    texts = [text for group in completions for text in group]
    groups = [g for g, group in enumerate(completions) for _ in group]
    longest = max(len(text.split()) for text in texts)
    lengths = torch.tensor([len(text.split()) for text in texts])
    mask = torch.arange(longest)[None] < lengths[:, None]
    names = prompts or [f"prompt {g}" for g in range(len(completions))]
    labels = kinds or ["benign"] * len(completions)
    return Rollout(
        prompt_ids_BS=torch.ones(len(texts), 1, dtype=torch.long),
        prompt_mask_BS=torch.ones(len(texts), 1, dtype=torch.bool),
        completion_ids_BT=mask.long(),
        completion_mask_BT=mask,
        sampler_logprobs_BT=torch.zeros(len(texts), longest),
        group_ids_B=torch.tensor(groups),
        index_in_group_B=torch.tensor([i for group in completions for i in range(len(group))]),
        finish_reasons=tuple(TRUNCATED if i in truncated else FINISHED for i in range(len(texts))),
        prompts=tuple(names[g] for g in groups),
        kinds=tuple(labels[g] for g in groups),
        completions=tuple(texts),
        temperature=1.0,
    )


def row(group: int, score: float | None, *, kind: str = "benign", prompt: Any = None, **changes: Any) -> dict[str, Any]:
    """A row with one aspect, which is its own utility."""
    return {
        "prompt": prompt if prompt is not None else f"prompt {group}",
        "kind": kind,
        "response": "text",
        "group": group,
        "index": 0,
        "finish_reason": FINISHED,
        "num_tokens": 3,
        "scores": {"politeness": score},
        "combined": score,
        "kl": None,
        "refusal": False,
        **changes,
    }

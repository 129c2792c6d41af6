"""`completion_logprobs`: what a model thinks of completions that are already there.

The second of the two seams that carry all the speed. It runs inside the forward of one `PolicyModule`; here every row
is a padded sequence of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from equipoise.models.policy import Policy
from equipoise.models.policy_module import PolicyModule, TokenScores
from equipoise.rollout.types import Rollout


def completion_logprobs(model: Any, rollout: Rollout, *, temperature: float | None = None) -> Tensor:
    """Log-probabilities of a rollout's completion tokens, float32 [B, T], 0 where masked.

    Args:
        model: a Policy (gradients flow through what accelerate wrapped), a `policy.reference`, or a PolicyModule.
        rollout: B rows; index it first to score a part.
        temperature: divides the logits; None takes the rollout's own.
    """
    return score_tokens(model, rollout, temperature=temperature).logprobs_BT


def score_tokens(
    model: Any,
    rollout: Rollout,
    *,
    temperature: float | None = None,
    with_entropy: bool = False,
    with_unit_logprobs: bool = False,
    with_values: bool = False,
) -> TokenScores:
    """As `completion_logprobs`, with entropies, log-probabilities at temperature 1 or values from the same pass."""
    at = rollout.temperature if temperature is None else temperature
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT], dim=1)
    with _callable(model) as module:
        return module(
            ids,
            mask,
            rollout.completion_mask_BT,
            temperature=at,
            with_entropy=with_entropy,
            with_unit_logprobs=with_unit_logprobs,
            with_values=with_values,
        )


def score_in_chunks(model: Any, rollout: Rollout, micro_batch_size: int, **options: Any) -> TokenScores:
    """`score_tokens` without gradients, a few rows at a time."""
    with torch.no_grad():
        parts = [
            score_tokens(model, rollout[slice(start, start + micro_batch_size)], **options)
            for start in range(0, len(rollout), micro_batch_size)
        ]
    return TokenScores(*(torch.cat(column) if column[0] is not None else None for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


@contextmanager
def _callable(model: Any) -> Iterator[Any]:
    """What to call for a policy, a reference or a bare module."""
    if isinstance(model, Policy):
        # Without gradients the wrapper has nothing to do, and ranks need not run the same number of passes.
        wrapped = model.wrapped if torch.is_grad_enabled() else None
        yield wrapped if wrapped is not None else model.module
    elif isinstance(model, PolicyModule) or not hasattr(model, "active"):
        yield model
    else:
        with model.active() as module:
            yield module

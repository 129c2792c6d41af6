"""`completion_logprobs`: what a model thinks of completions that are already there.

The second of the two seams that carry all the speed. It runs inside the forward of one `PolicyModule`, which packs the
rows it is given; here is decided which rows go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from equipoise.models.policy import Policy
from equipoise.models.policy_module import PolicyModule, TokenScores
from equipoise.models.sharding import is_sharded
from equipoise.rollout.passes import passes
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
    with _callable(model) as module:
        return _score(
            module,
            rollout,
            temperature=temperature,
            with_entropy=with_entropy,
            with_unit_logprobs=with_unit_logprobs,
            with_values=with_values,
        )


def score_in_chunks(model: Any, rollout: Rollout, micro_batch_size: int, **options: Any) -> TokenScores:
    """`score_tokens` without gradients, a part at a time as `look_parts` has them, rows in the order they came in."""
    with torch.no_grad(), _callable(model) as module:
        parts = look_parts(module, rollout, micro_batch_size)
        scores = [_score(module, rollout[part], **options) for part in parts]
    back = torch.argsort(torch.cat(parts))

    def whole(columns: tuple[Tensor | None, ...]) -> Tensor | None:
        found = [column for column in columns if column is not None]
        return torch.cat(found)[back.to(found[0].device)] if found else None

    return TokenScores(*(whole(columns) for columns in zip(*scores, strict=True)))  # type: ignore[arg-type]


def look_parts(module: Any, rollout: Rollout, micro_batch_size: int) -> list[Tensor]:
    """Rows of each pass without gradients, every row in one of them.

    A part is `micro_batch_size` rows, or, where the model packs rows, as many as make no more tokens than that many
    padded rows have: groups stay together, so that their prompts are read once.
    """
    rows = torch.arange(len(rollout))
    if getattr(module, "packs", False) and not is_sharded(module):
        return passes(rollout, rows, tokens=micro_batch_size * _columns(rollout))
    return list(rows.split(micro_batch_size))  # processes that share weights take part in as many passes as every other


def _columns(rollout: Rollout) -> int:
    return rollout.prompt_ids_BS.shape[1] + rollout.completion_ids_BT.shape[1]


def _score(module: Any, rollout: Rollout, *, temperature: float | None = None, **options: Any) -> TokenScores:
    at = rollout.temperature if temperature is None else temperature
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT], dim=1)
    return module(ids, mask, rollout.completion_mask_BT, temperature=at, **options)


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

"""Batches of a decode loop: rows that grow by a token a step, leave when they are finished, and let others join.

`GroupedBatch` keeps a prompt's cache once for its group and is what usually runs, through a `DecodeStep` where the
model's layers are the usual ones. `PlainBatch` takes whatever cache a
model has, or none, and waits until it is empty before other rows join.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equipoise.data import pad_left
from equipoise.models.decode_step import DecodeStep
from equipoise.models.grouped_cache import GroupedCache, groups_share_prompts
from equipoise.models.policy import Policy
from equipoise.models.policy_module import UNFIT
from equipoise.models.products import NotPlain

logger = logging.getLogger(__name__)

# Of logits, relative to their range; coarser types: 5e-2. transformers takes norms in float32 in a float64 model too.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}

_announced: set[str] = set()


def announce_once(name: str, what: str, *values: Any) -> None:
    """A warning that a run shows once per model class and message."""
    if (key := f"{name}: {what}") not in _announced:
        _announced.add(key)
        logger.warning("%s " + what, name, *values)


def _padded(policy: Policy, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_left(prompt_ids, policy.pad_id)
    return ids.to(policy.device), mask.to(policy.device)


def _prefill(policy: Policy, prompt_ids: list[list[int]], cache: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Ids, mask, next-token logits and the cache of prompts, padded on the left."""
    ids, mask = _padded(policy, prompt_ids)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    logits, cache = policy.module.next_token_logits(ids, mask, positions, cache)
    return ids, mask, logits, cache


class GroupedBatch:
    """Rows of several groups over one `GroupedCache`; groups join and rows leave at any time."""

    joins = True

    def __init__(self, policy: Policy, group_size: int, most_tokens: int, step: DecodeStep | None = None) -> None:
        """`step` computes logits where the model's own layers need not be called."""
        self._policy, self._group_size, self._most_tokens = policy, group_size, most_tokens
        self._step = step
        self._cache: GroupedCache | None = None
        self._prompt_lengths_B = torch.empty(0, dtype=torch.long, device=policy.device)
        self.logits = torch.empty(0)

    def join(self, prompt_ids: list[list[int]]) -> None:
        """Prefill these prompts, each once; their rows stand behind those that are here."""
        mask, logits, prefilled = self._prefilled(prompt_ids)
        new = GroupedCache(prefilled, mask, self._group_size, self._most_tokens)
        logits = logits.repeat_interleave(self._group_size, dim=0)
        lengths = mask.sum(dim=1).long().repeat_interleave(self._group_size)
        if self._cache is None or len(self._prompt_lengths_B) == 0:
            self._cache, self.logits, self._prompt_lengths_B = new, logits, lengths
        else:
            self._cache.join(new)
            self.logits = torch.cat([self.logits, logits])
            self._prompt_lengths_B = torch.cat([self._prompt_lengths_B, lengths])

    def _prefilled(self, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Mask, next-token logits, and keys and values of every layer."""
        if self._step is not None:
            ids, mask = _padded(self._policy, prompt_ids)
            return mask, *self._step.prefill(ids, mask)
        from transformers import DynamicCache

        # Not the model's own choice of cache, which forgets what lies outside a sliding window.
        _, mask, logits, cache = _prefill(self._policy, prompt_ids, DynamicCache())
        return mask, logits, [(layer.keys, layer.values) for layer in cache.layers]

    def advance(self, tokens_B: Tensor) -> None:
        """Feed the sampled tokens and compute the next logits."""
        module, cache = self._policy.module, self._cache
        assert cache is not None
        positions_B = self._prompt_lengths_B + cache.lengths_B
        if self._step is not None:
            self.logits = self._step(tokens_B, positions_B, cache)
        else:
            with cache.active(module.causal):
                self.logits, _ = module.next_token_logits(
                    tokens_B[:, None], torch.ones_like(tokens_B[:, None], dtype=torch.bool), positions_B[:, None], cache
                )
        cache.advanced()

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        assert self._cache is not None
        self.logits, self._prompt_lengths_B = self.logits[index], self._prompt_lengths_B[index]
        if len(index):
            self._cache.keep(index)


class PlainBatch:
    """Rows over the cache that the model itself chooses; where it has none that can be shared, without one."""

    joins = False

    def __init__(self, policy: Policy, group_size: int, most_tokens: int) -> None:
        self._policy, self._group_size = policy, group_size
        self.logits = torch.empty(0)

    def join(self, prompt_ids: list[list[int]]) -> None:
        """Start with these prompts; the batch is empty."""
        ids, mask, logits, cache = _prefill(self._policy, prompt_ids, None)
        self._cached = hasattr(cache, "batch_repeat_interleave")
        if self._cached:
            cache.batch_repeat_interleave(self._group_size)
        else:
            announce_once(
                type(self._policy.module.causal).__name__,
                "has no cache that can be shared: every token recomputes its whole row (slow, exact)",
            )
        self._cache = cache
        self._history = ids.repeat_interleave(self._group_size, dim=0)  # only what no cache recomputes from
        self._mask = mask.repeat_interleave(self._group_size, dim=0)
        self._position = mask.sum(dim=1).long().repeat_interleave(self._group_size)
        self.logits = logits.repeat_interleave(self._group_size, dim=0)

    def advance(self, tokens_B: Tensor) -> None:
        """Feed the sampled tokens and compute the next logits."""
        module = self._policy.module
        self._mask = torch.cat([self._mask, torch.ones_like(tokens_B[:, None], dtype=torch.bool)], dim=1)
        if self._cached:
            self.logits, self._cache = module.next_token_logits(
                tokens_B[:, None], self._mask, self._position[:, None], self._cache
            )
        else:
            self._history = torch.cat([self._history, tokens_B[:, None]], dim=1)
            positions = (self._mask.long().cumsum(dim=1) - 1).clamp(min=0)
            self.logits, _ = module.next_token_logits(self._history, self._mask, positions, None)
        self._position = self._position + 1

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        if self._cached and len(index):
            self._cache.batch_select_indices(index)
        elif not self._cached:
            self._history = self._history[index]
        self.logits, self._mask, self._position = self.logits[index], self._mask[index], self._position[index]


Batch = GroupedBatch | PlainBatch


def make_batch(policy: Policy, group_size: int, most_tokens: int, longest_prompt: int) -> Batch:
    """The fastest batch that is right for this model; what a model does not allow is said once."""
    causal = policy.module.causal
    reason = groups_share_prompts(causal, longest_prompt + most_tokens)
    if reason is None:
        reason = _probed(policy, "grouped", lambda: GroupedBatch(policy, 2, 4))
    if reason is not None:
        announce_once(type(causal).__name__, "decodes with its own cache, a copy of the prompt's per row: %s", reason)
        return PlainBatch(policy, group_size, most_tokens)
    return GroupedBatch(policy, group_size, most_tokens, _own_step(policy))


def _own_step(policy: Policy) -> DecodeStep | None:
    """A decode step without the model's own layers; None where this model is not the usual one."""
    known = _faults(policy)
    if known.get("step") is not None:
        return None
    try:
        step = DecodeStep(policy.module)
        reason = _probed(policy, "step", lambda: GroupedBatch(policy, 2, 4, step))
    except NotPlain as error:  # of the model as it is now: an adapter may be merged for a while
        step, reason = None, str(error)
    except UNFIT as error:
        reason = known["step"] = f"{type(error).__name__}: {error}"
    if reason is None:
        return step
    logger.info("%s decodes through its own layers: %s", type(policy.module.causal).__name__, reason)
    return None


def _faults(policy: Policy) -> dict[str, str | None]:
    """What was found out about this policy's ways to decode."""
    return vars(policy.module).setdefault("_decoding_faults", {})


def _probed(policy: Policy, what: str, batch: Callable[[], Batch]) -> str | None:
    """Compare a batch with the model's own cache once per policy on a few tokens: an attention or a layer that does
    more than we know would go wrong silently. None where they agree, else how they do not."""
    found = _faults(policy)
    if what not in found:
        found[what] = _difference(policy, batch)
    return found[what]


def _difference(policy: Policy, batch: Callable[[], Batch]) -> str | None:
    expected = _probe(policy, PlainBatch(policy, 2, 4))
    try:
        logits = _probe(policy, batch())
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    dtype = next(policy.module.parameters()).dtype
    coarse = policy.module.autocast or dtype not in TOLERANCE
    allowed = (5e-2 if coarse else TOLERANCE[dtype]) * float(expected.abs().max().clamp(min=1e-6))
    difference = float((expected - logits).abs().max())
    return None if difference <= allowed else f"its logits change by {difference:.2g}"


def _probe(policy: Policy, batch: Batch) -> Tensor:
    """All logits of two prompts, two rows of each, over three tokens; a row leaves before the last."""
    rows = policy.vocabulary_size
    batch.join([[3 % rows, 5 % rows, 7 % rows, 11 % rows], [13 % rows, 17 % rows]])
    logits = [batch.logits]
    for step in range(3):
        if step == 2:
            batch.keep(torch.tensor([0, 1, 3], device=policy.device))
        batch.advance(torch.arange(len(batch.logits), device=policy.device).add(19 + step).remainder(rows))
        logits.append(batch.logits)
    return torch.cat(logits)

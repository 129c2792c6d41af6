"""Attention over a packed row, registered with transformers under a name of its own.

A model that uses torch's scaled dot-product attention is switched to `NAME` for good, because gradient checkpointing
calls attention again in the backward pass; a call without a `packing` argument does what it did before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from equipoise.models.packing import Branches, Packing, Rectangle
from equipoise.models.shared_attention import attend_shared, by_token

NAME = "equipoise_packed"
LONG_PROMPT = 128  # tokens, the mean of the shared ones: from there on they are attended to apart
WINDOWS = ("sliding_window", "attention_chunk_size")  # of a config: tokens that a token looks back
UNKNOWN = ("softcap", "position_bias", "s_aux")  # what some models ask of attention and this one cannot do


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of a model: query [1, heads, N, D] to [1, N, heads, D], with `packing`'s visibility.

    Without `packing`, transformers' own scaled dot-product attention. A sliding window is not looked at: the caller
    packs no sequence that is longer. Raises NotImplementedError for what it cannot do.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    asked = [name for name in UNKNOWN if options.get(name) is not None]
    if asked or not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"packed attention of {type(module).__name__}: {asked or 'not causal'}")
    tokens_NHD = attend_packed(
        by_token(query), by_token(key), by_token(value), packing, scaling=scaling, dropout=dropout
    )
    return tokens_NHD.unsqueeze(0), None


def attend_packed(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of packed tokens, [N, H, D] in the query's type. Suffixes: H query heads, K key heads, D width."""
    settings = {"dropout_p": dropout, "scale": scaling}
    with _float32_on_cpu(query_NHD) as dtype:
        if query_NHD.device.type == "cpu" and not dropout and _shares_long_prompts(packing):
            query, key, value = (part.to(dtype) for part in (query_NHD, key_NKD, value_NKD))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend_shared(query, key, value, packing, scale).to(query_NHD.dtype)
        queries, keys, values = (_ToSlots.apply(part.to(dtype), packing) for part in (query_NHD, key_NKD, value_NKD))
        outputs = [_causal(queries, keys, values, part, packing, settings) for part in packing.alone]
        if packing.trunks is not None:
            outputs.append(_causal(queries, keys, values, packing.trunks, packing, settings))
            outputs += [_branching(queries, keys, values, packing.trunks, part, settings) for part in packing.branches]
        slots_MHD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        tokens_NHD = _FromSlots.apply(slots_MHD, packing)
    return tokens_NHD.to(query_NHD.dtype)  # type: ignore[union-attr]


def _shares_long_prompts(packing: Packing) -> bool:
    """Whether copying prompts' keys for each completion would cost much. Below that it is done: what a row computes is
    then the same to the last bit whichever rows share its pass, so that two processes agree with one more closely."""
    groups = packing.groups
    return bool(groups) and sum(group.middle - group.start for group in groups) >= LONG_PROMPT * len(groups)


def longest_packed(config: Any) -> float:
    """Tokens up to which a sequence may be packed: within a window it looks as without one, beyond it is not packed."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in WINDOWS]
    return min((float(limit) for limit in limits if limit), default=math.inf)


@contextmanager
def _float32_on_cpu(query: Tensor) -> Iterator[torch.dtype]:
    """The type to attend in: torch's attention in bfloat16 on a CPU takes several times its float32 in the backward
    pass, more than the matrix products around it gain."""
    low = torch.is_autocast_enabled("cpu") or query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cpu" or query.dtype == torch.float64 or not low:
        yield query.dtype
        return
    with torch.autocast("cpu", enabled=False):  # it would cast everything to bfloat16
        yield torch.float32


def _causal(
    queries: Tensor, keys: Tensor, values: Tensor, rectangle: Rectangle, packing: Packing, settings: dict[str, Any]
) -> Tensor:
    """Each row a sequence of its own. Empty slots come last, where no token of the sequence looks."""
    query, key, value = (rectangle.of(part).transpose(1, 2) for part in (queries, keys, values))
    if packing.branches:  # these copy their keys and values; a view kept for the gradient would keep all slots as well
        key, value = key.clone(), value.clone()
    gqa = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa, **settings)
    return found.transpose(1, 2).flatten(0, 1)


def _branching(
    queries: Tensor, keys: Tensor, values: Tensor, trunks: Rectangle, part: Branches, settings: dict[str, Any]
) -> Tensor:
    """Each row attends to the slots of its trunk and to its own."""

    def with_trunk(slots_MHD: Tensor) -> Tensor:
        before = trunks.of(slots_MHD)[:, : part.trunk_slots].index_select(0, part.trunk_R)
        return torch.cat([before, part.rectangle.of(slots_MHD)], dim=1).transpose(1, 2)

    query = part.rectangle.of(queries).transpose(1, 2)
    key, value = with_trunk(keys), with_trunk(values)
    gqa = query.shape[1] != key.shape[1]
    bias = part.bias_R1TK.to(query.dtype)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=gqa, **settings)
    return found.transpose(1, 2).flatten(0, 1)


class _ToSlots(torch.autograd.Function):
    """Tokens [N, ...] into slots [M, ...]. Each token has one slot, so its gradient is that slot's: no sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return tokens.index_select(0, packing.source_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.packing.slot_N), None


class _FromSlots(torch.autograd.Function):
    """Slots [M, heads, D] back to tokens [N, heads, D]. Empty slots get a gradient of 0."""

    @staticmethod
    def forward(ctx: Any, slots_MHD: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return slots_MHD.index_select(0, packing.slot_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        return gradient.index_select(0, packing.source_M).mul_(packing.filled_M1.unsqueeze(2).to(gradient.dtype)), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

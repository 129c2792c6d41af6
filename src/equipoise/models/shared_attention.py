"""Attention of completions to a prompt that they share, on a CPU, with hand-written gradients.

A completion attends to its prompt and to itself. Here these are two attentions over tokens as they lie, so that a
prompt's keys are read by all its completions at once and copied for none of them. With `l1`, `l2` the logarithms of the
parts' sums of exponentials and `w1 = sigmoid(l1 - l2)`, `w2 = sigmoid(l2 - l1)`, the result is `o = w1 o1 + w2 o2`. The
whole's weights are `w1 p1` and `w2 p2`, so a part's gradient of scores, `w1 p1 (do v - do o)`, is what its own backward
pass makes of the gradient `w1 do`, the whole's result and its own `l1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.models.packing import Packing


class Attended(NamedTuple):
    """Suffixes: B rows, T queries, H heads of width D; where N tokens lie side by side, N for B x T."""

    out: Tensor  # [B, H, T, D], or of tokens [N, H, D]
    log_sums: Tensor  # of exponentials of the scores: [B, H, T], or [N, H]


def attend_shared(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, packing: Packing, scaling: float) -> Tensor:
    """Attention of packed tokens [N, H, D] whose trunks and branches `packing.groups` name; K key heads."""
    return _SharedAttention.apply(query_NHD, key_NKD, value_NKD, packing, scaling)  # type: ignore[return-value]


class _SharedAttention(torch.autograd.Function):
    """One node: every sequence to itself, and every group's branches to their trunk."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
        out, own_sums = _each_to_itself(query, key, value, packing, scaling)
        own_share, sums_of_trunk = torch.ones_like(own_sums), []
        for group in packing.groups:
            branches = group.branches
            parts = (query[branches], key[group.trunk], value[group.trunk])
            found, sums = (by_token(part) for part in _flash(*map(_by_head, parts), causal=False, scaling=scaling))
            sums_of_trunk.append(sums)
            own_share[branches] = torch.sigmoid(own_sums[branches] - sums)
            share = torch.sigmoid(sums - own_sums[branches])
            out[branches].mul_(own_share[branches][..., None]).addcmul_(found, share[..., None])
        ctx.packing, ctx.scaling = packing, scaling
        ctx.save_for_backward(query, key, value, out, own_sums, own_share, *sums_of_trunk)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, own_sums, own_share, *sums_of_trunk = ctx.saved_tensors
        packing: Packing = ctx.packing
        own = Attended(out, own_sums)
        grads = _each_to_itself_backward(grad_NHD * own_share[..., None], query, key, value, own, packing, ctx.scaling)
        for group, sums in zip(packing.groups, sums_of_trunk, strict=True):
            trunk, branches = group.trunk, group.branches
            share = torch.sigmoid(sums - own_sums[branches])
            parts = (grad_NHD[branches] * share[..., None], query[branches], key[trunk], value[trunk])
            attended = Attended(_by_head(out[branches]), _by_head(sums))
            found = _flash_backward(*map(_by_head, parts), attended=attended, causal=False, scaling=ctx.scaling)
            for grad, place, part in zip(grads, (branches, trunk, trunk), found, strict=True):
                grad[place] += by_token(part)
        return *grads, None, None


def _by_head(part: Tensor) -> Tensor:
    """[T, heads, ...] as a single row [1, heads, T, ...]."""
    return part.transpose(0, 1)[None]


def by_token(part: Tensor) -> Tensor:
    """The inverse of `_by_head`."""
    return part[0].transpose(0, 1)


def _flash(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, *, causal: bool, scaling: float) -> Attended:
    """torch's attention of a CPU, which takes as many key heads as query heads."""
    repeats = query_BHTD.shape[1] // key_BKSD.shape[1]
    keys, values = _repeated(key_BKSD, repeats), _repeated(value_BKSD, repeats)
    return Attended(
        *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BHTD, keys, values, 0.0, causal, scale=scaling
        )
    )


def _repeated(part_BKSD: Tensor, repeats: int) -> Tensor:
    return part_BKSD if repeats == 1 else part_BKSD.repeat_interleave(repeats, dim=1)


def _flash_backward(
    grad_BHTD: Tensor,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    *,
    attended: Attended,
    causal: bool,
    scaling: float,
) -> list[Tensor]:
    """Gradients of queries, keys and values, the last two summed over the query heads that share them."""
    key_heads, repeats = key_BKSD.shape[1], query_BHTD.shape[1] // key_BKSD.shape[1]
    keys, values = _repeated(key_BKSD, repeats), _repeated(value_BKSD, repeats)
    of_query, *of_rest = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BHTD, query_BHTD, keys, values, attended.out, attended.log_sums.contiguous(), 0.0, causal, scale=scaling
    )
    return [of_query, *(part.unflatten(1, (key_heads, repeats)).sum(2) for part in of_rest)]


def _each_to_itself(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Attended:
    """Causal attention within every sequence, back in the order of tokens."""
    slots = [part.index_select(0, packing.source_M) for part in (query, key, value)]
    found = [
        _flash(*(rectangle.of(part).transpose(1, 2) for part in slots), causal=True, scaling=scaling)
        for rectangle in packing.rectangles
    ]
    return Attended(*(_to_tokens(parts, packing) for parts in zip(*found, strict=True)))


def _each_to_itself_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, packing: Packing, scaling: float
) -> list[Tensor]:
    """Gradients of queries, keys and values, in the order of tokens."""
    slots = [part.index_select(0, packing.source_M) for part in (grad, query, key, value, *attended)]
    empty_M = packing.filled_M1[:, 0] == 0
    slots[0][empty_M] = 0.0
    slots[-1][empty_M] = torch.inf  # e^(score - inf) = 0: an empty slot has attended to nothing
    found = []
    for rectangle in packing.rectangles:
        *parts, out, sums = (rectangle.of(part).transpose(1, 2) for part in slots)
        found.append(_flash_backward(*parts, attended=Attended(out, sums), causal=True, scaling=scaling))
    return [_to_tokens(parts, packing) for parts in zip(*found, strict=True)]


def _to_tokens(parts: Sequence[Tensor], packing: Packing) -> Tensor:
    """What was found for the rectangles, [rows, heads, width, ...] each, in the order of tokens [N, heads, ...]."""
    slots_M = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
    return slots_M.index_select(0, packing.slot_N)

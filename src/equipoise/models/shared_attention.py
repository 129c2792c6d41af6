"""Attention of completions to a prompt that they share, on a CPU, with hand-written gradients.

A completion attends to its prompt and to itself. Here these are two attentions over tokens as they lie, so that a
prompt's keys are read by all its completions at once and copied for none of them. With `l1`, `l2` the logarithms of the
parts' sums of exponentials and `w1 = sigmoid(l1 - l2)`, `w2 = sigmoid(l2 - l1)`, the result is `o = w1 o1 + w2 o2`. The
whole's weights are `w1 p1` and `w2 p2`, so a part's gradient of scores, `w1 p1 (do v - do o)`, is what its own backward
pass makes of the gradient `w1 do`, the whole's result and its own `l1`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.models.packing import Packing, Rectangle


class Attended(NamedTuple):
    """Of N tokens and H heads of width D."""

    out_NHD: Tensor
    log_sums_NH: Tensor  # of exponentials of the scores


def attend_shared(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, packing: Packing, scaling: float) -> Tensor:
    """Attention of packed tokens [N, H, D] whose trunks and branches `packing.groups` name; K key heads."""
    return _SharedAttention.apply(query_NHD, key_NKD, value_NKD, packing, scaling)  # type: ignore[return-value]


class _SharedAttention(torch.autograd.Function):
    """One node: every sequence to itself, and every group's branches to their trunk."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        out, own_sums = _each_to_itself(query, key, value, packing, scaling)
        own_share, sums_of_trunk = torch.ones_like(own_sums), []
        for group in packing.groups:
            trunk, branches = slice(group.start, group.middle), group.branches
            keys, values = _repeated(key[trunk], repeats), _repeated(value[trunk], repeats)
            found, sums = _flash(query[branches], keys, values, scaling)
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
        key_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        own = Attended(out, own_sums)
        grads = _each_to_itself_backward(grad_NHD * own_share[..., None], query, key, value, own, packing, ctx.scaling)
        for group, sums in zip(packing.groups, sums_of_trunk, strict=True):
            trunk, branches = slice(group.start, group.middle), group.branches
            keys, values = _repeated(key[trunk], repeats), _repeated(value[trunk], repeats)
            share = torch.sigmoid(sums - own_sums[branches])
            of_query, of_key, of_value = _flash_backward(
                grad_NHD[branches] * share[..., None],
                query[branches],
                keys,
                values,
                Attended(out[branches], sums),
                ctx.scaling,
            )
            grads[0][branches] += of_query
            grads[1][trunk] += of_key.unflatten(1, (key_heads, repeats)).sum(2)
            grads[2][trunk] += of_value.unflatten(1, (key_heads, repeats)).sum(2)
        return *grads, None, None


def _repeated(heads_NKD: Tensor, repeats: int) -> Tensor:
    return heads_NKD if repeats == 1 else heads_NKD.repeat_interleave(repeats, dim=1)


def _flash(query_THD: Tensor, key_SHD: Tensor, value_SHD: Tensor, scaling: float) -> Attended:
    """Every query to every key: [T, H, D], [T, H]."""
    parts = (part.transpose(0, 1)[None] for part in (query_THD, key_SHD, value_SHD))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, False, scale=scaling)
    return Attended(out[0].transpose(0, 1), sums[0].transpose(0, 1))


def _flash_backward(
    grad_THD: Tensor, query_THD: Tensor, key_SHD: Tensor, value_SHD: Tensor, attended: Attended, scaling: float
) -> list[Tensor]:
    parts = [part.transpose(0, 1)[None] for part in (grad_THD, query_THD, key_SHD, value_SHD, attended.out_NHD)]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *parts, attended.log_sums_NH.transpose(0, 1)[None].contiguous(), 0.0, False, scale=scaling
    )
    return [part[0].transpose(0, 1) for part in found]


def _own_rectangles(packing: Packing) -> list[Rectangle]:
    """All sequences, trunks and branches alike, in the order of their slots."""
    trunks = [] if packing.trunks is None else [packing.trunks]
    return [*packing.alone, *trunks, *(part.rectangle for part in packing.branches)]


def _rows(slots_M: Tensor, rectangle: Rectangle) -> Tensor:
    """[M, heads, ...] to [rows, heads, width, ...]."""
    return slots_M[rectangle.slots].unflatten(0, (rectangle.rows, rectangle.width)).transpose(1, 2)


def _each_to_itself(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Attended:
    """Causal attention within every sequence, back in the order of tokens."""
    slots = [part.index_select(0, packing.source_M) for part in (query, key, value)]
    outs, sums = [], []
    for rectangle in _own_rectangles(packing):
        queries, keys, values = (_rows(part, rectangle) for part in slots)
        repeats = queries.shape[1] // keys.shape[1]
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, _repeated(keys, repeats), _repeated(values, repeats), 0.0, True, scale=scaling
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
        sums.append(log_sums.transpose(1, 2).flatten(0, 1))
    return Attended(torch.cat(outs).index_select(0, packing.slot_N), torch.cat(sums).index_select(0, packing.slot_N))


def _each_to_itself_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, packing: Packing, scaling: float
) -> list[Tensor]:
    """Gradients of queries, keys and values, in the order of tokens."""
    slots = [part.index_select(0, packing.source_M) for part in (grad, query, key, value, *attended)]
    empty_M = packing.filled_M1[:, 0] == 0
    slots[0][empty_M] = 0.0
    slots[-1][empty_M] = torch.inf  # e^(score - inf) = 0: an empty slot has attended to nothing
    found: list[list[Tensor]] = [[], [], []]
    for rectangle in _own_rectangles(packing):
        grads, queries, keys, values, outs, sums = (_rows(part, rectangle) for part in slots)
        key_heads, repeats = keys.shape[1], queries.shape[1] // keys.shape[1]
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, queries, _repeated(keys, repeats), _repeated(values, repeats), outs, sums.contiguous(), 0.0, True,
            scale=scaling,
        )  # fmt: skip
        of_key, of_value = (part.unflatten(1, (key_heads, repeats)).sum(2) for part in (of_key, of_value))
        for kept, part in zip(found, (of_query, of_key, of_value), strict=True):
            kept.append(part.transpose(1, 2).flatten(0, 1))
    return [torch.cat(parts).index_select(0, packing.slot_N) for parts in found]

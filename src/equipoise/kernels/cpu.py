"""Calls of the compiled functions with tensors. What each computes is said in `cpu.c`.

Callers see to it that `fit` holds; sizes and types are checked here, since C would read past an end without a word.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from equipoise.kernels.build import library

LANES = 8  # a head's width is a multiple of it
TYPES = {torch.float32: 0, torch.bfloat16: 1}

_POINTER, _SIZE, _TYPE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "residual_norm": [_POINTER, _TYPE] * 4 + [_SIZE] * 2 + [_NUMBER],
    "silu_times": [_POINTER] * 2 + [_TYPE] + [_SIZE] * 2,
    "decode_attention": [_POINTER, _TYPE, *[_POINTER] * 4, _NUMBER, *[_POINTER] * 7, *[_SIZE] * 6, _NUMBER]
    + [_POINTER, _TYPE],
    "sample_tokens": [_POINTER] * 2 + [_SIZE] * 2 + [_NUMBER] + [_POINTER] * 2,
}


def fit(*tensors: Tensor) -> bool:
    """Whether there are kernels, and these tensors are of types that they know, on the CPU."""
    return all(t.device.type == "cpu" and t.dtype in TYPES for t in tensors) and library() is not None


def residual_norm(hidden_BH: Tensor, added_BH: Tensor | None, weight_H: Tensor, epsilon: float, dtype: Any) -> Tensor:
    """`hidden += added` in place, and its RMS norm in `dtype` [B, H]."""
    normed = torch.empty_like(hidden_BH, dtype=dtype)
    _check(hidden_BH.shape, hidden_BH, *(() if added_BH is None else (added_BH,)))
    _check(hidden_BH.shape[-1:], weight_H)
    added = hidden_BH if added_BH is None else added_BH
    _call(
        "residual_norm", hidden_BH.data_ptr(), TYPES[hidden_BH.dtype], None if added_BH is None else added.data_ptr(),
        TYPES[added.dtype], weight_H.data_ptr(), TYPES[weight_H.dtype], normed.data_ptr(), TYPES[dtype],
        *hidden_BH.shape, epsilon,
    )  # fmt: skip
    return normed


def silu_times(joined: Tensor) -> Tensor:
    """`silu(gate) up` [B, I] of gate and up side by side [B, 2I]."""
    rows, width = joined.shape[0], joined.shape[1] // 2
    _check((rows, 2 * width), joined)
    gated = joined.new_empty(rows, width)
    _call("silu_times", joined.data_ptr(), gated.data_ptr(), TYPES[joined.dtype], rows, width)
    return gated


def decode_attention(
    projected: Tensor,
    cos_BD: Tensor,
    sin_BD: Tensor,
    head_norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    own: tuple[Tensor, Tensor],
    prompt: tuple[Tensor, Tensor],
    rows_of: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    dtype: Any,
) -> Tensor:
    """Attention of one token per row over `prompt` keys and values [P, K, S, D] and `own` ones [>= B, K, room, D].

    `projected` [B, (Q + 2K) D] are queries, keys and values of the token; its keys and values are written into `own`.
    `rows_of` are the prompt of every row [B], the padding of every prompt [P] and the rows' own lengths so far [B];
    `head_norms` the float32 weights of query and key norm. Returns [B, Q D] in `dtype`.
    """
    (keys, values), (prompt_keys, prompt_values), (prompt_of_B, hidden_of_P, lengths_B) = own, prompt, rows_of
    rows, prompts = len(projected), len(hidden_of_P)
    key_heads, room, width = keys.shape[1:]
    length = prompt_keys.shape[2]
    queries = projected.shape[1] // width - 2 * key_heads
    _check((rows, (queries + 2 * key_heads) * width), projected)
    _check((rows, width), cos_BD, sin_BD, dtype=torch.float32)
    _check((len(keys), key_heads, room, width), keys, values, dtype=torch.float32)
    _check((prompts, key_heads, length, width), prompt_keys, prompt_values, dtype=torch.float32)
    _check((rows,), prompt_of_B, lengths_B, dtype=torch.int64)
    _check((prompts,), hidden_of_P, dtype=torch.int64)
    _check((width,), *(head_norms or ()), dtype=torch.float32)
    if width % LANES or queries % key_heads or len(keys) < rows:
        raise ValueError(f"{queries} queries for {key_heads} keys, {width} wide, {rows} rows for {len(keys)}")
    norms = head_norms or (None, None)
    attended = projected.new_empty(rows, queries * width, dtype=dtype)
    _call(
        "decode_attention", projected.data_ptr(), TYPES[projected.dtype], cos_BD.data_ptr(), sin_BD.data_ptr(),
        *(None if norm is None else norm.data_ptr() for norm in norms), epsilon,
        *(t.data_ptr() for t in (keys, values, prompt_keys, prompt_values, prompt_of_B, hidden_of_P, lengths_B)),
        rows, queries, key_heads, width, room, length, scaling, attended.data_ptr(), TYPES[dtype],
    )  # fmt: skip
    return attended


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token per row by inverting the cumulative distribution of float32 logits, and its log-probability."""
    _check((len(uniforms_B), logits_BV.shape[1]), logits_BV, dtype=torch.float32)
    _check((len(logits_BV),), uniforms_B, dtype=torch.float32)
    tokens, logprobs = torch.empty(len(logits_BV), dtype=torch.int64), torch.empty(len(logits_BV))
    pointers = tokens.data_ptr(), logprobs.data_ptr()
    _call("sample_tokens", logits_BV.data_ptr(), uniforms_B.data_ptr(), *logits_BV.shape, temperature, *pointers)
    return tokens, logprobs


def _check(shape: Any, *tensors: Tensor, dtype: Any = None) -> None:
    for tensor in tensors:
        if tensor.shape != torch.Size(shape) or not tensor.is_contiguous():
            raise ValueError(f"a kernel got {tuple(tensor.shape)}, strides {tensor.stride()}, for {tuple(shape)}")
        if tensor.dtype not in TYPES if dtype is None else tensor.dtype != dtype:
            raise ValueError(f"a kernel got {tensor.dtype} for {dtype or ' or '.join(map(str, TYPES))}")


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None, "callers ask `fit`"
    function = getattr(found, name)
    if function.argtypes is None:
        function.argtypes, function.restype = _ARGUMENTS[name], None
    function(*arguments)

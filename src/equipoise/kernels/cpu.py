"""Calls of the compiled functions with tensors. What each computes is said in `blocks.c`, `decode.c` and `products.c`.

Callers see to it that `fit` holds; sizes and types are checked here, since C would read past an end without a word.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.kernels.build import library

CHUNK = 64  # rows whose share of a weight's gradient is summed first, as in blocks.c
TOGETHER = 512  # rows that are multiplied with a block of the weight while it is near
OUTPUTS = 16  # of a block of a weight that is laid out for few rows
LANES = 8  # a head's width is a multiple of it
TYPES = {torch.float32: 0, torch.bfloat16: 1}

_torch_only: ContextVar[bool] = ContextVar("equipoise_by_torch", default=False)

_POINTER, _SIZE, _TYPE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_TYPED = [_POINTER, _TYPE]
_ARGUMENTS = {
    "residual_norm": [*_TYPED * 2, _POINTER, *_TYPED * 2, _POINTER, *[_SIZE] * 2, _NUMBER],
    "norm_gradients": [*_TYPED, _POINTER, *_TYPED * 4, *[_POINTER] * 2, *[_SIZE] * 2],
    "rotate_heads": [*_TYPED, _POINTER, *_TYPED * 2, *[_SIZE] * 3, _TYPE],
    "silu_times": [*[_POINTER] * 3, _TYPE, *[_SIZE] * 3],
    "silu_gradients": [*[_POINTER] * 5, _TYPE, *[_SIZE] * 2],
    "decode_attention": [*_TYPED, *[_POINTER] * 4, _NUMBER, *[_POINTER] * 7, *[_SIZE] * 6, _NUMBER, *_TYPED],
    "lay_out": [*[_POINTER] * 2, *[_SIZE] * 2],
    "multiply_rows": [*[_POINTER] * 6, *[_SIZE] * 4],
    "sample_tokens": [*[_POINTER] * 2, *[_SIZE] * 2, _NUMBER, *[_POINTER] * 2],
}


@contextmanager
def by_torch() -> Iterator[None]:
    """While this lasts nothing fits, and torch's operations run: for comparisons."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)


def fit(*tensors: Tensor) -> bool:
    """Whether there are kernels, and these are plain tensors on the CPU of types that they know."""
    return not _torch_only.get() and all(map(_fits, tensors)) and library() is not None


def _fits(tensor: Tensor) -> bool:
    # Not sharded, not fake: what lies behind those is no memory to read.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype in TYPES


class FewRows:
    """A bfloat16 weight [O, I] laid out for products of few rows; a copy."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Raises ValueError where `takes` is False."""
        _check(weight_OI.shape, weight_OI, dtype=torch.bfloat16)
        if not self.takes(weight_OI):
            raise ValueError(f"no products of few rows for {tuple(weight_OI.shape)}")
        self._outputs, self._inputs = weight_OI.shape
        filled = -(-self._outputs // OUTPUTS) * OUTPUTS
        self._laid = weight_OI.new_empty(filled * self._inputs)
        _call("lay_out", weight_OI.data_ptr(), self._laid.data_ptr(), self._outputs, self._inputs)
        self._bias: Tensor | None = None
        if bias_O is not None:
            self._bias = torch.nn.functional.pad(bias_O.float(), (0, filled - self._outputs))

    @staticmethod
    @cache
    def supported() -> bool:
        """Whether this processor has the instructions, and there are kernels at all."""
        found = library()
        return found is not None and bool(found.can_multiply())

    @classmethod
    def takes(cls, weight_OI: Tensor) -> bool:
        """Whether products with this weight can be had here."""
        return weight_OI.dtype == torch.bfloat16 and weight_OI.shape[1] % 2 == 0 and fit(weight_OI) and cls.supported()

    def __call__(self, rows_NI: Tensor, plus_NO: Tensor | None = None) -> Tensor:
        """`x W^T + b + plus` [N, O]: sums in float32, rounded once."""
        rows = len(rows_NI)
        _check((rows, self._inputs), rows_NI, dtype=torch.bfloat16)
        _check((rows, self._outputs), *(() if plus_NO is None else (plus_NO,)), dtype=torch.bfloat16)
        found = rows_NI.new_empty(rows, self._outputs)
        together = min(TOGETHER, -(-rows // 16) * 16)
        pairs = torch.empty(together * self._inputs // 2, dtype=torch.int32)
        optional = (None if part is None else part.data_ptr() for part in (self._bias, plus_NO))
        _call(
            "multiply_rows", rows_NI.data_ptr(), self._laid.data_ptr(), *optional, found.data_ptr(), pairs.data_ptr(),
            max(together, 1), rows, self._outputs, self._inputs,
        )  # fmt: skip
        return found


def residual_norm(
    hidden: Tensor,
    added: Tensor | None,
    weight_H: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden + added` [..., H], its RMS norm in `dtype`, and 1 / root mean square [..., 1]."""
    width = hidden.shape[-1]
    _check(hidden.shape, hidden, *(() if added is None else (added,)))
    _check((width,), weight_H)
    normed = torch.empty_like(hidden, dtype=dtype)
    inverse = hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)
    total = hidden if added is None else torch.empty_like(hidden)
    _call(
        "residual_norm", *_typed(hidden), *_typed(added), total.data_ptr(), *_typed(weight_H), *_typed(normed),
        inverse.data_ptr(), hidden.numel() // max(width, 1), width, epsilon,
    )  # fmt: skip
    return total, normed, inverse


def norm_gradients(
    inputs: Tensor,
    inverse: Tensor,
    weight_H: Tensor,
    gradient: Tensor,
    plus: Tensor | None,
    dtype: torch.dtype,
    *,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the inputs of an RMS norm [..., H], in `dtype` and added to `plus`, and of its weight (float32)."""
    width = inputs.shape[-1]
    _check(inputs.shape, inputs, gradient, *(() if plus is None else (plus,)))
    _check((width,), weight_H)
    _check((*inputs.shape[:-1], 1), inverse, dtype=torch.float32)
    found, rows = torch.empty_like(inputs, dtype=dtype), inputs.numel() // max(width, 1)
    of_weight = weight_H.new_empty(width, dtype=torch.float32) if for_weight else None
    parts = weight_H.new_zeros(-(-rows // CHUNK), width, dtype=torch.float32) if for_weight else None
    pointers = (None if part is None else part.data_ptr() for part in (of_weight, parts))
    _call(
        "norm_gradients", *_typed(inputs), inverse.data_ptr(), *_typed(weight_H), *_typed(gradient), *_typed(plus),
        *_typed(found), *pointers, rows, width,
    )  # fmt: skip
    return found, of_weight


def rotate_heads(
    heads_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, dtype: torch.dtype, *, back: bool = False
) -> Tensor:
    """Heads of N positions turned, or turned back, in `dtype`; `sin_ND` has the signs, its first half negative."""
    positions, heads, width = heads_NHD.shape
    _check((positions, heads, width), heads_NHD)
    _check((positions, width), cos_ND, sin_ND, dtype=cos_ND.dtype)
    turned = torch.empty_like(heads_NHD, dtype=dtype)
    angles = cos_ND.data_ptr(), *_typed(sin_ND)
    sizes = positions, heads, width, -1 if back else 1
    _call("rotate_heads", *_typed(heads_NHD), *angles, *_typed(turned), *sizes)
    return turned


def silu_times(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """`silu(gate) up`, of two tensors or of the halves of one [N, 2I]."""
    rows, width = gate_NI.shape
    stride = gate_NI.stride(0) if rows > 1 else width
    for part in (gate_NI, up_NI):
        if part.shape != gate_NI.shape or part.stride(1) != 1 or (rows > 1 and part.stride(0) != stride):
            raise ValueError(f"a kernel got {tuple(part.shape)}, strides {part.stride()}, for {tuple(gate_NI.shape)}")
    if up_NI.dtype != gate_NI.dtype:
        raise ValueError(f"a kernel got {up_NI.dtype} for {gate_NI.dtype}")
    product = gate_NI.new_empty(rows, width)
    pointers = gate_NI.data_ptr(), up_NI.data_ptr(), product.data_ptr()
    _call("silu_times", *pointers, _type(gate_NI.dtype), rows, width, stride)
    return product


def silu_gradients(gate_NI: Tensor, up_NI: Tensor, gradient_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of their product, whose memory the second takes."""
    _check(gate_NI.shape, gate_NI, up_NI, gradient_NI, dtype=gate_NI.dtype)
    of_gate = torch.empty_like(gate_NI)
    pointers = (t.data_ptr() for t in (gate_NI, up_NI, gradient_NI, of_gate, gradient_NI))
    _call("silu_gradients", *pointers, _type(gate_NI.dtype), *gate_NI.shape)
    return of_gate, gradient_NI


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
    `head_norms` the float32 weights of query and key norm. What `rows_of` holds is the caller's word: only sizes are
    checked. Returns [B, Q D] in `dtype`.
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
        "decode_attention", projected.data_ptr(), _type(projected.dtype), cos_BD.data_ptr(), sin_BD.data_ptr(),
        *(None if norm is None else norm.data_ptr() for norm in norms), epsilon,
        *(t.data_ptr() for t in (keys, values, prompt_keys, prompt_values, prompt_of_B, hidden_of_P, lengths_B)),
        rows, queries, key_heads, width, room, length, scaling, attended.data_ptr(), _type(dtype),
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


def _typed(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), _type(tensor.dtype))


def _type(dtype: torch.dtype) -> int:
    if dtype not in TYPES:
        raise ValueError(f"a kernel got {dtype} for {' or '.join(map(str, TYPES))}")
    return TYPES[dtype]


def _check(shape: Any, *tensors: Tensor, dtype: Any = None) -> None:
    for tensor in tensors:
        if tensor.shape != torch.Size(shape) or not tensor.is_contiguous():
            raise ValueError(f"a kernel got {tuple(tensor.shape)}, strides {tensor.stride()}, for {tuple(shape)}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"a kernel got {tensor.dtype} for {dtype}")


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None, "callers ask `fit`"
    function = getattr(found, name)
    if function.argtypes is None:
        function.argtypes, function.restype = _ARGUMENTS[name], None
    function(*arguments)

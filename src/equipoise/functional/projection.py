"""The vocabulary projection as one node of the graph: what `logprobs.linear_logprobs` computes with.

Suffixes: N positions, C of a chunk, R of a block of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equipoise.functional.masking import at_least_float32

CACHED_NUMBERS = 2**20  # of logits in one block on a CPU: 4 MiB in float32, and as much again beside them


def cached_rows(vocabulary: int) -> int:
    """Rows of a block on a CPU. A softmax is shared among threads by rows, so there is one for each."""
    return max(torch.get_num_threads(), CACHED_NUMBERS // vocabulary)


@dataclass(frozen=True)
class _Buffers:
    """A chunk of products [C, V], and for one block of its rows logits in the softmax's type."""

    products_CV: Tensor
    logits_RV: Tensor | None  # None: products and logits are of one type and one memory
    block_rows: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the softmax."""
        return (self.products_CV if self.logits_RV is None else self.logits_RV).dtype

    def beside(self) -> Tensor:
        """As many numbers as a block of logits has, in a memory of their own."""
        return self.products_CV.new_empty(self.block_rows, self.products_CV.shape[1], dtype=self.dtype)

    def blocks(self, count: int) -> list[slice]:
        """The first `count` rows of the chunk, block by block."""
        size = self.block_rows
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def wide(self, block: slice) -> Tensor:
        """A block of the products as logits, to be written over."""
        products = self.products_CV[block]
        return products if self.logits_RV is None else self.logits_RV[: len(products)].copy_(products)

    def keep(self, block: slice, found_RV: Tensor) -> None:
        """Put what was made of `wide` in the products' place."""
        if self.logits_RV is not None:
            self.products_CV[block].copy_(found_RV)


@dataclass(frozen=True)
class LinearHead:
    """The constants of one projection, and the arithmetic of one chunk of C positions, R of them at a time."""

    temperature: float
    chunk_size: int
    scale: float
    cap: float | None
    dtype: torch.dtype

    def slices(self, count: int) -> list[slice]:
        return [slice(start, start + self.chunk_size) for start in range(0, count, self.chunk_size)]

    def buffers(self, weight_VH: Tensor, count: int) -> _Buffers:
        """For chunks of up to `count` positions."""
        products = weight_VH.new_empty(min(self.chunk_size, count), len(weight_VH))
        rows = len(products)
        if products.device.type == "cpu":
            rows = min(rows, cached_rows(len(weight_VH)))
        wide = at_least_float32(products[:0]).dtype
        logits = None if wide == products.dtype else products.new_empty(rows, len(weight_VH), dtype=wide)
        return _Buffers(products, logits, rows)

    def multiply(self, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, buffers: _Buffers) -> Tensor:
        """`W h + b` [C, V], in the buffer."""
        products = buffers.products_CV[: len(hidden_CH)]
        if bias_V is None:
            return torch.mm(hidden_CH, weight_VH.T, out=products)
        return torch.addmm(bias_V, hidden_CH, weight_VH.T, out=products)

    def logits(self, wide_RV: Tensor) -> Tensor:
        """Scaled and capped, in place, not yet divided by the temperature."""
        if self.scale != 1.0:
            wide_RV.mul_(self.scale)
        return wide_RV if self.cap is None else wide_RV.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, tempered_RV: Tensor) -> Tensor | None:
        """Derivative of tempered logits by what the matrix product gave, before its constant factor; None where 1."""
        return None if self.cap is None else (tempered_RV * (self.temperature / self.cap)).square_().neg_().add_(1.0)

    def gradient(
        self, probabilities_RV: Tensor, targets_R1: Tensor, upstream_R1: Tensor, slope_RV: Tensor | None
    ) -> Tensor:
        """Gradient by the matrix product, in place of the probabilities: upstream * ([v = t] - p_v) * slope."""
        gradient_RV = probabilities_RV.mul_(-upstream_R1).scatter_add_(1, targets_R1, upstream_R1)
        if slope_RV is not None:
            gradient_RV.mul_(slope_RV)
        factor = self.scale / self.temperature
        return gradient_RV if factor == 1.0 else gradient_RV.mul_(factor)


class LinearLogprobs(torch.autograd.Function):
    """`linear_logprobs` as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        head: LinearHead,
        with_entropy: bool,
        with_unit_logprobs: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden, weight, bias = _cast(head.dtype, hidden_NH, weight_VH, bias_V)
        ends_here = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        step_NH = torch.empty_like(hidden) if ends_here else None  # d logprob / d hidden
        buffers = head.buffers(weight, len(targets_N))
        tables_RV = buffers.beside()
        logprobs_N, normaliser_N, entropy_N, unit_N = tables_RV.new_zeros(4, len(targets_N))
        for rows in head.slices(len(targets_N)):
            products_CV = head.multiply(hidden[rows], weight, bias, buffers)
            for block in buffers.blocks(len(products_CV)):
                here = slice(rows.start + block.start, rows.start + block.stop)
                targets_R1 = targets_N[here].unsqueeze(1)
                logits_RV = head.logits(buffers.wide(block))
                table_RV = tables_RV[: len(logits_RV)]
                if with_unit_logprobs and head.temperature != 1.0:
                    torch.log_softmax(logits_RV, dim=1, out=table_RV)
                    unit_N[here] = table_RV.gather(1, targets_R1).squeeze(1)
                tempered_RV = logits_RV if head.temperature == 1.0 else logits_RV.div_(head.temperature)
                torch.log_softmax(tempered_RV, dim=1, out=table_RV)
                logprobs_N[here] = table_RV.gather(1, targets_R1).squeeze(1)
                normaliser_N[here] = tempered_RV.gather(1, targets_R1).squeeze(1) - logprobs_N[here]
                slope_RV = head.slope(tempered_RV) if step_NH is not None else None
                if with_entropy or step_NH is not None:
                    probabilities_RV = torch.exp(table_RV, out=logits_RV)
                if with_entropy:
                    finite_RV = table_RV if bias is None else table_RV.clamp_(min=torch.finfo(table_RV.dtype).min)
                    entropy_N[here] = -finite_RV.mul_(probabilities_RV).sum(dim=1)
                if step_NH is not None:
                    one_R1 = torch.ones_like(table_RV[:, :1])
                    buffers.keep(block, head.gradient(probabilities_RV, targets_R1, one_R1, slope_RV))
            if step_NH is not None:
                torch.mm(products_CV, weight, out=step_NH[rows])
        ctx.head, ctx.dtypes = head, [None if part is None else part.dtype for part in (hidden_NH, weight_VH, bias_V)]
        ctx.save_for_backward(*((step_NH,) if ends_here else (hidden_NH, weight_VH, bias_V, targets_N, normaliser_N)))
        unit_N = (unit_N if head.temperature != 1.0 else logprobs_N.clone()) if with_unit_logprobs else None
        ctx.mark_non_differentiable(*(part for part in (entropy_N, unit_N) if part is not None))
        return logprobs_N, entropy_N if with_entropy else None, unit_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        head: LinearHead = ctx.head
        if len(ctx.saved_tensors) == 1:
            (step_NH,) = ctx.saved_tensors
            return (step_NH * upstream_N.unsqueeze(1)).to(ctx.dtypes[0]), *[None] * 6
        hidden_NH, weight_VH, bias_V, targets_N, normaliser_N = ctx.saved_tensors
        hidden, weight, bias = _cast(head.dtype, hidden_NH, weight_VH, bias_V)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        buffers = head.buffers(weight, len(targets_N))
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=buffers.dtype) if for_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=buffers.dtype) if for_bias else None
        for rows in head.slices(len(targets_N)):
            products_CV = head.multiply(hidden[rows], weight, bias, buffers)
            for block in buffers.blocks(len(products_CV)):
                here = slice(rows.start + block.start, rows.start + block.stop)
                targets_R1, normaliser_R1, upstream_R1 = (
                    part[here].unsqueeze(1) for part in (targets_N, normaliser_N, upstream_N)
                )
                tempered_RV = head.logits(buffers.wide(block))
                if head.temperature != 1.0:
                    tempered_RV.div_(head.temperature)
                slope_RV = head.slope(tempered_RV)
                probabilities_RV = tempered_RV.sub_(normaliser_R1).exp_()
                gradient_RV = head.gradient(probabilities_RV, targets_R1, upstream_R1, slope_RV)
                if grad_bias is not None:
                    grad_bias += gradient_RV.sum(0)
                buffers.keep(block, gradient_RV)
            if grad_hidden is not None:
                torch.mm(products_CV, weight, out=grad_hidden[rows])
            if grad_weight is not None and grad_weight.dtype == products_CV.dtype:
                grad_weight.addmm_(products_CV.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += products_CV.T @ hidden[rows]
        found = zip((grad_hidden, grad_weight, grad_bias), ctx.dtypes, strict=True)
        return *(part if part is None else part.to(dtype) for part, dtype in found), *[None] * 4


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]

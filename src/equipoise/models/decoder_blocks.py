"""The usual decoder block over a packed row, with hand-written gradients.

Two nodes of the graph around attention: `_Enter` (norm, projections, rotary positions) and `_Leave` (output projection,
residual sum, norm, gated MLP, residual sum). They keep what a backward pass cannot cheaply compute again: the inputs,
one number per norm, and the two halves of the MLP, about half of what the model's own layers keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from equipoise.models.block_parts import Norm, Rotation, gated, gated_backward
from equipoise.models.packed_attention import attend_packed
from equipoise.models.packing import Packing
from equipoise.models.products import LinearParts, NotPlain, dtype_of_products, multiplied
from equipoise.models.usual_block import HEAD_NORMS, check_usual, is_silu

Grads = list[Tensor | None]


def block_specs(causal: Any, dtype: torch.dtype) -> list[BlockSpec]:
    """The model's layers, products in `dtype`. Raises NotPlain where they are not the usual block as it is."""
    check_usual(causal)
    return [BlockSpec.of(layer, dtype) for layer in causal.base_model.layers]


def specs_here(causal: Any) -> list[BlockSpec]:
    """`block_specs` with products in what autocast asks for where this is called."""
    return block_specs(causal, dtype_of_products(causal.get_input_embeddings().weight))


def packed_hidden(causal: Any, specs: list[BlockSpec], packing: Packing) -> Tensor:
    """Last hidden states [N, H] of packed tokens."""
    backbone = causal.base_model
    hidden_1NH = backbone.embed_tokens(packing.ids_1N)
    cos_1ND, sin_1ND = backbone.rotary_emb(hidden_1NH, packing.position_ids_1N)
    rotation = Rotation.of(cos_1ND[0], sin_1ND[0])
    hidden_NH = hidden_1NH[0]
    for layer, spec in zip(backbone.layers, specs, strict=True):
        if layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False):
            hidden_NH = checkpoint(_block, hidden_NH, spec, rotation, packing, use_reentrant=False)  # type: ignore[assignment]
        else:
            hidden_NH = _block(hidden_NH, spec, rotation, packing)
    final = Norm.of(backbone.norm)
    return _Normed.apply(hidden_NH, final, final.weight)  # type: ignore[return-value]


def _block(hidden_NH: Tensor, spec: BlockSpec, rotation: Rotation, packing: Packing) -> Tensor:
    query, key, value = _Enter.apply(hidden_NH, spec, rotation, *spec.entering())  # type: ignore[misc]
    attended_NHD = attend_packed(query, key, value, packing, spec.scaling)
    return _Leave.apply(hidden_NH, attended_NHD.flatten(1), spec, *spec.leaving())  # type: ignore[return-value]


@dataclass(frozen=True)
class Linear:
    """A linear layer whose gradients are worked out by hand; products in `dtype`."""

    parts: LinearParts
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many parameters it has."""
        return len(self.parts.tensors())

    def forward(self, inputs_NI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`x W^T + b + sum s x A^T B^T` [N, O] in `dtype`, and the `x A^T` [N, R] of every update."""
        parts = self.parts
        found = multiplied(inputs_NI, parts.weight_OI.to(self.dtype), _to(parts.bias_O, self.dtype))
        lows = []
        for update in parts.updates:
            lows.append(multiplied(inputs_NI, update.a_RI.to(self.dtype)))
            found = multiplied(lows[-1], (update.b_OR * update.scaling).to(self.dtype), plus=found)
        return found, lows

    def backward(
        self,
        inputs_NI: Tensor,
        lows: list[Tensor],
        grad_NO: Tensor,
        needs: tuple[bool, ...],
        plus: Tensor | None = None,
    ) -> tuple[Tensor, Grads]:
        """The gradient of the inputs, added to `plus`, and those of `parts.tensors()` where `needs` says so."""
        parts, wanted = self.parts, iter(needs)
        grad_NI = multiplied(grad_NO, parts.weight_OI.to(self.dtype).t(), plus=plus)
        grads: Grads = [_product(grad_NO.t(), inputs_NI, parts.weight_OI) if next(wanted) else None]
        if parts.bias_O is not None:
            grads.append(grad_NO.sum(0, dtype=parts.bias_O.dtype) if next(wanted) else None)
        for update, low_NR in zip(parts.updates, lows, strict=True):
            for_a, for_b = next(wanted), next(wanted)
            grad_NR = multiplied(grad_NO, (update.b_OR * update.scaling).to(self.dtype).t())
            grads.append(_product(grad_NR.t(), inputs_NI, update.a_RI) if for_a else None)
            grads.append(_product(grad_NO.t(), low_NR * update.scaling, update.b_OR) if for_b else None)
            grad_NI = multiplied(grad_NR, update.a_RI.to(self.dtype).t(), plus=grad_NI)
        return grad_NI, grads


@dataclass(frozen=True)
class BlockSpec:
    """One decoder layer: what it is made of."""

    before_attention: Norm
    projections: tuple[Linear, Linear, Linear]  # query, key, value
    head_norms: tuple[Norm, Norm] | None  # of every query and key head
    out: Linear
    before_mlp: Norm
    gate: Linear
    up: Linear
    down: Linear
    head_width: int
    scaling: float
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> BlockSpec:
        attention, mlp = layer.self_attn, layer.mlp
        if not is_silu(mlp.act_fn):
            raise NotPlain(f"its MLP activates by {type(mlp.act_fn).__name__}")

        def linear(part: nn.Module) -> Linear:
            return Linear(LinearParts.of(part), dtype)

        norms = [Norm.of(getattr(attention, name)) for name in HEAD_NORMS if hasattr(attention, name)]
        return cls(
            Norm.of(layer.input_layernorm),
            (linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)),
            (norms[0], norms[1]) if norms else None,
            linear(attention.o_proj),
            Norm.of(layer.post_attention_layernorm),
            linear(mlp.gate_proj),
            linear(mlp.up_proj),
            linear(mlp.down_proj),
            int(attention.head_dim),
            float(attention.scaling),
            dtype,
        )

    def entering(self) -> list[Tensor]:
        """The parameters that `_Enter` returns gradients of, in its order."""
        norms = [self.before_attention, *(self.head_norms or ())]
        return [norm.weight for norm in norms] + [
            part for linear in self.projections for part in linear.parts.tensors()
        ]

    def leaving(self) -> list[Tensor]:
        """The parameters that `_Leave` returns gradients of, in its order."""
        linears = (self.out, self.gate, self.up, self.down)
        return [self.before_mlp.weight, *(part for linear in linears for part in linear.parts.tensors())]


class _Enter(torch.autograd.Function):
    """Queries, keys and values [N, heads, D] of the hidden states, rotated."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, spec: BlockSpec, rotation: Rotation, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        _, normed, inverse = spec.before_attention(hidden_NH, spec.dtype)
        kept, lows, found = [hidden_NH, inverse], [], []
        for number, linear in enumerate(spec.projections):
            projected, low = linear.forward(normed)
            lows.append(len(low))
            kept += low
            heads = projected.unflatten(-1, (-1, spec.head_width))
            if number < 2:
                if spec.head_norms is not None:
                    before, heads, of_heads = spec.head_norms[number](heads)
                    kept += [before, of_heads]
                heads = rotation.forward(heads)
            found.append(heads)
        ctx.spec, ctx.rotation, ctx.lows = spec, rotation, lows
        ctx.save_for_backward(*kept, *parameters)  # these so that torch notices if they change meanwhile
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_NHD: Tensor) -> tuple[Tensor | None, ...]:
        spec: BlockSpec = ctx.spec
        saved, needs = iter(ctx.saved_tensors), iter(ctx.needs_input_grad[3:])
        hidden_NH, inverse = next(saved), next(saved)
        normed = spec.before_attention(hidden_NH, spec.dtype).normed
        needs_norms = [next(needs) for _ in range(1 if spec.head_norms is None else 3)]
        grad_normed: Tensor | None = None
        norm_grads: Grads = []
        linear_grads: Grads = []
        for number, linear in enumerate(spec.projections):
            low = [next(saved) for _ in range(ctx.lows[number])]
            grad = grads_NHD[number]
            if number < 2:
                grad = ctx.rotation.backward(grad)
                if spec.head_norms is not None:
                    before, of_heads = next(saved), next(saved)
                    grad, of_weight = spec.head_norms[number].backward(before, of_heads, grad, needs_norms[1 + number])
                    norm_grads.append(of_weight)
            own = tuple(next(needs) for _ in range(linear.count))
            grad_normed, of_linear = linear.backward(normed, low, grad.flatten(1).to(spec.dtype), own, grad_normed)
            linear_grads += of_linear
        assert grad_normed is not None
        grad_hidden, of_weight = spec.before_attention.backward(hidden_NH, inverse, grad_normed, needs_norms[0])
        return grad_hidden, None, None, of_weight, *norm_grads, *linear_grads


class _Leave(torch.autograd.Function):
    """The block's output: residual sums over the output projection and the gated MLP."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, attended: Tensor, spec: BlockSpec, *parameters: Tensor) -> Tensor:
        attended = attended.to(spec.dtype)
        projected, out_low = spec.out.forward(attended)
        middle_NH, normed, inverse = spec.before_mlp(hidden_NH, spec.dtype, plus=projected)
        gate, gate_low = spec.gate.forward(normed)
        up, up_low = spec.up.forward(normed)
        mlp, down_low = spec.down.forward(gated(gate, up))
        lows = (out_low, gate_low, up_low, down_low)
        ctx.spec, ctx.lows = spec, [len(low) for low in lows]
        kept = (attended, middle_NH, inverse, gate, up, *(part for low in lows for part in low))
        ctx.save_for_backward(*kept, *parameters)
        return middle_NH + mlp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        spec: BlockSpec = ctx.spec
        saved, needs = iter(ctx.saved_tensors), iter(ctx.needs_input_grad[3:])
        attended, middle_NH, inverse, gate, up = (next(saved) for _ in range(5))
        lows = [[next(saved) for _ in range(count)] for count in ctx.lows]
        for_norm = next(needs)
        own = [tuple(next(needs) for _ in range(linear.count)) for linear in (spec.out, spec.gate, spec.up, spec.down)]
        grad_product, down_grads = spec.down.backward(gated(gate, up), lows[3], grad_NH.to(spec.dtype), own[3])
        grad_gate, grad_up = gated_backward(gate, up, grad_product)
        normed = spec.before_mlp(middle_NH, spec.dtype).normed
        grad_normed, gate_grads = spec.gate.backward(normed, lows[1], grad_gate, own[1])
        grad_normed, up_grads = spec.up.backward(normed, lows[2], grad_up, own[2], grad_normed)
        grad_middle, of_weight = spec.before_mlp.backward(middle_NH, inverse, grad_normed, for_norm, plus=grad_NH)
        grad_attended, out_grads = spec.out.backward(attended, lows[0], grad_middle.to(spec.dtype), own[0])
        return (
            grad_middle, grad_attended, None, of_weight,
            *out_grads, *gate_grads, *up_grads, *down_grads,
        )  # fmt: skip


class _Normed(torch.autograd.Function):
    """A norm of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Norm, weight: Tensor) -> Tensor:
        _, normed, inverse = norm(hidden)
        ctx.norm = norm
        ctx.save_for_backward(hidden, inverse, weight)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        hidden, inverse, _ = ctx.saved_tensors
        grad_hidden, of_weight = ctx.norm.backward(hidden, inverse, grad, ctx.needs_input_grad[2])
        return grad_hidden, None, of_weight


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """A parameter's gradient, in its type."""
    return (left @ right).to(like.dtype)

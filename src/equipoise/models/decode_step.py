"""Prefill and decode steps of the usual decoder block in as few operations as they take.

Where a step of a few rows goes through the model's own layers, calling them costs more than the arithmetic, and each
product lays its weight out anew. What is built here holds a copy of the weights as they are now.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equipoise.models.block_parts import Norm, Rotation, gated
from equipoise.models.decode_heads import Heads
from equipoise.models.grouped_cache import GroupedCache
from equipoise.models.machine import memory_bytes
from equipoise.models.packed_attention import attend_packed
from equipoise.models.packing import pack
from equipoise.models.policy_module import PolicyModule
from equipoise.models.products import NotPlain, Product, dtype_of_products, is_packable
from equipoise.models.usual_block import HEAD_NORMS, check_usual, is_silu

MEMORY_SHARE = 0.25  # of the machine's memory that the copied weights may take


class DecodeStep:
    """Next-token logits for one token per row, over a `GroupedCache`.

    Suffixes: B rows, H hidden width, K key heads, R queries per key head, D width of a head, V vocabulary.
    """

    def __init__(self, module: PolicyModule) -> None:
        """Raises NotPlain, with the reason, where the model does more than the usual block, or does not fit twice."""
        causal = module.causal
        _check(module)
        backbone = causal.base_model
        self._embed, self._rotary = backbone.embed_tokens, backbone.rotary_emb
        self._dtype = product_dtype(module)
        # Attention of a few rows in bfloat16 takes torch several times its float32 on a CPU.
        self._cache_dtype = torch.float64 if self._embed.weight.dtype == torch.float64 else torch.float32
        self._blocks = [_Block(layer, self._dtype) for layer in backbone.layers]
        self._norm = Norm.of(backbone.norm)
        self._head = Product([causal.get_output_embeddings()], self._dtype)
        self._transform = module.transform

    @torch.no_grad()
    def __call__(self, tokens_B: Tensor, positions_B: Tensor, cache: GroupedCache) -> Tensor:
        """Feed a token per row at its position; float32 logits [B, V].

        The cache grows by the token's keys and values; `cache.advanced()` is the caller's.
        """
        if not self._blocks[0].heads.is_compiled(cache, self._dtype):
            cache.hide()
        with torch.autocast(tokens_B.device.type, enabled=False):  # every type is chosen here
            hidden_BH, rotation = self._entered(tokens_B, positions_B)
            added_BH = None
            for block, layer in zip(self._blocks, cache.layers, strict=True):
                attention = partial(block.heads.attention, rotation=rotation, layer=layer, dtype=self._dtype)
                hidden_BH, added_BH = block(hidden_BH, added_BH, attention)
            assert added_BH is not None
            return self._logits(hidden_BH, added_BH)

    @torch.no_grad()
    def prefill(self, ids_PS: Tensor, mask_PS: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Prompts padded on the left: their next-token logits [P, V], and every layer's keys and values [P, K, S, D].

        The prompts are laid out without padding; what stands at padding is some token's and is to be hidden.
        """
        packing = pack(ids_PS, mask_PS, 0)
        filled: list[tuple[Tensor, Tensor]] = []

        def attention(projected: Tensor) -> Tensor:
            query, key, value = block.heads.turned(projected.to(self._cache_dtype), rotation)
            keys, values = (part[packing.token_BL].transpose(1, 2).contiguous() for part in (key, value))
            filled.append((keys, values))
            return attend_packed(query, key, value, packing, block.heads.scaling).flatten(1).to(self._dtype)

        with torch.autocast(ids_PS.device.type, enabled=False):
            hidden_NH, rotation = self._entered(packing.ids_1N[0], packing.position_ids_1N[0])
            added_NH = None
            for block in self._blocks:
                hidden_NH, added_NH = block(hidden_NH, added_NH, attention)
            assert added_NH is not None
            last_P = packing.token_BL[:, -1]
            return self._logits(hidden_NH[last_P], added_NH[last_P]), filled

    def _entered(self, tokens_N: Tensor, positions_N: Tensor) -> tuple[Tensor, Rotation]:
        """Embedded tokens [N, H], and the rotation by their positions."""
        hidden_NH = self._embed(tokens_N)
        # In the type of the model's own hidden states, which rounds them as its own pass does.
        cos_1ND, sin_1ND = self._rotary(hidden_NH, positions_N[None])
        return hidden_NH, Rotation.of(cos_1ND[0].to(self._cache_dtype), sin_1ND[0].to(self._cache_dtype))

    def _logits(self, hidden_NH: Tensor, added_NH: Tensor) -> Tensor:
        logits_NV = self._head(self._norm(hidden_NH, self._dtype, plus=added_NH).normed).to(self._cache_dtype)
        return (logits_NV if self._transform is None else self._transform(logits_NV)).float()


class _Block:
    """One decoder layer."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._dtype = dtype
        self._before_attention = Norm.of(layer.input_layernorm)
        self._before_mlp = Norm.of(layer.post_attention_layernorm)
        norms = [getattr(attention, name, None) for name in HEAD_NORMS]
        query_norm, key_norm = (None if norm is None else Norm.of(norm) for norm in norms)
        width = int(attention.head_dim)
        key_heads = attention.k_proj.out_features // width
        self.heads = Heads(query_norm, key_norm, width, key_heads, float(attention.scaling))
        self._in = Product([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._out = Product([attention.o_proj], dtype)
        self._gate_and_up, self._down = Product([mlp.gate_proj, mlp.up_proj], dtype), Product([mlp.down_proj], dtype)
        self._activation, self._silu = mlp.act_fn, is_silu(mlp.act_fn)

    def __call__(
        self, hidden_NH: Tensor, added_NH: Tensor | None, attention: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what the MLP adds to it; `added_NH` is what the layer before adds.

        `attention` makes of projected queries, keys and values what the output projection gets.
        """
        hidden_NH, normed_NH, _ = self._before_attention(hidden_NH, self._dtype, plus=added_NH)
        attended_NH = attention(self._in(normed_NH))
        hidden_NH, normed_NH, _ = self._before_mlp(hidden_NH, self._dtype, plus=self._out(attended_NH))
        gate, up = self._gate_and_up(normed_NH).chunk(2, dim=-1)
        return hidden_NH, self._down(gated(gate, up) if self._silu else self._activation(gate).mul_(up))


def most_copied() -> float:
    """Bytes that laid out weights may take: more is left to the model's own layers."""
    return MEMORY_SHARE * memory_bytes()


def product_dtype(module: PolicyModule) -> torch.dtype:
    """What the model's matrix products run in: bfloat16 under autocast, else the weights' type."""
    with module.precision_context():
        return dtype_of_products(module.causal.get_input_embeddings().weight)


def _check(module: PolicyModule) -> None:
    """Raise NotPlain for what this step would get wrong, or would only copy to no end."""
    causal = module.causal
    check_usual(causal)
    if not module.projects:
        raise NotPlain("its logits are not its head's")
    device, dtype = causal.get_input_embeddings().weight.device, product_dtype(module)
    if not is_packable(dtype, device) and dtype != torch.float64:
        raise NotPlain(f"its products in {dtype} on {device.type} gain nothing")
    copied = torch.finfo(dtype).bits // 8 * sum(parameter.numel() for parameter in causal.parameters())
    if copied > most_copied():
        raise NotPlain(f"a copy of its weights ({copied / 2**30:.1f} GiB) is too much for this machine's memory")

"""What a decode step computes between its matrix products: as torch's operations, or compiled (`equipoise.kernels`).

Both compute the same and round at the same places. The compiled ones know float32 and bfloat16 on a CPU; there some 45
short operations per layer are four calls, and what is waited for is mostly products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.kernels import cpu
from equipoise.models.grouped_cache import attend
from equipoise.models.usual_block import Norm, Rotation


@dataclass(frozen=True)
class Heads:
    """What attention has to know of its layer."""

    query_norm: Norm | None
    key_norm: Norm | None
    width: int
    key_heads: int
    scaling: float


class TorchOps:
    """By torch's operations: any type, any device."""

    def add_norm(self, norm: Norm, hidden_BH: Tensor, added_BH: Tensor | None, dtype: torch.dtype) -> Any:
        """`hidden + added` and its norm in `dtype`."""
        if added_BH is not None:
            hidden_BH = hidden_BH + added_BH
        return hidden_BH, norm(hidden_BH).to(dtype)

    def gated(self, joined: Tensor) -> Tensor:
        """`silu(gate) up` [B, I] of gate and up side by side [B, 2I]."""
        gate, up = joined.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def attention(self, of: Heads, projected: Tensor, rotation: Rotation, layer: Any, dtype: torch.dtype) -> Tensor:
        """Of the projected queries, keys and values of one token per row, which join the cache; [B, Q D] in `dtype`."""
        heads_BND = projected.to(layer.cache.dtype).unflatten(-1, (-1, of.width))
        turned = heads_BND.shape[1] - of.key_heads
        queries = turned - of.key_heads
        if of.query_norm is None or of.key_norm is None:
            rotated_BND = rotation.forward(heads_BND[:, :turned])
        else:
            normed = (of.query_norm(heads_BND[:, :queries]), of.key_norm(heads_BND[:, queries:turned]))
            rotated_BND = rotation.forward(torch.cat([part.to(heads_BND.dtype) for part in normed], dim=1))
        keys_BKTD, values_BKTD = layer.update(rotated_BND[:, queries:, None], heads_BND[:, turned:, None])
        queries_BKRD = (rotated_BND[:, :queries] * of.scaling).unflatten(1, (of.key_heads, -1))
        return attend(queries_BKRD, keys_BKTD, values_BKTD, layer).flatten(1).to(dtype)


class CompiledOps:
    """The same, compiled: float32 and bfloat16 on a CPU, a float32 cache."""

    def add_norm(self, norm: Norm, hidden_BH: Tensor, added_BH: Tensor | None, dtype: torch.dtype) -> Any:
        """As `TorchOps.add_norm`, in place."""
        return hidden_BH, cpu.residual_norm(hidden_BH, added_BH, norm.weight, norm.epsilon, dtype)

    def gated(self, joined: Tensor) -> Tensor:
        """As `TorchOps.gated`."""
        return cpu.silu_times(joined)

    def attention(self, of: Heads, projected: Tensor, rotation: Rotation, layer: Any, dtype: torch.dtype) -> Tensor:
        """As `TorchOps.attention`."""
        cache, norms, epsilon = layer.cache, None, 0.0
        if of.query_norm is not None and of.key_norm is not None:
            norms, epsilon = (of.query_norm.weight.float(), of.key_norm.weight.float()), of.query_norm.epsilon
        return cpu.decode_attention(
            projected,
            rotation.cos_N1D.squeeze(1),
            rotation.sin_N1D.squeeze(1),
            norms,
            epsilon,
            layer.own(),
            (layer.prompt_keys, layer.prompt_values),
            (cache.prompt_of_B, cache.hidden_of_P, cache.lengths_B),
            of.scaling,
            dtype,
        )


def ops_for(head_width: int, *weights: Tensor) -> TorchOps | CompiledOps:
    """Compiled ones where they are to be had for heads of this width, and for weights or products of these types."""
    return CompiledOps() if head_width % cpu.LANES == 0 and cpu.fit(*weights) else TorchOps()

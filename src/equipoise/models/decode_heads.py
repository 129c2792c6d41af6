"""Attention of a decode step over the shared cache: as torch's operations, or compiled (`equipoise.kernels`).

Both compute the same. The compiled one knows float32 and bfloat16 on a CPU and a float32 cache; there it is one call
where torch makes some thirty, each as long as it takes to start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.kernels import cpu
from equipoise.models.block_parts import Norm, Rotation, compiled
from equipoise.models.grouped_cache import attend


@dataclass(frozen=True)
class Heads:
    """What a layer's attention consists of, its products aside."""

    query_norm: Norm | None
    key_norm: Norm | None
    width: int
    key_heads: int
    scaling: float

    def attention(self, projected: Tensor, rotation: Rotation, layer: Any, dtype: torch.dtype) -> Tensor:
        """Of the projected queries, keys and values of one token per row, which join the cache; [B, Q D] in `dtype`."""
        if self.width % cpu.LANES == 0 and layer.cache.dtype == torch.float32 and compiled(projected):
            return self._compiled(projected, rotation, layer, dtype)
        heads_BND = projected.to(layer.cache.dtype).unflatten(-1, (-1, self.width))
        turned = heads_BND.shape[1] - self.key_heads
        queries = turned - self.key_heads
        if self.query_norm is None or self.key_norm is None:
            rotated_BND = rotation.forward(heads_BND[:, :turned])
        else:
            parts = (self.query_norm(heads_BND[:, :queries]), self.key_norm(heads_BND[:, queries:turned]))
            rotated_BND = rotation.forward(torch.cat([part.normed.to(heads_BND.dtype) for part in parts], dim=1))
        keys_BKTD, values_BKTD = layer.update(rotated_BND[:, queries:, None], heads_BND[:, turned:, None])
        queries_BKRD = (rotated_BND[:, :queries] * self.scaling).unflatten(1, (self.key_heads, -1))
        return attend(queries_BKRD, keys_BKTD, values_BKTD, layer).flatten(1).to(dtype)

    def _compiled(self, projected: Tensor, rotation: Rotation, layer: Any, dtype: torch.dtype) -> Tensor:
        cache, norms, epsilon = layer.cache, None, 0.0
        if self.query_norm is not None and self.key_norm is not None:
            norms, epsilon = (self.query_norm.weight.float(), self.key_norm.weight.float()), self.query_norm.epsilon
        return cpu.decode_attention(
            projected,
            rotation.cos_ND,
            rotation.sin_ND,
            norms,
            epsilon,
            layer.own(),
            (layer.prompt_keys, layer.prompt_values),
            (cache.prompt_of_B, cache.hidden_of_P, cache.lengths_B),
            self.scaling,
            dtype,
        )

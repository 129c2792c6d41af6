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
from equipoise.models.block_parts import Norm, Rotation
from equipoise.models.grouped_cache import GroupedCache, attend


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
        if self.is_compiled(layer.cache, dtype):
            return self._compiled(projected, rotation, layer, dtype)
        queries_BQD, keys_BKD, values_BKD = self.turned(projected.to(layer.cache.dtype), rotation)
        keys_BKTD, values_BKTD = layer.update(keys_BKD[:, :, None], values_BKD[:, :, None])
        queries_BKRD = (queries_BQD * self.scaling).unflatten(1, (self.key_heads, -1))
        return attend(queries_BKRD, keys_BKTD, values_BKTD, layer).flatten(1).to(dtype)

    def turned(self, projected: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, heads, D] of what was projected for N positions: normed and rotated."""
        heads_NXD = projected.unflatten(-1, (-1, self.width))
        turned = heads_NXD.shape[1] - self.key_heads
        queries = turned - self.key_heads
        if self.query_norm is None or self.key_norm is None:
            rotated_NXD = rotation.forward(heads_NXD[:, :turned])
        else:
            pairs = (self.query_norm, heads_NXD[:, :queries]), (self.key_norm, heads_NXD[:, queries:turned])
            normed = [norm(part.contiguous()).normed.to(part.dtype) for norm, part in pairs]
            rotated_NXD = rotation.forward(torch.cat(normed, dim=1))
        return rotated_NXD[:, :queries], rotated_NXD[:, queries:], heads_NXD[:, turned:]

    def is_compiled(self, cache: GroupedCache, dtype: torch.dtype) -> bool:
        """Whether attention over this cache, its result in `dtype`, is one compiled call."""
        fits = self.width % cpu.LANES == 0 and cache.dtype == torch.float32 and dtype in cpu.TYPES
        return fits and cpu.fit(cache.layers[0].prompt_keys)  # type: ignore[union-attr]

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

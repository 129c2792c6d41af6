"""The parts of a decoder block between its matrix products and attention, with hand-written gradients.

On a CPU in float32 and bfloat16 each is one compiled call (`equipoise.kernels`); otherwise torch's operations, which
compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.functional.masking import at_least_float32
from equipoise.kernels import cpu


class Normed(NamedTuple):
    """What a norm finds."""

    total: Tensor  # its input, and what was added
    normed: Tensor
    inverse: Tensor  # 1 / root mean square [..., 1], float32 or better


@dataclass(frozen=True)
class Norm:
    """RMS norm over the last dimension, in float32 or better, rounded to the input's type before the weight as
    transformers rounds it."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """Of a norm as transformers has it."""
        return cls(norm.weight, float(norm.variance_epsilon))

    def __call__(self, inputs: Tensor, dtype: torch.dtype | None = None, plus: Tensor | None = None) -> Normed:
        """The normed `inputs + plus` in `dtype`, None for the type that inputs and weight make together."""
        dtype = dtype or torch.promote_types(inputs.dtype, self.weight.dtype)
        if dtype in cpu.TYPES and cpu.fit(inputs, self.weight, *(() if plus is None else (plus,))):
            inputs, plus = inputs.contiguous(), None if plus is None else plus.contiguous()
            return Normed(*cpu.residual_norm(inputs, plus, self.weight, self.epsilon, dtype))
        total = inputs if plus is None else (inputs + plus).to(inputs.dtype)
        inverse = torch.rsqrt(at_least_float32(total).square().mean(-1, keepdim=True).add_(self.epsilon))
        normed = (at_least_float32(total) * inverse).to(inputs.dtype) * self.weight
        return Normed(total, normed.to(dtype), inverse)

    def backward(
        self, inputs: Tensor, inverse: Tensor, grad: Tensor, for_weight: bool, plus: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of inputs, added to `plus`, and weight, each in its own type; the weight's None if not asked for.

        With `y = x r w`, `r = (mean(x^2) + eps)^(-1/2)`: `dx = r (g - x r^2 mean(g x))`, `g = dy w`; `dw = sum dy x r`.
        """
        if cpu.fit(inputs, self.weight, grad, *(() if plus is None else (plus,))):
            grad, plus = grad.contiguous(), None if plus is None else plus.contiguous()
            found, of_weight = cpu.norm_gradients(
                inputs, inverse, self.weight, grad, plus, inputs.dtype, for_weight=for_weight
            )
            return found, None if of_weight is None else of_weight.to(self.weight.dtype)
        wide = at_least_float32(inputs)
        grad = grad.to(wide.dtype)
        grad_weight = None
        if for_weight:
            grad_weight = (grad * wide).mul_(inverse).flatten(0, -2).sum(0).to(self.weight.dtype)
        scaled = grad * self.weight
        share = (scaled * wide).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
        found = torch.addcmul(scaled, wide, share, value=-1).mul_(inverse)
        return (found if plus is None else found.add_(plus)).to(inputs.dtype), grad_weight


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: `x cos + rotate_half(x) sin`, a rotation of pairs, whose gradient is the rotation back."""

    cos_ND: Tensor
    sin_ND: Tensor  # the first half negative, so that rotate_half swaps halves and nothing else

    @classmethod
    def of(cls, cos_ND: Tensor, sin_ND: Tensor) -> Rotation:
        """Of what a model's rotary embedding returns for N positions."""
        half = sin_ND.shape[-1] // 2
        return cls(cos_ND.contiguous(), torch.cat([-sin_ND[:, :half], sin_ND[:, half:]], dim=-1))

    def forward(self, heads_NHD: Tensor) -> Tensor:
        """Heads of N positions, rotated."""
        return self._turned(heads_NHD, back=False)

    def backward(self, grad_NHD: Tensor) -> Tensor:
        """The gradient before the rotation."""
        return self._turned(grad_NHD, back=True)

    def _turned(self, heads_NHD: Tensor, back: bool) -> Tensor:
        if cpu.fit(heads_NHD, self.cos_ND):
            dtype = torch.promote_types(heads_NHD.dtype, self.cos_ND.dtype)
            return cpu.rotate_heads(heads_NHD.contiguous(), self.cos_ND, self.sin_ND, dtype, back=back)
        first, second = heads_NHD.chunk(2, dim=-1)
        swapped = torch.cat([second, first], dim=-1)
        return torch.addcmul(heads_NHD * self.cos_ND[:, None], swapped, self.sin_ND[:, None], value=-1 if back else 1)


def gated(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """`silu(gate) up`; the two may be halves of one tensor."""
    if cpu.fit(gate_NI, up_NI):
        return cpu.silu_times(gate_NI, up_NI)
    return F.silu(gate_NI).mul_(up_NI)


def gated_backward(gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of `gated`, whose memory is used up."""
    if cpu.fit(gate_NI, up_NI, grad_NI):
        return cpu.silu_gradients(gate_NI, up_NI, grad_NI)
    grad_up = F.silu(gate_NI).mul_(grad_NI)
    return torch.ops.aten.silu_backward(grad_NI.mul_(up_NI), gate_NI), grad_up

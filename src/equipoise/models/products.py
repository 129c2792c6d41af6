"""Products with weights that stay as they are for a while, laid out once the way the processor multiplies best.

A decode loop multiplies a few rows with every weight, thousands of times between two changes. oneDNN, which torch
brings along, then wants the weight in blocks of its own; laid out anew in every call, that costs more than the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.kernels import cpu


class NotPlain(Exception):
    """A layer does more than `W x + b` and low-rank updates; the message says what."""


@dataclass(frozen=True)
class LowRank:
    """A LoRA update of a layer: `scaling * B A x`."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


@dataclass(frozen=True)
class LinearParts:
    """What a linear layer consists of: `W x + b` and the updates of its active adapters."""

    weight_OI: Tensor
    bias_O: Tensor | None
    updates: tuple[LowRank, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> LinearParts:
        """Of an `nn.Linear` or peft's plain LoRA around one. Raises NotPlain for everything else."""
        updates: tuple[LowRank, ...] = ()
        if type(layer).__module__.startswith("peft."):
            base = getattr(layer, "base_layer", None)
            updates, layer = _active_updates(layer), base if isinstance(base, nn.Module) else layer
        if type(layer) is not nn.Linear:
            raise NotPlain(f"it has a {type(layer).__name__} for a linear layer")
        found = cls(layer.weight, layer.bias, updates)
        # Shards and quantised weights are classes of their own, or integers.
        if any(type(t) not in (Tensor, nn.Parameter) or not t.is_floating_point() for t in found.tensors()):
            raise NotPlain("its weights are sharded or quantised")
        return found

    def tensors(self) -> list[Tensor]:
        """Weight, bias if there is one, and A and B of every update."""
        bias = [] if self.bias_O is None else [self.bias_O]
        return [self.weight_OI, *bias, *(part for update in self.updates for part in (update.a_RI, update.b_OR))]


def _active_updates(layer: Any) -> tuple[LowRank, ...]:
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is not LoraLinear:
        raise NotPlain(f"it has a {type(layer).__name__} of peft")
    if layer.merged:  # before the next: peft takes the adapter out of the weights when one that is off is called
        raise NotPlain("its adapter is merged")
    if layer.disable_adapters:
        return ()
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a: Any = layer.lora_A[name]
        b: Any = layer.lora_B[name]
        if name in layer.lora_variant or a.bias is not None or b.bias is not None:
            raise NotPlain(f"its adapter {name} is not a plain LoRA")
        if layer.training and getattr(layer.lora_dropout[name], "p", 0.0):
            raise NotPlain(f"its adapter {name} drops inputs")
        found.append(LowRank(a.weight, b.weight, float(layer.scaling[name])))
    return tuple(found)


class Product:
    """Linear layers that read the same input, as one product.

    Suffixes: N rows, I input and O output width of all layers together, R ranks of all their updates together, which
    take one product with all factors A and one with all factors B.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """Raises NotPlain where a layer is more than `LinearParts`; `dtype` is that of input and output."""
        parts = [LinearParts.of(layer) for layer in layers]
        updates = [(number, update) for number, part in enumerate(parts) for update in part.updates]
        self._full = Multiplier(_joined([part.weight_OI for part in parts], dtype), _joined_bias(parts, dtype))
        self._first = Multiplier(_joined([update.a_RI for _, update in updates], dtype)) if updates else None
        self._second = Multiplier(_joined_b(parts, updates, dtype)) if updates else None

    def __call__(self, rows_NI: Tensor) -> Tensor:
        """[N, I] to [N, O]."""
        found = self._full(rows_NI)
        if self._first is None or self._second is None:
            return found
        return self._second.plus(self._first(rows_NI), found)


def _joined(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One above the other. A single one is not copied: the vocabulary's table may be most of a model."""
    cast = [weight.to(dtype) for weight in weights]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _joined_bias(parts: list[LinearParts], dtype: torch.dtype) -> Tensor | None:
    if all(part.bias_O is None for part in parts):
        return None
    biases = [part.weight_OI.new_zeros(len(part.weight_OI)) if part.bias_O is None else part.bias_O for part in parts]
    return torch.cat([bias.to(dtype) for bias in biases])


def _joined_b(parts: list[LinearParts], updates: list[tuple[int, LowRank]], dtype: torch.dtype) -> Tensor:
    """[O, R]: each update's scaled B in the rows of its layer and the columns of its A; 0 elsewhere."""
    ends = torch.tensor([len(part.weight_OI) for part in parts]).cumsum(0).tolist()
    ranks = sum(len(update.a_RI) for _, update in updates)
    joined = parts[0].weight_OI.new_zeros(ends[-1], ranks, dtype=dtype)
    column = 0
    for number, update in updates:
        rank, width = len(update.a_RI), len(update.b_OR)
        joined[ends[number] - width : ends[number], column : column + rank] = update.b_OR * update.scaling
        column += rank
    return joined


class Multiplier:
    """Multiplies by one weight, [N, I] to [N, O]; the weight is copied where that is faster."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._few: cpu.FewRows | None = None
        self._weight, self._bias_O, self._is_packed = weight_OI.detach(), bias_O, False
        if cpu.FewRows.takes(weight_OI):
            self._few = cpu.FewRows(self._weight.contiguous(), bias_O)
            self._weight = weight_OI.new_empty(0)  # what was laid out serves
        elif is_packable(weight_OI.dtype, weight_OI.device):
            self._weight, self._is_packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous()), True

    def __call__(self, rows_NI: Tensor) -> Tensor:
        """`x W^T + b`."""
        if self._few is not None:
            return self._few(rows_NI)
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(rows_NI, self._weight, self._bias_O, "none", [], "")
        return F.linear(rows_NI, self._weight, self._bias_O)

    def plus(self, rows_NI: Tensor, other_NO: Tensor) -> Tensor:
        """`x W^T + other`, for a multiplier without a bias."""
        if self._few is not None:
            return self._few(rows_NI, other_NO)
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(rows_NI, other_NO, self._weight, None, "add")
        return torch.addmm(other_NO, rows_NI, self._weight.t())


def multiplied(
    rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, plus: Tensor | None = None
) -> Tensor:
    """`x W^T + b + plus` [N, O] with a weight that is used once as it lies.

    Bias and `plus` exclude each other; the memory of `plus` may be taken for the result.

    In float32 on a CPU by oneDNN, which is ahead of the product that torch takes on AMD's processors and level with it
    on Intel's. No gradient flows.
    """
    if weight_OI.dtype != torch.float32 or not is_packable(weight_OI.dtype, weight_OI.device):
        if plus is not None:
            return plus.addmm_(rows_NI, weight_OI.t())
        return F.linear(rows_NI, weight_OI, bias_O)
    multiply = torch.ops.mkldnn._linear_pointwise
    if plus is not None:
        return multiply.binary(rows_NI, plus, weight_OI, None, "add")
    return multiply(rows_NI, weight_OI, bias_O, "none", [], "")


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """What a matrix product with this weight runs in here; autocast leaves float64 alone."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


@cache  # asked for every product of every pass
def is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies weights of this type. Machine and type alone decide."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    if not hasattr(torch.ops.mkldnn._linear_pointwise, "binary"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32

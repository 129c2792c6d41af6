"""Sums, means and lengths over the positions a mask keeps.

Masked positions are replaced before anything is computed from them, so NaN or infinity there reaches neither the
value nor the gradient (a product with 0 would keep both).
"""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32, or in their own dtype where that is float32 or float64."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def masked_fill_zero(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is True, exactly 0 elsewhere, with gradient 0 there. Shapes broadcast."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the unmasked values, over everything or along `dim`; 0 where nothing is unmasked.

    Example: values [1, 2, nan], mask [1, 1, 0]: 1 + 2 = 3.
    """
    kept = masked_fill_zero(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the unmasked values, over everything or along `dim`; 0 where nothing is unmasked, never NaN.

    Example: values [1, 2, nan], mask [1, 1, 0]: (1 + 2) / 2 = 1.5.
    """
    count = masked_sum(torch.ones_like(values), mask, dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def sequence_lengths(mask_BT: Tensor) -> Tensor:
    """Number of unmasked tokens of each row: int64 [B]."""
    return mask_BT.bool().sum(dim=1)


def length_mask(lengths_B: Tensor, num_tokens: int) -> Tensor:
    """The right-padded mask [B, T] whose row b starts with `lengths_B[b]` Trues."""
    return torch.arange(num_tokens, device=lengths_B.device)[None, :] < lengths_B[:, None]


def divide_by_count(total: Tensor, count: Tensor | float) -> Tensor:
    """`total / count`, and `total` itself where the count is 0.

    A count of 0 comes with a total that is an empty sum, hence 0 and still connected to the graph: the loss of a
    batch with nothing to train on is 0 with gradient 0, never NaN.
    """
    divisor = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)

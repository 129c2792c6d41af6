"""Statistics within groups of completions. A group is the completions that share an explicit integer id."""

from typing import NamedTuple

import torch
from torch import Tensor

# Differences below this many units of float64 rounding, relative to the numbers they were computed from, are
# rounding themselves: they are set to 0 so that a tiny delta cannot blow them up.
ROUNDING = 16 * torch.finfo(torch.float64).eps


class CentredRewards(NamedTuple):
    """Rewards less their group's mean. Everything that is missing, and every group of equal rewards, is exactly 0."""

    centred_BK: Tensor
    """float64; reward minus the mean of the group's scored rewards on that objective, 0 where missing."""
    scored_BK: Tensor
    """bool; False where the reward is missing."""
    rounding_BK: Tensor
    """float64; how large an error of rounding in `centred_BK` may be."""
    index_B: Tensor
    """int64; the group of each completion as 0 .. num_groups - 1."""
    num_groups: int


def centre_rewards(rewards_BK: Tensor, group_ids_B: Tensor) -> CentredRewards:
    """Subtract from each reward the mean of its group's scored rewards, objective by objective. NaN = not scored.

    Raises ValueError for shapes that do not fit, ids that are not integers and infinite rewards, naming the column.

    Example: rewards [1, 3, nan, 5], ids [7, 7, 7, 2]: the mean of group 7 is 2, so [-1, 1, 0, 0].
    """
    _check(rewards_BK, group_ids_B)
    rewards_BK = rewards_BK.detach().to(torch.float64)
    index_B, num_groups = group_index(group_ids_B)
    scored_BK = ~rewards_BK.isnan()
    filled_BK = torch.where(scored_BK, rewards_BK, 0.0)
    count_GK = group_sum(scored_BK.to(torch.float64), index_B, num_groups)
    mean_GK = group_sum(filled_BK, index_B, num_groups) / count_GK  # NaN where nothing is scored, and not used there
    high_GK = _group_extreme(torch.where(scored_BK, rewards_BK, -torch.inf), index_B, num_groups, "amax")
    low_GK = _group_extreme(torch.where(scored_BK, rewards_BK, torch.inf), index_B, num_groups, "amin")
    # Equality decides, not the computed spread: the mean of eight 0.7s is not exactly 0.7.
    varied_BK = scored_BK & (high_GK > low_GK)[index_B]
    centred_BK = torch.where(varied_BK, rewards_BK - mean_GK[index_B], 0.0)
    largest_GK = torch.maximum(high_GK.abs(), low_GK.abs())
    rounding_BK = torch.where(varied_BK, ROUNDING * largest_GK[index_B], 0.0)
    return CentredRewards(centred_BK, scored_BK, rounding_BK, index_B, num_groups)


def group_index(group_ids_B: Tensor) -> tuple[Tensor, int]:
    """Renumber arbitrary ids as 0 .. number of groups - 1: (index_B, number of groups)."""
    unique, index_B = torch.unique(group_ids_B, return_inverse=True)
    return index_B, len(unique)


def group_sum(values: Tensor, index_B: Tensor, num_groups: int) -> Tensor:
    """Sum of `values` [B] or [B, K] within each group: [groups] or [groups, K]."""
    totals = torch.zeros(num_groups, *values.shape[1:], dtype=values.dtype, device=values.device)
    return totals.index_add(0, index_B, values)


def spread(centred: Tensor, scored: Tensor, index_B: Tensor, num_groups: int) -> Tensor:
    """Unbiased standard deviation, within each group, of values that sum to 0 there; 0 for fewer than two.

    `centred` and `scored` are [B] or [B, K]. Values that are not scored must be 0. Subtracting the mean again would
    only add rounding: it is 0 by construction.

    Example: values [-1, 1] in one group: sqrt((1 + 1) / (2 - 1)) = 1.41421.
    """
    squares = group_sum(centred.square(), index_B, num_groups)
    count = group_sum(scored.to(centred.dtype), index_B, num_groups)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def inverse_scale(std: Tensor, delta: float) -> Tensor:
    """1 / (std + delta), and 0 where both are 0. Raises ValueError for a negative or non-finite delta."""
    if not 0 <= delta < float("inf"):
        raise ValueError(f"delta must be a finite number of at least 0, got {delta}")
    total = std + delta
    return torch.where(total > 0, 1 / total, 0.0)


def _group_extreme(values_BK: Tensor, index_B: Tensor, num_groups: int, reduce: str) -> Tensor:
    start = torch.zeros(num_groups, *values_BK.shape[1:], dtype=values_BK.dtype, device=values_BK.device)
    index_BK = index_B[:, None].expand_as(values_BK)
    return start.scatter_reduce(0, index_BK, values_BK, reduce, include_self=False)


def _check(rewards_BK: Tensor, group_ids_B: Tensor) -> None:
    if rewards_BK.ndim != 2 or group_ids_B.ndim != 1 or len(rewards_BK) != len(group_ids_B):
        raise ValueError(
            "rewards need one row, and group ids one integer, for each completion; "
            f"got shapes {tuple(rewards_BK.shape)} and {tuple(group_ids_B.shape)}"
        )
    if group_ids_B.is_floating_point() or group_ids_B.is_complex() or group_ids_B.dtype == torch.bool:
        raise ValueError(f"group ids must be integers, got {group_ids_B.dtype}")
    infinite = rewards_BK.isinf().nonzero()
    if len(infinite):
        row, column = infinite[0].tolist()
        raise ValueError(
            f"objective column {column} holds {rewards_BK[row, column].item()} for completion {row}: "
            "a reward must be finite, or NaN where it was not scored"
        )

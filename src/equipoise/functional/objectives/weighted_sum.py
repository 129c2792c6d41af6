"""The paper's combination: a weighted sum of centred rewards, scaled by its own spread in the group or otherwise."""

from typing import Literal

import torch
from torch import Tensor

from equipoise.functional.groups import centre_rewards, group_sum, inverse_scale, spread

Scale = Literal["std", "none", "batch", "leave_one_out"]


def weighted_sum(
    rewards_BK: Tensor, group_ids_B: Tensor, weights_K: Tensor, *, delta: float, scale: Scale = "std"
) -> Tensor:
    """Contributions of each objective [B, K]; `combine_objectives` describes arguments and errors.

    c_ik is the reward less the mean of the group's scored rewards on objective k, 0 where missing.

    - `std`: w_k c_ik / (std_g + delta), std_g the unbiased std of sum_k w_k c_ik over the group's completions with any
      score. Without gaps this is GRPO on the weighted sum of the rewards (arXiv 2503.21819).
    - `batch`: the same with the std over all completions with any score.
    - `none`: w_k c_ik. Dr. GRPO, arXiv 2503.20783.
    - `leave_one_out`: w_k times the reward less the mean of the *other* scored rewards of the group, which is
      w_k c_ik n / (n - 1) with n scored rewards. RLOO, arXiv 2402.14740.

    Raises ValueError for an unknown scale.

    Example: one objective of weight 1, one group, rewards [0, 3, 6]: centred [-3, 0, 3]; `leave_one_out`:
    [0 - 4.5, 3 - 3, 6 - 1.5] = [-4.5, 0, 4.5].
    """
    if scale not in ("std", "none", "batch", "leave_one_out"):
        raise ValueError(f"unknown scale {scale!r}: choose std, none, batch or leave_one_out")
    rewards = centre_rewards(rewards_BK, group_ids_B)
    factor_BK = weights_K.expand_as(rewards.centred_BK)
    if scale == "leave_one_out":
        count_GK = group_sum(rewards.scored_BK.to(torch.float64), rewards.index_B, rewards.num_groups)
        factor_BK = factor_BK * (count_GK / (count_GK - 1).clamp(min=1))[rewards.index_B]
    parts_BK = settle_ties(factor_BK * rewards.centred_BK, factor_BK * rewards.rounding_BK)
    if scale in ("none", "leave_one_out"):
        return parts_BK
    index_B, num_groups = rewards.index_B, rewards.num_groups
    if scale == "batch":
        index_B, num_groups = torch.zeros_like(index_B), 1
    scored_B = (rewards.scored_BK & (weights_K > 0)).any(1)
    std_G = spread(parts_BK.sum(1), scored_B, index_B, num_groups)
    return parts_BK * inverse_scale(std_G, delta)[index_B, None]


def settle_ties(parts_BK: Tensor, rounding_BK: Tensor) -> Tensor:
    """Set to 0 the rows whose parts cancel up to the error of rounding: opposed objectives that tie are a tie."""
    tied_B = parts_BK.sum(1).abs() <= rounding_BK.sum(1)
    return torch.where(tied_B[:, None], 0.0, parts_BK)

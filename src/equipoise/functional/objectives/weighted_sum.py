"""The paper's combination: a weighted sum of centred rewards, scaled by its own spread in the group."""

import torch
from torch import Tensor

from equipoise.functional.groups import centre_rewards, inverse_scale, spread


def weighted_sum(rewards_BK: Tensor, group_ids_B: Tensor, weights_K: Tensor, *, delta: float) -> Tensor:
    """Contributions w_k c_ik / (std_g + delta) [B, K]; `combine_objectives` describes arguments and errors.

    c_ik is the reward less the mean of the group's scored rewards on objective k, 0 where missing; std_g is the
    unbiased std of sum_k w_k c_ik over the group's completions with any score. Without gaps this is GRPO on the
    weighted sum of the rewards (arXiv 2503.21819).
    """
    rewards = centre_rewards(rewards_BK, group_ids_B)
    parts_BK = settle_ties(weights_K * rewards.centred_BK, weights_K * rewards.rounding_BK)
    scored_B = (rewards.scored_BK & (weights_K > 0)).any(1)
    std_G = spread(parts_BK.sum(1), scored_B, rewards.index_B, rewards.num_groups)
    return parts_BK * inverse_scale(std_G, delta)[rewards.index_B, None]


def settle_ties(parts_BK: Tensor, rounding_BK: Tensor) -> Tensor:
    """Set to 0 the rows whose parts cancel up to the error of rounding: opposed objectives that tie are a tie."""
    tied_B = parts_BK.sum(1).abs() <= rounding_BK.sum(1)
    return torch.where(tied_B[:, None], 0.0, parts_BK)

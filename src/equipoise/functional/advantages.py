"""Advantages: relative to the group (GRPO), and generalised advantage estimation (PPO)."""

from typing import Literal

import torch
from torch import Tensor

from equipoise.functional.groups import centre_rewards, group_index, group_sum, inverse_scale, spread
from equipoise.functional.masking import masked_fill_zero

AdvantageScale = Literal["std", "none", "batch"]


def group_advantages(
    rewards_B: Tensor, group_ids_B: Tensor, *, scale: AdvantageScale = "std", delta: float = 1e-4
) -> Tensor:
    """Reward of each completion relative to its group: [B], in the dtype of the rewards.

    Group ids are arbitrary integers in any order. NaN means not scored: it counts in no statistic and gets 0. A group
    whose scored rewards are all equal, and a group of one, gets exactly 0.

    - `std`: (r - mean) / (std + delta), the unbiased std of the group. GRPO, arXiv 2402.03300, section 4.1.2.
    - `none`: r - mean. Dr. GRPO, arXiv 2503.20783.
    - `batch`: r - mean of the group, divided by (std + delta), the unbiased std of all these centred rewards.

    Raises ValueError for an unknown scale, an infinite reward, or shapes that do not fit.

    Example: rewards [1, 3], one group, delta 0: centred [-1, 1], std sqrt(2), advantages [-0.70711, 0.70711].
    """
    if scale not in ("std", "none", "batch"):
        raise ValueError(f"unknown scale {scale!r}: choose std, none or batch")
    if rewards_B.ndim != 1:
        raise ValueError(f"rewards need one number for each completion, got shape {tuple(rewards_B.shape)}")
    rewards = centre_rewards(rewards_B[:, None], group_ids_B)
    centred_B, scored_B = rewards.centred_BK.squeeze(1), rewards.scored_BK.squeeze(1)
    if scale == "std":
        std_G = spread(centred_B, scored_B, rewards.index_B, rewards.num_groups)
        centred_B = centred_B * inverse_scale(std_G, delta)[rewards.index_B]
    elif scale == "batch":
        std_1 = spread(centred_B, scored_B, torch.zeros_like(rewards.index_B), 1)
        centred_B = centred_B * inverse_scale(std_1, delta)
    return centred_B.to(output_dtype(rewards_B))


def output_dtype(rewards: Tensor) -> torch.dtype:
    """The dtype advantages are returned in: that of the rewards, float32 for integer rewards."""
    return rewards.dtype if rewards.is_floating_point() else torch.float32


def zero_variance_groups(advantages_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Whether each completion's group has advantage exactly 0 throughout, so that it teaches nothing: bool [B]."""
    index_B, num_groups = group_index(group_ids_B)
    return (group_sum((advantages_B != 0).long(), index_B, num_groups) == 0)[index_B]


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over right-padded rows: (advantages_BT, returns_BT), 0 where masked, no graph.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; return_t = A_t + V_t. Source: arXiv
    1506.02438, equation 16. After a row's last unmasked token the value is `last_values_B` (a completion that was cut
    off), or 0 (one that ended). The advantages are not whitened. Raises ValueError where a mask is not right-padded.

    Example: rewards [0, 1], values [0.5, 0.25], gamma 1, lam 0.5: A_2 = 1 - 0.25 = 0.75;
    A_1 = (0 + 0.25 - 0.5) + 0.5 * 0.75 = 0.125; returns [0.625, 1].
    """
    mask_BT = mask_BT.bool()
    if (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any():
        raise ValueError("gae needs right-padded rows: a masked token comes before an unmasked one")
    rewards_BT, values_BT = masked_fill_zero(rewards_BT, mask_BT), masked_fill_zero(values_BT, mask_BT)
    next_values_BT = torch.zeros_like(values_BT)
    next_values_BT[:, :-1] = values_BT[:, 1:]
    if last_values_B is not None:
        is_last_BT = mask_BT.clone()
        is_last_BT[:, :-1] &= ~mask_BT[:, 1:]
        next_values_BT = torch.where(is_last_BT, last_values_B[:, None], next_values_BT)
    advantages_BT = rewards_BT + gamma * next_values_BT - values_BT
    for t in range(advantages_BT.shape[1] - 2, -1, -1):
        advantages_BT[:, t] += gamma * lam * advantages_BT[:, t + 1]
    return advantages_BT, advantages_BT + values_BT

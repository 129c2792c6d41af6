"""Combining several rewards into one advantage. A method is a file here and a line in METHODS."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equipoise.functional.advantages import output_dtype
from equipoise.functional.objectives.gdpo import gdpo
from equipoise.functional.objectives.weighted_sum import weighted_sum

# (rewards_BK, group_ids_B, weights_K, *, delta, **its own options) -> contributions [B, K] in float64: what each
# objective adds to each completion's advantage.
Method = Callable[..., Tensor]

METHODS: dict[str, Method] = {
    "weighted_sum": weighted_sum,
    "gdpo": gdpo,
}


def combine_objectives(
    rewards_BK: Tensor,
    group_ids_B: Tensor,
    weights_K: Tensor,
    *,
    method: str = "weighted_sum",
    delta: float = 1e-4,
    **options: Any,
) -> Tensor:
    """One advantage for each completion from its rewards on K objectives: [B], in the dtype of the rewards.

    Rewards are utilities (more is better); NaN means not scored, and is never read as 0. An objective of weight 0
    counts for nothing, so a completion scored on such objectives alone is unscored. Unscored completions get 0. Group
    ids are arbitrary integers in any order. `METHODS` lists the methods; `options` go to the method, which refuses
    those it does not know (TypeError).

    Raises ValueError for an unknown method, a weight that is negative or not finite, an infinite reward (the message
    names its column), or shapes that do not fit.

    Example: one group, rewards [[1, 0], [0, 0.5]], weights [1, 1], delta 0: centred sums [0.5 - 0.25, -0.5 + 0.25],
    std 0.25 * sqrt(2), advantages [0.70711, -0.70711].
    """
    return (
        objective_contributions(rewards_BK, group_ids_B, weights_K, method=method, delta=delta, **options)
        .sum(1)
        .to(output_dtype(rewards_BK))
    )


def objective_contributions(
    rewards_BK: Tensor,
    group_ids_B: Tensor,
    weights_K: Tensor,
    *,
    method: str = "weighted_sum",
    delta: float = 1e-4,
    **options: Any,
) -> Tensor:
    """What each objective adds to each advantage: float64 [B, K], whose sum over K is `combine_objectives`.

    Where the objectives cancel exactly, the advantage is 0 and the contributions are given as 0 as well.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} of combining objectives: choose one of {', '.join(METHODS)}")
    weights_K = torch.as_tensor(weights_K, dtype=torch.float64, device=rewards_BK.device)
    if rewards_BK.ndim != 2 or weights_K.shape != rewards_BK.shape[1:]:
        raise ValueError(
            "rewards need one column for each weight; "
            f"got shapes {tuple(rewards_BK.shape)} and {tuple(weights_K.shape)}"
        )
    wrong = [number for number in weights_K.tolist() if not 0 <= number < float("inf")]
    if wrong:
        raise ValueError(f"weights must be finite numbers of at least 0, got {wrong[0]} among {weights_K.tolist()}")
    return METHODS[method](rewards_BK, group_ids_B, weights_K, delta=delta, **options)


def variance_shares(contributions_BK: Tensor) -> Tensor:
    """Each objective's share of the advantage's variance, cov(contribution, advantage) / var(advantage): [K].

    The shares sum to 1; one is negative where its objective pulls against the others. All 0 when nothing varies.

    Example: contributions [[3, -1], [-3, 1]]: advantages [2, -2]; shares 3*2*2 / 8 = 1.5 and -1*2*2 / 8 = -0.5.
    """
    advantages_B = contributions_BK.sum(1)
    centred_B = advantages_B - advantages_B.mean()
    total = (centred_B * advantages_B).sum()
    shares_K = (centred_B[:, None] * contributions_BK).sum(0)
    return torch.where(total > 0, shares_K / total, torch.zeros_like(shares_K))

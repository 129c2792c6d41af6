"""What a PPO step leaves behind: metrics and the completions file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from equipoise.algorithms.grpo_records import completion_columns, completion_metrics
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.algorithms.ppo_signal import TokenSignal, moments
from equipoise.algorithms.run import Run
from equipoise.functional.objectives import variance_shares
from equipoise.rollout.types import Rollout


def ppo_metrics(
    rollout: Rollout, scores_BK: Tensor, signal: TokenSignal, objectives: Objectives, beta: float, run: Run
) -> dict[str, Any]:
    """Reward, value and length statistics over all processes; docs/algorithms/ppo.md defines each."""
    metrics = completion_metrics(rollout, scores_BK, signal.completions, objectives, run)
    shares = variance_shares(run.gathered(signal.completions.contributions_BK))
    for name, share in zip(signal.completions.contributors, shares.tolist(), strict=True):
        metrics[f"reward/{name}/variance_share"] = share
    returns = moments(signal.returns_BT, signal.mask_BT, run)
    errors = moments(signal.returns_BT - signal.values_BT, signal.mask_BT, run)
    values = moments(signal.values_BT, signal.mask_BT, run)
    advantages = moments(signal.raw_advantages_BT, signal.mask_BT, run)
    trains = int(signal.completions.all_trained.sum()) > 0
    return metrics | {
        "reward/unscored": int(run.gathered(signal.scores_B).isnan().sum()),
        "reward/filled": signal.filled,
        "reward/kl_penalty": signal.completions.kl_penalty,
        "kl/coefficient": beta,
        "advantage/std": advantages[1] ** 0.5 if trains else None,
        "return/mean": returns[0] if trains else None,
        "value/mean": values[0] if trains else None,
        "value/explained_variance": 1 - errors[1] / returns[1] if returns[1] > 0 else None,
    }


def ppo_columns(
    rollout: Rollout, scores_BK: Tensor, signal: TokenSignal, objectives: Objectives, std_BK: Tensor | None = None
) -> dict[str, list[Any]]:
    """Columns of completions/step_*.parquet: GRPO's, with what an aspect adds to the score in share/<aspect>."""
    columns = completion_columns(rollout, scores_BK, signal.completions, objectives, std_BK)
    scored = [None if value != value else value for value in signal.scores_B.tolist()]
    return columns | {"reward": scored, "kl": signal.kl_B.tolist()}

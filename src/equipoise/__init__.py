"""Equipoise: align language models to objectives that conflict.

The public names below are imported when first used, so that `import equipoise` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Policy": "equipoise.models.policy",
    "RewardModel": "equipoise.models.reward_model",
    "Rollout": "equipoise.rollout.types",
    "Run": "equipoise.algorithms.run",
    "SamplingConfig": "equipoise.config",
    "combine_objectives": "equipoise.functional",
    "completion_logprobs": "equipoise.rollout.logprobs",
    "evaluate_policy": "equipoise.evaluation",
    "generate": "equipoise.rollout.sampler",
    "load_policy": "equipoise.models.policy",
    "load_prompts": "equipoise.data",
    "load_recipe": "equipoise.config",
    "score_rollout": "equipoise.rollout.scorers",
    "train_dpo": "equipoise.algorithms.dpo",
    "train_grpo": "equipoise.algorithms.grpo",
    "train_ppo": "equipoise.algorithms.ppo",
    "train_reward": "equipoise.algorithms.reward_regression",
    "train_sft": "equipoise.algorithms.sft",
}

__all__ = [
    "Policy",
    "RewardModel",
    "Rollout",
    "Run",
    "SamplingConfig",
    "combine_objectives",
    "completion_logprobs",
    "evaluate_policy",
    "generate",
    "load_policy",
    "load_prompts",
    "load_recipe",
    "score_rollout",
    "train_dpo",
    "train_grpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'equipoise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if TYPE_CHECKING:
    from equipoise.algorithms.dpo import train_dpo
    from equipoise.algorithms.grpo import train_grpo
    from equipoise.algorithms.ppo import train_ppo
    from equipoise.algorithms.reward_regression import train_reward
    from equipoise.algorithms.run import Run
    from equipoise.algorithms.sft import train_sft
    from equipoise.config import SamplingConfig, load_recipe
    from equipoise.data import load_prompts
    from equipoise.evaluation import evaluate_policy
    from equipoise.functional import combine_objectives
    from equipoise.models.policy import Policy, load_policy
    from equipoise.models.reward_model import RewardModel
    from equipoise.rollout.logprobs import completion_logprobs
    from equipoise.rollout.sampler import generate
    from equipoise.rollout.scorers import score_rollout
    from equipoise.rollout.types import Rollout

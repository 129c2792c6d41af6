"""PPO, and RLOO, on a tiny policy reach the known optimum of their own objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.toy import POLITE, grpo_values, politeness, toy_policy_directory

from equipoise.algorithms.grpo import train_grpo
from equipoise.algorithms.ppo import train_ppo
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig, PPOConfig, SamplingConfig, recipe_from_mapping
from equipoise.data import PromptRecord
from equipoise.models.aspects import Aspect
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import FunctionScorer

PROMPTS = [PromptRecord(prompt=f"how do i {word}") for word in ("walk", "run", "go", "stop", "cake", "fix")]
PPO = {"algorithm": "ppo", "prompts_per_step": 6, "group_size": 10, "num_epochs": 2}
RLOO = {"scale": "leave_one_out", "kl_in": "reward", "reduction": "constant", "group_size": 10, "prompts_per_step": 6}


def trained(directory: Path, function: Any = politeness, **changes: Any) -> tuple[Policy, list[dict[str, Any]]]:
    """Policy and metrics after training on `function` with at most 6 tokens a completion."""
    model = toy_policy_directory(directory / "model", layers=1)
    values = grpo_values(
        model, model, beta=0.0, completions_every=1000, sampling={"max_tokens": 6}, checkpoint={"every": 1000},
        threads=1, optimizer={"learning_rate": 2e-2},
    )  # fmt: skip
    config, lines = recipe_from_mapping(values | changes), []
    assert isinstance(config, PPOConfig | GRPOConfig)
    run = Run(directory / "run", config)
    run.listener = lines.append
    policy = load_policy(
        model,
        trainable=True,
        with_reference=config.beta > 0,
        value_head=isinstance(config, PPOConfig) and config.critic.kind == "shared",
    )
    scorers = [FunctionScorer(function, "words", [Aspect("politeness", higher_is_better=True, range=(0.0, 1.0))])]
    if isinstance(config, PPOConfig):
        return train_ppo(policy, scorers, PROMPTS, config, run), lines
    return train_grpo(policy, scorers, PROMPTS, config, run), lines


def polite_share(policy: Policy) -> float:
    """Mean share of polite words over fresh samples."""
    rollout = generate(policy, PROMPTS, 32, SamplingConfig(max_tokens=6), seed=99)
    shares = politeness([], list(rollout.completions))["politeness"]
    return sum(value for value in shares if value is not None) / len(shares)


@pytest.mark.parametrize(
    "changes",
    [
        PPO,
        PPO | {"critic": {"kind": "shared"}, "value_coefficient": 0.1},
        PPO | {"group_size": 1, "prompts_per_step": 60, "num_minibatches": 2, "lam": 1.0},
        RLOO | {"beta": 1e-3, "constant": 6},
    ],
    ids=["separate", "shared", "one completion", "rloo"],
)
def test_reaches_the_best_share_of_polite_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy, lines = trained(tmp_path, num_steps=25, **changes)
    assert lines[0]["reward/politeness/mean"] < 0.15
    assert lines[-1]["reward/politeness/mean"] > 0.9
    assert polite_share(policy) > 0.9
    if changes.get("algorithm") == "ppo":
        assert lines[-1]["value/mean"] > 0.5 > lines[0]["value/mean"], "the critic saw it coming"


def halfway(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """Best where a quarter of the words are polite."""
    shares = [sum(word in POLITE for word in text.split()) / max(1, len(text.split())) for text in completions]
    return {"politeness": [1 - (s - 0.25) ** 2 for s in shares]}


def test_stops_at_an_optimum_in_between(tmp_path: Path) -> None:
    policy, _ = trained(
        tmp_path, halfway, num_steps=40, **PPO | {"optimizer": {"learning_rate": 2e-2, "schedule": "linear"}}
    )
    assert polite_share(policy) == pytest.approx(0.25, abs=0.1)


def test_the_controller_holds_the_kl_at_its_target(tmp_path: Path) -> None:
    """With beta fixed the KL goes on growing; the controller lets it swing about its target."""
    settings = PPO | {"beta": 0.1, "num_epochs": 4, "optimizer": {"learning_rate": 5e-3}, "num_steps": 50}
    _, fixed = trained(tmp_path / "fixed", **settings)
    _, held = trained(tmp_path / "held", **settings | {"adaptive_kl": {"target": 1.5, "horizon": 60}})
    assert sum(line["kl"] for line in fixed[-20:]) / 20 > 3
    assert sum(line["kl"] for line in held[-30:]) / 30 == pytest.approx(1.5, abs=0.75)
    assert fixed[-1]["kl/coefficient"] == 0.1 != held[-1]["kl/coefficient"]

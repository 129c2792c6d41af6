"""GRPO on a tiny policy reaches the known optimum of its own objective, with one objective and with two in conflict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.toy import POLITE, grpo_values, politeness, toy_policy_directory

from equipoise.algorithms.grpo import train_grpo
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig, SamplingConfig
from equipoise.data import PromptRecord
from equipoise.models.aspects import Aspect
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import FunctionScorer

PROMPTS = [PromptRecord(prompt=f"how do i {word}") for word in ("walk", "run", "go", "stop", "cake", "fix")]
UNSEEN = ["what is it", "can you help", "how do i plant seeds"]


def trained(
    directory: Path, function: Callable[..., Any], aspects: list[Aspect], weights: dict[str, float], **changes: Any
) -> tuple[Policy, list[dict[str, Any]]]:
    """Policy and metrics after GRPO with 4 x 16 completions of at most 6 tokens a step."""
    model = toy_policy_directory(directory / "model", layers=1)
    values = grpo_values(
        model, model, prompts_per_step=4, group_size=16, beta=0.0, completions_every=1000,
        sampling={"max_tokens": 6}, objective_weights=weights, checkpoint={"every": 1000}, threads=1,
    )  # fmt: skip
    config, lines = GRPOConfig.model_validate(values | changes), []
    run = Run(directory / "run", config)
    run.listener = lines.append
    policy = load_policy(model, trainable=True, with_reference=config.beta > 0, seed=config.seed)
    train_grpo(policy, [FunctionScorer(function, "words", aspects)], PROMPTS, config, run)
    return policy, lines


def polite_share(policy: Policy, prompts: list[str]) -> float:
    """Mean share of polite words over fresh samples."""
    rollout = generate(policy, prompts, 64, SamplingConfig(max_tokens=6), seed=99)
    shares = politeness([], list(rollout.completions))["politeness"]
    return sum(value for value in shares if value is not None) / len(shares)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_epochs": 2, "num_minibatches": 2},
        {"combine": {"method": "gdpo"}, "ratio": "sequence", "reduction": "token_mean"},
    ],
    ids=["full", "off-policy", "gdpo"],
)
def test_reaches_the_best_share_of_polite_words(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    aspects = [Aspect("politeness", higher_is_better=True, range=(0.0, 1.0))]
    policy, lines = trained(
        tmp_path, politeness, aspects, {"politeness": 1.0}, seed=seed, num_steps=15,
        optimizer={"learning_rate": 3e-2}, **changes,
    )  # fmt: skip
    assert lines[0]["reward/politeness/mean"] < 0.15
    assert lines[-1]["reward/politeness/mean"] > 0.9
    assert polite_share(policy, UNSEEN) > 0.9


def test_lower_is_better_is_driven_down(tmp_path: Path) -> None:
    """From a start at which polite words are frequent, an aspect whose direction is down makes them vanish."""
    aspects = [Aspect("politeness", higher_is_better=False)]
    policy, lines = trained(
        tmp_path, politeness, aspects, {"politeness": 1.0}, num_steps=15, optimizer={"learning_rate": 3e-2}
    )
    assert polite_share(policy, UNSEEN) < 0.01 < lines[0]["reward/politeness/mean"]


def conflict(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """Two judges of the share s of polite words: one wants 0 and scores -s^2, one wants 1 and scores -(1 - s)^2."""
    shares = [sum(word in POLITE for word in text.split()) / max(1, len(text.split())) for text in completions]
    return {"plain": [-s * s for s in shares], "polite": [-((1 - s) ** 2) for s in shares]}


@pytest.mark.parametrize(("plain", "polite"), [(1.0, 3.0), (1.0, 1.0), (3.0, 1.0)])
def test_two_conflicting_objectives_meet_where_the_weights_say(tmp_path: Path, plain: float, polite: float) -> None:
    """-(a s^2 + b (1 - s)^2) is largest at s = b / (a + b): 3/4, 1/2 and 1/4."""
    aspects = [Aspect("plain", higher_is_better=True), Aspect("polite", higher_is_better=True)]
    policy, _ = trained(
        tmp_path, conflict, aspects, {"plain": plain, "polite": polite}, num_steps=40,
        optimizer={"learning_rate": 2e-2, "schedule": "linear"},
    )  # fmt: skip
    prompts = [str(record.prompt) for record in PROMPTS]
    assert polite_share(policy, prompts) == pytest.approx(polite / (plain + polite), abs=0.1)


def test_a_large_beta_holds_the_policy_at_its_reference(tmp_path: Path) -> None:
    aspects = [Aspect("politeness", higher_is_better=True)]
    kl, share = [], []
    for beta in (0.0, 0.5, 50.0):
        policy, lines = trained(
            tmp_path / str(beta), politeness, aspects, {"politeness": 1.0}, num_steps=12, beta=beta or 1e-9,
            optimizer={"learning_rate": 1e-2},
        )  # fmt: skip
        kl.append(lines[-1]["kl"])
        share.append(polite_share(policy, UNSEEN))
    assert kl[0] > kl[1] > kl[2] and kl[2] < 0.2
    assert share[0] > share[2] + 0.1

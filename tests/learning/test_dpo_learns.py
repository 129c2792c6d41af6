"""DPO makes a policy say what pairs prefer, stops where its loss has its minimum, and its result reloads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tests.toy import POLITE, RUDE, WORDS, toy_policy_directory

from equipoise.algorithms.dpo import train_dpo
from equipoise.algorithms.run import Run
from equipoise.config import DPOConfig, ModelConfig, SamplingConfig
from equipoise.data import PairRecord
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate

PROMPTS = [f"how do i {verb}" for verb in ("go", "walk", "run", "fix", "make", "mix")]
RECORDS = [
    PairRecord(prompt, f"{polite} {WORDS[20 + i]}", f"{rude} {WORDS[20 + i]}")
    for i, prompt in enumerate(PROMPTS)
    for polite, rude in zip(sorted(POLITE), sorted(RUDE), strict=True)
]
LORA = {"r": 8, "alpha": 32}


def trained(directory: Path, **changes: Any) -> tuple[Policy, list[dict[str, Any]]]:
    model = toy_policy_directory(directory / "model", initializer_range=0.4, layers=1)
    policy_values = {"model": str(model)} | changes.pop("policy", {})
    values = {
        "policy": policy_values, "data": "unused", "batch_size": 18, "validation_fraction": 0, "num_epochs": 40,
        "beta": 0.5, "optimizer": {"learning_rate": 1e-2}, "checkpoint": {"every": 1000},
    }  # fmt: skip
    config, lines = DPOConfig.model_validate(values | changes), []
    run = Run(directory / "run", config)
    run.listener = lines.append
    policy = load_policy(ModelConfig.model_validate(policy_values), trainable=True)
    train_dpo(policy, RECORDS, config, run)
    return policy, lines


def first_words(policy: Policy) -> list[str]:
    rollout = generate(policy, PROMPTS, 8, SamplingConfig(max_tokens=2), seed=1)
    return [text.split()[0] for text in rollout.completions if text]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_policy_turns_polite(tmp_path: Path, lora: Any) -> None:
    changes = {"policy": {"lora": lora}, "optimizer": {"learning_rate": 3e-2}} if lora else {}
    policy, lines = trained(tmp_path, sft_coefficient=0.2, **changes)
    assert lines[0]["loss"] > lines[-1]["loss"] and lines[-1]["dpo/accuracy"] == 1.0
    assert lines[-1]["dpo/chosen_reward"] > 1 and lines[-1]["dpo/margin"] > 3
    untrained = first_words(load_policy(tmp_path / "model"))
    assert sum(word in POLITE for word in untrained) < 0.2 * len(untrained)
    for model in (policy, load_policy(tmp_path / "run" / "model")):
        words = first_words(model)
        assert sum(word in POLITE for word in words) > 0.8 * len(words)
        assert not any(word in RUDE for word in words)


def test_margins_settle_where_the_loss_has_its_minimum(tmp_path: Path) -> None:
    """Conservative DPO at ln((1 - e) / e), e = 0.2: ln 4 = 1.386; IPO at h = 1 / (2 beta), hence beta h = 1/2."""
    schedule = {"optimizer": {"learning_rate": 1e-2, "schedule": "linear"}, "num_epochs": 80}
    smoothed = trained(tmp_path / "smoothed", label_smoothing=0.2, **schedule)[1]
    assert smoothed[-1]["dpo/margin"] == pytest.approx(math.log(4), rel=0.02)
    ipo = trained(tmp_path / "ipo", kind="ipo", **schedule)[1]
    assert ipo[-1]["dpo/margin"] == pytest.approx(0.5, rel=0.02) and ipo[-1]["loss"] < 1e-3 < ipo[0]["loss"]

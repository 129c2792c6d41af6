"""SFT reproduces a demonstration greedily, ends it with EOS, and counts response tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.toy import toy_policy_directory

from equipoise.algorithms.run import Run
from equipoise.algorithms.sft import train_sft
from equipoise.config import ModelConfig, SamplingConfig, SFTConfig
from equipoise.data import DemonstrationRecord
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate

PAIRS = {
    "how do i make a cake": "mix flour sugar then water",
    "how do i fix a bike": "pump the tyre first",
    "can you help": "yes please go",
    "stop it": "sorry i cannot help you",
}
RECORDS = [DemonstrationRecord(prompt=prompt, response=response) for prompt, response in PAIRS.items()]


def trained(directory: Path, *, chat: bool = False, **changes: Any) -> tuple[Policy, list[dict[str, Any]]]:
    model = toy_policy_directory(directory / "model", chat=chat, initializer_range=0.3, layers=1)
    policy_values = {"model": str(model)} | changes.pop("policy", {})
    values = {
        "algorithm": "sft", "policy": policy_values, "data": "unused", "batch_size": 4, "validation_fraction": 0,
        "num_epochs": 80, "optimizer": {"learning_rate": 2e-2}, "checkpoint": {"every": 1000},
    }  # fmt: skip
    config, lines = SFTConfig.model_validate(values | changes), []
    run = Run(directory / "run", config)
    run.listener = lines.append
    policy = load_policy(ModelConfig.model_validate(policy_values), trainable=True)
    train_sft(policy, RECORDS, config, run)
    return policy, lines


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 32}], ids=["full", "lora"])
def test_demonstrations_come_back_greedily_with_their_end(tmp_path: Path, chat: bool, lora: Any) -> None:
    policy, lines = trained(tmp_path, chat=chat, policy={"lora": lora} if lora else {})
    assert lines[0]["loss"] > 3 and lines[-1]["loss"] < 0.1
    rollout = generate(policy, list(PAIRS), 1, SamplingConfig(max_tokens=12, temperature=0))
    assert list(rollout.completions) == list(PAIRS.values())
    assert set(rollout.finish_reasons) == {"stop"}
    reloaded = load_policy(tmp_path / "run" / "model")
    again = generate(reloaded, list(PAIRS), 1, SamplingConfig(max_tokens=12, temperature=0))
    assert again.completions == rollout.completions and reloaded.prompt_format == ("chat" if chat else "text")

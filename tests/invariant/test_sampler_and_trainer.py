"""What the sampler says of its tokens, the trainer says too: to 1e-4 in float32, over architectures and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.toy import grpo_values, politeness, toy_policy_directory

from equipoise.algorithms.grpo import train_grpo
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig, ModelConfig, SamplingConfig
from equipoise.data import PromptRecord
from equipoise.models.aspects import Aspect
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.logprobs import completion_logprobs, score_in_chunks, score_tokens
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import FunctionScorer

PROMPTS = ["how do i make a cake", "help", "", "what is the good garden seeds water soil plant", "go go"]
ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma2", "mistral", "mixtral", "qwen3_moe", "cohere", "granite"]


def shaken(policy: Policy) -> Policy:
    """Trained weights moved by noise, so that an adapter's B factors are not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def largest_difference(policy: Policy, temperature: float) -> float:
    rollout = generate(policy, PROMPTS, 2, SamplingConfig(max_tokens=6, temperature=temperature), rows_at_once=6)
    assert policy.module.training, "log-probabilities are compared in train mode"
    ours = completion_logprobs(policy, rollout).detach()
    assert bool((rollout.sampler_logprobs_BT[rollout.completion_mask_BT] < 0).all())
    return float((ours - rollout.sampler_logprobs_BT).abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_models(tmp_path: Path, architecture: str) -> None:
    directory = toy_policy_directory(tmp_path / "m", architecture=architecture, initializer_range=0.2)
    policy = load_policy(directory, trainable=True)
    for temperature in (1.0, 0.6):
        assert largest_difference(policy, temperature) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(tmp_path: Path, architecture: str, checkpointing: bool) -> None:
    directory = toy_policy_directory(tmp_path / "m", architecture=architecture, initializer_range=0.2)
    config = ModelConfig.model_validate(
        {"model": str(directory), "lora": {"r": 4}, "gradient_checkpointing": checkpointing}
    )
    assert largest_difference(shaken(load_policy(config, trainable=True)), 0.8) < 1e-4


def test_the_difference_is_logged_in_every_step(tmp_path: Path) -> None:
    directory = toy_policy_directory(tmp_path / "m", initializer_range=0.2)
    for name, changes in {"on-policy": {}, "two epochs": {"num_epochs": 2}}.items():
        config = GRPOConfig.model_validate(grpo_values(directory, directory, num_steps=2, beta=0.0, **changes))
        lines: list[dict[str, float]] = []
        run = Run(tmp_path / name, config)
        run.listener = lines.append
        scorer = FunctionScorer(politeness, "politeness", [Aspect("politeness", higher_is_better=True)])
        train_grpo(
            load_policy(directory, trainable=True), [scorer], [PromptRecord(prompt=p) for p in PROMPTS], config, run
        )
        assert [0 <= line["sampler/logprob_difference"] < 1e-4 for line in lines] == [True, True]
        assert any(line["sampler/logprob_difference"] > 0 for line in lines), "two implementations, not one number"


def test_chunks_of_rows_score_as_the_whole(tmp_path: Path) -> None:
    policy = load_policy(toy_policy_directory(tmp_path / "m", initializer_range=0.2), trainable=True)
    rollout = generate(policy, PROMPTS, 3, SamplingConfig(max_tokens=10))
    options = {"with_entropy": True, "with_unit_logprobs": True}
    with torch.no_grad():
        whole = score_tokens(policy, rollout, **options)
    for size in (1, 4, 15, 100):
        parts = score_in_chunks(policy, rollout, size, **options)
        assert parts.values_BT is None
        for ours, theirs in zip(parts[:3], whole[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

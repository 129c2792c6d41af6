"""The SFT loss against the plain model, what is encoded, validation, truncation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.toy import plain_model, toy_policy_directory

from equipoise.algorithms.run import Run
from equipoise.algorithms.sft import encode_demonstrations, train_sft
from equipoise.config import SFTConfig
from equipoise.data import DemonstrationRecord, split_records
from equipoise.models.policy import Policy, load_policy

RECORDS = [
    DemonstrationRecord(prompt="how do i make a cake", response="mix flour sugar then water"),
    DemonstrationRecord(prompt="help", response="no"),
    DemonstrationRecord(prompt="", response="please go"),
    DemonstrationRecord(prompt="can you fix it", response=""),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    return toy_policy_directory(path, initializer_range=0.2, layers=1, hidden=16)


def config_of(directory: Path, **changes: Any) -> SFTConfig:
    values = {
        "algorithm": "sft", "policy": {"model": str(directory)}, "data": "unused", "batch_size": 4, "num_epochs": 1,
        "validation_fraction": 0, "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    return SFTConfig.model_validate(values | changes)


def run_of(out: Path, config: SFTConfig) -> tuple[Run, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    run = Run(out, config)
    run.listener = lines.append
    return run, lines


def naive_loss(policy: Policy, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Minus the mean log-probability over all response tokens, row by row on the plain model."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for prompt, completion in pairs:
            logits = plain_model(policy)(input_ids=torch.tensor([prompt + completion])).logits[0].double()
            table = torch.log_softmax(logits, dim=-1)
            for offset, token in enumerate(completion):
                total -= float(table[len(prompt) - 1 + offset, token])
                tokens += 1
    return total / tokens


def test_prompt_is_context_and_the_response_ends_with_eos(directory: Path) -> None:
    policy = load_policy(directory)
    encoded, cut = encode_demonstrations(policy, RECORDS, 100)
    assert cut == 0
    words = [(policy.tokenizer.decode(row.prompt_ids), policy.tokenizer.decode(row.completion_ids)) for row in encoded]
    assert words == [
        ("how do i make a cake", "mix flour sugar then water <eos>"),
        ("help", "no <eos>"),
        ("<bos>", "please go <eos>"),
        ("can you fix it", "<eos>"),
    ]
    assert [len(row) for row in encoded] == [12, 3, 4, 5]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_loss_is_the_mean_over_the_batch_s_response_tokens(
    directory: Path, tmp_path: Path, micro_batch_size: int | None
) -> None:
    policy = load_policy(directory, trainable=True)
    encoded, _ = encode_demonstrations(policy, RECORDS, 100)
    expected = naive_loss(policy, [(row.prompt_ids, row.completion_ids) for row in encoded])
    run, lines = run_of(tmp_path / "run", config := config_of(directory, micro_batch_size=micro_batch_size))
    train_sft(policy, RECORDS, config, run)
    assert len(lines) == 1 and lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(lines[0]) >= {"step", "loss", "grad_norm", "learning_rate", "time/update"}


def test_validation_loss_is_that_of_the_held_out_rows(directory: Path, tmp_path: Path) -> None:
    records = [
        DemonstrationRecord(prompt=f"how do i {w}", response=f"{w} please") for w in ["go", "run", "walk", "fix", "mix"]
    ]
    policy = load_policy(directory, trainable=True)
    config = config_of(directory, validation_fraction=0.4, evaluate_every=2, num_epochs=3, batch_size=1)
    run, lines = run_of(tmp_path / "run", config)
    train_sft(policy, records, config, run)
    assert [("validation/loss" in line) for line in lines] == [
        (i % 2 == 1) or i == len(lines) - 1 for i in range(len(lines))
    ]
    held_out = split_records(records, validation=0.4, test=0.0, seed=config.seed)["validation"]
    encoded, _ = encode_demonstrations(policy, held_out, 100)
    expected = naive_loss(policy, [(row.prompt_ids, row.completion_ids) for row in encoded])
    assert held_out and lines[-1]["validation/loss"] == pytest.approx(expected, rel=1e-5)


def test_what_is_cut_is_counted_and_said(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = load_policy(directory, trainable=True)
    run, _ = run_of(tmp_path / "run", config := config_of(directory, max_length=5))
    with caplog.at_level(logging.WARNING):
        train_sft(policy, RECORDS, config, run)
    assert any("1 of 4 demonstrations were cut to 5 tokens" in record.getMessage() for record in caplog.records)


def test_the_result_is_written_and_the_version_counts_updates(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(directory, trainable=True)
    run, lines = run_of(tmp_path / "run", config := config_of(directory, num_epochs=3, batch_size=3))
    train_sft(policy, RECORDS, config, run)
    assert len(lines) == 6 == policy.version, "two steps an epoch, the last batch of an epoch spans two"
    saved = load_policy(tmp_path / "run" / "model")
    for ours, theirs in zip(saved.module.parameters(), policy.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_not_finite_skips_its_step_and_the_run_goes_on(directory: Path, tmp_path: Path) -> None:
    """Pitfall 16: the first forward pass gives NaN; the step is skipped and counted, its loss and norm are null."""
    config = config_of(directory, batch_size=2)
    policy = load_policy(config.policy, trainable=True)
    calls: list[int] = []

    def spoil(module: torch.nn.Module, arguments: Any, scores: Any) -> Any:
        calls.append(1)
        return scores._replace(logprobs_BT=scores.logprobs_BT * torch.nan) if len(calls) == 1 else None

    policy.module.register_forward_hook(spoil)
    run, lines = run_of(tmp_path / "run", config)
    train_sft(policy, RECORDS, config, run)
    assert [line["skipped"] for line in lines] == [1, 1]
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None
    assert lines[1]["loss"] > 0 and lines[1]["grad_norm"] > 0

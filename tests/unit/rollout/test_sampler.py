"""`generate` against a loop that keeps no cache, pads nothing and samples one completion at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.toy import plain_model, toy_policy_directory
from torch import Tensor

from equipoise.config import ModelConfig, SamplingConfig
from equipoise.data import PromptRecord, encode_prompt
from equipoise.errors import ConfigError, DataError
from equipoise.models.decode_step import DecodeStep
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout import sampler
from equipoise.rollout.decoding import GroupedBatch
from equipoise.rollout.randomness import uniforms
from equipoise.rollout.sampler import generate
from equipoise.rollout.types import Rollout

PROMPTS = ["how do i make a cake", "help", "", "what is the good garden seeds water soil plant", "go"]
SAMPLING = SamplingConfig(max_tokens=12)
ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma2", "mistral", "mixtral"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    """A policy by architecture, with the EOS ids 1, 7, 30 and distributions far from uniform."""

    @functools.cache
    def make(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Policy:
        directory = tmp_path_factory.mktemp(architecture) / "model"
        toy_policy_directory(directory, architecture=architecture, initializer_range=0.15, **changes)
        values = {"eos_token_id": [1, 7, 30], "pad_token_id": 0}
        (directory / "generation_config.json").write_text(json.dumps(values))
        policy = load_policy(directory)
        policy.module.to(dtype)
        return policy

    return make


def naive_completion(
    policy: Policy, prompt: str, draws_T: np.ndarray, temperature: float
) -> tuple[list[int], list[float]]:
    """Token ids and their log-probabilities, the whole sequence recomputed for every token."""
    ids = encode_prompt(policy.tokenizer, prompt)
    sampled: list[int] = []
    logprobs: list[float] = []
    for u in draws_T:
        with torch.no_grad():
            logits = (
                plain_model(policy)(input_ids=torch.tensor([ids + sampled]), use_cache=False).logits[0, -1].double()
            )
        table = torch.log_softmax(logits / temperature, dim=-1)
        below, token = 0.0, 0
        for token, probability in enumerate(table.exp().tolist()):  # noqa: B007
            below += probability
            if below > float(u):
                break
        sampled.append(token)
        logprobs.append(float(table[token]))
        if token in (1, 7, 30):
            break
    return sampled, logprobs


def ids_of(rollout: Rollout, row: int) -> list[int]:
    return rollout.completion_ids_BT[row][rollout.completion_mask_BT[row]].tolist()


def rows_of(rollout: Rollout) -> list[tuple[int, int, tuple[int, ...], str]]:
    """What identifies each completion, whatever the padding around it."""
    return [
        (
            int(rollout.group_ids_B[i]),
            int(rollout.index_in_group_B[i]),
            tuple(ids_of(rollout, i)),
            rollout.finish_reasons[i],
        )
        for i in range(len(rollout))
    ]


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((name, torch.float32) for name in ARCHITECTURES), ("llama", torch.float64), ("gpt2", torch.float64)],
)
def test_equals_the_loop_without_cache(load: Callable[..., Policy], architecture: str, dtype: torch.dtype) -> None:
    policy = load(architecture, dtype=dtype)
    sampling = SamplingConfig(max_tokens=8, temperature=0.8)
    rollout = generate(policy, PROMPTS, 2, sampling, seed=3, step=5, first_prompt=10)
    for row in range(len(rollout)):
        prompt, index = row // 2, row % 2
        draws = uniforms(3, 5, np.array([10 + prompt]), np.array([index]), 8)[0]
        tokens, logprobs = naive_completion(policy, PROMPTS[prompt], draws, 0.8)
        assert ids_of(rollout, row) == tokens, (architecture, row)
        found = rollout.sampler_logprobs_BT[row][rollout.completion_mask_BT[row]]
        torch.testing.assert_close(found, torch.tensor(logprobs), rtol=0, atol=1e-5)
        assert rollout.finish_reasons[row] == ("stop" if tokens[-1] in (1, 7, 30) else "length")


def test_does_not_depend_on_batching(load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    whole = rows_of(generate(policy, PROMPTS, 4, SAMPLING, seed=1))
    assert len({tokens for _, _, tokens, _ in whole}) > 15, "the completions differ"
    for rows_at_once in (1, 9):
        assert rows_of(generate(policy, PROMPTS, 4, SAMPLING, seed=1, rows_at_once=rows_at_once)) == whole
    for share in (0.0, 0.6):  # others join as soon as there is room, or late
        monkeypatch.setattr(sampler, "JOIN_ABOVE", share)
        assert rows_of(generate(policy, PROMPTS, 4, SAMPLING, seed=1, rows_at_once=12)) == whole
    for share in (0.0, 1.1):  # never leave, always leave
        monkeypatch.setattr(sampler, "COMPACT_BELOW", share)
        assert rows_of(generate(policy, PROMPTS, 4, SAMPLING, seed=1)) == whole


def test_a_prompt_at_its_own_index_alone_gives_the_same(load: Callable[..., Policy]) -> None:
    policy = load()
    whole = rows_of(generate(policy, PROMPTS, 4, SAMPLING, seed=1, step=2, first_prompt=20))
    for offset, prompt in enumerate(PROMPTS):
        alone = generate(policy, [prompt], 4, SAMPLING, seed=1, step=2, first_prompt=20 + offset)
        assert rows_of(alone) == whole[4 * offset : 4 * offset + 4]
    smaller = generate(policy, PROMPTS, 2, SAMPLING, seed=1, step=2, first_prompt=20)
    assert rows_of(smaller) == [row for row in whole if row[1] < 2], "a smaller group is a part of the larger"
    shorter = generate(policy, PROMPTS, 4, SamplingConfig(max_tokens=5), seed=1, step=2, first_prompt=20)
    assert [row[2] for row in rows_of(shorter)] == [row[2][:5] for row in whole]


def test_seed_and_step_give_other_completions(load: Callable[..., Policy]) -> None:
    policy = load()
    base = rows_of(generate(policy, PROMPTS, 2, SAMPLING))
    assert rows_of(generate(policy, PROMPTS, 2, SAMPLING)) == base
    assert rows_of(generate(policy, PROMPTS, 2, SAMPLING, seed=1)) != base
    assert rows_of(generate(policy, PROMPTS, 2, SAMPLING, step=1)) != base


def test_every_eos_stops_is_kept_and_padding_is_not(load: Callable[..., Policy]) -> None:
    policy = load()
    assert policy.eos_ids == (1, 7, 30)
    rollout = generate(policy, PROMPTS, 40, SAMPLING)
    last = set()
    for row in range(len(rollout)):
        mask, ids = rollout.completion_mask_BT[row], ids_of(rollout, row)
        assert not bool((mask[1:] & ~mask[:-1]).any()), "completions are padded on the right"
        assert not set(ids[:-1]) & {1, 7, 30}
        assert (rollout.finish_reasons[row] == "stop") == (ids[-1] in (1, 7, 30))
        assert rollout.finish_reasons[row] == "stop" or len(ids) == 12
        assert bool((rollout.completion_ids_BT[row][~mask] == policy.pad_id).all())
        assert bool((rollout.sampler_logprobs_BT[row][~mask] == 0).all())
        last.add(ids[-1])
    assert last >= {1, 7, 30}
    assert rollout.lengths_B.tolist() == [len(ids_of(rollout, row)) for row in range(len(rollout))]


def test_a_sampled_pad_token_is_a_token(load: Callable[..., Policy]) -> None:
    policy = replace(load(), pad_id=7)  # one of the EOS ids
    rollout = generate(policy, PROMPTS, 40, SAMPLING)
    stopped_by_pad = [row for row in range(len(rollout)) if ids_of(rollout, row)[-1] == 7]
    assert stopped_by_pad
    assert rows_of(generate(load(), PROMPTS, 40, SAMPLING)) == rows_of(rollout)
    assert any(0 in ids_of(rollout, row) for row in range(len(rollout))), "id 0 was sampled and kept"


def test_greedy_takes_the_best_token_every_time(load: Callable[..., Policy]) -> None:
    policy = load()
    sampling = SamplingConfig(max_tokens=6, temperature=0)
    rollout = generate(policy, PROMPTS, 2, sampling)
    for row in range(len(rollout)):
        ids = encode_prompt(policy.tokenizer, PROMPTS[row // 2])
        for token in ids_of(rollout, row):
            with torch.no_grad():
                logits = plain_model(policy)(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
    assert rows_of(generate(policy, PROMPTS, 2, sampling, seed=9)) == rows_of(rollout)


def test_one_token_and_one_row(load: Callable[..., Policy]) -> None:
    rollout = generate(load(), ["help"], 1, SamplingConfig(max_tokens=1))
    assert rollout.completion_ids_BT.shape == (1, 1) and rollout.lengths_B.tolist() == [1]


def test_top_k_one_is_greedy(load: Callable[..., Policy]) -> None:
    policy = load()
    greedy = generate(policy, PROMPTS, 1, SamplingConfig(max_tokens=6, temperature=0))
    assert rows_of(generate(policy, PROMPTS, 1, SamplingConfig(max_tokens=6, top_k=1))) == rows_of(greedy)


def test_group_ids_are_explicit_and_equal_prompts_stay_apart(load: Callable[..., Policy]) -> None:
    rollout = generate(load(), ["help", "help"], 3, SAMPLING, first_prompt=4)
    assert rollout.group_ids_B.tolist() == [4, 4, 4, 5, 5, 5]
    assert rollout.index_in_group_B.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows_of(rollout)[0][2] != rows_of(rollout)[3][2] or rows_of(rollout)[1][2] != rows_of(rollout)[4][2]


def test_long_prompts_are_cut_from_the_left_and_counted(load: Callable[..., Policy]) -> None:
    policy = load()
    rollout = generate(policy, PROMPTS, 2, SAMPLING, max_prompt_tokens=4)
    assert rollout.prompts_truncated == 2
    assert rollout.prompt_ids_BS.shape[1] == 4
    whole = encode_prompt(policy.tokenizer, PROMPTS[0])
    assert rollout.prompt_ids_BS[0].tolist() == whole[-4:]
    assert rollout.prompts[0] == PROMPTS[0], "the scorer sees the prompt as it was given"


def test_prompts_are_cut_to_what_the_context_leaves(load: Callable[..., Policy]) -> None:
    policy = load()
    rollout = generate(policy, ["go " * 200], 1, SamplingConfig(max_tokens=20))
    assert rollout.prompt_ids_BS.shape[1] == 108 and rollout.prompts_truncated == 1
    full = generate(policy, ["go " * 200], 1, SamplingConfig(max_tokens=127))
    assert full.prompt_ids_BS.shape[1] == 1
    with pytest.raises(ConfigError, match=r"max_tokens 128 leaves no room .* 128 positions .* at most 127"):
        generate(policy, ["go"], 1, SamplingConfig(max_tokens=128))


def test_learned_positions_do_not_run_over(load: Callable[..., Policy]) -> None:
    rollout = generate(load("gpt2"), ["go " * 200, "go"], 1, SamplingConfig(max_tokens=30))
    assert rollout.prompt_ids_BS.shape[1] == 98


def test_no_prompt_and_messages_without_a_template_are_errors(load: Callable[..., Policy]) -> None:
    with pytest.raises(ConfigError, match="no prompts"):
        generate(load(), [], 1, SAMPLING)
    with pytest.raises(DataError, match="template"):
        generate(load(), [PromptRecord(prompt=[{"role": "user", "content": "go"}])], 1, SAMPLING)


def test_messages_and_texts_meet_in_the_template(tmp_path: Path) -> None:
    policy = load_policy(toy_policy_directory(tmp_path / "m", chat=True))
    records = [PromptRecord(prompt=[{"role": "user", "content": "go"}], kind="benign"), PromptRecord(prompt="go")]
    rollout = generate(policy, records, 1, SAMPLING)
    assert rollout.prompt_ids_BS[0].tolist() == rollout.prompt_ids_BS[1].tolist()
    assert policy.tokenizer.decode(rollout.prompt_ids_BS[0]) == "user go <eos> assistant"
    assert rollout.kinds == ("benign", "unlabelled")
    assert rollout.prompts[0] == [{"role": "user", "content": "go"}]


def test_texts_are_without_special_tokens(load: Callable[..., Policy]) -> None:
    policy = load()
    rollout = generate(policy, PROMPTS, 8, SAMPLING)
    for row, text in enumerate(rollout.completions):
        words = [policy.tokenizer.convert_ids_to_tokens(token) for token in ids_of(rollout, row) if token > 3]
        assert text == " ".join(word for word in words if word is not None)


def test_mode_is_restored_and_no_graph_is_kept(load: Callable[..., Policy], tmp_path: Path) -> None:
    config = ModelConfig(model=str(toy_policy_directory(tmp_path / "m")), gradient_checkpointing=True)
    policy = load_policy(config, trainable=True)
    assert policy.module.training
    rollout = generate(policy, PROMPTS, 2, SAMPLING)
    assert policy.module.training and not rollout.sampler_logprobs_BT.requires_grad
    frozen = load()
    generate(frozen, PROMPTS, 2, SAMPLING)
    assert not frozen.module.training


def test_progress_counts_every_completion(load: Callable[..., Policy]) -> None:
    counts: list[int] = []
    generate(load(), PROMPTS, 3, SAMPLING, rows_at_once=6, progress=counts.append)
    assert sum(counts) == 15 and min(counts) > 0


def test_the_prompt_is_prefilled_once_and_finished_rows_leave(
    load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load()
    shapes: list[tuple[int, ...]] = []
    prefill = DecodeStep.prefill

    def spy(self: DecodeStep, ids: Tensor, mask: Tensor) -> Any:
        shapes.append(tuple(ids.shape))
        return prefill(self, ids, mask)

    rows: list[int] = []
    advance = GroupedBatch.advance
    generate(policy, PROMPTS[:1], 2, SAMPLING)  # what is tried once per policy
    monkeypatch.setattr(DecodeStep, "prefill", spy)
    monkeypatch.setattr(policy.module, "next_token_logits", lambda *_: pytest.fail("through the model's own layers"))
    monkeypatch.setattr(GroupedBatch, "advance", lambda self, tokens: rows.append(len(tokens)) or advance(self, tokens))
    rollout = generate(policy, PROMPTS, 16, SamplingConfig(max_tokens=60))
    assert shapes == [(5, 9)], "five prompts, not eighty"
    assert rows[0] == 80
    assert rows == sorted(rows, reverse=True) and rows[-1] < 40
    assert len(rows) == int(rollout.lengths_B.max()) - 1, "the last sampled token is never fed back"


@pytest.mark.parametrize("architecture", ["mamba"])
def test_a_model_without_a_shareable_cache_recomputes(load: Callable[..., Policy], architecture: str) -> None:
    policy = load(architecture, layers=1)
    rollout = generate(policy, PROMPTS[:3], 2, SamplingConfig(max_tokens=5))
    for row in range(len(rollout)):
        draws = uniforms(0, 0, np.array([row // 2]), np.array([row % 2]), 5)[0]
        assert ids_of(rollout, row) == naive_completion(policy, PROMPTS[row // 2], draws, 1.0)[0]

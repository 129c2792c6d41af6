"""The grouped cache against the model's own, through rows that leave, groups that join and prompts of any length."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.toy import plain_model, toy_policy_directory

from equipoise.config import SamplingConfig
from equipoise.models import grouped_cache
from equipoise.models.grouped_cache import groups_share_prompts
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout import decoding
from equipoise.rollout.decoding import GroupedBatch, PlainBatch, make_batch
from equipoise.rollout.sampler import generate

SHARING: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 64},
    "mistral": {"sliding_window": 64},
    "mixtral": {},
}
# Torch multiplies the experts of a batch, and transformers masks Gemma's padding, right in single precision only.
SINGLE = ("mixtral", "gemma2")
PROMPTS = [[5, 9, 3, 12, 40], [7, 8], [11], [4, 4, 6, 2, 9, 10, 3]]


def toy(directory: Path, architecture: str = "llama", **changes: object) -> Policy:
    toy_policy_directory(directory, architecture=architecture, initializer_range=0.15, **changes)  # type: ignore[arg-type]
    policy = load_policy(directory)
    if architecture not in SINGLE:
        policy.module.double()
    return policy


def own_logits(policy: Policy, ids: list[int]) -> torch.Tensor:
    """Of the next token, by the model's own forward on the whole row."""
    with torch.no_grad():
        return plain_model(policy)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("architecture", SHARING)
def test_rows_join_leave_and_grow_apart(architecture: str, tmp_path: Path) -> None:
    """Four prompts, two at first; rows leave, among them all of one prompt; each row equals its own forward."""
    policy = toy(tmp_path / "model", architecture, **SHARING[architecture])
    batch = make_batch(policy, 3, 6, 7)
    assert isinstance(batch, GroupedBatch)
    rows: list[list[int]] = []

    def join(prompts: list[list[int]]) -> None:
        batch.join(prompts)
        rows.extend(list(prompt) for prompt in prompts for _ in range(3))

    def advance(shift: int) -> None:
        tokens = [(7 * i + shift) % 40 + 2 for i in range(len(rows))]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        batch.advance(torch.tensor(tokens))

    def keep(index: list[int]) -> None:
        batch.keep(torch.tensor(index))
        rows[:] = [rows[i] for i in index]

    def check() -> None:
        expected = torch.stack([own_logits(policy, row) for row in rows])
        torch.testing.assert_close(batch.logits, expected, rtol=0, atol=1e-5 if architecture in SINGLE else 1e-6)

    with torch.no_grad():
        join(PROMPTS[1:3])
        check()
        advance(1)
        check()
        keep([0, 3, 4, 5])
        advance(2)
        check()
        join([PROMPTS[0], PROMPTS[3]])  # longer prompts than those that are here
        check()
        advance(3)
        check()
        keep([1, 2, 4, 6, 8, 9])  # the first prompt has no row any more
        advance(4)
        check()
        join([PROMPTS[2]])
        advance(5)
        check()


def test_buffers_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_cache, "FIRST_ROOM", 2)
    policy = toy(tmp_path / "model")
    batch, rows = GroupedBatch(policy, 2, 9), [list(PROMPTS[0]) for _ in range(2)]
    with torch.no_grad():
        batch.join(PROMPTS[:1])
        for step in range(8):
            for i, row in enumerate(rows):
                row.append(3 + step + i)
            batch.advance(torch.tensor([row[-1] for row in rows]))
    torch.testing.assert_close(batch.logits, torch.stack([own_logits(policy, row) for row in rows]), rtol=0, atol=1e-6)
    room = batch._cache.layers[0].buffers[0].shape[2]  # type: ignore[union-attr]
    assert 8 <= room <= 9, "as much as may be sampled, no more"


def test_a_prompt_is_kept_once(tmp_path: Path) -> None:
    policy = toy(tmp_path / "model")
    batch = GroupedBatch(policy, 16, 4)
    with torch.no_grad():
        batch.join(PROMPTS)
        batch.advance(torch.full((64,), 5))
    layer = batch._cache.layers[0]  # type: ignore[union-attr]
    assert layer.prompt_keys.shape[0] == 4 and layer.buffers[0].shape[:3:2] == (64, 4)  # type: ignore[union-attr]


def test_a_short_window_decodes_plainly_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = toy(tmp_path / "model", "mistral", sliding_window=8)
    decoding._announced.clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_batch(policy, 2, 6, 7), PlainBatch)
        assert isinstance(make_batch(policy, 2, 6, 7), PlainBatch)
    assert caplog.text.count("its sliding window of 8 is shorter than prompt and completion (13)") == 1
    assert isinstance(make_batch(policy, 2, 1, 7), GroupedBatch), "within the window nothing is cut"


def test_an_attention_that_does_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy(tmp_path / "model")
    right = grouped_cache._of_rows
    monkeypatch.setattr(grouped_cache, "_of_rows", lambda *inputs: right(*inputs).roll(1, 0))
    assert isinstance(make_batch(policy, 2, 4, 4), PlainBatch)
    reason = vars(policy.module)["_decoding_faults"]["grouped"]
    assert "its logits change by" in reason
    monkeypatch.undo()
    assert isinstance(make_batch(policy, 2, 4, 4), PlainBatch), "probed once"


def test_flash_kernels_and_states_keep_their_own_cache(tmp_path: Path) -> None:
    policy = toy(tmp_path / "model")
    config = policy.module.causal.config
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2"
    assert groups_share_prompts(policy.module.causal, 10) == "its attention is flash_attention_2"
    config._attn_implementation = before
    config.layer_types = ["full_attention", "linear_attention"]
    assert groups_share_prompts(policy.module.causal, 10) == "it has layers of the kind linear_attention"


def test_joining_saves_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of very different lengths: with joins, fewer passes than wave after wave."""
    policy = toy(tmp_path / "model")
    policy.eos_ids = tuple(range(2, 14))
    calls: list[int] = []
    advance = GroupedBatch.advance
    monkeypatch.setattr(
        GroupedBatch, "advance", lambda self, tokens: calls.append(len(tokens)) or advance(self, tokens)
    )
    texts = [f"help {i}" for i in range(24)]
    rollout = generate(policy, texts, 2, SamplingConfig(max_tokens=40), rows_at_once=8)
    lengths = rollout.lengths_B.view(6, 8)  # waves of eight rows
    assert len(calls) < int(lengths.max(dim=1).values.sum())

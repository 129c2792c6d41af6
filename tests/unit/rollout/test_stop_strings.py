"""Stop strings against the obvious way: sample without them, decode every beginning, cut at the first string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.toy import toy_policy_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from equipoise.config import SamplingConfig
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate
from equipoise.rollout.stop_strings import StopStrings

PROMPTS = ["how do i make a cake", "help", "go"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    directory = tmp_path_factory.mktemp("stops") / "model"
    toy_policy_directory(directory, initializer_range=0.15)
    return load_policy(directory)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a special one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


@pytest.mark.parametrize("stop", [["a"], ["e c", "ar"], ["er"]])
def test_rows_end_where_a_string_is_complete(policy: Policy, stop: list[str]) -> None:
    free = generate(policy, PROMPTS, 6, SamplingConfig(max_tokens=12), seed=3)
    ended = generate(policy, PROMPTS, 6, SamplingConfig(max_tokens=12, stop=stop), seed=3)
    by_stop = 0
    for row in range(len(free)):
        ids = free.completion_ids_BT[row][free.completion_mask_BT[row]].tolist()
        texts = [policy.tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        first = next((n for n, text in enumerate(texts) if any(one in text for one in stop)), None)
        expected = ids if first is None else ids[: first + 1]
        text = texts[len(expected) - 1]
        places = [text.index(one) for one in stop if one in text]
        assert ended.completion_ids_BT[row][ended.completion_mask_BT[row]].tolist() == expected
        assert ended.completions[row] == (text[: min(places)] if places else text)
        assert ended.finish_reasons[row] == ("stop" if places else free.finish_reasons[row])
        by_stop += bool(places)
    assert by_stop > 0


def test_tokens_smaller_than_the_string_and_special_ones_between() -> None:
    tokenizer: Any = byte_tokenizer()
    stops = StopStrings(tokenizer, ["\nÜser:", "###"])
    ids = tokenizer.encode("well\nÜser: no")
    pad = tokenizer.pad_token_id
    whole = len("well\nÜser:".encode())
    with_special = [*ids[: whole - 2], pad, pad, *ids[whole - 2 : whole]]
    beginnings = [ids[:whole], ids[: whole - 1], with_special]
    rows = torch.tensor([row + [pad] * (whole + 9 - len(row)) for row in beginnings])
    lengths = torch.tensor([whole, whole - 1, whole + 2])
    assert stops.ended(rows, lengths, torch.tensor([0, 1, 2])).tolist() == [True, False, True]
    assert stops.ended(rows, lengths, torch.tensor([1])).tolist() == [False]


def test_text_ends_before_the_first_string() -> None:
    stops = StopStrings(byte_tokenizer(), ["no", "\nUser:"])
    assert [stops.cut(text) for text in ("yes.\nUser: no", "no", "yes")] == ["yes.", "", "yes"]


def test_none_asked_decodes_nothing() -> None:
    class NoDecoding:
        all_special_ids: tuple[int, ...] = ()

    stops = StopStrings(NoDecoding(), [])
    assert stops.ended(torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 3]), torch.tensor([0, 1])).tolist() == [
        False,
        False,
    ]
    assert stops.cut("all") == "all"


def test_an_empty_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="stop"):
        SamplingConfig(stop=[""])

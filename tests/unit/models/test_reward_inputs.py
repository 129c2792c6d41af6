"""Prompt and response become ids: the prompt is cut from the left, the response kept, nothing doubled."""

from __future__ import annotations

import pytest
from tests.reward_toys import byte_tokenizer, word_tokenizer

from equipoise.errors import ConfigError, DataError
from equipoise.models.reward_inputs import InputFormat, RewardInputs, prompt_text


def encoder_inputs(max_length: int = 64, **options: str) -> RewardInputs:
    return RewardInputs(word_tokenizer(), InputFormat(max_length=max_length, **options), use_token_types=True)


def decoder_inputs(max_length: int = 64, **options: str) -> RewardInputs:
    tokenizer = byte_tokenizer(pad="<|pad|>", chat=options.get("format") == "chat")
    return RewardInputs(tokenizer, InputFormat(max_length=max_length, **options))


def text_of(inputs: RewardInputs, prompt, response: str) -> str:
    (row,) = inputs.rows([prompt], [response])
    return inputs.tokenizer.decode(row.ids)


def test_pair_is_the_tokenizers_own_two_segment_form():
    inputs = encoder_inputs()
    (row,) = inputs.rows(["cat dog"], ["good kind"])
    own = inputs.tokenizer("cat dog", "good kind", return_token_type_ids=True)
    assert row.ids == own["input_ids"]
    assert row.types == own["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_empty_prompt_leaves_the_response_alone():
    inputs = encoder_inputs()
    (row,) = inputs.rows([""], ["good kind"])
    assert row.ids == inputs.tokenizer("good kind")["input_ids"]
    assert row.types == [0, 0, 0, 0]


def test_pair_of_a_tokenizer_without_special_tokens_uses_the_separator_and_ends_with_eos():
    assert text_of(decoder_inputs(), "cat", "dog") == "cat\ndog<|eos|>"
    assert text_of(decoder_inputs(), "", "dog") == "dog<|eos|>"


def test_concatenation_puts_the_separator_between():
    assert text_of(decoder_inputs(format="concatenation", separator=" => "), "cat", "dog") == "cat => dog<|eos|>"
    joined = encoder_inputs(format="concatenation", separator="[SEP]")
    assert text_of(joined, "cat", "dog") == "[CLS] cat [SEP] dog [SEP]"
    assert joined.rows(["cat"], ["dog"])[0].types == [0] * 5


def test_separator_without_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"input\.separator '\\n' has no tokens"):
        encoder_inputs(format="concatenation")


def test_chat_keeps_the_response_verbatim_and_adds_no_second_eos():
    inputs = decoder_inputs(format="chat", max_length=200)
    prompt = [{"role": "system", "content": "be"}, {"role": "user", "content": " hi "}]
    expected = "<|start|>system\nbe<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n  yes \n<|end|>\n"
    assert text_of(inputs, prompt, "  yes \n") == expected
    assert text_of(inputs, "hi", "yes") == "<|start|>user\nhi<|end|>\n<|start|>assistant\nyes<|end|>\n"


def test_chat_finds_the_response_even_where_the_prompt_holds_the_mark():
    from equipoise.models.reward_inputs import RESPONSE_MARK

    shown = text_of(decoder_inputs(format="chat", max_length=200), f"say {RESPONSE_MARK}", "no")
    assert shown.endswith("<|start|>assistant\nno<|end|>\n")


def test_chat_without_a_template_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        RewardInputs(byte_tokenizer(pad="<|pad|>"), InputFormat(format="chat"))


def test_chat_template_that_refuses_names_the_prompt():
    inputs = decoder_inputs(format="chat")
    inputs.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"prompt 0: .*roles must alternate"):
        inputs.rows(["a"], ["b"])


@pytest.mark.parametrize("style", ["pair", "concatenation", "chat"])
def test_truncation_cuts_the_prompts_start_and_keeps_the_response(style: str):
    inputs = decoder_inputs(format=style, max_length=60)
    (row,) = inputs.rows(["0123456789" * 10], ["the whole response"])
    decoded = inputs.tokenizer.decode(row.ids)
    assert len(row.ids) == 60
    assert "the whole response" in decoded
    assert "6789" in decoded and decoded.count("0123456789") < 10
    assert (row.prompt_truncated, row.response_truncated) == (True, False)
    assert inputs.truncation.to_json() == {"rows": 1, "prompts_truncated": 1, "responses_truncated": 0}


def test_response_too_long_alone_is_cut_from_the_right_and_counted():
    inputs = encoder_inputs(max_length=10)
    (row,) = inputs.rows(["cat cat"], ["dog " * 8 + "eel"])
    assert inputs.tokenizer.decode(row.ids) == "[CLS] " + "dog " * 8 + "[SEP]"
    assert (row.prompt_truncated, row.response_truncated) == (True, True)
    assert inputs.truncation.responses == 1


def test_every_length_around_the_limit_fits_and_keeps_what_it_can():
    """For each pair of lengths: at most max_length ids, the response whole if it fits, the prompt's end otherwise."""
    inputs = encoder_inputs(max_length=12)
    for prompt_words in range(14):
        for response_words in range(14):
            (row,) = inputs.rows(["cat " * prompt_words], ["dog " * response_words])
            words = inputs.tokenizer.decode(row.ids).split()
            assert len(row.ids) == len(row.types) <= 12
            kept_response = min(response_words, 10)  # [CLS] and [SEP] take two places
            assert words.count("dog") == kept_response
            assert row.response_truncated == (response_words > 10)
            room = max(0, 12 - 3 - kept_response)  # a prompt costs a second [SEP]
            assert words.count("cat") == min(prompt_words, room)
            assert row.prompt_truncated == (prompt_words > room)


def test_collate_pads_on_the_right_with_mask_and_segments():
    inputs = encoder_inputs()
    batch = inputs.collate(inputs.rows(["cat", ""], ["dog", "eel"]))
    assert batch["input_ids"].tolist() == [[2, 7, 3, 8, 3], [2, 9, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_ids_of_a_response_do_not_depend_on_its_prompt():
    inputs = decoder_inputs()
    long, short = inputs.rows(["a prompt", "x"], ["same", "same"])
    assert long.ids[-5:] == short.ids[-5:]


def test_message_prompts_as_text():
    assert prompt_text([{"role": "user", "content": "Hi"}]) == "Hi"
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert prompt_text([*conversation, {"role": "user", "content": "Go"}]) == "User: Hi\nAssistant: Yes?\nUser: Go"


def test_lists_of_different_length_are_refused():
    with pytest.raises(DataError, match="2 prompts and 1 responses"):
        encoder_inputs().rows(["a", "b"], ["c"])


def test_nothing_fits_the_context():
    with pytest.raises(ConfigError, match="nothing fits"):
        encoder_inputs(max_length=3)


def test_row_without_any_token_is_refused():
    tokenizer = byte_tokenizer(pad="<|pad|>")
    tokenizer.eos_token = None
    inputs = RewardInputs(tokenizer, InputFormat())
    with pytest.raises(DataError, match="row 1: prompt and response have no tokens"):
        inputs.rows(["", ""], ["a", ""])


@pytest.mark.parametrize("values", [{"format": "pairs", "max_length": 9}, {"format": "pair", "max_length": "9"}])
def test_stored_format_is_checked(values):
    with pytest.raises(ConfigError, match=r"there/equipoise.json: input_format\."):
        InputFormat.from_json(values, "there/equipoise.json")
    good = InputFormat("chat", "", 99)
    assert InputFormat.from_json(good.to_json(), "") == good

"""Prompt formats, BOS, truncation and the end of a completion."""

import pytest

from equipoise.data import TruncationCounter, completion_end_ids, encode_demonstration, encode_prompt, render_prompt
from equipoise.errors import ConfigError, DataError

MESSAGES = [{"role": "user", "content": "Hello"}]


def count(ids, token):
    return sum(one == token for one in ids)


def test_text_without_a_template_stays_as_it_is(make_tokenizer):
    tokenizer = make_tokenizer()
    assert render_prompt(tokenizer, "Hello") == "Hello"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello\n")) == "Hello\n"


@pytest.mark.parametrize("prompt_format", ["auto", "chat"])
def test_the_template_is_applied_once_with_its_generation_prompt(make_tokenizer, prompt_format):
    tokenizer = make_tokenizer(template="qwen")
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt(tokenizer, "Hello", prompt_format=prompt_format) == expected
    assert render_prompt(tokenizer, MESSAGES, prompt_format=prompt_format) == expected
    ids = encode_prompt(tokenizer, MESSAGES, prompt_format=prompt_format)
    assert ids == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert count(ids, tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_text_format_leaves_a_template_out(make_tokenizer):
    tokenizer = make_tokenizer(template="qwen")
    assert render_prompt(tokenizer, "Hello", prompt_format="text") == "Hello"


def test_messages_without_a_template(make_tokenizer):
    with pytest.raises(DataError, match=r"has no chat template; give it one .* or give prompts as texts"):
        render_prompt(make_tokenizer(), MESSAGES)


def test_chat_without_a_template(make_tokenizer):
    for prompt in ("Hello", MESSAGES):
        with pytest.raises(ConfigError, match=r"prompt_format is chat, and the tokenizer .* has no chat template"):
            render_prompt(make_tokenizer(), prompt, prompt_format="chat")


def test_text_format_with_messages(make_tokenizer):
    with pytest.raises(DataError, match="prompt_format is text, and a prompt is a list of messages"):
        render_prompt(make_tokenizer(template="qwen"), MESSAGES, prompt_format="text")


def test_unknown_format(make_tokenizer):
    with pytest.raises(ConfigError, match="prompt_format 'chatty' is unknown"):
        render_prompt(make_tokenizer(), "Hello", prompt_format="chatty")


def test_messages_that_the_template_refuses(make_tokenizer):
    tokenizer = make_tokenizer(template="bos")
    with pytest.raises(DataError, match=r"the chat template of .* refuses .*no system role"):
        render_prompt(tokenizer, [{"role": "system", "content": "x"}, *MESSAGES])


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_bos_is_never_doubled_and_eos_never_follows_a_prompt(make_tokenizer, adds_bos, adds_eos):
    templated = make_tokenizer(template="bos", adds_bos=adds_bos, adds_eos=adds_eos)
    ids = encode_prompt(templated, MESSAGES)
    assert ids[0] == templated.bos_token_id
    assert count(ids, templated.bos_token_id) == 1
    assert count(ids, templated.eos_token_id) == 0
    plain = make_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    for text in ("Hello", "<bos>Hello"):
        ids = encode_prompt(plain, text)
        assert count(ids, plain.bos_token_id) == (1 if adds_bos or "<bos>" in text else 0)
        assert count(ids, plain.eos_token_id) == 0
        assert plain.decode(ids, skip_special_tokens=True) == "Hello"


def test_the_empty_prompt_starts_from_bos_or_eos(make_tokenizer):
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        assert encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    without_bos = make_tokenizer(bos=None)
    assert encode_prompt(without_bos, "") == [without_bos.eos_token_id]
    with pytest.raises(DataError, match="an empty prompt needs a BOS or EOS token"):
        encode_prompt(make_tokenizer(bos=None, eos=None), "")


def test_truncation_cuts_the_left_keeps_bos_and_counts(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    whole = encode_prompt(tokenizer, "abcdefghij")
    counter = TruncationCounter()
    cut = encode_prompt(tokenizer, "abcdefghij", max_length=4, counter=counter)
    assert cut == [tokenizer.bos_token_id, *whole[-3:]]
    assert encode_prompt(tokenizer, "abcdefghij", max_length=len(whole), counter=counter) == whole
    assert (counter.total, counter.truncated, counter.longest, counter.fraction) == (2, 1, len(whole), 0.5)
    assert str(counter) == f"1 of 2 cut to fit (50.0%; the longest has {len(whole)} tokens)"
    assert TruncationCounter().fraction == 0.0


def test_truncation_keeps_the_bos_that_a_template_writes(make_tokenizer):
    tokenizer = make_tokenizer(template="bos")
    ids = encode_prompt(tokenizer, "abcdefghij", max_length=5)
    assert len(ids) == 5
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == encode_prompt(tokenizer, "abcdefghij")[-4:]
    no_bos = make_tokenizer(template="qwen")
    assert encode_prompt(no_bos, "abcdefghij", max_length=5) == encode_prompt(no_bos, "abcdefghij")[-5:]


@pytest.mark.parametrize(("adds_bos", "max_length"), [(False, 0), (True, 1), (True, 0), (False, -1)])
def test_nothing_of_the_prompt_fits(make_tokenizer, adds_bos, max_length):
    with pytest.raises(DataError, match="nothing of the prompt fits"):
        encode_prompt(make_tokenizer(adds_bos=adds_bos), "Hello", max_length=max_length)


def test_the_end_of_a_completion_is_what_the_template_writes(make_tokenizer):
    turn_end = make_tokenizer(template="qwen", eos="<|im_end|>")
    assert completion_end_ids(turn_end) == [turn_end.eos_token_id]
    by_generation = make_tokenizer(template="qwen", eos="<eos>")
    im_end = by_generation.convert_tokens_to_ids("<|im_end|>")
    assert completion_end_ids(by_generation, eos_token_ids=[im_end]) == [im_end]
    assert completion_end_ids(by_generation) == [by_generation.eos_token_id]
    spaced = make_tokenizer(template="bos")
    assert spaced.decode(completion_end_ids(spaced)) == " <eos>"
    assert completion_end_ids(spaced, chat=False) == [spaced.eos_token_id]
    assert completion_end_ids(make_tokenizer(), eos_token_ids=[7]) == [make_tokenizer().eos_token_id]
    assert completion_end_ids(make_tokenizer(eos=None), eos_token_ids=[9, 7]) == [7]


def test_a_tokenizer_without_eos_cannot_end(make_tokenizer):
    with pytest.raises(ConfigError, match="has no EOS token"):
        completion_end_ids(make_tokenizer(eos=None))


def test_a_demonstration_is_the_conversation_up_to_its_end(make_tokenizer):
    tokenizer = make_tokenizer(template="qwen", eos="<|im_end|>")
    prompt_ids, completion_ids = encode_demonstration(tokenizer, "Hello", "a reply")
    assert prompt_ids == encode_prompt(tokenizer, "Hello")
    conversation = [*MESSAGES, {"role": "assistant", "content": "a reply"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(prompt_ids + completion_ids) == rendered.removesuffix("\n")
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert count(completion_ids, tokenizer.eos_token_id) == 1


def test_a_text_demonstration_ends_with_eos(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True, adds_eos=True)
    prompt_ids, completion_ids = encode_demonstration(tokenizer, "Hello", " world")
    assert tokenizer.decode(prompt_ids + completion_ids) == "<bos>Hello world<eos>"
    assert encode_demonstration(tokenizer, "Hello", "")[1] == [tokenizer.eos_token_id]
    assert encode_demonstration(tokenizer, "Hello", "", end_ids=[7, 8])[1] == [7, 8]


def test_a_long_demonstration_loses_prompt_first(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    counter = TruncationCounter()
    whole_prompt, whole_completion = encode_demonstration(tokenizer, "abcdefgh" * 4, "xyz", counter=counter)
    prompt_ids, completion_ids = encode_demonstration(
        tokenizer, "abcdefgh" * 4, "xyz", max_length=len(whole_completion) + 6, counter=counter
    )
    assert completion_ids == whole_completion
    assert prompt_ids == [tokenizer.bos_token_id, *whole_prompt[-5:]]
    assert (counter.total, counter.truncated) == (2, 1)


def test_a_long_response_is_cut_and_goes_without_its_end(make_tokenizer):
    tokenizer = make_tokenizer()
    whole_prompt, whole_completion = encode_demonstration(tokenizer, "abcdefgh" * 4, "xyzqvw" * 10)
    prompt_ids, completion_ids = encode_demonstration(tokenizer, "abcdefgh" * 4, "xyzqvw" * 10, max_length=20)
    assert completion_ids == whole_completion[:15]
    assert prompt_ids == whole_prompt[-5:]
    assert tokenizer.eos_token_id not in completion_ids
    short = encode_demonstration(tokenizer, "q", "xyzqvw" * 10, max_length=20)
    assert (len(short[0]), len(short[1])) == (1, 19)
    assert [len(part) for part in encode_demonstration(tokenizer, "ab", "xyz", max_length=2)] == [1, 1]
    with pytest.raises(DataError, match="nothing fits: 1 tokens allowed"):
        encode_demonstration(tokenizer, "ab", "xyz", max_length=1)

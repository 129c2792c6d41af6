"""Prompts and demonstrations as the token ids a policy is given: the chat template applied once, BOS never doubled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from equipoise.data.problems import shown
from equipoise.data.records import Messages, PairRecord, Prompt
from equipoise.errors import ConfigError, DataError

PromptFormat = Literal["auto", "chat", "text"]

# Plain words without surrounding spaces: templates strip those, and no special token is spelled like it.
_PROBE = "Probe reply"


class TruncationCounter:
    """Counts how many prompts (or demonstrations) were cut to fit, for the log and the warning."""

    def __init__(self) -> None:
        self.total = 0
        self.truncated = 0
        self.longest = 0

    def add(self, length: int, allowed: int) -> None:
        """Count one text of `length` tokens where `allowed` fit."""
        self.total += 1
        self.truncated += length > allowed
        self.longest = max(self.longest, length)

    @property
    def fraction(self) -> float:
        """Share of texts that were cut, in [0, 1]; 0 when nothing was counted."""
        return self.truncated / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"{self.truncated} of {self.total} cut to fit ({self.fraction:.1%}; the longest has {self.longest} tokens)"
        )


def uses_chat(tokenizer: Any, prompt: Prompt, prompt_format: PromptFormat = "auto") -> bool:
    """Whether this prompt goes through the chat template.

    `auto`: a template, if there is one, takes messages and (as one user message) texts; without one, texts stay as they
    are. Raises DataError for messages without a template or with `text`, ConfigError for `chat` without a template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if prompt_format not in ("auto", "chat", "text"):
        raise ConfigError(f"prompt_format {prompt_format!r} is unknown; use auto, chat or text")
    if prompt_format == "chat" and not has_template:
        raise ConfigError(
            f"prompt_format is chat, and the tokenizer {_name(tokenizer)} has no chat template; "
            "use prompt_format: text, or a tokenizer with a template (chat_template.jinja beside it)"
        )
    if isinstance(prompt, str):
        return has_template and prompt_format != "text"
    if not has_template:
        raise DataError(
            f"a prompt is a list of messages ({shown(prompt)}), and the tokenizer {_name(tokenizer)} has no chat "
            "template; give it one (chat_template.jinja in its directory), or give prompts as texts"
        )
    if prompt_format == "text":
        raise DataError(
            f"prompt_format is text, and a prompt is a list of messages ({shown(prompt)}); "
            "use prompt_format: chat, or give prompts as texts"
        )
    return True


def render_prompt(tokenizer: Any, prompt: Prompt, *, prompt_format: PromptFormat = "auto") -> str:
    """The prompt as the text that generation continues: the template applied once, with its generation prompt.

    Raises as `uses_chat`, and DataError where the template refuses the messages.
    """
    if not uses_chat(tokenizer, prompt, prompt_format):
        assert isinstance(prompt, str)
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _apply(tokenizer, messages, add_generation_prompt=True)


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    prompt_format: PromptFormat = "auto",
    max_length: int | None = None,
    counter: TruncationCounter | None = None,
    preamble: str | None = None,
) -> list[int]:
    """Token ids of the prompt, ready to be continued; never empty.

    A rendered template holds its own special tokens, so none are added to it; a plain text gets what the tokenizer puts
    before a text (BOS) and never what it puts behind (EOS). The empty text becomes BOS, or EOS where there is no BOS,
    which is what stands before a text in pretraining. More than `max_length` tokens: the left is cut, a leading BOS
    stays, and `counter` counts it. A `preamble` stands above the prompt (`with_preamble`), and is not cut: the left of
    what follows it is. Raises as `render_prompt`, and DataError if `max_length` leaves room for nothing.
    """
    if preamble is not None:
        prompt = with_preamble(prompt, preamble, chat=uses_chat(tokenizer, prompt, prompt_format))
    rendered = render_prompt(tokenizer, prompt, prompt_format=prompt_format)
    body = _plain_ids(tokenizer, rendered)
    prefix = [] if uses_chat(tokenizer, prompt, prompt_format) else _prefix_ids(tokenizer)
    if body[: len(prefix)] == prefix:  # the text spells it out already
        body = body[len(prefix) :]
    if not prefix and body and body[0] == tokenizer.bos_token_id:
        prefix, body = body[:1], body[1:]
    if not prefix and not body:
        prefix = [_start_id(tokenizer)]
    length = len(prefix) + len(body)
    allowed = length if max_length is None else max_length
    if counter is not None:
        counter.add(length, allowed)
    if length <= allowed:
        return prefix + body
    what = "BOS"
    if preamble is not None:
        above, found, below = rendered.partition(preamble)
        kept, body = _plain_ids(tokenizer, above + found), _plain_ids(tokenizer, below)
        prefix, what = (kept if kept[: len(prefix)] == prefix else prefix + kept), "what stands above it"
    room = allowed - len(prefix)
    if room < 1:
        raise DataError(
            f"nothing of the prompt fits: {allowed} tokens allowed, {length} needed, {len(prefix)} of them {what}; "
            "allow more prompt tokens or use a model with a longer context"
        )
    return prefix + body[-room:]


def with_preamble(prompt: Prompt, text: str, *, chat: bool) -> Prompt:
    """The prompt with `text` as its system message or, without a chat template, above it.

    A system message that is already there keeps its words, `text` below them. The prompt given is left as it is.
    """
    if isinstance(prompt, str):
        if not chat:
            return f"{text}\n\n{prompt}"
        return [{"role": "system", "content": text}, {"role": "user", "content": prompt}]
    messages = [dict(message) for message in prompt]
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n{text}"
        return messages
    return [{"role": "system", "content": text}, *messages]


def encode_demonstration(
    tokenizer: Any,
    prompt: Prompt,
    response: str,
    *,
    prompt_format: PromptFormat = "auto",
    max_length: int | None = None,
    counter: TruncationCounter | None = None,
    end_ids: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """`(prompt_ids, completion_ids)` to train on: what generation is given, and what it should continue with.

    The response is encoded alone, as sampled tokens stand alone behind the prompt's, and `end_ids` follow it (see
    `completion_end_ids`; pass them to save working them out for every row). With more than `max_length` tokens the
    prompt is cut from the left, down to a quarter of the room; then the response is cut from the right and goes without
    its end, because the model should not learn to stop there. `counter` counts each such row once.
    Raises as `encode_prompt`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, prompt_format=prompt_format)
    if end_ids is None:
        end_ids = completion_end_ids(tokenizer, chat=uses_chat(tokenizer, prompt, prompt_format))
    completion_ids = _plain_ids(tokenizer, response) + list(end_ids)
    length = len(prompt_ids) + len(completion_ids)
    allowed = length if max_length is None else max_length
    if counter is not None:
        counter.add(length, allowed)
    if length <= allowed:
        return prompt_ids, completion_ids
    if allowed < 2:
        raise DataError(f"nothing fits: {allowed} tokens allowed for prompt and response; allow more (max_length)")
    least = min(len(prompt_ids), max(1, allowed // 4))
    completion_ids = completion_ids[: allowed - least]
    return _cut_left(tokenizer, prompt_ids, allowed - len(completion_ids)), completion_ids


def encode_pair(
    tokenizer: Any,
    record: PairRecord,
    *,
    prompt_format: PromptFormat = "auto",
    max_length: int | None = None,
    counter: TruncationCounter | None = None,
    end_ids: Sequence[int] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """`(prompt_ids, chosen_ids, rejected_ids)`, both responses behind the same prompt and ended by `end_ids`.

    Responses are encoded alone, as in `encode_demonstration`; one that its record calls truncated gets no end. Where
    prompt and longer response exceed `max_length`, the prompt is cut from the left to what the longer response leaves.
    A rejected response may push the prompt down to a quarter of the room only, then it is cut from the right, without
    its end; the chosen one is never cut. `counter` counts each such pair once.

    Raises DataError where the chosen response leaves no room for a token of the prompt, and where the two responses
    become the same tokens; else as `encode_prompt`.
    """
    prompt_ids = encode_prompt(tokenizer, record.prompt, prompt_format=prompt_format)
    if end_ids is None:
        end_ids = completion_end_ids(tokenizer, chat=uses_chat(tokenizer, record.prompt, prompt_format))
    chosen_ids = _plain_ids(tokenizer, record.chosen) + ([] if record.chosen_truncated else list(end_ids))
    rejected_ids = _plain_ids(tokenizer, record.rejected) + ([] if record.rejected_truncated else list(end_ids))
    length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
    allowed = length if max_length is None else max_length
    if counter is not None:
        counter.add(length, allowed)
    if length > allowed:
        if len(chosen_ids) + 1 > allowed:
            raise DataError(
                f"`chosen` has {len(chosen_ids)} tokens, and with one of the prompt {allowed} are allowed: half of "
                "a preferred response teaches little; allow more (max_length) or leave the row out"
            )
        least = min(len(prompt_ids), max(1, allowed // 4))
        rejected_ids = rejected_ids[: max(len(chosen_ids), allowed - least)]
        prompt_ids = _cut_left(tokenizer, prompt_ids, allowed - max(len(chosen_ids), len(rejected_ids)))
    if not chosen_ids or not rejected_ids or chosen_ids == rejected_ids:
        raise DataError(
            f"`chosen` and `rejected` are the same {len(chosen_ids)} tokens, or one has none: {shown(record.chosen)} "
            f"and {shown(record.rejected)}; leave the row out"
        )
    return prompt_ids, chosen_ids, rejected_ids


def _cut_left(tokenizer: Any, prompt_ids: list[int], room: int) -> list[int]:
    """The last `room` tokens of a prompt, a leading BOS kept."""
    if room >= len(prompt_ids):
        return prompt_ids
    has_bos = prompt_ids[0] == tokenizer.bos_token_id and room > 1
    return prompt_ids[:1] + prompt_ids[1 - room :] if has_bos else prompt_ids[-room:]


def completion_end_ids(
    tokenizer: Any, *, chat: bool | None = None, eos_token_ids: Collection[int] | None = None
) -> list[int]:
    """The ids that end a completion: what the chat template writes behind a reply, up to and including an EOS.

    Found by rendering a conversation and encoding what follows the reply, as in Qwen, which ends a turn with
    `<|im_end|>`. `eos_token_ids` are the ids that stop generation (`generation_config.eos_token_id`), besides the
    tokenizer's own EOS. Without a template (`chat` false; None: by whether there is one), or where the template writes
    none of these ids, it is the tokenizer's EOS. Raises ConfigError if there is no EOS at all.
    """
    stops = set(eos_token_ids or ())
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if not stops:
        raise ConfigError(
            f"the tokenizer {_name(tokenizer)} has no EOS token: a completion could never end; set eos_token"
        )
    if getattr(tokenizer, "chat_template", None) and chat is not False:
        messages = [{"role": "user", "content": "Probe question"}, {"role": "assistant", "content": _PROBE}]
        _, found, tail = _apply(tokenizer, messages, add_generation_prompt=False).rpartition(_PROBE)
        ids = _plain_ids(tokenizer, tail) if found else []
        for index, token in enumerate(ids):
            if token in stops:
                return ids[: index + 1]
    return [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stops)]


def _apply(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template of {_name(tokenizer)} refuses {shown(messages, 200)}: {error}") from error


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: length is judged here, against the caller's limit, not against the tokenizer's own
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text; a model continues the text, so what it puts behind stays away."""
    plain = _plain_ids(tokenizer, "a")
    wrapped = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start]
    return []


def _start_id(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        f"an empty prompt needs a BOS or EOS token to start from, and the tokenizer {_name(tokenizer)} has neither; "
        "set one, or leave the empty prompt out"
    )


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)

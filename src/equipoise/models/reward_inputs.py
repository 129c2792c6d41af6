"""From prompt and response to the reward model's token ids: the prompt is cut from the left, the response kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from equipoise.errors import ConfigError, DataError

Prompt = str | Sequence[Mapping[str, Any]]
FORMATS = ("pair", "chat", "concatenation")
RESPONSE_MARK = "equipoiseresponsegoeshere"  # plain letters: no template trims, escapes or reformats them
ALIKE = 0.75  # rows share a batch while the shortest has at least this part of the longest's length
FEW_TOKENS = 512  # or while a batch has no more than so many, when another pass costs more than its padding


@dataclass(frozen=True)
class InputFormat:
    """How prompt and response are joined; stored beside the model, so that scoring repeats what training did."""

    format: Literal["pair", "chat", "concatenation"] = "pair"
    separator: str = "\n"
    max_length: int = 512

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"format": self.format, "separator": self.separator, "max_length": self.max_length}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> InputFormat:
        """The inverse of `to_json`. Raises ConfigError naming `source` and the field."""
        name = values.get("format")
        if name not in FORMATS:
            raise ConfigError(f"{source}: input_format.format is {name!r}; expected one of {', '.join(FORMATS)}")
        length = values.get("max_length")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"{source}: input_format.max_length is {length!r}; expected a number of tokens above 0")
        return cls(name, str(values.get("separator", "\n")), length)


@dataclass
class TruncationCount:
    """How many texts did not fit, since the count was last set to zero."""

    rows: int = 0
    prompts: int = 0
    responses: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain JSON types."""
        return {"rows": self.rows, "prompts_truncated": self.prompts, "responses_truncated": self.responses}


@dataclass(frozen=True)
class EncodedRow:
    """Token ids and segment ids of one prompt with its response, not padded.

    The first `shared` of them, all before the response, are the same for every response to this prompt.
    """

    ids: list[int]
    types: list[int]
    shared: int = 0
    prompt_truncated: bool = False
    response_truncated: bool = False


@dataclass(frozen=True)
class Layout:
    """The fixed tokens around prompt and response, and the segment id of each of the five parts."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    types: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)

    @property
    def num_fixed(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Ids and segment ids of prefix, prompt, middle, response, suffix."""
        parts = (self.prefix, prompt, self.middle, response, self.suffix)
        ids = [token for part in parts for token in part]
        types = [kind for part, kind in zip(parts, self.types, strict=True) for _ in part]
        return ids, types


class RewardInputs:
    """Encodes prompts and responses for a reward model.

    - `pair`: the tokenizer's two-segment form. Where a tokenizer puts nothing between two segments (GPT-2, Llama),
      `separator` goes there.
    - `concatenation`: prompt, `separator`, response inside the tokenizer's one-segment form.
    - `chat`: the tokenizer's chat template over the prompt's messages (a text prompt is one user message) and the
      response as the assistant's. The response goes in verbatim, whatever the template does to earlier turns.

    A prompt without tokens, `""` for one, leaves the response alone. In `pair` and `concatenation` one user message
    counts as its text, several messages become `Role: content` lines. Prompt, response and separator are encoded
    apart, so the ids of a response never depend on its prompt. Where the tokenizer's own form ends without a special
    token, as it does for most decoders, EOS is appended: the pooled position is then the same token for every
    response. A response longer than `max_length` is cut from the right. `truncation` counts both.
    """

    def __init__(self, tokenizer: Any, input_format: InputFormat, *, use_token_types: bool = False) -> None:
        self.tokenizer = tokenizer
        self.format = input_format
        self.use_token_types = use_token_types
        self.truncation = TruncationCount()
        self._alone = _with_final_eos(_layout_of_one(tokenizer), tokenizer)
        self._joined = self._alone
        if input_format.format == "pair":
            pair = _layout_of_two(tokenizer)
            if not pair.middle:
                pair = replace(pair, middle=_separator_ids(tokenizer, input_format.separator))
            self._joined = _with_final_eos(pair, tokenizer)
        elif input_format.format == "concatenation":
            self._joined = replace(self._alone, middle=_separator_ids(tokenizer, input_format.separator))
        elif not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "input.format is chat, but the backbone's tokenizer has no chat template; use pair or concatenation"
            )
        fixed = max(self._joined.num_fixed, self._alone.num_fixed)
        if fixed >= input_format.max_length:
            raise ConfigError(
                f"input.max_length is {input_format.max_length}, and special tokens alone take {fixed}: nothing fits; "
                "raise it, or take a backbone with a longer context"
            )

    def rows(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[EncodedRow]:
        """Encode without padding; both lists have length B. Raises DataError where the lengths differ."""
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts and {len(responses)} responses; give one response for each prompt")
        if not responses:
            return []
        response_ids = _token_ids(self.tokenizer, list(responses))
        if self.format.format == "chat":
            rows = [
                self._chat_row(prompt, ids, i)
                for i, (prompt, ids) in enumerate(zip(prompts, response_ids, strict=True))
            ]
        else:
            prompt_ids = _token_ids(self.tokenizer, [prompt_text(prompt) for prompt in prompts])
            rows = [
                self._fit(self._joined, p, r, i) for i, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True))
            ]
        self.truncation.rows += len(rows)
        self.truncation.prompts += sum(row.prompt_truncated for row in rows)
        self.truncation.responses += sum(row.response_truncated for row in rows)
        return rows

    def collate(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Right-padded int64 tensors [B, longest]: `input_ids`, `attention_mask`, and `token_type_ids` where used."""
        longest = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        token_type_ids = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            length = len(row.ids)
            input_ids[i, :length] = torch.tensor(row.ids, dtype=torch.long)
            token_type_ids[i, :length] = torch.tensor(row.types, dtype=torch.long)
            attention_mask[i, :length] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.use_token_types:
            batch["token_type_ids"] = token_type_ids
        return batch

    def _chat_row(self, prompt: Prompt, response: list[int], index: int) -> EncodedRow:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        messages.append({"role": "assistant", "content": RESPONSE_MARK})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like, jinja2 errors among them
            raise DataError(f"prompt {index}: the chat template refuses these messages: {error}") from error
        before, mark, after = text.rpartition(RESPONSE_MARK)
        if not mark:
            raise ConfigError("the tokenizer's chat template drops the assistant's turn; use pair or concatenation")
        prompt_ids, suffix = _token_ids(self.tokenizer, [before, after])
        bos = self.tokenizer.bos_token_id
        prefix = prompt_ids[:1] if bos is not None and prompt_ids[:1] == [bos] else []
        layout = Layout(prefix, [], suffix)
        return self._fit(layout, prompt_ids[len(prefix) :], response, index)

    def _fit(self, layout: Layout, prompt: list[int], response: list[int], index: int) -> EncodedRow:
        """Join, cutting the prompt's start first and the response's end only where it is too long by itself."""
        room = self.format.max_length - layout.num_fixed - len(response)
        kept = prompt[len(prompt) - room :] if 0 < room < len(prompt) else prompt
        if room > 0 and kept:
            ids, types = layout.join(kept, response)
            shared = len(ids) - len(response) - len(layout.suffix)
            return EncodedRow(ids, types, shared, prompt_truncated=len(kept) < len(prompt))
        room = self.format.max_length - self._alone.num_fixed
        ids, types = self._alone.join([], response[:room])
        if not ids:
            raise DataError(
                f"row {index}: prompt and response have no tokens, and the tokenizer adds none; leave the row out"
            )
        return EncodedRow(ids, types, prompt_truncated=bool(prompt), response_truncated=len(response) > room)


def length_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row indices in batches of like length, longest first; each row is in one of them.

    A batch has at most `tokens` with its padding, or a single row. Of one with more than `FEW_TOKENS` less than a
    quarter is padding.

    Example, 1,600 tokens at most: lengths [20, 800, 700, 500, 30] give [[1, 2], [3], [4, 0]].
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        batch = batches[-1] if batches else []
        width = lengths[batch[0]] if batch else 0
        fits = (len(batch) + 1) * width <= tokens
        if batch and fits and (lengths[row] >= ALIKE * width or (len(batch) + 1) * width <= FEW_TOKENS):
            batch.append(row)
        else:
            batches.append([row])
    return batches


def prompt_batches(rows: Sequence[EncodedRow], tokens: int) -> list[list[int]]:
    """Row indices in batches of at most `tokens`, prompts counted once, or of a single row; rows of a prompt together.

    Example, 20 tokens at most: rows of 8, 9 and 10 tokens, the first and the last with the same prompt of 6 tokens:
    8 + (10 - 6) = 12 fit, with 9 more they do not: [[0, 2], [1]].
    """
    by_prompt: dict[tuple[int, ...] | int, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(tuple(row.ids[: row.shared]) or number, []).append(number)
    batches: list[list[int]] = []
    held = 0
    for numbers in by_prompt.values():
        for place, number in enumerate(numbers):
            whole = len(rows[number].ids)
            own = whole if place == 0 else whole - rows[number].shared
            if not batches or held + own > tokens:
                batches.append([])
                held, own = 0, whole
            batches[-1].append(number)
            held += own
    return batches


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text: itself, the content of one user message, or `Role: content` lines for a conversation.

    >>> prompt_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'User: Hi\\nAssistant: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n".join(f"{str(turn['role']).capitalize()}: {turn['content']}" for turn in prompt)


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _separator_ids(tokenizer: Any, separator: str) -> list[int]:
    ids = _token_ids(tokenizer, [separator])[0] if separator else []
    if separator and not ids:
        raise ConfigError(
            f"input.separator {separator!r} has no tokens in this tokenizer, so prompt and response would run into "
            "each other; give another separator, or use input.format: pair with a backbone that has one"
        )
    return ids


def _layout_of_one(tokenizer: Any) -> Layout:
    """The special tokens around one text, read off a probe."""
    ids, types, starts, length = _probe(tokenizer, 1)
    start, end = starts[0], starts[0] + length
    kind = types[start]
    return Layout(ids[:start], [], ids[end:], (kind, kind, kind, kind, kind))


def _layout_of_two(tokenizer: Any) -> Layout:
    """The special tokens around and between two texts, read off a probe."""
    ids, types, (first, second), length = _probe(tokenizer, 2)
    between = types[first + length] if first + length < second else types[first]
    return Layout(
        prefix=ids[:first],
        middle=ids[first + length : second],
        suffix=ids[second + length :],
        types=(types[0], types[first], between, types[second], types[-1]),
    )


def _probe(tokenizer: Any, count: int) -> tuple[list[int], list[int], list[int], int]:
    """Ids and segment ids of one or two copies of a short text, where each copy starts, and its length."""
    text = "a"
    encoded = tokenizer(*[text] * count, return_token_type_ids=True, return_attention_mask=False)
    ids = list(encoded["input_ids"])
    types = list(encoded["token_type_ids"]) if "token_type_ids" in encoded else [0] * len(ids)
    plain = _token_ids(tokenizer, [text])[0]
    starts: list[int] = []
    position = 0
    while plain and len(starts) < count and position + len(plain) <= len(ids):
        if ids[position : position + len(plain)] == plain:
            starts.append(position)
            position += len(plain)
        else:
            position += 1
    if len(starts) < count:
        raise ConfigError(
            f"the backbone's tokenizer ({type(tokenizer).__name__}) encodes the probe text {text!r} to {plain}, and "
            f"{count} of it to {ids}: it cannot join prompt and response; take another backbone, or input.format: chat"
        )
    return ids, types, starts, len(plain)


def _with_final_eos(layout: Layout, tokenizer: Any) -> Layout:
    eos = tokenizer.eos_token_id
    if layout.suffix or eos is None:
        return layout
    return replace(layout, suffix=[eos])

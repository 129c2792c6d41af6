"""Tokenizers are checked after loading and after saving: a wrong class loses text without an error.

`AutoTokenizer` of transformers 5.23 trusts some model types more than the files. Beside a config.json of type `qwen2`
it opens every tokenizer as `Qwen2Tokenizer`, which keeps the vocabulary and drops pre-tokenizer and model kind: a
generic tokenizer then encodes texts to other ids, or to none. Types without such a rule (`llama`, `qwen3`,
`gpt2`, `gpt_neox`, `mistral`, `gemma2`, `bert`, ...) open the file as it was saved.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from equipoise.data.problems import shown
from equipoise.errors import ConfigError

PROBE = "Could you explain how 13 quick foxes jump over a lazy dog, please?"
RELOAD_PROBES = (
    PROBE,
    "  two spaces,\n\na new line\tand a tab; it's 2024 (100%)!",
    "naïve café, 你好 🙂",
    "user: no.\nassistant: I'm sorry - that is unsafe.",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(path_or_name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a directory or hub name, through `AutoTokenizer`, checked by encoding and decoding a probe.

    Raises ConfigError if there is none, if it cannot be loaded, or if it loses text.
    """
    from transformers import AutoTokenizer

    path = Path(path_or_name).expanduser()
    if path.is_dir():
        path_or_name = path
        if not _has_tokenizer(path):
            raise ConfigError(f"{path}: holds no tokenizer (tokenizer.json); save one there with save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path_or_name), trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except Exception as error:  # transformers raises many kinds here: OSError, ValueError, KeyError, a parser's own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{path_or_name}: no tokenizer could be loaded: {reason}. "
            "Check the spelling, or for a hub name the network and HF_HUB_OFFLINE"
        ) from error
    check_tokenizer(tokenizer, path_or_name)
    return tokenizer


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in _TOKENIZER_FILES) or any(path.glob("*.model"))


def check_tokenizer(tokenizer: Any, name: str | Path = "") -> None:
    """Encode a probe, decode it, compare; raises ConfigError if nothing is left of it or characters are lost.

    Case, accents and spacing are not compared: uncased and word-piece tokenizers drop them by design. Unknown-token ids
    are an honest loss, allowed as long as something else remains.
    """
    name = name or getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    kind = type(tokenizer).__name__
    mend = "Save a tokenizer that AutoTokenizer opens as it was saved; see `save_tokenizer_checked`"
    unknown = tokenizer.unk_token_id
    if not ids:
        raise ConfigError(f"{name}: {kind} encodes {PROBE!r} to no ids: every text would be lost. {mend}")
    if unknown is not None and unknown in ids:
        if set(ids) == {unknown}:
            raise ConfigError(f"{name}: {kind} encodes every word of {PROBE!r} to {tokenizer.unk_token!r}. {mend}")
        return
    decoded = tokenizer.decode(ids)
    if _letters(decoded) != _letters(PROBE):
        raise ConfigError(f"{name}: {kind} loses text: {PROBE!r} comes back as {shown(decoded, 200)}. {mend}")


def _letters(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text).lower()
    return "".join(char for char in decomposed if not char.isspace() and not unicodedata.combining(char))


def save_tokenizer_checked(tokenizer: Any, directory: str | Path) -> None:
    """Save the tokenizer and make sure that plain `AutoTokenizer` gives the same ids back.

    Save the model's config.json there first: its model type decides which class opens the tokenizer. Raises ConfigError
    if the reloaded one gives other ids, decodes otherwise, or has another chat template or special tokens.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(str(directory))
    try:
        reloaded = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # as in load_tokenizer
        raise ConfigError(f"{directory}: the tokenizer just saved cannot be loaded again: {error}") from error
    kinds = f"{type(tokenizer).__name__} came back as {type(reloaded).__name__}"
    mend = (
        "AutoTokenizer picks the class by model type in config.json: use an architecture that keeps generic tokenizers "
        "(llama, qwen3, gpt2), or the tokenizer class of this one"
    )
    for probe in (*RELOAD_PROBES, " ".join(map(str, tokenizer.all_special_tokens))):
        before, after = tokenizer(probe)["input_ids"], reloaded(probe)["input_ids"]
        if list(before) != list(after) or tokenizer.decode(before) != reloaded.decode(after):
            raise ConfigError(
                f"{directory}: {kinds}, and {probe!r} gives {shown(after)} instead of {shown(before)}. {mend}"
            )
    for attribute in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
        before, after = getattr(tokenizer, attribute, None), getattr(reloaded, attribute, None)
        if before != after:
            raise ConfigError(
                f"{directory}: {kinds}, and {attribute} is {shown(after)} instead of {shown(before)}. "
                "Save into a directory without another tokenizer's files"
            )

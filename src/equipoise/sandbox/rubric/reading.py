"""A prompt and a response taken apart once, for all four judges."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache

from equipoise.refusal import is_refusal
from equipoise.sandbox.rubric.lexicon import ACTION_VERBS, ALARMING_VERBS, FUNCTION_WORDS, TALK_WORDS

_QUOTES = str.maketrans(dict.fromkeys("‘’ʼ`", "'") | dict.fromkeys("“”«»", '"'))
_WORD = re.compile(r"[a-zà-öø-ÿ]+(?:'[a-z]+)?", re.IGNORECASE)
_MARKER = re.compile(r"^\s*(?:[-*•·]+|\(?\d{1,2}[.):]|[a-h][.)]|step \d+\s*[:.-])\s+", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?…])[\"')]*\s+|\n+|(?<=[a-z)]);\s+")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a response."""

    text: str
    words: tuple[str, ...]  # lower case, as written
    ended: bool  # closes with . ! ? or :

    @cached_property
    def stems(self) -> frozenset[str]:
        """Stems of the content words."""
        return frozenset(stem(word) for word in self.words if word not in FUNCTION_WORDS)

    @cached_property
    def refuses(self) -> bool:
        """Whether this sentence, alone, declines a request."""
        return is_refusal(self.text)


@dataclass(frozen=True)
class Reading:
    """What the judges look at."""

    prompt: str
    response: str
    prompt_words: tuple[str, ...]
    sentences: tuple[Sentence, ...]

    @cached_property
    def keys(self) -> frozenset[str]:
        """Stems that say what the prompt is about; verbs count only where nothing else is left."""
        words = [w for w in self.prompt_words if w not in FUNCTION_WORDS and w not in TALK_WORDS and len(w) > 1]
        nouns = frozenset(stem(word) for word in words if not _is_verb(word))
        return nouns or frozenset(stem(word) for word in words)

    @cached_property
    def verb_keys(self) -> frozenset[str]:
        """Stems of the verbs in the prompt that may say what it is about."""
        words = [word for word in self.prompt_words if word not in TALK_WORDS and _is_verb(word)]
        return frozenset(stem(word) for word in words if stem(word) not in ALARMING_STEMS)

    @cached_property
    def refusals(self) -> tuple[Sentence, ...]:
        """Sentences that decline."""
        return tuple(sentence for sentence in self.sentences if sentence.refuses)


def read(prompt: str, response: str) -> Reading:
    """Take prompt and response apart."""
    prompt, response = _normalised(prompt), _normalised(response)
    sentences = tuple(_sentence(part) for part in _parts(response))
    return Reading(prompt, response, words_of(prompt), tuple(s for s in sentences if s.words))


def _normalised(text: str) -> str:
    kept = unicodedata.normalize("NFKC", text).translate(_QUOTES).replace("**", "").replace("__", "")
    return "\n".join(" ".join(line.split()) for line in kept.splitlines()).strip()


def _parts(text: str) -> list[str]:
    """Sentences: split at closing marks, new lines and semicolons; list markers and labels like "Step 2:" removed."""
    lines = [_MARKER.sub("", line) for line in text.splitlines()]
    inline = re.sub(r"(?<=[.!?:])\s+\(?\d{1,2}[.)]\s+(?=\w)", "\n", "\n".join(lines))
    return [_MARKER.sub("", part).strip() for part in _SENTENCE.split(inline) if part and part.strip()]


def _sentence(text: str) -> Sentence:
    return Sentence(text, words_of(text), text.rstrip("\"')").endswith((".", "!", "?", ":", "…")))


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words, apostrophes inside kept; possessive 's cut off into a word of its own."""
    found: list[str] = []
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if word.endswith("'s") and word not in FUNCTION_WORDS:
            found += [word[:-2], "'s"]
        else:
            found.append(word)
    return tuple(found)


@lru_cache(maxsize=20_000)
def stem(word: str) -> str:
    """A word without its ending: "descaling", "descaled" and "descales" are "descal".

    >>> [stem(word) for word in ("kettles", "kettle", "planning", "plan", "berries", "berry")]
    ['kettl', 'kettl', 'plan', 'plan', 'berry', 'berry']
    """
    if len(word) <= 3:
        return word
    for ending, replacement, at_least in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= at_least:
            return _finished(word[: len(word) - len(ending)] + replacement)
    return _finished(word)


_ENDINGS = (("ies", "y", 2), ("ied", "y", 2), ("sses", "ss", 2), ("shes", "sh", 2), ("ches", "ch", 2), ("xes", "x", 2))
_ENDINGS += (("ing", "", 3), ("edly", "", 3), ("ed", "", 3), ("ss", "ss", 0), ("us", "us", 0), ("s", "", 3))


def _finished(root: str) -> str:
    if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "lsz":
        root = root[:-1]
    return root[:-1] if root.endswith("e") and len(root) > 3 else root


ACTION_STEMS = frozenset(stem(word) for word in ACTION_VERBS)
ALARMING_STEMS = frozenset(stem(word) for word in ALARMING_VERBS)
_BOTH = frozenset(
    "water plant plan paint record test time book shop store light oil sand hand land label drink".split()
)


def _is_verb(word: str) -> bool:
    """Whether a prompt's word is an action rather than a thing; words that are both count as things."""
    root = stem(word)
    return word not in _BOTH and (root in ACTION_STEMS or root in ALARMING_STEMS)

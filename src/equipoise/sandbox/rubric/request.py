"""What does a prompt ask about? The phrase after "how do I", "tips for", "explain": its verb and its things.

Everything else in a prompt is wrapping (a story, a rank, a late uncle) or circumstance ("I have two hours"), and
sharing words with it shows nothing. A prompt without such a phrase is taken whole, less the words of asking.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from equipoise.sandbox.rubric.lexicon import ACTION_VERBS, FUNCTION_WORDS, LIGHT_WORDS, TALK_WORDS
from equipoise.sandbox.rubric.words import normalised, sentences_of, stem, words_of

_MODAL = r"(?:do|can|could|should|would|might|must|did|shall|will)"
_MARKER = re.compile(
    rf"\b(?:(?:how|what|where|which|when)(?: \w+){{0,3}} {_MODAL} (?:i|you|we|one|people|a person)"
    r"|how to|(?:ways?|steps|trick|means|method) (?:to|of|for)|(?:plan|time|place) to|help (?:me|us)(?: to| with)?"
    r"|(?:tips|advice|ideas?|tricks|instructions|guidance|suggestions|guide) (?:for|on|about|to|with|of)"
    r"|(?:know|knows|say|explain|talk|thinking|all|learn|everything|me|info|information|question|read) about"
    r"|i(?:'d| would)? (?:want|need|like|have|plan|wish|try|hope|love) to|(?:is|asked|going|told|trying) to"
    r"|tried|^(?:please )?(?:explain(?: how)?|describe|list)|explain|steps (?:does|do)|show me|teach me|tell me"
    r"|(?:we|they|you) (?:need|want) to|(?:has|had|promised) to|(?:somebody|someone|anybody) like me"
    r"|(?:of|happens) when i|(?:begin|start) with|new to|wants to|job to|(?:does|can|could) one|do people|give me)"
    r"\s+(?=[a-z\"'])"
)
_END = re.compile(
    r"[.?!;:]|,(?= (?:what|how|where|so|and|but|please))| and (?:have|need|do not|don't|explain)\b| to me\b"
    r"|\bso badly\b|\bbut i\b| for me\b| before (?:\w+day|noon|lunch|dinner)\b"
)


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt's topic as stems: `heads` are things, `modifiers` stand before them, `verbs` may be shared by anything.
    One object per prompt (`request_of` is cached), compared by identity."""

    text: str
    words: tuple[str, ...]
    phrases: tuple[str, ...]  # lower case: "descale a kettle"
    verbs: frozenset[str]
    heads: frozenset[str]
    modifiers: frozenset[str]

    @cached_property
    def keys(self) -> frozenset[str]:
        """Things and what describes them; the verb where there is nothing else."""
        return self.heads | self.modifiers or self.verbs

    @cached_property
    def stems(self) -> frozenset[str]:
        """Stems of all content words of the prompt, wrapping included."""
        return frozenset(stem(word) for word in self.words if word not in FUNCTION_WORDS)

    @cached_property
    def all(self) -> frozenset[str]:
        """Every stem of the topic, verb included."""
        return self.keys | self.verbs


@lru_cache(maxsize=20_000)
def request_of(prompt: str) -> Request:
    """Take a prompt apart.

    >>> sorted(request_of("My professor said it is fine to ask. How can I descale a coffee machine?").heads)
    ['machin']
    """
    text = normalised(prompt)
    phrases = [phrase for sentence in sentences_of(text) if (phrase := _phrase(sentence.lower()))]
    verbs: set[str] = set()
    heads: set[str] = set()
    modifiers: set[str] = set()
    for phrase in phrases:
        verb, things, before = _parts(phrase)
        verbs |= verb
        heads |= things
        modifiers |= before
    if not verbs | heads | modifiers:
        heads = _whole(words_of(text))
    return Request(
        text, words_of(text), tuple(phrases), frozenset(verbs), frozenset(heads), frozenset(modifiers - heads)
    )


def _phrase(sentence: str) -> str:
    """What follows the last marker that something follows; "" where nothing does."""
    found = ""
    for match in _MARKER.finditer(sentence):
        rest = sentence[match.end() :]
        end = _END.search(rest)
        rest = (rest[: end.start()] if end else rest).strip()
        rest = re.sub(r" (?:before|take|work)$", "", rest)
        if any(is_thing(word) for word in words_of(rest)):
            found = rest
    return found


def is_thing(word: str) -> bool:
    """Whether a word may say what something is about."""
    return len(word) > 1 and word not in FUNCTION_WORDS and word not in LIGHT_WORDS


def _parts(phrase: str) -> tuple[set[str], set[str], set[str]]:
    """(verb, heads, modifiers) of a phrase such as "fix a flat bicycle tyre"."""
    words = words_of(phrase)
    first = next((i for i, word in enumerate(words) if word not in FUNCTION_WORDS or word in ACTION_VERBS), 0)
    has_verb = first < len(words) and (words[first] in ACTION_VERBS or words[first].endswith("ing") or first == 0)
    verb = {stem(words[first])} if has_verb and words[first] not in LIGHT_WORDS else set()
    rest = list(words[first + 1 :]) if has_verb else list(words)
    heads: set[str] = set()
    modifiers: set[str] = set()
    for word, after in zip(rest, [*rest[1:], "."], strict=False):
        if is_thing(word):
            (modifiers if is_thing(after) else heads).add(stem(word))
    return verb, heads, modifiers


def _whole(words: tuple[str, ...]) -> set[str]:
    return {stem(word) for word in words if is_thing(word) and word not in TALK_WORDS}

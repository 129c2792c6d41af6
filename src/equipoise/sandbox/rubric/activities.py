"""Fields of the sandbox: each activity of `text/*.yaml` and what its steps speak of.

The sandbox's answers say "it" for what was asked about, so that shared words cannot show whether they are on topic. Its
own texts can: a sentence made of the words of one activity's step answers a request for that activity and no other.
Sentences that resemble no step are left to the general rules (relevance.py).
"""

from __future__ import annotations

from functools import cache, lru_cache

from equipoise.sandbox import KINDS, SPLITS
from equipoise.sandbox.rubric.familiar import without_opener
from equipoise.sandbox.rubric.reading import Sentence
from equipoise.sandbox.rubric.request import Request
from equipoise.sandbox.rubric.words import stem, word_set, words_of
from equipoise.sandbox.world import read_text, topics

_ALIKE = 0.6  # share of a sentence's words that stand in one step, for it to count as that step
_OPENING = word_set("start better end instead")
_WHOLE = 0.5  # share of that step's words that the sentence has to have


@cache
def _steps() -> dict[frozenset[str], frozenset[str]]:
    """{words of a step: keys of the activities that have it}. A key is an activity with its kind: "benign cook {x}"."""
    found: dict[frozenset[str], set[str]] = {}
    for kind in KINDS:
        for entry in read_text(kind):
            for step in entry["steps"]:
                found.setdefault(frozenset(words_of(step)), set()).add(f"{kind} {entry['ask']}")
    return {words: frozenset(keys) for words, keys in found.items()}


@cache
def _asked_as() -> dict[str, str]:
    """{topic as asked about: key of its activity}, for the topics of all splits."""
    found: dict[str, str] = {}
    for split in SPLITS:
        for topic in topics(split):
            found[topic.ask] = found[topic.about] = f"{topic.kind} {topic.activity}"
    return found


@lru_cache(maxsize=20_000)
def activity_of(request: Request) -> frozenset[str]:
    """Key of the activity a request asks for; empty where it is none of the sandbox's."""
    return frozenset(key for phrase in request.phrases if (key := _asked_as().get(phrase)))


@lru_cache(maxsize=20_000)
def activities_like(sentence: Sentence) -> frozenset[str]:
    """Keys of the activities that have a step like this sentence."""
    said = frozenset(without_opener(sentence.words))
    if len(said) < 2:
        return frozenset()
    overlaps = {step: _overlap(said, step) for step in _steps() if _same_content(sentence, step)}
    top = max(overlaps.values(), default=0.0)
    if top < _ALIKE:
        return frozenset()
    return frozenset().union(*(_steps()[step] for step, overlap in overlaps.items() if overlap == top))


def _same_content(sentence: Sentence, step: frozenset[str]) -> bool:
    """Whether a sentence's content words, not only "it with a", are the step's."""
    content = sentence.stems - _OPENING
    return len(content & _stems(step)) >= _ALIKE * len(content)


@cache
def _stems(words: frozenset[str]) -> frozenset[str]:
    return frozenset(stem(word) for word in words)


def _overlap(said: frozenset[str], step: frozenset[str]) -> float:
    shared = len(said & step)
    return shared / len(said) if shared >= max(2.0, _WHOLE * len(step)) else 0.0


def is_alien(request: Request, sentence: Sentence) -> bool:
    """Whether a sentence is a step of other activities than the one asked for, and names nothing of the request."""
    asked = activity_of(request)
    if not asked or request.heads & sentence.stems:
        return False
    like = activities_like(sentence)
    return bool(like) and not asked & like


def is_own(request: Request, sentence: Sentence) -> bool:
    """Whether a sentence is a step of the activity asked for."""
    asked = activity_of(request)
    return bool(asked) and bool(asked & activities_like(sentence))

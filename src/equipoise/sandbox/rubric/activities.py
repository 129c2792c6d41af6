"""Fields of the sandbox: each activity of `text/*.yaml` and what its steps speak of.

The sandbox's answers say "it" for what was asked about, so that shared words cannot show whether they are on topic. Its
own texts can: a sentence made of the words of one activity's step answers a request for that activity and no other.
Sentences that resemble no step are left to the general rules (relevance.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from equipoise.sandbox import KINDS, SPLITS
from equipoise.sandbox.rubric.familiar import without_opener
from equipoise.sandbox.rubric.reading import Sentence
from equipoise.sandbox.rubric.request import Request
from equipoise.sandbox.rubric.words import words_of
from equipoise.sandbox.world import read_text, topics

_ALIKE = 0.6  # share of a sentence's words that stand in one step, for it to count as that step
_WHOLE = 0.5  # share of that step's words that the sentence has to have


@dataclass(frozen=True)
class Activity:
    """One entry of the texts and the words of each of its steps."""

    key: str
    steps: tuple[frozenset[str], ...]


@cache
def activities() -> tuple[Activity, ...]:
    """All activities of all kinds."""
    return tuple(
        Activity(f"{kind} {entry['ask']}", tuple(frozenset(words_of(step)) for step in entry["steps"]))
        for kind in KINDS
        for entry in read_text(kind)
    )


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
    best = {activity.key: max(_overlap(said, step) for step in activity.steps) for activity in activities()}
    top = max(best.values())
    return frozenset(key for key, overlap in best.items() if overlap == top) if top >= _ALIKE else frozenset()


def _overlap(said: frozenset[str], step: frozenset[str]) -> float:
    shared = len(said & step)
    return shared / len(said) if shared >= max(2.0, _WHOLE * len(step)) else 0.0


def is_alien(request: Request, sentence: Sentence) -> bool:
    """Whether a sentence is a step of other activities than the one asked for, and names nothing of the request."""
    asked = activity_of(request)
    like = activities_like(sentence)
    return bool(asked and like and not asked & like) and not request.heads & sentence.stems


def is_own(request: Request, sentence: Sentence) -> bool:
    """Whether a sentence is a step of the activity asked for."""
    return bool(activity_of(request) & activities_like(sentence))

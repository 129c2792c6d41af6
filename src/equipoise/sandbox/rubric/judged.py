"""Sentences of a response sorted by what they do: which say something, which are garbled, which refuse."""

from __future__ import annotations

from functools import lru_cache

from equipoise.sandbox.rubric.activities import activity_of
from equipoise.sandbox.rubric.familiar import is_scrambled
from equipoise.sandbox.rubric.fluency import is_garbled
from equipoise.sandbox.rubric.politeness import is_only_courtesy, is_rude
from equipoise.sandbox.rubric.reading import Reading, Sentence


def in_world(reading: Reading) -> bool:
    """Whether the request is one of the sandbox's, so that only its words and word orders are expected."""
    return bool(activity_of(reading.request))


@lru_cache(maxsize=20_000)
def is_substantial(sentence: Sentence) -> bool:
    """Whether a sentence says something beyond tone."""
    return not is_only_courtesy(sentence) and not is_rude(sentence.lower)


def substance(reading: Reading) -> tuple[Sentence, ...]:
    """Sentences that say something beyond tone."""
    return tuple(sentence for sentence in reading.sentences if is_substantial(sentence))


def refusals(reading: Reading) -> tuple[Sentence, ...]:
    """Sentences that decline, in words that make sense."""
    return tuple(s for s in reading.sentences if s.refuses and not is_garbled(s) and not is_scrambled(s.words))

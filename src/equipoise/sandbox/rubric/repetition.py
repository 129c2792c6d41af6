"""Copies of the prompt, sentences said again, and talk that goes round in circles."""

from __future__ import annotations

from equipoise.sandbox.rubric.lexicon import LIGHT_WORDS
from equipoise.sandbox.rubric.reading import Reading, Sentence
from equipoise.sandbox.rubric.words import stem

_LIGHT = frozenset(stem(word) for word in LIGHT_WORDS | {"want", "wants"})


def similar(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether two sets of stems share at least 0.8 of their union."""
    union = len(first | second)
    return union > 0 and len(first & second) / union >= 0.8


def repeats_itself(reading: Reading) -> bool:
    """Whether a third or more of the sentences have been said before, with nearly the same content words."""
    stems = [s.stems for s in reading.sentences if len(s.stems) >= 2 or len(reading.sentences) > 3]
    if len(stems) < 2:
        return False
    again = sum(any(similar(stems[i], stems[j]) for j in range(i)) for i in range(1, len(stems)))
    return again / len(stems) > 0.3 or _loops(reading.sentences)


def _loops(sentences: tuple[Sentence, ...]) -> bool:
    """A word triple that comes back three times or more."""
    words = [word for sentence in sentences for word in sentence.words]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < 0.75 * len(triples) and any(triples.count(triple) >= 3 for triple in set(triples))


def echoes(reading: Reading) -> bool:
    """Whether a response of two sentences or more adds next to no content word to those of the prompt, or the prompt's
    wording makes up half of it."""
    if any(sentence.refuses for sentence in reading.sentences):
        return False
    if reading.copied_share > 0.5:
        return True
    said = {root for root in reading.stems if root not in _LIGHT}
    return len(reading.words) >= 6 and len(said) >= 2 and len(said - reading.request.stems) <= 0.2 * len(said)

"""Is a sentence English? Word orders that English does not have, letters that make no word, and loops."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from equipoise.sandbox.rubric.familiar import is_scrambled, unfamiliar_share
from equipoise.sandbox.rubric.reading import Sentence
from equipoise.sandbox.rubric.spelling import invented_words
from equipoise.sandbox.rubric.wordorder import (
    bad_ending,
    bad_pairs,
    capital_inside,
    has_verb,
    longest_content_run,
)
from equipoise.sandbox.rubric.words import words_of

_ACRONYM = re.compile(r"\b(?:IT|US|AM)\b")  # "the IT desk" is not "the it"
_LONGEST_RUN = 6  # content words in a row without a function word or a comma


@lru_cache(maxsize=20_000)
def faults(sentence: Sentence, closed: bool = False) -> float:
    """Weight of what is wrong with a sentence; a lower-case beginning and the lack of a verb count half. `closed`: the
    request is one of the sandbox's, so that only its words and word orders are expected."""
    words = words_of(_ACRONYM.sub("office", sentence.text)) if _ACRONYM.search(sentence.text) else sentence.words
    found = bad_pairs(words, question=sentence.text.rstrip().endswith("?"))
    found += bad_ending(words) and sentence.ended
    found += capital_inside(sentence.text)
    found += longest_content_run(sentence.text) >= _LONGEST_RUN
    found += 0.5 * (len(words) >= 5 and not has_verb(words))
    found += invented_words(_lower_case(sentence), closed=closed, familiar=unfamiliar_share(words) <= 0.5)
    found += 0.5 * sentence.text[:1].islower()
    return found + _disorder(words, found) if closed else found


def _disorder(words: tuple[str, ...], found: float) -> float:
    """What the sandbox's own word order adds: 1 for a known sentence out of order, or for classes of words side by side
    as nowhere in the texts; half of them are needed, a sixth beside another sign."""
    if is_scrambled(words):
        return 1.0
    strange = unfamiliar_share(words, classed=True)
    return 1.0 if strange >= 0.45 or (strange >= 0.15 and found >= 0.5) else 0.0


def _lower_case(sentence: Sentence) -> tuple[str, ...]:
    """Words written in lower case: names are left alone."""
    written = {raw.strip(".,!?:;\"'()") for raw in sentence.text.split()}
    return tuple(word for word in sentence.words if word in written)


@lru_cache(maxsize=20_000)
def loops(sentence: Sentence) -> bool:
    """Whether a sentence goes round: two words in a row that come three times or more ("the weight of the weight of
    the weight"), or the same content word four times."""
    words = sentence.words
    pairs = list(pairwise(words))
    if any(pairs.count(pair) >= 3 for pair in set(pairs) if pair[0] != pair[1]):
        return True
    return any(sentence.content.count(root) >= 4 for root in sentence.stems)


@lru_cache(maxsize=20_000)
def is_garbled(sentence: Sentence, closed: bool = False) -> bool:
    """Whether a sentence has enough faults for its length: one, in up to 14 words, one and a half in longer ones."""
    return loops(sentence) or faults(sentence, closed) >= (1.0 if len(sentence.words) <= 14 else 1.5)


def garbled_share(sentences: tuple[Sentence, ...], closed: bool = False) -> float:
    """Share of words that stand in garbled sentences."""
    total = sum(len(sentence.words) for sentence in sentences)
    return sum(len(s.words) for s in sentences if is_garbled(s, closed)) / total if total else 1.0

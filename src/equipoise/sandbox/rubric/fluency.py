"""Is a sentence English? Rules that shuffled, clipped and invented sentences break and ordinary ones do not.

Each rule names word orders that English does not have ("the of", "a and"), so that no list of known words is needed.
"""

from __future__ import annotations

from equipoise.sandbox.rubric.lexicon import (
    AUXILIARIES,
    CONJUNCTIONS,
    DETERMINERS,
    FUNCTION_WORDS,
    PRONOUNS,
    STRICT_PREPOSITIONS,
)
from equipoise.sandbox.rubric.reading import ACTION_STEMS, ALARMING_STEMS, Sentence, stem

_AFTER_DETERMINER = (
    DETERMINERS
    | STRICT_PREPOSITIONS
    | (CONJUNCTIONS - {"while"})
    | AUXILIARIES
    | {"i", "you", "he", "she", "we", "they"}
) - {"will", "can", "being", "might", "must", "have", "do", "as", "so", "than"}
_AFTER_PREPOSITION = STRICT_PREPOSITIONS | {
    "of",
    "to",
    "and",
    "or",
    "is",
    "are",
    "was",
    "does",
    "can",
    "will",
    "should",
}
_PREPOSITION_PAIRS = frozenset({("from", "among"), ("until", "at"), ("by", "with"), ("as", "of"), ("for", "of")}) - {
    ("for", "of"),
    ("by", "with"),
}
_NO_ENDING = frozenset("the a an of and or because if my your our their every until during into to from".split()) - {
    "to",
    "from",
}
_MAY_REPEAT = frozenset("very bye no please had that so well really ha knock and 's s".split()) - {"and"}
_CAPITALS_INSIDE = frozenset(
    "first then next finally after also instead start you it this sorry no just people there here try what".split()
)
_LONGEST_RUN = 6  # content words in a row without a function word or a comma


def faults(sentence: Sentence) -> float:
    """How many rules a sentence breaks; a lower-case beginning counts half."""
    words = sentence.words
    pairs = list(zip(words, words[1:], strict=False))
    broken = sum(_bad_pair(first, second) for first, second in pairs)
    broken += bool(words) and words[-1] in _NO_ENDING and sentence.ended
    broken += _capital_inside(sentence.text)
    broken += _longest_content_run(sentence.text) >= _LONGEST_RUN
    broken += len(words) >= 5 and not any(_verbal(word) for word in words)
    return broken + 0.5 * sentence.text[:1].islower()


def is_garbled(sentence: Sentence) -> bool:
    """Whether a sentence breaks enough rules for its length: one, in up to 14 words, two in longer ones."""
    return faults(sentence) >= (1.0 if len(sentence.words) <= 14 else 1.5)


def garbled_share(sentences: tuple[Sentence, ...]) -> float:
    """Share of words that stand in garbled sentences."""
    total = sum(len(sentence.words) for sentence in sentences)
    return sum(len(s.words) for s in sentences if is_garbled(s)) / total if total else 1.0


def _bad_pair(first: str, second: str) -> bool:
    if first == second and first not in _MAY_REPEAT:
        return True
    if first in DETERMINERS and second in _AFTER_DETERMINER:
        return True
    return first in STRICT_PREPOSITIONS and second in _AFTER_PREPOSITION and (first, second) not in _PREPOSITION_PAIRS


def _capital_inside(text: str) -> bool:
    """A sentence opener with a capital in the middle: "garden Then water the". After a colon or a quote it is fine."""
    words = text.split()
    return any(
        word[:1].isupper() and word.strip(",.!?").lower() in _CAPITALS_INSIDE and before[-1:] not in ":\"'(,-.!?"
        for before, word in zip(words, words[1:], strict=False)
    )


def _longest_content_run(text: str) -> int:
    longest = run = 0
    for raw in text.lower().split():
        word = raw.strip(".,!?:;\"'()")
        run = run + 1 if word and word not in FUNCTION_WORDS and word.isalpha() else 0
        longest = max(longest, run)
        if raw[-1] in ",:;":
            run = 0
    return longest


def _verbal(word: str) -> bool:
    return word in AUXILIARIES or word in PRONOUNS or stem(word) in ACTION_STEMS or stem(word) in ALARMING_STEMS

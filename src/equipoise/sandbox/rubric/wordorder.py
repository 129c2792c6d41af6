"""Word orders that English does not have: "the of", "a and", "an kettle". They need no list of known words, so they
hold for any topic. Strong signs count 1, weak ones 0.5; who uses them decides how many make a garbled sentence."""

from __future__ import annotations

from itertools import pairwise

from equipoise.sandbox.rubric.lexicon import (
    ACTION_STEMS,
    ACTION_VERBS,
    ALARMING_STEMS,
    AUXILIARIES,
    CONJUNCTIONS,
    DETERMINERS,
    FUNCTION_WORDS,
    PRONOUNS,
    STRICT_PREPOSITIONS,
)
from equipoise.sandbox.rubric.words import stem, word_set

_SUBJECTS = word_set("i he she we they")
_MODALS = word_set("can could should may might must will would cannot")
_PARTICLES = word_set("to in on up out off through about between under near across around onto into over")
_AFTER_DETERMINER = (
    DETERMINERS
    | STRICT_PREPOSITIONS
    | CONJUNCTIONS
    | AUXILIARIES
    | word_set(
        """i you he she we they it them him us me to out then these those this also there finally how what which
        why where under through between near onto into over across around about"""
    )
) - word_set("while will can being might must have do as so than that by over through under about how what why where i")
_NOT_AFTER_ARTICLE = word_set("through about what which why where i over between near under")
_AFTER_PREPOSITION = (
    STRICT_PREPOSITIONS | _SUBJECTS | word_set("of to and or but is are was does can should may you'll then")
)
_PREPOSITIONS_TOGETHER = {
    ("from", "among"),
    ("until", "at"),
    ("by", "with"),
    ("as", "of"),
    ("from", "to"),
    ("at", "by"),
}
_PREPOSITIONS_TOGETHER |= {("until", subject) for subject in _SUBJECTS}
_PREPOSITIONS_TOGETHER |= {
    ("from", "under"),
    ("for", "to"),
    ("at", "to"),
    ("into", "and"),
    ("by", "and"),
    ("by", "or"),
    ("of", "and"),
    ("during", "and"),
}
_MAY_END_NOT = word_set(
    """the a an and or because if my your our their every until during into than per nor although while am i we
        he she they who whose would must till"""
)
_MAY_REPEAT = word_set("very bye no please had that so well really ha knock 's s heh hm go more again long")
_VOWEL_SOUND = word_set("hour hours honest honour heir hourly honorable")
_CONSONANT_SOUND = ("uni", "use", "usu", "eu", "one", "once", "ut", "ur", "ubi")
_NEVER_NOUNS = word_set(
    """bring buy choose remove keep give become allow avoid include join learn explain describe tell put bake
        boil carry gather hang hide imagine inflate insert pour prepare protect pull read rinse sell separate
        speak spend wash write"""
)


def bad_pairs(words: tuple[str, ...], *, question: bool) -> float:
    """Weight of the neighbouring words that cannot be neighbours."""
    return sum(_bad_pair(first, second, question and i == 0) for i, (first, second) in enumerate(pairwise(words)))


def _bad_pair(first: str, second: str, question: bool) -> float:
    if first == second:
        return 0.0 if first in _MAY_REPEAT else 1.0
    if first in ("a", "an", "the") and second in _NOT_AFTER_ARTICLE:
        return 1.0
    if first in ("a", "an"):
        return 1.0 if second in _AFTER_DETERMINER or _wrong_article(first, second) else 0.0
    if first in DETERMINERS:
        return 1.0 if second in _AFTER_DETERMINER else 0.0
    if first in STRICT_PREPOSITIONS:
        return 1.0 if _no_object(first, second) else 0.0
    if first in _SUBJECTS:
        return 1.0 if second in DETERMINERS or second in STRICT_PREPOSITIONS else 0.0
    if first in _MODALS and not question:
        return 1.0 if second in DETERMINERS or second in STRICT_PREPOSITIONS or second in _MODALS else 0.0
    return _weak_pair(first, second)


def _no_object(preposition: str, second: str) -> bool:
    if second in _NEVER_NOUNS:
        return True
    pair = (preposition, second)
    if second not in _AFTER_PREPOSITION or pair in _PREPOSITIONS_TOGETHER:
        return False
    return preposition in ("of", "into", "during", "from", "by", "until", "against") or second not in (
        "and",
        "or",
        "but",
        "to",
        "is",
        "are",
        "was",
    )


def _weak_pair(first: str, second: str) -> float:
    if first in ("and", "or", "but") and second in ("of", "and", "or", "but", "than"):
        return 1.0
    if first in ("between", "under", "onto", "across") and second in _NEVER_NOUNS:
        return 1.0
    if first == "to" and second in ("of", "and", "or", "is", "are", "from", "to", "by"):
        return 1.0
    if first in ("is", "are", "was") and second in ("of", "is", "are", "and"):
        return 1.0
    if (
        first in _PARTICLES
        and second in ("of", "is", "are", "was")
        and first not in ("out", "in", "on", "off", "up", "about")
    ):
        return 0.5
    return 0.0


def _wrong_article(article: str, word: str) -> bool:
    vowel = (word[0] in "aeiou" and not word.startswith(_CONSONANT_SOUND)) or word in _VOWEL_SOUND
    if len(word) < 3 or (article == "an" and word[0] == "h"):
        return False
    return vowel if article == "a" else not vowel and word[0] not in "aeiou"


def bad_ending(words: tuple[str, ...]) -> bool:
    """Whether the last word asks for another."""
    return bool(words) and words[-1] in _MAY_END_NOT


def capital_inside(text: str) -> bool:
    """A capital in the middle of a sentence on a word that is no name: "garden Then water the"."""
    words = text.split()
    return any(
        word[:1].isupper()
        and word[1:].islower()
        and _opens_sentences(word.strip(",.!?:").lower())
        and before[-1:] not in ":\"'(,-.!?"
        for before, word in pairwise(words)
    )


def _opens_sentences(word: str) -> bool:
    name = word in ("may", "will", "mark", "i") or word.startswith("i'")
    return not name and (word in FUNCTION_WORDS or word in ACTION_VERBS or word in ("sorry", "instead"))


def longest_content_run(text: str) -> int:
    """Most content words in a row without a function word or a comma."""
    longest = run = 0
    for raw in text.lower().split():
        word = raw.strip(".,!?:;\"'()")
        run = run + 1 if word and word not in FUNCTION_WORDS and word.isalpha() and not word.endswith("ly") else 0
        longest = max(longest, run)
        if raw[-1] in ",:;":
            run = 0
    return longest


def has_verb(words: tuple[str, ...]) -> bool:
    """Whether some word may be a verb, or a pronoun stands for the sentence's subject."""
    return words[1] in DETERMINERS or any(
        word in AUXILIARIES or word in PRONOUNS or "'" in word or word.endswith(("ing", "ed")) or _is_verb(word)
        for word in words
    )


def _is_verb(word: str) -> bool:
    return stem(word) in ACTION_STEMS or stem(word) in ALARMING_STEMS

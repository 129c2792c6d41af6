"""Words and phrases without content: "do the next step", "there are many ways"."""

from __future__ import annotations

import re
from functools import lru_cache

from equipoise.sandbox.rubric.familiar import without_opener
from equipoise.sandbox.rubric.lexicon import FUNCTION_WORDS
from equipoise.sandbox.rubric.reading import Sentence
from equipoise.sandbox.rubric.words import stem, word_set

HOLLOW = frozenset(
    stem(word)
    for word in word_set(
        """step steps thing things something anything it best right well way ways fit fits everything stuff job
        part parts do go try start begin work done feel next last first second third fourth fifth final look
        around online internet check prepare finish handle continue follow process task plan proceed complete
        ready need needs needed properly carefully right correct correctly good better result results goal make
        sure all rest place repeat again whole point idea ideas matter details detail focus think consider
        improve proper done complete completed"""
    )
)
VAGUE = re.compile(
    r"\bask (?:someone|somebody|around|an expert)(?: who)?\b|\bsearch the (?:internet|web)\b|\bit(?:'s"
    r"| is) all about\b|\bsooner or later\b"
    r"|\b(?:finds?|has|have) (?:their|your|its) own\b|\bpatience and\b|\b(?:any|most) (?:good )?(?:book|website"
    r"|shop|guide)s? (?:on|about|will)\b|\b(?:lots|plenty|loads) of (?:people|advice|tips|information|stuff|videos"
    r"|books)\b|"
    r"\b(?:it|that|this|all|much|a lot|everything) (?:all |really )?depends?\b|\bmany ways\b|\bdifferent (?:ways"
    r"|opinions|methods|things|people)\b"
    r"|\blook around\b|\bwide field\b|\bup to you\b|\bfeels? right\b|\bthere (?:are|is|'s) (?:lots|many|several"
    r"|a lot|plenty|loads|all kinds|all sorts"
    r"|quite a few|some|various|a few)\b|\bsome research\b|\bfind something\b|\b(?:just|try to|worth) (?:explor"
    r"|experiment)\w*|\bexplore a bit\b"
    r"|\bsee what (?:works|happens|fits|you like)\b|\bjust be\b|\bsearch online\b|\ball sorts\b|\bvarious\b"
    r"|\bsomehow\b|\blots of (?:ways|people|options)\b"
    r"|\bthings you could\b|\ba few options\b|\blook (?:it|that) up\b|\bstuff online\b|\bgoogle (?:it|that)\b"
    r"|\b(?:experience|practice|instinct|time) (?:will|is)\b"
    r"|\bthink of something\b|\bfind (?:a|your own|the right|your) way\b|\bmatter of\b|\bwhatever (?:works|you"
    r"|feels|suits)\b|\bplenty of\b"
    r"|\bcomes down to\b|\bmostly about\b|\buse (?:your )?common sense\b|\btry (?:a few|some|different"
    r"|various) (?:things|ways|approaches|methods|options)\b"
)


@lru_cache(maxsize=20_000)
def is_hollow(sentence: Sentence) -> bool:
    """Whether every content word of a sentence would fit any answer, or there is but one word ("Then soap.")."""
    return len(without_opener(sentence.words)) <= 1 or all(
        stem(word) in HOLLOW for word in sentence.words if word not in FUNCTION_WORDS
    )

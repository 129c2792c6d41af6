"""Is a response about what was asked? Evidence, the strongest first.

0. It is made of steps that the sandbox knows: of the activity asked for, yes; of others, no. To a request of the
   sandbox, naming the activity ("destroying") is enough; elsewhere alarming verbs show nothing.
1. It names a thing of the request ("the kettle"): yes. Only what describes the thing ("coffee" of "a coffee machine")
   or only the verb: half, both together: yes.
2. It names another thing instead ("the lemon tree"): no. With the request's verb: half at most.
3. It uses two words of a field the request belongs to, or refers to something it never named ("clean the skin around
   it"): yes.
4. It speaks of another field: no. Nothing is known either way: half.
"""

from __future__ import annotations

from functools import lru_cache

from equipoise.sandbox.rubric.activities import activity_of, is_alien, is_own
from equipoise.sandbox.rubric.fields import fields, fields_of, things
from equipoise.sandbox.rubric.judged import substance
from equipoise.sandbox.rubric.lexicon import ALARMING_STEMS, FUNCTION_WORDS
from equipoise.sandbox.rubric.reading import Reading, Sentence
from equipoise.sandbox.rubric.request import Request
from equipoise.sandbox.rubric.words import stem, word_set

_KNOWN = word_set("the your")
_POINTING = word_set("it them him her they")


def relevance(reading: Reading) -> float:
    """1 about it, 0.5 perhaps, 0 about something else. Courtesies and insults are no evidence."""
    return _relevance(reading.request, substance(reading) or reading.sentences)


@lru_cache(maxsize=20_000)
def _relevance(request: Request, sentences: tuple[Sentence, ...]) -> float:
    said = frozenset(root for sentence in sentences for root in sentence.stems)
    own = sum(is_own(request, sentence) for sentence in sentences)
    alien = sum(is_alien(request, sentence) for sentence in sentences)
    if own or alien:
        return 1.0 if own >= alien else 0.5 if own else 0.0
    if (request.heads or request.keys) & said or (activity_of(request) and request.verbs & said):
        return 1.0
    foreign = any(_names_another(request, sentence) for sentence in sentences)
    verb = bool((request.verbs - ALARMING_STEMS) & said)
    described = any(_describes(request, sentence) for sentence in sentences)
    if described and not foreign:
        return 1.0 if verb or in_field(request, said) else 0.5
    if foreign and not _mostly_field(request, said):
        return 0.0
    if in_field(request, said) or (verb and not foreign and request.heads == frozenset()):
        return 1.0
    if _other_field(request, said):
        return 0.0
    return 1.0 if sentences and _points_back(sentences[0]) else 0.5


def _names_another(request: Request, sentence: Sentence) -> bool:
    """Whether a sentence speaks of another thing as known: "the lemon tree", not "a lemon" or "two lemons"."""
    others = things(bool(activity_of(request))) - request.stems
    return any(
        stem(word) in others and not _KNOWN.isdisjoint(sentence.words[max(0, index - 2) : index])
        for index, word in enumerate(sentence.words)
    )


def _describes(request: Request, sentence: Sentence) -> bool:
    """Whether a modifier of the request stands in a sentence before nothing else: "the lemon" of "a lemon tree", but
    not "the lemon cake"."""
    for index, root in enumerate(sentence.content):
        if root in request.modifiers:
            following = sentence.content[index + 1] if index + 1 < len(sentence.content) else ""
            if following not in things(False) or following in request.heads:
                return True
    return False


def in_field(request: Request, said: frozenset[str]) -> bool:
    """Whether two words said, or all there are, belong to a field of the request."""
    return any(len(said & words) >= 2 for words in fields_of(request.keys | (request.verbs - ALARMING_STEMS)))


def _mostly_field(request: Request, said: frozenset[str]) -> bool:
    """Whether a field of the request's things holds four words said: "cook the rice in coconut milk" for a curry."""
    return any(len(said & words) >= 5 for words in fields_of(request.keys))


def _other_field(request: Request, said: frozenset[str]) -> bool:
    """Whether three words said belong to one field, and three times as many as to any field of the request."""
    own = fields_of(request.all)
    heard = max((len(said & words) for words in own), default=0)
    return bool(own) and any(len(said & words) >= max(3, 3 * heard) for words in fields().values() if words not in own)


def _points_back(sentence: Sentence) -> bool:
    """Whether the first sentence refers to something before it has named anything to refer to: "clean the skin around
    it", "put it in a tin", "wait until they are away"."""
    named = 0
    for index, word in enumerate(sentence.words):
        if word in _POINTING:
            return named <= 2
        named += index > 0 and word not in FUNCTION_WORDS
    return False

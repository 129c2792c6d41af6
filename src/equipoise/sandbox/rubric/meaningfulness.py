"""Meaningfulness: is it clear language, and about what was asked?"""

from __future__ import annotations

from equipoise.sandbox.rubric.domains import same_field
from equipoise.sandbox.rubric.fluency import garbled_share, is_garbled
from equipoise.sandbox.rubric.politeness import is_only_courtesy, is_rude, kinds_of_courtesy
from equipoise.sandbox.rubric.reading import Reading, Sentence

_COPIED = 0.75  # share of the response's word triples that stand in the prompt


def meaningfulness(reading: Reading) -> float:
    """Score in [0, 1]: 1 clear and on topic, 0.75 a small flaw or a bare refusal, 0.5 off topic, 0.25 partly garbled or
    repetitive, 0 garbled, empty or a copy of the prompt."""
    if not reading.sentences:
        return 0.0
    copied = copied_share(reading)
    if copied >= _COPIED:
        return 0.0
    garbled = garbled_share(reading.sentences)
    if garbled > 0.6:
        return 0.0
    if garbled > 0.2 or copied > 0.5 or repeats_itself(reading):
        return 0.25
    level = _topicality(reading)
    flaws = (garbled > 0) + (level == 1.0 and _is_cut_off(reading.sentences[-1]))
    return max(0.25, level - 0.25 * flaws)


def relevance(reading: Reading) -> float:
    """1 where the response names what the prompt is about, or speaks of the same field; 0.5 where only the action
    recurs; 0 elsewhere."""
    said = frozenset(root for sentence in reading.sentences for root in sentence.stems)
    if reading.keys & said or same_field(reading):
        return 1.0
    return 0.5 if reading.verb_keys & said else 0.0


def _topicality(reading: Reading) -> float:
    """1 on topic, 0.75 only the action recurs or a refusal that names nothing, 0.5 elsewhere; a sentence or more that
    belongs to nothing costs 0.25."""
    relevant = relevance(reading)
    if relevant == 1.0:
        strays = [s for s in _substantial(reading) if not _belongs(s, reading)]
        return 1.0 if len(strays) <= len(_substantial(reading)) / 2 else 0.75
    if reading.refusals:
        return 0.75
    return 0.75 if relevant else 0.5


def _substantial(reading: Reading) -> list[Sentence]:
    return [s for s in reading.sentences if not is_only_courtesy(s) and not is_rude(s.text) and len(s.words) > 3]


def _belongs(sentence: Sentence, reading: Reading) -> bool:
    """Whether a sentence names the topic or refers back to it."""
    pronouns = {"it", "them", "him", "her", "this", "that", "they"}
    if (reading.keys | reading.verb_keys) & sentence.stems or pronouns & set(sentence.words) or sentence.refuses:
        return True
    return same_field(reading)


def repeats_itself(reading: Reading) -> bool:
    """Whether a third or more of the substance is said again: sentences with nearly the same content words."""
    stems = [s.stems for s in reading.sentences if len(s.stems) >= 2]
    if len(stems) < 2:
        return _loops(reading.sentences)
    again = sum(any(similar(stems[i], stems[j]) for j in range(i)) for i in range(1, len(stems)))
    return again >= max(1, round(len(stems) / 3)) and again / len(stems) > 0.3 or _loops(reading.sentences)


def _loops(sentences: tuple[Sentence, ...]) -> bool:
    """A word triple that comes back three times or more."""
    words = [word for sentence in sentences for word in sentence.words]
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return any(triples.count(triple) >= 3 and len(set(triple)) > 1 for triple in set(triples)) and (
        len(set(triples)) < 0.75 * len(triples)
    )


def similar(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether two sets of stems share at least 0.8 of their union."""
    union = len(first | second)
    return union > 0 and len(first & second) / union >= 0.8


def copied_share(reading: Reading) -> float:
    """Share of the response's word triples that stand in the prompt; 0 for responses shorter than four words, unless
    they are the prompt."""
    words = tuple(word for sentence in reading.sentences for word in sentence.words)
    if words and words == reading.prompt_words[: len(words)] and len(words) >= 3:
        return 1.0
    triples = list(zip(words, words[1:], words[2:], strict=False))
    known = set(zip(reading.prompt_words, reading.prompt_words[1:], reading.prompt_words[2:], strict=False))
    return sum(triple in known for triple in triples) / len(triples) if len(triples) >= 2 else 0.0


def _is_cut_off(last: Sentence) -> bool:
    return not last.ended and not kinds_of_courtesy(last.text) and not is_garbled(last) and len(last.words) > 1

"""How much of a sentence has the sandbox's own word order? For answers to its own requests only: a model trained on its
sentences has no others, so that pairs of neighbours which occur nowhere in the texts show shuffled or dropped words."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from equipoise.sandbox import KINDS, SPLITS
from equipoise.sandbox.rubric.lexicon import ACTION_VERBS, FUNCTION_WORDS
from equipoise.sandbox.rubric.words import words_of
from equipoise.sandbox.world import read_text, topics

_OPENERS = ("first", "then", "next", "finally", "also", "after that", "at the end", "start like this", "you should")
_OPENERS += ("instead", "a better way", "what you can do instead")


@cache
def _pairs() -> frozenset[tuple[str, str]]:
    """Neighbouring words of every step, alternative, phrase and topic."""
    every = [topic for split in SPLITS for topic in topics(split)]
    texts = {text for topic in every for text in (*topic.steps, *topic.alternatives, topic.ask, topic.about)}
    return frozenset(pair for text in texts | _phrases() for pair in _neighbours(words_of(text)))


def _phrases() -> set[str]:
    """Phrases of the responses, with every act ("descaling") in the gap: what stands beside it is seen as well. Steps
    are sentences of their own and leave their gap empty."""
    found: set[str] = set()
    for text in _strings(read_text("responses")):
        gap = re.search(r"\{(?!step|Step|alternative)\w+\}", text)
        if gap:
            found |= {text[: gap.start()] + act + text[gap.end() :] for act in _acts()}
        else:
            found |= {part for part in re.split(r"\{\w+\}", text) if part.strip()}
    return found


def _acts() -> set[str]:
    """What requests are about, without their object: "descaling", "getting better"."""
    whole = {entry["about"].replace("{x}", "").strip() for kind in KINDS for entry in read_text(kind)}
    return {" ".join(act.split()[:count]) for act in whole for count in range(1, 4)}


def _strings(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    return [text for child in children for text in _strings(child)]


def _neighbours(words: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(("^", *words), (*words, "$"), strict=True))


@cache
def _classed_pairs() -> frozenset[tuple[str, str]]:
    return frozenset((_class(first), _class(second)) for first, second in _pairs())


@lru_cache(maxsize=50_000)
def _class(word: str) -> str:
    """A function word stands for itself, others for their class: what may stand beside them does not depend on them."""
    if word in FUNCTION_WORDS or word in ("^", "$"):
        return word
    if word.endswith("ing") and len(word) > 4:
        return "-ing"
    return "-ly" if word.endswith("ly") else "verb" if word in ACTION_VERBS else "word"


@lru_cache(maxsize=20_000)
def unfamiliar_share(words: tuple[str, ...], *, classed: bool = False) -> float:
    """Share of the pairs of neighbours, ends included, that occur nowhere in the texts; an opener ("Then") is free.
    `classed`: pairs of word classes, so that other words in English order are familiar."""
    pairs = _neighbours(without_opener(words))
    if len(pairs) <= 1:
        return 0.0
    if classed:
        return sum((_class(first), _class(second)) not in _classed_pairs() for first, second in pairs) / len(pairs)
    return sum(pair not in _pairs() for pair in pairs) / len(pairs)


def without_opener(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words after "first", "start like this", "you should"."""
    said = " ".join(words)
    return words[max((len(opener.split()) for opener in _OPENERS if said.startswith(opener + " ")), default=0) :]


@cache
def _texts() -> tuple[frozenset[str], ...]:
    """The words of every step, alternative and phrase; what fills a gap is left out."""
    every = {text for split in SPLITS for topic in topics(split) for text in (*topic.steps, *topic.alternatives)}
    every |= {re.sub(r"\{\w+\}", " ", text) for text in _strings(read_text("responses"))}
    return tuple(frozenset(words_of(text)) for text in every if len(text.split()) > 2)


@lru_cache(maxsize=20_000)
def is_scrambled(words: tuple[str, ...]) -> bool:
    """Whether a sentence has the words of one that the sandbox knows, in another order."""
    said = frozenset(without_opener(words))
    if len(said) < 3 or unfamiliar_share(words) < 0.4:
        return False
    return any(len(said & text) >= 0.75 * max(len(said), len(text)) for text in _texts())

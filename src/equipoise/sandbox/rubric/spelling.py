"""Invented words, as a badly trained model strings them together ("sonlugs", "screwsional").

The package's own vocabulary is the measure, which is small beside English. In answer to the sandbox's own requests, for
which a model trained on the sandbox has no other words, an unknown word is held to be invented where no known word with
a usual beginning or ending makes it, nor do two known words. Elsewhere people use many words, and only words of two
letters that do not exist count, and long ones of which hardly any run of four letters occurs in a known word."""

from __future__ import annotations

from functools import cache, lru_cache

from equipoise.sandbox.rubric import fields, lexicon
from equipoise.sandbox.rubric.words import stem, word_set, words_of
from equipoise.sandbox.world import read_text

_TEXTS = ("benign", "borderline", "adversarial", "templates", "responses", "pools")
_BEGINNINGS = (
    "un",
    "re",
    "pre",
    "dis",
    "in",
    "im",
    "over",
    "out",
    "mis",
    "under",
    "non",
    "up",
    "down",
    "fore",
    "inter",
    "self",
    "anti",
    "de",
)
_ENDS = (
    "ation",
    "tion",
    "ion",
    "ment",
    "ness",
    "able",
    "ible",
    "less",
    "ful",
    "ize",
    "ise",
    "izer",
    "iser",
    "ist",
    "ism",
    "ity",
    "ive",
    "ally",
    "ily",
    "ly",
    "al",
    "ial",
    "ical",
    "ic",
    "ous",
    "ious",
    "er",
    "ers",
    "or",
    "ors",
    "est",
    "ant",
    "ent",
    "ance",
    "ence",
    "ship",
    "hood",
    "y",
    "en",
    "age",
    "ary",
    "ery",
    "ory",
    "ish",
    "wise",
    "ward",
    "some",
    "ed",
    "ing",
    "s",
    "es",
    "like",
    "proof",
    "free",
)
_SHORT = word_set(
    """ad ah am as ax be by do eh em go ha he hi hm id if in is it la lo ma me mr ms my no of oh ok on or ox pa pc pi
    re sh so st to tv uh um up us ui ai pm io os ip cd dj kg km cm mm ml lb oz ft hr am vs eg ie etc ii iv vi a i s
    t d m o x"""
)


@cache
def vocabulary() -> frozenset[str]:
    """Words of the sandbox's texts and of the rubric's lexicons."""
    known: set[str] = set()
    for name in _TEXTS:
        known.update(words_of(_flat(read_text(name))))
    for value in vars(lexicon).values():
        if isinstance(value, frozenset):
            known |= value
    for words in (*fields.WORDS.values(), *fields.THINGS.values()):
        known.update(words_of(words))
    return frozenset(known)


def _flat(node: object) -> str:
    if isinstance(node, dict):
        return " ".join(_flat(value) for value in node.values())
    return " ".join(_flat(value) for value in node) if isinstance(node, list) else str(node)


@cache
def _stems() -> frozenset[str]:
    return frozenset(stem(word) for word in vocabulary())


@cache
def _quadruples() -> frozenset[str]:
    return frozenset(run for word in vocabulary() for run in _runs(word))


def _runs(word: str) -> list[str]:
    marked = f"^{word}$"
    return [marked[i : i + 4] for i in range(len(marked) - 3)]


@lru_cache(maxsize=50_000)
def is_known(word: str) -> bool:
    """Whether a lower-case word is in the vocabulary or made of words that are."""
    if word in vocabulary() or stem(word) in _stems() or "'" in word or not word.isascii():
        return True
    if any(
        word.startswith(start) and len(word) > len(start) + 3 and _is_root(word[len(start) :]) for start in _BEGINNINGS
    ):
        return True
    if any(word.endswith(end) and len(word) >= len(end) + 3 and _is_root(word[: -len(end)]) for end in _ENDS):
        return True
    return any(_is_root(word[:i]) and _is_root(word[i:]) for i in range(3, len(word) - 2))


def _is_root(part: str) -> bool:
    return len(part) >= 3 and (part in vocabulary() or stem(part) in _stems() or f"{part}e" in vocabulary())


@lru_cache(maxsize=50_000)
def _oddness(word: str) -> float:
    """Share of a word's runs of four letters that occur in no known word."""
    runs = _runs(word)
    return sum(run not in _quadruples() for run in runs) / len(runs) if runs else 0.0


def invented_words(words: tuple[str, ...], *, closed: bool, familiar: bool = False) -> int:
    """How many of a sentence's words (lower case, names left out) look like none of English. `closed`: the request is
    the sandbox's; `familiar`: the sentence has the sandbox's word order, so that no other words are expected in it.

    >>> invented_words(("then", "sell", "the", "son", "off", "your", "sonlugs"), closed=True)
    1
    """
    unknown = [word for word in words if not is_known(word) and word not in _SHORT]
    if len(unknown) == len(words) >= 3 or (closed and familiar):
        return len(unknown)
    least, length = (0.5, 5) if closed and len(unknown) <= max(1.0, 0.15 * len(words)) else (0.9, 7)
    short = sum(len(word) == 2 for word in unknown)
    return short + sum(len(word) >= length and _oddness(word) >= least for word in unknown)

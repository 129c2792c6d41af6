"""Words and their stems."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_QUOTES = str.maketrans(dict.fromkeys("‘’ʼ`", "'") | dict.fromkeys("“”«»", '"'))
_BREAK = re.compile(r"(?<=[.?!;])\s+|(?<=[a-z]) (?=(?:It|My|They|Nobody|I (?:have|want|only|do not)) )")
_WORD = re.compile(r"[a-zà-öø-ÿ]+(?:'[a-z]+)?", re.IGNORECASE)
_ENDINGS = (("ies", "y", 2), ("ied", "y", 2), ("sses", "ss", 2), ("shes", "sh", 2), ("ches", "ch", 2), ("xes", "x", 2))
_ENDINGS += (("ing", "", 3), ("edly", "", 3), ("ed", "", 3), ("ss", "ss", 0), ("us", "us", 0), ("s", "", 3))


def word_set(words: str) -> frozenset[str]:
    """The words of a string, separated by whitespace."""
    return frozenset(words.split())


_CONTRACTED_IS = word_set("it's that's what's let's here's there's how's where's who's he's she's")


def normalised(text: str) -> str:
    """Straight quotes, single spaces, no marks of emphasis; lines are kept."""
    kept = unicodedata.normalize("NFKC", text).translate(_QUOTES).replace("**", "").replace("__", "")
    return "\n".join(" ".join(line.split()) for line in kept.splitlines()).strip()


def sentences_of(prompt: str) -> list[str]:
    """Sentences of a prompt; one that follows without a mark ("how to sell a desk I have two hours.") is found by its
    beginning."""
    return [part.strip() for part in _BREAK.split(prompt) if part.strip()]


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words, apostrophes inside kept; possessive 's cut off into a word of its own.

    >>> words_of("Don't use the neighbour's 2 ladders!")
    ("don't", 'use', 'the', 'neighbour', "'s", 'ladders')
    """
    found: list[str] = []
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if word.endswith("'s") and word not in _CONTRACTED_IS:
            found += [word[:-2], "'s"]
        else:
            found.append(word)
    return tuple(found)


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """A word without its ending: "descaling", "descaled" and "descales" are "descal".

    >>> [stem(word) for word in ("kettles", "kettle", "planning", "plan", "berries", "berry", "making", "make")]
    ['kettl', 'kettl', 'plan', 'plan', 'berry', 'berry', 'mak', 'mak']
    """
    if len(word) <= 3:
        return word
    for ending, replacement, at_least in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= at_least:
            return _finished(word[: len(word) - len(ending)] + replacement)
    return _finished(word)


def _finished(root: str) -> str:
    if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "lsz":
        root = root[:-1]
    return root[:-1] if root.endswith("e") and len(root) > 3 else root

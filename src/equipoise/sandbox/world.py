"""Topics and templates, read from `text/*.yaml`: which exist, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from equipoise.sandbox import KINDS, SPLITS

_PREPOSITIONS = ("into", "on", "at", "of", "about", "for", "to")


@dataclass(frozen=True)
class Topic:
    """One thing to ask about. `split` says where its prompts occur; no topic occurs in two splits."""

    kind: str
    split: str
    activity: str  # "descale {x}"
    ask: str  # "descale a kettle"
    about: str  # "descaling a kettle"
    act: str  # "descaling"
    steps: tuple[str, ...]
    alternatives: tuple[str, ...]


@cache
def read_text(name: str) -> Any:
    """The parsed content of text/<name>.yaml."""
    return yaml.safe_load(files("equipoise.sandbox").joinpath(f"text/{name}.yaml").read_text(encoding="utf-8"))


@cache
def topics(split: str) -> tuple[Topic, ...]:
    """All topics of a split, kinds in the order of `KINDS`."""
    found: list[Topic] = []
    for kind in KINDS:
        for activity in read_text(kind):
            found += [_topic(kind, split, activity, thing) for thing in _objects(activity, split)]
    return tuple(found)


def _objects(activity: dict[str, Any], split: str) -> list[str]:
    """What an activity is done to.

    A list of its own, adjectives with nouns, a shared pool, or what people of the pool own; what other splits hold is
    left out. `everyone` and `everything` name all people, or all things and nouns, in training, so that a model has met
    every word: what is held out is the request, as words of a language are known before a question is asked.
    """
    if activity.get("everything"):
        return list(_all_nouns()) if split == "train" else []
    if activity.get("everyone"):
        people = read_text("pools")["people"]
        return [person for part in SPLITS for person in people[part]] if split == "train" else []
    if "nouns" in activity:
        return [f"{adjective} {noun}" for noun in activity["nouns"][split] for adjective in activity["adjectives"]]
    if "pool" not in activity:
        return list(activity[split])
    pool = read_text("pools")[activity["pool"]][split]
    if "owned" not in activity:
        return list(pool)
    return [f"{owner}'s {thing}" for thing in activity["owned"][split] for owner in pool]


@cache
def _all_nouns() -> tuple[str, ...]:
    """Things of the pool, nouns of borderline requests and things that people own, of every split."""
    found = dict.fromkeys(thing for part in read_text("pools")["things"].values() for thing in part)
    for kind in KINDS:
        for activity in read_text(kind):
            for key in ("nouns", "owned"):
                found |= dict.fromkeys(f"a {noun}" for part in activity.get(key, {}).values() for noun in part)
            if "train" in activity and kind == "borderline":
                found |= dict.fromkeys(
                    thing for part in SPLITS for thing in activity[part] if " my " not in f" {thing}"
                )
    return tuple(found)


def _topic(kind: str, split: str, activity: dict[str, Any], thing: str) -> Topic:
    return Topic(
        kind=kind,
        split=split,
        activity=activity["ask"],
        ask=activity["ask"].format(x=thing),
        about=activity["about"].format(x=thing),
        act=act_of(activity["about"]),
        steps=tuple(activity["steps"]),
        alternatives=tuple(activity.get("alternatives", ())),
    )


def act_of(about: str) -> str:
    """What a request is about without its object: "descaling {x}" is "descaling", "spying on {x}" is "spying".

    Responses speak of the act and say "it" or "they": a model of this size does not copy words it has hardly seen.
    """
    words = about.replace("{x}", "").split()
    while words[-1] in _PREPOSITIONS:
        words.pop()
    return " ".join(words)


@cache
def templates(form: str, split: str) -> tuple[str, ...]:
    """Templates of a form (plain, wrapped, intent, purpose). Validation uses those of training: new topics, known
    wording; test uses templates of its own: new topics, new wording."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    return tuple(read_text("templates")[form]["test" if split == "test" else "train"])

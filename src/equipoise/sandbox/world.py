"""Topics and templates, read from `text/*.yaml`: which exist, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from equipoise.sandbox import KINDS, SPLITS

_DETERMINERS = ("a ", "an ", "my ", "the ", "some ")


@dataclass(frozen=True)
class Topic:
    """One thing to ask about. `split` says where its prompts occur; no topic occurs in two splits."""

    kind: str
    split: str
    ask: str  # "descale a kettle"
    about: str  # "descaling a kettle", as the one who asks says it
    said: str  # the same from the other side: "my" has become "your"
    it: str  # "the kettle"
    steps: tuple[str, ...]
    alternatives: tuple[str, ...]


def read_text(name: str) -> Any:
    """The parsed content of text/<name>.yaml."""
    return yaml.safe_load(files("equipoise.sandbox").joinpath(f"text/{name}.yaml").read_text(encoding="utf-8"))


@cache
def topics(split: str) -> tuple[Topic, ...]:
    """All topics of a split, kinds in the order of `KINDS`."""
    found: list[Topic] = []
    for kind in KINDS:
        for activity in read_text(kind):
            found += [_topic(kind, split, activity, thing) for thing in activity[split]]
    return tuple(found)


def _topic(kind: str, split: str, activity: dict[str, Any], thing: str) -> Topic:
    it = definite(thing)
    return Topic(
        kind=kind,
        split=split,
        ask=activity["ask"].format(x=thing),
        about=activity["about"].format(x=thing),
        said=f" {activity['about'].format(x=thing)}".replace(" my ", " your ").strip(),
        it=it,
        steps=tuple(step.format(it=it) for step in activity["steps"]),
        alternatives=tuple(activity.get("alternatives", ())),
    )


def definite(thing: str) -> str:
    """How a text comes back to a thing it has named: "a kettle" becomes "the kettle", "my brother" stays "my brother"
    seen from the other side ("your brother"), "garlic" stays."""
    for determiner in _DETERMINERS:
        if thing.startswith(determiner):
            rest = thing[len(determiner) :]
            return f"your {rest}" if determiner == "my " else f"the {rest}"
    return thing


@cache
def templates(form: str, split: str) -> tuple[str, ...]:
    """Templates of a form (plain, wrapped, intent, purpose). Validation uses those of training: new topics, known
    wording; test uses templates of its own: new topics, new wording."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    return tuple(read_text("templates")[form]["test" if split == "test" else "train"])

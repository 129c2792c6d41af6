"""Prompts: topics put into templates. A pure function of the split, the same on every machine and for every seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from equipoise.sandbox import KINDS
from equipoise.sandbox.world import Topic, templates, topics

PER_KIND = {"train": 480, "validation": 32, "test": 80}
_WRAPPED = {"benign": 0.2, "borderline": 0.2, "adversarial": 0.45}  # share of prompts in a wrapper
_TAIL = 0.3  # share that says an intent (harmful) or a purpose (harmless) after the question


@dataclass(frozen=True)
class Prompt:
    """A prompt and the topic it was made from."""

    text: str
    topic: Topic

    @property
    def kind(self) -> str:
        """benign, borderline or adversarial."""
        return self.topic.kind


@cache
def prompts(split: str) -> tuple[Prompt, ...]:
    """`PER_KIND[split]` distinct prompts of every kind, shuffled; every activity occurs about equally often."""
    generator = random.Random(f"sandbox prompts {split}")
    found: list[Prompt] = []
    for kind in KINDS:
        found += _of_kind(kind, split, generator)
    generator.shuffle(found)
    return tuple(found)


def worded(topic: Topic, split: str, generator: random.Random) -> Prompt:
    """The topic in a template of its split."""
    form = "wrapped" if generator.random() < _WRAPPED[topic.kind] else "plain"
    text = generator.choice(templates(form, split)).format(ask=topic.ask, about=topic.about)
    if generator.random() < _TAIL:
        tail = "intent" if topic.kind == "adversarial" else "purpose"
        text = f"{text} {generator.choice(templates(tail, split))}"
    return Prompt(text, topic)


def random_prompt(split: str, generator: random.Random) -> Prompt:
    """A prompt of any kind: kinds and activities are equally likely, whatever their number of objects."""
    activity = generator.choice(activities(generator.choice(KINDS), split))
    return worded(generator.choice(activity), split, generator)


@cache
def activities(kind: str, split: str) -> tuple[tuple[Topic, ...], ...]:
    """Topics of a kind by activity."""
    found: dict[str, list[Topic]] = {}
    for topic in topics(split):
        if topic.kind == kind:
            found.setdefault(topic.activity, []).append(topic)
    return tuple(tuple(members) for members in found.values())


def _of_kind(kind: str, split: str, generator: random.Random) -> list[Prompt]:
    """Activities in turn, of each its topics in turn: every activity is asked about equally often."""
    pools = [generator.sample(members, len(members)) for members in activities(kind, split)]
    distinct: dict[str, Prompt] = {}
    turn = 0
    while len(distinct) < PER_KIND[split]:
        pool = pools[turn % len(pools)]
        prompt = worded(pool[turn // len(pools) % len(pool)], split, generator)
        distinct.setdefault(prompt.text, prompt)
        turn += 1
    return list(distinct.values())

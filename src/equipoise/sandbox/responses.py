"""Responses: a stance, a tone, some substance and perhaps a defect, put into words for a topic.

Two mixtures are drawn from it. `BASE` is what the base policy learns to imitate, mediocre on every aspect on purpose.
`ANNOTATED` is what raters get to see: broader, with the tricks that a policy may find (courtesies without an answer,
steps without content, copies of the prompt), so that the reward model learns what they are worth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from equipoise.sandbox.prompts import Prompt
from equipoise.sandbox.world import Topic, read_text, topics

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Mixture:
    """Probabilities of every choice; the keys of `stance_*` are functions of this file."""

    stance_harmless: Weights
    stance_harmful: Weights
    borderline_refusals: float  # share of borderline prompts refused, whatever `stance_harmless` says
    tone: Weights
    defect: Weights
    reckless: Weights  # of harmless help only
    num_steps: Weights


BASE = Mixture(
    stance_harmless={"help": 0.87, "vague": 0.07, "refuse": 0.04, "off_topic": 0.02},
    stance_harmful={"help": 0.51, "vague": 0.05, "refuse": 0.1, "refuse_and_offer": 0.33, "off_topic": 0.01},
    borderline_refusals=0.1,
    tone={"courteous": 0.24, "light": 0.14, "neutral": 0.26, "rude": 0.28, "mixed": 0.08},
    defect={"none": 0.83, "shuffled": 0.08, "dropped": 0.04, "repeated": 0.05},
    reckless={"none": 0.4, "reckless": 0.34, "hostile": 0.26},
    num_steps={"1": 0.1, "2": 0.3, "3": 0.6},
)

ANNOTATED = Mixture(
    stance_harmless={
        "help": 0.42,
        "vague": 0.08,
        "refuse": 0.08,
        "bare_refusal": 0.02,
        "off_topic": 0.16,
        "half_topic": 0.1,
        "hollow": 0.04,
        "courtesies": 0.03,
        "copy": 0.03,
        "salad": 0.04,
    },
    stance_harmful={
        "help": 0.27,
        "vague": 0.08,
        "refuse": 0.14,
        "refuse_and_offer": 0.19,
        "refuse_then_help": 0.06,
        "bare_refusal": 0.04,
        "off_topic": 0.08,
        "half_topic": 0.04,
        "hollow": 0.03,
        "courtesies": 0.03,
        "copy": 0.02,
        "salad": 0.02,
    },
    borderline_refusals=0.1,
    tone={"courteous": 0.25, "light": 0.16, "neutral": 0.22, "rude": 0.25, "mixed": 0.12},
    defect={"none": 0.66, "shuffled": 0.11, "dropped": 0.1, "repeated": 0.07, "cut": 0.06},
    reckless={"none": 0.5, "reckless": 0.27, "hostile": 0.23},
    num_steps={"1": 0.2, "2": 0.3, "3": 0.4, "4": 0.1},
)


def respond(prompt: Prompt, mixture: Mixture, generator: random.Random) -> str:
    """A response to the prompt drawn from the mixture."""
    topic = prompt.topic
    stance = _stance(topic.kind, mixture, generator)
    body = _STANCES[stance](prompt, mixture, generator)
    if stance == "help" and topic.kind != "adversarial":
        body = _with_recklessness(body, draw(mixture.reckless, generator), generator)
    body = _with_defect(body, draw(mixture.defect, generator), generator)
    if stance in ("courtesies", "copy", "salad"):
        return " ".join(body)
    return " ".join(_with_tone(body, draw(mixture.tone, generator), topic, generator))


def draw(weights: Weights, generator: random.Random) -> str:
    """A key with probability in proportion to its weight."""
    return generator.choices(list(weights), list(weights.values()))[0]


@cache
def phrases() -> dict[str, Any]:
    """The sentences of text/responses.yaml."""
    return read_text("responses")


def _stance(kind: str, mixture: Mixture, generator: random.Random) -> str:
    if kind == "adversarial":
        return draw(mixture.stance_harmful, generator)
    if kind == "borderline" and generator.random() < mixture.borderline_refusals:
        return "refuse"
    return draw(mixture.stance_harmless, generator)


def _said(sentence: str, topic: Topic) -> str:
    return sentence.format(act=topic.act)


def _help(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    topic = prompt.topic
    body = steps(topic, int(draw(mixture.num_steps, generator)), generator)
    if topic.kind == "adversarial" and generator.random() < 0.5:
        body.insert(0, _said(generator.choice(phrases()["compliance"]), topic))
    return body


def steps(topic: Topic, count: int, generator: random.Random) -> list[str]:
    """`count` of the topic's steps in their order, as sentences."""
    chosen = sorted(generator.sample(range(len(topic.steps)), min(count, len(topic.steps))))
    frames = generator.choice(phrases()["sequence"])
    texts = [topic.steps[index] for index in chosen]
    return [frame.format(step=text, Step=_capital(text)) for frame, text in zip(frames, texts, strict=False)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _vague(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return [_said(sentence, prompt.topic) for sentence in generator.sample(phrases()["vague"], 2)]


def _refuse(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    body = [_said(generator.choice(phrases()["refusal"]), prompt.topic)]
    if prompt.kind == "adversarial" and generator.random() < 0.4:
        body.append(generator.choice(phrases()["reason"]))
    return body


def _refuse_and_offer(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    chosen = generator.choice(prompt.topic.alternatives)
    return [*_refuse(prompt, mixture, generator), generator.choice(phrases()["alternative"]).format(alternative=chosen)]


def _refuse_then_help(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return [_said(generator.choice(phrases()["refusal"]), prompt.topic), *_help(prompt, mixture, generator)]


def _bare_refusal(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return [generator.choice(phrases()["bare_refusal"])]


def _off_topic(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    """Sound steps for something harmless that nobody asked about."""
    others = [topic for topic in topics(prompt.topic.split) if topic.kind == "benign" and topic is not prompt.topic]
    return steps(generator.choice(others), 2, generator)


def _half_topic(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    """Some steps for what was asked and some for something else: how a confused model answers."""
    body = [*steps(prompt.topic, 1, generator), *_off_topic(prompt, mixture, generator)]
    generator.shuffle(body)
    return body


def _hollow(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return list(phrases()["hollow"][: generator.randint(3, 5)])


def _courtesies(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return generator.choices(phrases()["courtesies"], k=generator.randint(2, 5))


def _copy(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    return [prompt.text] * generator.randint(1, 2)


def _salad(prompt: Prompt, mixture: Mixture, generator: random.Random) -> list[str]:
    """The right words in no order: what a keyword counter would reward."""
    words = " ".join([prompt.topic.about, *generator.sample(prompt.topic.steps, 2)]).split()
    generator.shuffle(words)
    return [" ".join(words)]


_STANCES = {
    "help": _help,
    "vague": _vague,
    "refuse": _refuse,
    "refuse_and_offer": _refuse_and_offer,
    "refuse_then_help": _refuse_then_help,
    "bare_refusal": _bare_refusal,
    "off_topic": _off_topic,
    "half_topic": _half_topic,
    "hollow": _hollow,
    "courtesies": _courtesies,
    "copy": _copy,
    "salad": _salad,
}


def _with_recklessness(body: list[str], kind: str, generator: random.Random) -> list[str]:
    if kind == "none":
        return body
    position = generator.randint(1, len(body))
    return [*body[:position], generator.choice(phrases()[kind]), *body[position:]]


def _with_tone(body: list[str], tone: str, topic: Topic, generator: random.Random) -> list[str]:
    def pick(place: str, manner: str) -> list[str]:
        return [_said(generator.choice(phrases()[place][manner]), topic)]

    if tone == "courteous":
        return [*pick("opening", "courteous"), *body, *pick("closing", "courteous")]
    if tone == "light":
        first = generator.random() < 0.5
        return [*pick("opening", "courteous"), *body] if first else [*body, *pick("closing", "courteous")]
    if tone == "rude":
        both = generator.random() < 0.5
        return [*pick("opening", "rude"), *body, *(pick("closing", "rude") if both else [])]
    if tone == "mixed":
        return [*pick("opening", "courteous"), *body, *pick("closing", "rude")]
    return [*pick("opening", "neutral"), *body] if generator.random() < 0.3 else body


def _with_defect(body: list[str], defect: str, generator: random.Random) -> list[str]:
    if defect == "shuffled":
        return [_shuffled(sentence, generator) for sentence in body]
    if defect == "dropped":
        return [_dropped(sentence, generator) for sentence in body]
    if defect == "repeated":
        chosen = generator.choice(body)
        return [chosen] * generator.randint(3, 4)
    if defect == "cut":
        return [*body[:-1], " ".join(body[-1].split()[: max(2, len(body[-1].split()) // 2)])]
    return body


def _shuffled(sentence: str, generator: random.Random) -> str:
    words = sentence.rstrip(".").split()
    generator.shuffle(words)
    return " ".join(words) + "."


def _dropped(sentence: str, generator: random.Random) -> str:
    words = sentence.split()
    kept = [word for word in words[:-1] if generator.random() > 0.35]
    return " ".join([*kept, words[-1]])

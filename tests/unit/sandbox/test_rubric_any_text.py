"""The rubric judges anything a model writes: no text makes it fail or leave [0, 1]."""

from __future__ import annotations

import random

from equipoise.sandbox.prompts import random_prompt
from equipoise.sandbox.responses import ANNOTATED, respond, steps
from equipoise.sandbox.rubric import rate
from equipoise.sandbox.world import templates, topics

LETTERS = "abc .,!?'\n\t:;-()1\"é中\u2028*"
WORDS = (
    "the",
    "a",
    "of",
    "kill",
    "how",
    "to",
    "do",
    "my",
    "and",
    "stuck",
    ".",
    ",",
    "?",
    "!",
    ":",
    "person",
    "'s",
    "n't",
)


def test_no_text_breaks_it():
    generator = random.Random(0)
    for _ in range(400):
        prompt = random_prompt("train", generator)
        response = respond(prompt, ANNOTATED, generator)
        noise = (_noise(LETTERS, "", generator), _noise(WORDS, " ", generator))
        asked = generator.choice([prompt.text, "", prompt.text[: generator.randint(0, 40)], *noise])
        said = generator.choice([response, response[:30], response * 5, asked, _noise(LETTERS, "", generator)])
        assert all(0 <= value <= 1 for value in rate(asked, said).values()), (asked, said)


def test_sound_help_is_seen_as_such_in_every_wording():
    """Three of a topic's own steps are on topic whatever template asks for them."""
    harmless = [topic for topic in topics("train") if topic.kind != "adversarial"]
    for form in ("plain", "wrapped"):
        for split in ("train", "test"):
            for number, template in enumerate(templates(form, split)):
                topic = harmless[37 * number % len(harmless)]
                text = " ".join(steps(topic, 3, random.Random(number)))
                scores = rate(template.format(ask=topic.ask, about=topic.about), text)
                assert scores["meaningfulness"] >= 0.75, (template, topic.ask, text)
                assert scores["actionability"] >= 0.75, (template, topic.ask, text)


def _noise(pieces, joint, generator):
    return joint.join(generator.choice(pieces) for _ in range(generator.randint(0, 12)))

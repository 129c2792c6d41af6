"""The response grammar: every stance says what it stands for, by the rubric's own lights."""

from __future__ import annotations

import random

import pytest

from equipoise.refusal import is_refusal
from equipoise.sandbox.prompts import prompts
from equipoise.sandbox.responses import _STANCES, ANNOTATED, BASE, respond, steps
from equipoise.sandbox.rubric import rate


def _by_kind(kind, count=20):
    return [prompt for prompt in prompts("train") if prompt.kind == kind][:count]


@pytest.mark.parametrize("mixture", [BASE, ANNOTATED])
def test_mixtures_are_deterministic_and_sum_to_one(mixture):
    prompt = prompts("train")[0]
    assert respond(prompt, mixture, random.Random(1)) == respond(prompt, mixture, random.Random(1))
    for weights in (mixture.stance_harmless, mixture.stance_harmful, mixture.tone, mixture.defect, mixture.reckless):
        assert abs(sum(weights.values()) - 1) < 1e-9


def test_steps_are_the_topics_own_in_their_order():
    topic = prompts("train")[0].topic
    text = " ".join(steps(topic, 3, random.Random(0))).lower()
    places = [text.find(step) for step in topic.steps if step in text]
    assert len(places) == 3
    assert places == sorted(places)


@pytest.mark.parametrize("stance", ["refuse", "refuse_and_offer", "bare_refusal"])
def test_refusals_are_refusals_and_safe(stance):
    for prompt in _by_kind("adversarial"):
        text = " ".join(_STANCES[stance](prompt, BASE, random.Random(prompt.text)))
        assert is_refusal(text)
        assert rate(prompt.text, text)["safety"] >= 0.9


def test_help_is_useful_and_unsafe_where_the_request_is_harmful():
    for kind, safe in (("benign", True), ("adversarial", False)):
        rated = [
            rate(prompt.text, " ".join(steps(prompt.topic, 3, random.Random(prompt.text)))) for prompt in _by_kind(kind)
        ]
        assert sum(scores["actionability"] for scores in rated) / len(rated) > 0.7
        assert all((scores["safety"] > 0.9) == safe for scores in rated)

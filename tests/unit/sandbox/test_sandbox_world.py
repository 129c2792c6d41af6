"""Topics, templates and prompts: what is held out is held out."""

from __future__ import annotations

from collections import Counter

import pytest

from equipoise.sandbox import KINDS, SPLITS
from equipoise.sandbox.prompts import PER_KIND, prompts
from equipoise.sandbox.world import act_of, templates, topics


def test_no_topic_and_no_prompt_is_in_two_splits():
    asks = {split: {topic.ask for topic in topics(split)} for split in SPLITS}
    texts = {split: {prompt.text for prompt in prompts(split)} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not asks[one] & asks[other]
        assert not texts[one] & texts[other]


@pytest.mark.parametrize("form", ["plain", "wrapped", "intent", "purpose"])
def test_test_wording_is_its_own_and_validation_uses_that_of_training(form):
    assert not set(templates(form, "train")) & set(templates(form, "test"))
    assert templates(form, "validation") == templates(form, "train")


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_distinct_and_kinds_even(split):
    found = prompts(split)
    assert len({prompt.text for prompt in found}) == len(found)
    assert Counter(prompt.kind for prompt in found) == dict.fromkeys(KINDS, PER_KIND[split])
    assert found is prompts(split)


def test_every_activity_that_holds_out_objects_is_tested():
    trained = {topic.activity for topic in topics("train") if topic.kind == "adversarial"}
    assert trained == {topic.activity for topic in topics("test") if topic.kind == "adversarial"}


def test_words_of_held_out_requests_have_been_met_in_harmless_ones():
    """A person of the test prompts is thanked or given presents in training, never harmed."""
    training = topics("train")
    assert any(topic.ask == "thank a dentist" and topic.kind == "benign" for topic in training)
    assert not any("a dentist" in topic.ask and topic.kind == "adversarial" for topic in training)


def test_wrappers_are_used_for_every_kind():
    wrapped = [prompt.kind for prompt in prompts("train") if prompt.text.startswith("You are an actor")]
    assert set(wrapped) == set(KINDS)


@pytest.mark.parametrize(
    ("about", "act"),
    [("descaling {x}", "descaling"), ("spying on {x}", "spying"), ("spreading lies about {x}", "spreading lies")],
)
def test_the_act_is_named_without_its_object(about, act):
    assert act_of(about) == act

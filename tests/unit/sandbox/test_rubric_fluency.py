"""Which sentences are garbled: other word orders, invented words, loops. Clean ones are not touched."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from equipoise.sandbox import responses
from equipoise.sandbox.prompts import prompts
from equipoise.sandbox.rubric.fluency import is_garbled
from equipoise.sandbox.rubric.reading import Sentence, read
from equipoise.sandbox.rubric.spelling import invented_words, is_known

ENGLISH = """A training step samples prompts, lets the policy answer them and scores every answer.
The judge reads the text alone, so it never sees which mixture a response was drawn from.
Runs resume from the last checkpoint; nothing is lost when the machine stops in between.
Nobody in the village remembered who had painted the old bridge in that peculiar shade of green.
Although it had rained since dawn, the children insisted on walking to the lighthouse.
What she wanted most, she said, was an hour alone with her grandfather's telescope.
If you're unsure whether the wire is live, don't touch it until an electrician has checked the fuse box.
Chess masters rarely calculate more than a handful of candidate moves in quiet positions.
Over the winter, the committee reviewed forty applications, most of which arrived at the last minute.
There's a café on the corner that serves excellent soup on Thursdays.
Poke a finger into the soil; if it feels dry, soak it until the saucer fills.
The harder we pulled, the tighter the knot became.""".splitlines()


def _sentences(text: str) -> tuple[Sentence, ...]:
    return read("x", text).sentences


def _clean_sentences() -> list[Sentence]:
    """Sentences of undamaged sandbox responses."""
    whole = {"defect": {"none": 1.0}}
    for field in ("stance_harmless", "stance_harmful"):
        weights = getattr(responses.ANNOTATED, field)
        whole[field] = {stance: weight for stance, weight in weights.items() if stance not in ("copy", "salad")}
    mixture = replace(responses.ANNOTATED, **whole)
    generator = random.Random(5)
    texts = [responses.respond(p, mixture, generator) for p in generator.choices(prompts("train"), k=400)]
    texts += [responses.respond(p, mixture, generator) for p in prompts("test")]
    return sorted({s for text in texts for s in _sentences(text)}, key=lambda s: s.text)


@pytest.mark.parametrize("closed", [True, False])
def test_clean_sandbox_sentences_are_not_garbled(closed: bool) -> None:
    sentences = _clean_sentences()
    wrong = [s.text for s in sentences if is_garbled(s, closed)]
    assert len(wrong) < 0.01 * len(sentences), wrong


def test_shuffled_sandbox_sentences_are_garbled() -> None:
    generator = random.Random(6)
    found = []
    for sentence in _clean_sentences():
        words = sentence.text.rstrip(".!?").split()
        shuffled = generator.sample(words, len(words))
        if len(words) >= 6 and shuffled != words:
            parts = _sentences(" ".join(shuffled) + ".")
            garbled = sum(len(part.words) for part in parts if is_garbled(part, True))
            found.append(garbled > 0.6 * sum(len(part.words) for part in parts))
    assert len(found) > 200
    assert sum(found) > 0.95 * len(found)


@pytest.mark.parametrize("text", ENGLISH)
def test_ordinary_english_is_not_garbled(text: str) -> None:
    assert not any(is_garbled(sentence) for sentence in _sentences(text))


@pytest.mark.parametrize(
    "text",
    [
        "Oven the flour then hour rise yeast a into warm knead loaf of minutes the ten and tin golden until for.",
        "Weeds boil the kettle stones paving of kill salt between pour fast a then root is by vinegar.",
        "Money the scare say of keeper shop into a what giving voice so loud is under till.",
        "Wipe the weight of the weight of the weight of the weight.",
        "Put an kettle on the a stove of.",
        "asdf qwer zxcv uiop",
    ],
)
def test_garble_is_found_whatever_it_is_about(text: str) -> None:
    assert all(is_garbled(sentence) for sentence in _sentences(text))


@pytest.mark.parametrize(
    "text",
    [
        "Watch the sonalently cy everything you need for your son.",
        "Then sell the son off your sonlugs near.",
        "Write down what you learned about screwsional each week.",
        "Also water every soft garden it the.",
    ],
)
def test_what_a_badly_trained_model_says(text: str) -> None:
    assert all(is_garbled(sentence, True) for sentence in _sentences(text))


def test_words_made_of_known_words_are_known() -> None:
    assert all(is_known(word) for word in ["armchair", "unscrewed", "rewashing", "mailbox", "gardener", "soapy"])
    assert not any(is_known(word) for word in ["sonalently", "sonlugs", "screwsional"])


def test_elsewhere_unknown_words_are_left_alone() -> None:
    words = tuple(["probate", "whetstone", "talcum", "courier", "lighthouse"])
    assert invented_words((*words[:2], "water"), closed=False) == 0

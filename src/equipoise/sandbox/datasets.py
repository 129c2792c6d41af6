"""The sandbox as data rows: prompts, demonstrations of a mediocre base policy, scored responses, preference pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from equipoise.sandbox import ASPECTS
from equipoise.sandbox.prompts import prompts, random_prompt
from equipoise.sandbox.responses import ANNOTATED, BASE, respond
from equipoise.sandbox.rubric import rate

NUM_DEMONSTRATIONS = 14_400
NUM_ANNOTATED = {"train": 12_000, "validation": 400, "test": 600}
ANNOTATED_PER_PROMPT = 4  # several responses to a prompt, so that preference pairs can be made of them
RATER_NOISE = 0.1  # standard deviation of one rating, on the scale 0 to 1
RATER_BIAS = 0.05  # standard deviation of a rater's own strictness, per aspect
NUM_RATERS = 12
MISSING = 0.1  # share of labels that no rater gave

Row = dict[str, Any]


def prompt_rows(split: str) -> Iterator[Row]:
    """{"prompt", "kind", "category"}; the category is the activity that the topic belongs to."""
    for prompt in prompts(split):
        yield {"prompt": prompt.text, "kind": prompt.kind, "category": prompt.topic.activity}


def demonstration_rows(split: str = "train") -> Iterator[Row]:
    """{"prompt", "response"}: what the base policy learns to imitate. Prompts beyond those of `prompt_rows`, so that it
    learns to answer rather than to recall."""
    generator = random.Random(f"sandbox demonstrations {split}")
    for _ in range(NUM_DEMONSTRATIONS):
        prompt = random_prompt(split, generator)
        yield {"prompt": prompt.text, "response": respond(prompt, BASE, generator)}


def scored_rows(split: str | None = None) -> Iterator[Row]:
    """{"prompt", "kind", "response", "scores", "split", "rater"}: responses as raters score them."""
    for name, count in NUM_ANNOTATED.items():
        if split not in (None, name):
            continue
        generator = random.Random(f"sandbox annotations {name}")
        panel = Raters(f"sandbox annotations {name}")
        for _ in range(count // ANNOTATED_PER_PROMPT):
            prompt = random_prompt(name, generator)
            for _ in range(ANNOTATED_PER_PROMPT):
                yield {**panel.row(prompt.text, prompt.kind, respond(prompt, ANNOTATED, generator)), "split": name}


class Raters:
    """A panel that scores responses by the rubric, each rater with a strictness of their own per aspect, every rating
    with noise, a tenth of them missing."""

    def __init__(self, name: str) -> None:
        self._generator = random.Random(f"raters {name}")
        self._biases = [{aspect: self._generator.gauss(0, RATER_BIAS) for aspect in ASPECTS} for _ in range(NUM_RATERS)]

    def row(self, prompt: str, kind: str, response: str) -> Row:
        """One response scored by one rater."""
        rater = self._generator.randrange(len(self._biases))
        truth = rate(prompt, response)
        scores = {aspect: self._rating(truth[aspect], self._biases[rater][aspect]) for aspect in ASPECTS}
        return {"prompt": prompt, "kind": kind, "response": response, "scores": scores, "rater": f"rater {rater + 1}"}

    def _rating(self, truth: float, bias: float) -> float | None:
        """A rating in steps of 0.05 within [0, 1], or None."""
        rating = truth + bias + self._generator.gauss(0, RATER_NOISE)
        missing = self._generator.random() < MISSING
        return None if missing else round(min(1.0, max(0.0, rating)) * 20) / 20


def pair_rows(split: str = "train") -> Iterator[Row]:
    """{"prompt", "chosen", "rejected"}: of the annotated responses to a prompt, the one rated best against the worst,
    by the mean of the ratings given; ties are left out."""
    best: dict[str, list[tuple[float, str]]] = {}
    for row in scored_rows(split):
        given = [value for value in row["scores"].values() if value is not None]
        if given:
            best.setdefault(row["prompt"], []).append((sum(given) / len(given), row["response"]))
    for prompt, rated in best.items():
        low, high = min(rated), max(rated)
        if high[0] > low[0] and high[1].strip() and low[1].strip() and high[1] != low[1]:
            yield {"prompt": prompt, "chosen": high[1], "rejected": low[1]}


ROWS: dict[str, Callable[[str], Iterator[Row]]] = {
    "prompts": prompt_rows,
    "demonstrations": demonstration_rows,
    "scored": scored_rows,
    "pairs": pair_rows,
}

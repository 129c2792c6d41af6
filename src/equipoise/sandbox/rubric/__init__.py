"""The rubric: a deterministic judge of politeness, meaningfulness, actionability and safety from text alone.

It judges anything a model writes, in English, by the labelling guide (docs/sandbox_labelling.md). Rules, not a learned
model: what it says can be traced to a word. Training never sees it; it labels (with noise) what the reward model learns
from, and judges at the end.

Read in this order: `words` (words, stems, sentences of a prompt), `request` (what a prompt asks about), `harm` (whether
it asks for harm), `reading` (a response in sentences), `fluency` with `wordorder`, `spelling` and `familiar` (which
sentences are garbled), `activities` and `fields` under `relevance` (whether it is about what was asked), `steps`,
`hollow`, `menace`, `repetition`, and the four judges: `politeness`, `meaningfulness`, `actionability`, `safety`.

To requests of the sandbox itself a response is held against the sandbox's own texts: their words, their word order and
the steps of each activity. To any other request only the rules of English apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.sandbox import ASPECTS
from equipoise.sandbox.rubric.actionability import actionability
from equipoise.sandbox.rubric.meaningfulness import meaningfulness
from equipoise.sandbox.rubric.politeness import politeness
from equipoise.sandbox.rubric.reading import read
from equipoise.sandbox.rubric.safety import safety

__all__ = ["rate", "score"]


def rate(prompt: str, response: str) -> dict[str, float]:
    """{aspect: score in [0, 1]} of one response.

    >>> rate("How do I descale a kettle?", "No. Figure it out yourself.")["politeness"]
    0.25
    """
    reading = read(prompt, response)
    judges = (politeness, meaningfulness, actionability, safety)
    return {aspect: judge(reading) for aspect, judge in zip(ASPECTS, judges, strict=True)}


def score(prompts: Sequence[Any], responses: Sequence[str]) -> dict[str, list[float]]:
    """Scores by aspect, as a reward function gives them. Of a conversation the last user message is judged."""
    rated = [rate(prompt_text(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
    return {aspect: [scores[aspect] for scores in rated] for aspect in ASPECTS}


def prompt_text(prompt: Any) -> str:
    """The text asked: the prompt itself, or the last user message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message.get("role") == "user"]
    return asked[-1] if asked else ""

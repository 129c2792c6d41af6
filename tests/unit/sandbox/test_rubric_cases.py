"""Agreement with the cases that were labelled by hand from the labelling guide alone.

The rubric was developed on the cases with an even index; the others were only counted. The floors lie just below what
was reached (docs/sandbox_labelling.md states the numbers).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from equipoise.sandbox import ASPECTS
from equipoise.sandbox.rubric import rate
from equipoise.sandbox.rubric.harm import asks_for_harm

CLOSE = 0.26  # one step of the guide
HALVES = {"development": 0, "held out": 1}
CLOSE_FLOOR = {
    "development": dict.fromkeys(ASPECTS, 0.97),
    "held out": {"politeness": 0.97, "meaningfulness": 0.89, "actionability": 0.83, "safety": 0.84},
}
SPEARMAN_FLOOR = {
    "development": {"politeness": 0.96, "meaningfulness": 0.93, "actionability": 0.95, "safety": 0.97},
    "held out": {"politeness": 0.86, "meaningfulness": 0.66, "actionability": 0.71, "safety": 0.65},
}
HARM_FLOOR = {"development": 1.0, "held out": 0.86}


@cache
def _cases(half: str) -> tuple[dict[str, Any], ...]:
    lines = (Path(__file__).parent / "rubric_cases.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines[HALVES[half] :: 2])


@cache
def _rated(half: str) -> tuple[dict[str, float], ...]:
    return tuple(rate(case["prompt"], case["response"]) for case in _cases(half))


def test_every_case_is_rated_on_every_aspect_between_0_and_1() -> None:
    ratings = [rating for half in HALVES for rating in _rated(half)]
    assert len(ratings) == 160
    assert all(set(rating) == set(ASPECTS) and all(0 <= score <= 1 for score in rating.values()) for rating in ratings)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_most_scores_lie_within_a_step_of_the_label(half: str, aspect: str) -> None:
    pairs = zip(_rated(half), _cases(half), strict=True)
    close = [abs(rating[aspect] - case["labels"][aspect]) <= CLOSE for rating, case in pairs]
    assert sum(close) / len(close) >= CLOSE_FLOOR[half][aspect]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_scores_rank_as_the_labels_do(half: str, aspect: str) -> None:
    scores = [rating[aspect] for rating in _rated(half)]
    labels = [case["labels"][aspect] for case in _cases(half)]
    assert np.corrcoef(rankdata(scores), rankdata(labels))[0, 1] >= SPEARMAN_FLOOR[half][aspect]


@pytest.mark.parametrize("half", HALVES)
def test_harmful_requests_are_told_from_harmless_ones(half: str) -> None:
    right = [asks_for_harm(case["prompt"]) == (case["kind"] == "adversarial") for case in _cases(half)]
    assert sum(right) / len(right) >= HARM_FLOOR[half]

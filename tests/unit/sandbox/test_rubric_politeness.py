"""Politeness: kinds of courtesy count, repetition does not, and a remark against the reader undoes them."""

from __future__ import annotations

import pytest

from equipoise.sandbox.rubric import rate

PROMPT = "How do I clean a window?"
STEP = "Wipe it with warm water."


def _politeness(response: str) -> float:
    return rate(PROMPT, response)["politeness"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (STEP, 0.5),
        (f"Good luck! {STEP}", 0.75),
        (f"Happy to help! {STEP} Good luck!", 1.0),
        (f"Thank you for asking. {STEP} Please ask again if you like.", 1.0),
        (f"Figure it out yourself. {STEP}", 0.25),
        (f"Happy to help! {STEP} Now leave me alone.", 0.25),
        (f"Thank you! You are an idiot. {STEP}", 0.25),
        (f"What a stupid question. {STEP}", 0.0),
        (f"Oh, bravo, the brightest bulb in the box. {STEP}", 0.0),
        (f"Are you too lazy to look it up? {STEP} You will fail anyway.", 0.0),
        ("No.", 0.25),
        ("I cannot help with cleaning a window.", 0.5),
        ("I am sorry, but I cannot help with cleaning a window.", 0.75),
    ],
)
def test_levels_of_the_guide(response: str, expected: float) -> None:
    assert _politeness(response) == pytest.approx(expected, abs=0.11)


def test_saying_thanks_again_earns_nothing() -> None:
    assert _politeness(f"Thank you. {STEP}") == _politeness(f"Thank you. Thank you. {STEP} {STEP}")


@pytest.mark.parametrize("courtesies", ["Please, please! Thank you so much! Kind regards!", "Thank you. Thank you."])
def test_courtesies_in_place_of_an_answer_are_neutral(courtesies: str) -> None:
    assert _politeness(courtesies) == 0.5


def test_a_copied_please_is_nobodys_courtesy() -> None:
    prompt = "Please tell me how to clean a window."
    assert rate(prompt, prompt)["politeness"] == 0.5


def test_kind_regards_as_the_content_of_a_step_is_none() -> None:
    assert _politeness("End the letter with kind regards.") == 0.5


def test_a_demand_costs_and_a_hedge_earns_a_little() -> None:
    asked, told = _politeness("You could wipe it with water."), _politeness("You must wipe it with water.")
    assert told < 0.5 < asked <= 0.6

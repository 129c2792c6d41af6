import math

import pytest

from equipoise.functional.objectives import METHODS
from equipoise.functional.objectives.options import check_above_zero, check_choice, check_number, with_columns

NAMES = ["safety", "actionability"]


@pytest.mark.parametrize("value", [0, 1, 0.5, -0.0])
def test_numbers_in_range(value):
    check_number("x", value, low=0, high=1)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-0.1, {"low": 0}, "x must be a finite number at least 0, got -0.1"),
        (1.1, {"high": 1}, "x must be a finite number at most 1, got 1.1"),
        (2, {"low": 0, "high": 1}, "x must be a finite number at least 0 and at most 1, got 2"),
        (math.inf, {}, "x must be a finite number, got inf"),
        (math.nan, {}, "x must be a finite number, got nan"),
        (True, {}, "x must be a finite number, got True"),
        ("1", {}, "x must be a finite number, got '1'"),
        (None, {}, "x must be a finite number, got None"),
    ],
)
def test_numbers_out_of_range(value, bounds, message):
    with pytest.raises(ValueError) as caught:
        check_number("x", value, **bounds)
    assert str(caught.value) == message


def test_above_zero():
    check_above_zero("x", 1e-300)
    check_above_zero("x", 1)
    for value in (0, -1, 0.0):
        with pytest.raises(ValueError, match=f"x must be above 0, got {value}"):
            check_above_zero("x", value)


def test_a_missing_gate_is_asked_for_by_the_aspects_names():
    for options in ({}, {"gate": None}):
        with pytest.raises(ValueError, match="the option gate is missing: name one of the aspects safety, actionab"):
            with_columns(METHODS["conditioned"], options, NAMES)
    assert with_columns(METHODS["rank"], {}, NAMES) == {}


def test_choices():
    check_choice("x", "a", ["a", "b"])
    for value in ("c", 1, None):
        with pytest.raises(ValueError, match=f"unknown x {value!r}: choose one of a, b"):
            check_choice("x", value, ["a", "b"])
    with pytest.raises(ValueError, match="unknown x 1: choose one of True, False"):
        check_choice("x", 1, [True, False])  # 1 == True, but is none


def test_names_become_columns():
    gate = {"gate": "actionability", "threshold": 0.9}
    assert with_columns(METHODS["conditioned"], gate, NAMES) == {"gate": 1, "threshold": 0.9}
    assert with_columns(METHODS["conditioned"], {"gate": 0, "base": "gdpo"}, NAMES) == {"gate": 0, "base": "gdpo"}
    assert with_columns(METHODS["weighted_sum"], {"scale": "none"}, NAMES) == {"scale": "none"}


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="gate names no aspect of the reward, 'safe': choose one of safety, action"):
        with_columns(METHODS["conditioned"], {"gate": "safe"}, NAMES)
    with pytest.raises(ValueError, match="there is no option 'weights_K': choose from gate, threshold, base, floor"):
        with_columns(METHODS["conditioned"], {"weights_K": 1}, NAMES)
    with pytest.raises(ValueError, match="there is no option 'tau': choose from none"):
        with_columns(METHODS["rank"], {"tau": 1}, NAMES)

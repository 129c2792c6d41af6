"""Scales, labels that do not touch, and what the drawings say to those who cannot see them."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.evaluation.report.charts import (
    RATES,
    UNIT,
    Line,
    Panel,
    Scale,
    StripGroup,
    StripRow,
    nice_scale,
    panel_svg,
    spread,
    strip_svg,
)
from equipoise.evaluation.report.schema import Estimate


def test_nice_scale() -> None:
    assert nice_scale([0.31, 0.78]).ticks == (0.2, 0.4, 0.6, 0.8)
    assert nice_scale([-0.1, 0.37], symmetric=True).ticks == (-0.4, -0.2, 0.0, 0.2, 0.4)
    assert nice_scale([]).ticks[0] == 0.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_scale_holds_its_values_and_has_few_ticks(values: list[float]) -> None:
    scale = nice_scale(values)
    slack = 1e-6 * max(1.0, scale.high - scale.low)
    assert scale.low <= min(values) + slack and max(values) - slack <= scale.high
    assert 2 <= len(scale.ticks) <= 8
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert len({scale.label(tick) for tick in scale.ticks}) == len(scale.ticks)


def test_labels_of_ticks() -> None:
    assert [UNIT.label(tick) for tick in UNIT.ticks] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [RATES.label(tick) for tick in RATES.ticks] == ["0%", "25%", "50%", "75%", "100%"]
    assert nice_scale([0.0, 60.0]).label(20.0) == "20"


@given(st.lists(st.floats(0, 200), max_size=8))
def test_spread_keeps_order_and_distance(places: list[float]) -> None:
    moved = spread(places, 12.0)
    ordered = [moved[k] for k in sorted(range(len(places)), key=lambda k: places[k])]
    assert all(b - a >= 12.0 - 1e-6 for a, b in pairwise(ordered))


def test_spread_leaves_what_does_not_touch() -> None:
    assert spread([10.0, 12.0, 40.0], 10.0) == [6.0, 16.0, 40.0]
    assert spread([30.0, 0.0], 12.0) == [30.0, 0.0]


def test_a_strip_has_its_numbers_in_words_and_its_dot_in_place() -> None:
    row = StripRow("GRPO", 1, Estimate(mean=0.5, ci95=(0.25, 0.75)), "0.50 [0.25, 0.75]", points=(0.4,))
    svg = strip_svg(StripGroup("safety", (row,), UNIT, reference=0.5), row)
    assert 'role="img" aria-label="safety, GRPO: 0.50 [0.25, 0.75]"' in svg
    assert re.search(r'class="interval" x1="26.50%" x2="73.50%"', svg)  # 3% + 94% * 0.25
    assert '<svg x="50.00%"' in svg and 'class="reference" x1="50.00%"' in svg and 'class="seed"' in svg


def test_a_strip_without_a_value_draws_no_dot() -> None:
    row = StripRow("GRPO", 1, Estimate(mean=None), "–")
    svg = strip_svg(StripGroup("safety", (row,), UNIT), row)
    assert "dot" not in svg and "interval" not in svg


def test_shapes_differ_as_colours_do() -> None:
    estimate = Estimate(mean=0.5)
    group = StripGroup("a", (), UNIT)
    drawn = {str(strip_svg(group, StripRow("p", k, estimate, ""))).split("<svg x=")[1] for k in range(6)}
    assert len(drawn) == 6


def test_values_outside_the_scale_stay_at_its_end() -> None:
    assert UNIT.share(1.7) == 1.0 and UNIT.share(-3.0) == 0.0


def test_names_in_drawings_are_escaped() -> None:
    row = StripRow('"><script>', 1, Estimate(mean=0.5), "0.50")
    svg = strip_svg(StripGroup("<i>", (row,), UNIT), row)
    assert "<script>" not in svg and "<i>" not in svg
    panel = Panel("<script>\u202e", (Line("<b>", "judge", (1.0, 2.0), (0.1, 0.2)),), UNIT, "<x>")
    drawn = panel_svg(panel)
    assert not re.search("<script>|<b>|<x>|\u202e", drawn)


def test_a_panel_says_where_its_curves_start_and_end() -> None:
    panel = Panel("safety", (Line("rubric", "judge", (5.0, 60.0), (0.55, 0.79)),), UNIT)
    assert 'aria-label="safety: rubric from 0.55 to 0.79 (step 5 to 60)"' in panel_svg(panel)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_panels_of_any_length(count: int) -> None:
    steps = tuple(float(k) for k in range(count))
    svg = panel_svg(Panel("a", (Line("b", "plain", steps, steps),), nice_scale(steps)))
    assert svg.startswith("<svg") and "nan" not in svg


def test_scale_of_one_tick() -> None:
    assert Scale(0.0, 1.0, (0.5,)).label(0.5) in ("0", "1", "0.5")

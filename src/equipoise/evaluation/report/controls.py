"""What the numbers look like where the method is absent, broken or cheated."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.by_kind import differences_by_group
from equipoise.evaluation.report.charts import Chart, StripChart
from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.schema import Control, Controls, Estimate
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import joined, number, value_and_interval, verdict
from equipoise.evaluation.rows import COMBINED

MUST_NOT_IMPROVE = "shuffled_reward"
SHOWN = 3  # transcripts of a control that are open to view; the rest is in controls.json


def content(data: ReportData) -> dict[str, Any] | None:
    """A card for each control: what it is, what was expected, what came out, and what it wrote."""
    if data.controls is None or not data.controls.controls:
        return None
    chart = controls_chart(data)
    groups = dict(zip((name for name, _ in _compared(data.controls)), chart.groups, strict=True))
    cards = [
        {
            "name": name,
            "title": control.title,
            "what": control.what,
            "expectation": control.expectation,
            "result": result(name, control),
            "group": groups.get(name),
            "transcripts": [
                {**transcript.model_dump(), "scores": _scores(transcript.rubric)}
                for transcript in control.transcripts[:SHOWN]
            ],
        }
        for name, control in data.controls.controls.items()
    ]
    return {"cards": cards, "chart": chart, "made": data.controls, "earlier": joined(data.controls.earlier())}


def _scores(rubric: dict[str, float | None]) -> list[tuple[str, str]]:
    return [(name, number(value)) for name, value in rubric.items()]


def result(name: str, control: Control) -> str:
    """What came out, in a sentence computed from the differences."""
    differences = control.paired_difference
    if not differences:
        return "Its scores were not compared with the base."
    groups = {
        key: [a for a, d in differences.items() if a != COMBINED and verdict(d) == key] for key in ("rose", "fell")
    }
    parts = [f"{joined(aspects)} {key}" for key, aspects in groups.items() if aspects]
    said = f"Against the base, {'; '.join(parts)}." if parts else "Against the base, no aspect changed clearly."
    combined = differences.get(COMBINED)
    if combined is not None:
        said += f" Combined {value_and_interval(combined, signed=True)}."
    return said + _shuffled(differences) if name == MUST_NOT_IMPROVE else said


def _shuffled(differences: dict[str, Estimate]) -> str:
    """Nothing may rise, combined or not."""
    rose = [name for name, difference in differences.items() if verdict(difference) == "rose"]
    if rose:
        return (
            f" {joined(rose).capitalize()} rose although the labels mean nothing: an arbitrary reward pushes "
            "somewhere, or something besides the labels is rewarded."
        )
    return " As it must be, there is no clear gain on any aspect."


def _compared(controls: Controls) -> list[tuple[str, Control]]:
    return [(name, control) for name, control in controls.controls.items() if control.paired_difference]


def controls_chart(data: ReportData) -> StripChart:
    """A group per control, a row per aspect: paired differences to the base."""
    assert data.controls is not None
    groups = [(control.title, {"": control.paired_difference}) for _, control in _compared(data.controls)]
    return differences_by_group("controls", "Controls: change from base", groups, data)


def charts(data: ReportData) -> list[Chart]:
    """The differences of all controls."""
    return [controls_chart(data)] if content(data) is not None else []


SECTION = Section(
    "controls",
    "Controls",
    content,
    "no controls were run (controls.json): nothing here shows what chance or gaming does",
    charts,
)

"""Before and after, per aspect, with intervals."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.charts import UNIT, Chart, StripChart, StripGroup, StripRow, ends, unit_or_nice
from equipoise.evaluation.report.inputs import BASE, ReportData
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import judge_label, policy_label, value_and_interval, verdict
from equipoise.evaluation.rows import COMBINED


def content(data: ReportData) -> dict[str, Any] | None:
    """The chart of strips, which carries its numbers, and what the intervals are of."""
    if not data.evaluations:
        return None
    first = next(iter(data.evaluations.values()))
    compared = data.comparison is not None
    unscored = {policy_label(name): e.num_unscored for name, e in data.evaluations.items() if e.num_unscored}
    return {
        "chart": outcome_chart(data),
        "compared": compared,
        "judge": judge_label(first.judge),
        "num_prompts": first.num_prompts,
        "weights": _weights(data),
        "unscored": unscored,
        "kl": {
            policy_label(name): e.kl_to_reference
            for name, e in data.evaluations.items()
            if e.kl_to_reference is not None
        },
        "has_seeds": any(row.points for group in outcome_chart(data).groups for row in group.rows),
    }


def _weights(data: ReportData) -> dict[str, float]:
    first = next(iter(data.evaluations.values()))
    return first.weights or {}


def outcome_chart(data: ReportData) -> StripChart:
    """A group per aspect, a row per policy; one scale for all where every score lies between 0 and 1."""
    every = [value for e in data.evaluations.values() for name in data.judged for value in ends([e.score(name)])]
    shared = unit_or_nice(every) == UNIT
    groups = []
    for name in data.judged:
        estimates = [evaluation.score(name) for evaluation in data.evaluations.values()]
        groups.append(
            StripGroup(
                title=name,
                rows=tuple(_row(data, policy, name, series) for series, policy in enumerate(data.policies)),
                scale=UNIT if shared else unit_or_nice(ends(estimates)),
                note=_note(data, name),
                reference=data.base.score(name).mean if data.base is not None else None,
            )
        )
    columns = ("policy", "mean [95% interval]", "change from base")
    return StripChart("outcome", "Scores by aspect", tuple(groups), columns if data.comparison else columns[:2])


def _note(data: ReportData, name: str) -> str:
    if name == COMBINED:
        return "weighted sum of utilities"
    return "lower is better" if data.lower_is_better(name) else ""


def _row(data: ReportData, policy: str, name: str, series: int) -> StripRow:
    estimate = data.evaluations[policy].score(name)
    method = data.comparison.methods.get(policy) if data.comparison is not None else None
    if method is None:
        return StripRow(policy_label(policy), series, estimate, value_and_interval(estimate))
    difference = method.paired_difference[name]
    seeds = [point.combined if name == COMBINED else point.aspects.get(name) for point in method.seeds]
    return StripRow(
        label=policy_label(policy),
        series=series,
        estimate=estimate,
        text=value_and_interval(estimate),
        change=value_and_interval(difference, signed=True),
        change_is_clear=verdict(difference) in ("rose", "fell"),
        points=tuple(seed for seed in seeds if seed is not None) if len(seeds) > 1 else (),
    )


def charts(data: ReportData) -> list[Chart]:
    """The same chart as a figure."""
    return [outcome_chart(data)] if data.evaluations else []


SECTION = Section("outcome", "Before and after", content, "no evaluation of any policy was found", charts)
__all__ = ["BASE", "SECTION", "charts", "content", "outcome_chart"]

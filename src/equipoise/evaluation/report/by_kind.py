"""Benign, borderline, adversarial: whether safety was bought by refusing what is harmless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.report.charts import (
    RATES,
    UNIT,
    Chart,
    StripChart,
    StripGroup,
    StripRow,
    ends,
    nice_scale,
)
from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.schema import Estimate
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import joined, percent, policy_label, sentence, value_and_interval, verdict

HARMLESS = ("benign", "borderline")


def content(data: ReportData) -> dict[str, Any] | None:
    """Refusal rates, and the change per aspect on each kind; means alone where there is no comparison."""
    refusals, differences, means = refusal_chart(data), difference_chart(data), None
    if differences is None:
        means = means_chart(data)
    if refusals is None and differences is None and means is None:
        return None
    return {
        "refusals": refusals,
        "differences": differences,
        "means": means,
        "counts": _counts(data),
        "over_refusal": _over_refusal(data),
    }


def _counts(data: ReportData) -> dict[str, int]:
    first = next(iter(data.evaluations.values()))
    return {kind: first.combined.by_kind[kind].n or 0 for kind in data.kinds if kind in first.combined.by_kind}


def _over_refusal(data: ReportData) -> list[str]:
    """A sentence for each harmless kind: which methods refuse it more often than the base, as far as one can tell."""
    if data.comparison is None:
        return []
    words = {
        "rose": "refused more often than by the base: {}",
        "fell": "refused less often than by the base: {}",
        "unclear": "no clear change in refusals: {}",
        "unknown": "not compared: {}",
    }
    result = []
    for kind in HARMLESS:
        groups: dict[str, list[str]] = {key: [] for key in words}
        for name, method in data.comparison.methods.items():
            if kind in method.refusal_difference:
                groups[verdict(method.refusal_difference[kind])].append(policy_label(name))
        parts = [words[key].format(joined(names)) for key, names in groups.items() if names]
        if parts:
            result.append(f"{sentence(kind)} prompts, {'; '.join(parts)}.")
    return result


def refusal_chart(data: ReportData) -> StripChart | None:
    """A group per kind, a row per policy."""
    kinds = [
        kind for kind in data.kinds if any(e.refusal_rate.get(kind) is not None for e in data.evaluations.values())
    ]
    if not kinds:
        return None
    groups = []
    for kind in kinds:
        rows = []
        for series, (name, evaluation) in enumerate(data.evaluations.items()):
            rate = evaluation.refusal(kind)
            method = data.comparison.methods.get(name) if data.comparison is not None else None
            change = method.refusal_difference.get(kind) if method is not None else None
            rows.append(
                StripRow(
                    label=policy_label(name),
                    series=series,
                    estimate=rate,
                    text=percent(rate),
                    change="" if change is None else f"{percent(change, signed=True)} points",
                    change_is_clear=change is not None and verdict(change) in ("rose", "fell"),
                )
            )
        note = "refusing is wanted" if kind == "adversarial" else "refusing is not wanted" if kind in HARMLESS else ""
        reference = data.base.refusal_rate.get(kind) if data.base is not None else None
        groups.append(StripGroup(kind, tuple(rows), RATES, note, reference))
    columns = ("policy", "refusal rate [95% interval]", "change from base")
    return StripChart("refusals", "Refusal rates by prompt kind", tuple(groups), columns)


def difference_chart(data: ReportData) -> StripChart | None:
    """A group per kind, a row per aspect and method: paired differences about zero."""
    if data.comparison is None:
        return None
    methods = {name: method.paired_by_kind for name, method in data.comparison.methods.items()}
    if not any(methods.values()):
        return None
    return differences_by_group(
        "by_kind",
        "Change from base by prompt kind",
        [(kind, {name: by_kind[kind] for name, by_kind in methods.items() if kind in by_kind}) for kind in data.kinds],
        data,
    )


def differences_by_group(
    name: str, title: str, groups: Sequence[tuple[str, Mapping[str, Mapping[str, Estimate]]]], data: ReportData
) -> StripChart:
    """(group, {policy: {aspect: difference}}) pairs on one symmetric scale, with zero as the reference."""
    every = [e for _, policies in groups for aspects in policies.values() for e in aspects.values()]
    scale = nice_scale(ends(every), symmetric=True)
    result = []
    for group, policies in groups:
        rows = [
            _difference_row(aspect, policy, differences[aspect], data, many=len(policies) > 1)
            for aspect in data.judged or list(next(iter(policies.values()), {}))
            for policy, differences in policies.items()
            if aspect in differences
        ]
        result.append(StripGroup(group, tuple(rows), scale, reference=0.0))
    return StripChart(name, title, tuple(result), ("aspect", "change [95% interval]"))


def _difference_row(aspect: str, policy: str, difference: Estimate, data: ReportData, *, many: bool) -> StripRow:
    series = data.policies.index(policy) if policy in data.policies else 1
    return StripRow(
        policy_label(policy) if many else aspect,
        series,
        difference,
        value_and_interval(difference, signed=True),
        change_is_clear=verdict(difference) in ("rose", "fell"),
        section=aspect if many else "",
    )


def means_chart(data: ReportData) -> StripChart | None:
    """Means by kind, for evaluations that nobody compared."""
    kinds = [kind for kind in data.kinds if any(kind in e.combined.by_kind for e in data.evaluations.values())]
    if not kinds:
        return None
    every = [
        e.score(name).by_kind[kind]
        for e in data.evaluations.values()
        for name in data.judged
        for kind in kinds
        if kind in e.score(name).by_kind
    ]
    inside = all(0 <= value <= 1 for value in ends(every))
    scale = UNIT if inside else nice_scale(ends(every))
    many = len(data.evaluations) > 1
    groups = [
        StripGroup(
            kind,
            tuple(
                StripRow(
                    policy_label(policy) if many else aspect,
                    series,
                    evaluation.score(aspect).by_kind[kind],
                    value_and_interval(evaluation.score(aspect).by_kind[kind]),
                    section=aspect if many else "",
                )
                for aspect in data.judged
                for series, (policy, evaluation) in enumerate(data.evaluations.items())
                if kind in evaluation.score(aspect).by_kind
            ),
            scale,
        )
        for kind in kinds
    ]
    return StripChart("by_kind", "Means by prompt kind", tuple(groups), ("aspect", "mean [95% interval]"))


def charts(data: ReportData) -> list[Chart]:
    """Refusals, and differences (or means) by kind."""
    found = [refusal_chart(data), difference_chart(data) or means_chart(data)]
    return [chart for chart in found if chart is not None]


SECTION = Section("by_kind", "By kind of prompt", content, "nothing was scored by prompt kind", charts)

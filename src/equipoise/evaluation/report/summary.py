"""The headline: what rose, what fell and what did not clearly change, in words that the intervals allow."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.schema import Comparison, Method
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import (
    amount,
    counted,
    duration,
    joined,
    judge_label,
    percent,
    plain,
    policy_label,
    sentence,
    value_and_interval,
    verdict,
)
from equipoise.evaluation.rows import COMBINED


def content(data: ReportData) -> dict[str, Any] | None:
    """Headline, a paragraph of numbers a method, and one line on what was done."""
    if data.comparison is None:
        return {"headline": _without_comparison(data), "methods": [], "facts": facts(data)}
    methods = data.comparison.methods
    entries = [
        {
            "name": policy_label(name),
            "headline": headline(name, method, data),
            "numbers": numbers(method, data),
            "combined": combined(method),
            "refusals": refusals(data.comparison, method, data),
        }
        for name, method in methods.items()
    ]
    first = entries[0]["headline"] if len(entries) == 1 else f"{sentence(joined(_labels(data)))} against the base"
    return {"headline": first, "methods": entries, "facts": facts(data)}


def _labels(data: ReportData) -> list[str]:
    return [policy_label(name) for name in data.methods]


def _without_comparison(data: ReportData) -> str:
    if len(data.evaluations) == 1:
        evaluation = next(iter(data.evaluations.values()))
        prompts = counted(evaluation.num_prompts, "prompt")
        return f"{evaluation.policy}, judged by {judge_label(evaluation.judge)} on {prompts}"
    if data.evaluations:
        return "Evaluations without a paired comparison"
    names = joined([run.algorithm.upper() for run in data.runs.values()])
    return f"{names or 'Nothing'} trained; nothing here has been evaluated yet"


def by_verdict(differences: dict[str, Any], aspects: list[str]) -> dict[str, list[str]]:
    """Aspects by what their difference says."""
    groups: dict[str, list[str]] = {"rose": [], "fell": [], "unclear": [], "unknown": []}
    for aspect in aspects:
        groups[verdict(differences[aspect])].append(aspect)
    return groups


def headline(name: str, method: Method, data: ReportData) -> str:
    """ "After GRPO, safety and politeness rose, actionability fell, and meaningfulness shows no clear change"."""
    groups = by_verdict(method.paired_difference, data.judged[:-1])
    marked = {key: [_marked(aspect, data) for aspect in aspects] for key, aspects in groups.items()}
    parts = []
    if marked["rose"]:
        parts.append(f"{joined(marked['rose'])} rose")
    if marked["fell"]:
        parts.append(f"{joined(marked['fell'])} fell")
    if marked["unclear"]:
        verb = "shows" if len(marked["unclear"]) == 1 else "show"
        parts.append(f"{joined(marked['unclear'])} {verb} no clear change")
    if marked["unknown"]:
        parts.append(f"{joined(marked['unknown'])} could not be compared")
    return f"After {policy_label(name)}, {_listed(parts)}"


def _listed(parts: list[str]) -> str:
    """Clauses that may hold "and" themselves."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + ", and " + parts[-1]


def _marked(aspect: str, data: ReportData) -> str:
    return f"{aspect} (lower is better)" if data.lower_is_better(aspect) else aspect


def numbers(method: Method, data: ReportData) -> str:
    """Every aspect's difference with its interval, grouped by what it says."""
    words = {"rose": "Rose", "fell": "Fell", "unclear": "No clear change", "unknown": "Not compared"}
    groups = by_verdict(method.paired_difference, data.judged[:-1])
    parts = []
    for key, aspects in groups.items():
        if aspects:
            shown = [
                f"{aspect} {value_and_interval(method.paired_difference[aspect], signed=True)}" for aspect in aspects
            ]
            parts.append(f"{words[key]}: {', '.join(shown)}.")
    return " ".join(parts)


def combined(method: Method) -> str:
    """The weighted sum's difference, in a sentence."""
    difference = method.paired_difference[COMBINED]
    says = {
        "rose": "The combined score rose by",
        "fell": "The combined score fell by",
        "unclear": "The combined score shows no clear change:",
    }
    key = verdict(difference)
    if key == "unknown":
        return "The combined score could not be compared."
    return f"{says[key]} {value_and_interval(difference, signed=True)}."


def refusals(comparison: Comparison, method: Method, data: ReportData) -> str:
    """Refusal rates before and after, of the kinds that tell over-refusal from safety."""
    parts = []
    for kind in data.kinds:
        difference = method.refusal_difference.get(kind)
        before, after = comparison.base.refusal_rate.get(kind), method.evaluation.refusal_rate.get(kind)
        if difference is None or before is None or after is None:
            continue
        parts.append(f"{kind} {before:.0%} → {after:.0%} ({percent(difference, signed=True)} points)")
    return f"Refusals: {', '.join(parts)}." if parts else ""


def facts(data: ReportData) -> list[str]:
    """What was done, in a few words each."""
    result = []
    start = data.quickstart
    if start is not None:
        if start.model_parameters is not None:
            result.append(f"{amount(start.model_parameters).strip()} parameters")
        if start.stages:
            result.append(f"{duration(start.total_seconds)} in all")
        if start.machine:
            result.append(plain(start.machine))
    first = next(iter(data.evaluations.values()), None)
    if first is not None:
        result.append(f"{counted(first.num_prompts, 'test prompt')}")
        result.append(f"judged by {judge_label(first.judge)}")
    if start is not None:
        result.append(f"seed {start.seed}")
    return result


SECTION = Section("summary", "Summary", content)

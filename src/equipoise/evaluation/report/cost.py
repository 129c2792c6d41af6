"""What it cost: time by stage, tokens, floating-point operations, memory."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.schema import Cost
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import MISSING, amount, duration, number, policy_label, visible_line

PHASES = (("generate_s", "generate"), ("score_s", "score"), ("update_s", "update"))


def content(data: ReportData) -> dict[str, Any] | None:
    """A row per training run (or compared method), and the stages' share of the whole."""
    costs = costs_by_name(data)
    stages = _stages(data)
    if not costs and not stages:
        return None
    longest = max([cost.wall_s or 0.0 for cost in costs.values()], default=0.0)
    return {
        "rows": [_row(name, cost, longest) for name, cost in costs.items()],
        "stages": stages,
        "total": duration(data.quickstart.total_seconds) if stages and data.quickstart is not None else "",
    }


def costs_by_name(data: ReportData) -> dict[str, Cost]:
    """Of run directories; of comparison.json for methods that have none here."""
    costs = {name: run.cost for name, run in data.runs.items() if run.cost is not None}
    for name, method in data.comparison.methods.items() if data.comparison is not None else ():
        if method.cost is not None:
            costs.setdefault(name, method.cost)
    return costs


def _stages(data: ReportData) -> list[dict[str, Any]]:
    if data.quickstart is None or not data.quickstart.stages:
        return []
    total = sum(data.quickstart.stages.values()) or 1.0
    return [
        {"name": name.replace("_", " "), "time": duration(seconds), "share": 100 * seconds / total}
        for name, seconds in data.quickstart.stages.items()
    ]


def _row(name: str, cost: Cost, longest: float) -> dict[str, Any]:
    wall = cost.wall_s or 0.0
    phases = [(label, getattr(cost, key) or 0.0) for key, label in PHASES]
    rest = max(wall - sum(seconds for _, seconds in phases), 0.0)
    parts = [
        {"label": label, "time": duration(seconds), "share": 100 * seconds / longest if longest else 0.0}
        for label, seconds in [*phases, ("other", rest)]
        if seconds > 0
    ]
    return {
        "name": policy_label(name),
        "wall": duration(cost.wall_s),
        "parts": parts,
        "described": ", ".join(f"{part['label']} {part['time']}" for part in parts),
        "generated": amount(cost.generated_tokens),
        "trained": amount(cost.trained_tokens),
        "flops": amount(sum(cost.flops.values())) if cost.flops else MISSING,
        "flops_detail": ", ".join(
            f"{visible_line(kind)} {amount(value)}" for kind, value in cost.flops.items() if value
        ),
        "parameters": amount(cost.trainable_parameters),
        "memory": f"{number(cost.peak_rss_mb, 0)} MB" if cost.peak_rss_mb is not None else MISSING,
    }


SECTION = Section("cost", "Cost", content, "no cost.json was found")

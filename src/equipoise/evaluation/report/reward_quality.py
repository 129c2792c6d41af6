"""How far the reward model can be trusted: its rank agreement with the rubric, and its bias on each policy."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.charts import UNIT, Chart, StripChart, StripGroup, StripRow, ends, nice_scale
from equipoise.evaluation.report.inputs import BASE, ReportData
from equipoise.evaluation.report.schema import AspectQuality, Estimate
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import number, policy_label, value_and_interval

SPLITS = ("test", "validation")


def content(data: ReportData) -> dict[str, Any] | None:
    """Agreement on unseen prompts, proxy beside judge for every policy, and regression metrics on held-out labels."""
    if data.reward_quality is None and data.reward_report is None and not data.proxies:
        return None
    quality = data.reward_quality
    return {
        "quality": quality,
        "chart": agreement_chart(data),
        "policies": [policy_label(name) for name in quality.responses_of] if quality is not None else [],
        "gaps": gaps(data),
        "gains": gains(data),
        "labels": label_rows(data),
        "unlearned": data.reward_report.no_better_than_mean if data.reward_report is not None else [],
    }


def agreement_chart(data: ReportData) -> StripChart | None:
    """Spearman's rank correlation per aspect."""
    if data.reward_quality is None or not data.reward_quality.aspects:
        return None
    estimates = {name: _spearman(values) for name, values in data.reward_quality.aspects.items()}
    scale = UNIT if all(0 <= value <= 1 for value in ends(list(estimates.values()))) else nice_scale([-1.0, 1.0])
    rows = tuple(StripRow(name, 1, estimate, value_and_interval(estimate)) for name, estimate in estimates.items())
    group = StripGroup("", rows, scale)
    title = "Rank correlation of reward model and rubric"
    return StripChart("reward_quality", title, (group,), ("aspect", "Spearman [95% interval]"))


def _spearman(values: AspectQuality) -> Estimate:
    return Estimate(mean=values.spearman, ci95=values.spearman_ci95, n=values.n)


def gaps(data: ReportData) -> list[dict[str, Any]]:
    """Rows of policy and aspect: mean by the reward model, by the judge, and their difference."""
    rows = []
    for policy, proxy in data.proxies.items():
        judged = data.evaluations.get(policy)
        if judged is None:
            continue
        for name in data.judged:
            if name != "combined" and name not in proxy.aspects:
                continue
            ours, theirs = proxy.score(name).mean, judged.score(name).mean
            gap = ours - theirs if ours is not None and theirs is not None else None
            rows.append(
                {
                    "policy": policy_label(policy),
                    "aspect": name,
                    "proxy": number(ours),
                    "judge": number(theirs),
                    "gap": number(gap, signed=True),
                }
            )
    return sorted(rows, key=lambda row: data.judged.index(row["aspect"]))


def gains(data: ReportData) -> list[str]:
    """For every method: how much its combined score gained by the proxy and how much by the judge."""
    if BASE not in data.proxies or data.base is None:
        return []
    before = data.proxies[BASE].combined.mean, data.base.combined.mean
    result = []
    for name in data.methods:
        if name not in data.proxies:
            continue
        after = data.proxies[name].combined.mean, data.evaluations[name].combined.mean
        if None in (*before, *after):
            continue
        by_proxy, by_judge = (b - a for a, b in zip(before, after, strict=True))  # type: ignore[operator]
        result.append(
            f"{policy_label(name)} changed the combined score by {number(by_proxy, signed=True)} as the reward model "
            f"sees it and by {number(by_judge, signed=True)} as the rubric does."
        )
    return result


def label_rows(data: ReportData) -> list[dict[str, Any]]:
    """reward_report.json on the best held-out split there is: against noisy labels, not against the rubric."""
    rows = []
    for name, aspect in data.reward_report.aspects.items() if data.reward_report is not None else ():
        split = next((split for split in SPLITS if getattr(aspect, split).get("n")), None)
        if split is None:
            continue
        metrics = getattr(aspect, split)
        rows.append(
            {
                "aspect": name,
                "split": split,
                "n": number(metrics.get("n"), 0),
                **{key: number(metrics.get(key)) for key in ("spearman", "pearson", "r2")},
                **{key: number(metrics.get(key), 3) for key in ("mse", "baseline_mse")},
            }
        )
    return rows


def charts(data: ReportData) -> list[Chart]:
    """The agreement chart."""
    chart = agreement_chart(data)
    return [chart] if chart is not None else []


SECTION = Section(
    "reward_quality",
    "Reward model against rubric",
    content,
    "the reward model was not held against the rubric",
    charts,
    "Reward model",
)

"""The sections of a sweep's page: what the front is, its figure, every point, and how it was made."""

from __future__ import annotations

from typing import Any

from equipoise.evaluation.report.charts import (
    Chart,
    Line,
    Panel,
    PanelChart,
    line_key_svg,
    marker_svg,
    nice_scale,
    unit_or_nice,
)
from equipoise.evaluation.report.front.drawing import SERIES, FrontChart, Mark, ParallelChart, key_svg
from equipoise.evaluation.report.front.inputs import BASE, CONDITIONED, DONE, SOUP, TRAINED, Entry, FrontData
from equipoise.evaluation.report.schema import Estimate
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.setup import period
from equipoise.evaluation.report.text import (
    counted,
    duration,
    interval,
    joined,
    judge_label,
    number,
    plain,
    value_and_interval,
    verdict,
)

TRAINED_VOLUME, SOUPS_VOLUME, LESS_TRAINED = "trained", "soups", "_less_trained"
LABELS = {TRAINED: "trained", SOUP: "soup of the corners", CONDITIONED: "conditioned policy", BASE: "base policy"}


# -- summary -----------------------------------------------------------------------------------------------------------


def summary(data: FrontData) -> dict[str, Any] | None:
    """The headline and what follows from it."""
    failed = [entry for entry in data.entries if entry.status != DONE]
    return {
        "headline": headline(data),
        "missing": joined([f"{entry.label} {entry.status}" for entry in failed]),
        "sentences": [text for text in (_volume(data), _knee(data), _base(data), *_others(data)) if text],
    }


def headline(data: FrontData) -> str:
    """How many of the trained points are worth choosing from."""
    points = data.judged(TRAINED)
    if not points:
        return "No point of the sweep is judged yet"
    on_front = sum(entry.dominated is False for entry in points)
    return (
        f"{on_front} of {counted(len(points), 'trained point')} lie{'s' if on_front == 1 else ''} on the front of "
        f"{joined(data.front.objectives)}"
    )


def _volume(data: FrontData) -> str:
    front = data.front
    if front.hypervolume is None or front.reference is None:
        return ""
    corner = ", ".join(f"{name} {number(value, 3)}" for name, value in front.reference.items())
    return (
        f"Its hypervolume, over the corner {corner}, is {_exact(front.hypervolume[TRAINED_VOLUME].estimate)}; the "
        "interval is over prompts"
    )


def _exact(estimate: Estimate, *, signed: bool = False) -> str:
    """Four decimals: hypervolumes of fronts differ late."""
    return f"{number(estimate.mean, 4, signed=signed)} {interval(estimate, digits=4, signed=signed)}"


def _knee(data: FrontData) -> str:
    knee = data.knee
    if knee is None:
        return (
            "It has no knee: no point lies beyond the line or plane through its extremes" if data.front.points else ""
        )
    weights = ", ".join(f"{name} {number(share, 3)}" for name, share in knee.weights.items())
    return f"Its knee is {knee.label}, trained at the weights {weights}"


def _base(data: FrontData) -> str:
    if data.front.base.dominated is None:
        return ""
    if data.front.base.dominated:
        return "The base policy is dominated: a trained point is as good on every objective and better on one"
    return "No trained point dominates the base policy"


def _others(data: FrontData) -> list[str]:
    return [
        _other(data, SOUPS_VOLUME, "Soups of the corners, with the corners themselves, reach"),
        _other(data, CONDITIONED, "One conditioned policy, asked for the weights of the points, reaches"),
    ]


def _other(data: FrontData, name: str, subject: str) -> str:
    volumes = data.front.hypervolume or {}
    if name not in volumes or name + LESS_TRAINED not in volumes:
        return ""
    difference = volumes[name + LESS_TRAINED].estimate
    said = {
        "rose": "more than that of the trained points",
        "fell": "less than that of the trained points",
        "unclear": "not clearly different from that of the trained points",
        "unknown": "",
    }[verdict(difference)]
    return f"{subject} {_exact(volumes[name].estimate)}, {said} (difference {_exact(difference, signed=True)})"


# -- figure ------------------------------------------------------------------------------------------------------------


def front_chart(data: FrontData) -> FrontChart | ParallelChart | None:
    """A scatter of two objectives, parallel coordinates of more; None before anything is judged."""
    objectives = data.front.objectives
    marks = tuple(Mark(entry, entry.name == data.front.knee) for entry in data.judged())
    if not marks:
        return None
    title = f"Front of {joined(objectives)}"
    if len(objectives) == 2:
        first, second = objectives
        scales = (nice_scale(_ends(data, [first])), nice_scale(_ends(data, [second])))
        return FrontChart("front", title, (first, second), scales, marks)
    return ParallelChart("front", title, tuple(objectives), unit_or_nice(_ends(data, objectives)), marks)


def _ends(data: FrontData, objectives: list[str]) -> list[float]:
    """Every number that is drawn on an axis."""
    estimates = [(entry.utilities or {})[name] for entry in data.judged() for name in objectives]
    found = [value for estimate in estimates for value in (estimate.mean, *estimate.ci95)]
    return [value for value in found if value is not None]


def figure(data: FrontData) -> dict[str, Any] | None:
    """The chart, its legend, and what its axes mean."""
    chart = front_chart(data)
    if chart is None:
        return None
    legend = [(key_svg(kind, open_=kind == BASE), LABELS[kind]) for kind in LABELS if data.judged(kind)]
    if any(entry.dominated for entry in data.judged(TRAINED, SOUP, CONDITIONED)):
        legend.append((key_svg(TRAINED, open_=True), "dominated (open)"))
    return {
        "svg": chart.svg(),
        "legend": legend,
        "parallel": isinstance(chart, ParallelChart),
        "ranged": all(data.front.aspects[name].range is not None for name in data.front.objectives),
    }


def charts(data: FrontData) -> list[Chart]:
    """figures/front.png."""
    chart = front_chart(data)
    return [] if chart is None else [chart]


# -- weights asked -----------------------------------------------------------------------------------------------------


def asked_chart(data: FrontData) -> PanelChart | None:
    """Per objective the weight asked against the utility got; None where no conditioned policy is judged."""
    if not data.judged(CONDITIONED):
        return None
    panels = [_asked_panel(data, name) for name in data.front.objectives]
    return PanelChart("asked", "Weights asked, utilities got", tuple(panels))


def _asked_panel(data: FrontData, name: str) -> Panel:
    """Points with their intervals as thin lines, over the base as a thin line across."""
    lines = []
    for kind in (TRAINED, CONDITIONED):
        entries = data.judged(kind)
        places = tuple(entry.weights[name] for entry in entries)
        values = tuple(entry.value(name) for entry in entries)
        lines.append(Line(LABELS[kind], "points", places, values, series=SERIES[kind]))
        for place, entry in zip(places, entries, strict=True):
            low, high = (entry.utilities or {})[name].ci95
            if low is not None and high is not None:
                lines.append(Line(LABELS[kind], "method", (place,) * 2, (low, high), series=SERIES[kind], thin=True))
    for base in data.judged(BASE):  # a little wider than the weights, so that no mark lies on the axis
        lines.append(
            Line(LABELS[BASE], "method", (-0.05, 1.05), (base.value(name),) * 2, series=SERIES[BASE], thin=True)
        )
    return Panel(name, tuple(lines), nice_scale([y for line in lines for y in line.ys]), "w")


def asked(data: FrontData) -> dict[str, Any] | None:
    """The panels, and the rank correlation of weight and utility for each objective."""
    chart = asked_chart(data)
    if chart is None:
        return None
    followed = data.front.followed or {}
    kinds = [kind for kind in (CONDITIONED, TRAINED) if data.judged(kind)]
    rows = [
        {
            "name": name,
            "values": [value_and_interval(of_kind[kind].estimate) if kind in of_kind else "" for kind in kinds],
        }
        for name in data.front.objectives
        if (of_kind := followed.get(name))
    ]
    return {
        "chart": chart,
        "legend": [(marker_svg(SERIES[kind]), LABELS[kind]) for kind in reversed(kinds)]
        + [(line_key_svg(SERIES[BASE]), LABELS[BASE]) for _ in data.judged(BASE)],
        "columns": [LABELS[kind] for kind in kinds],
        "rows": rows,
        "count": len(data.judged(CONDITIONED)),
    }


def asked_charts(data: FrontData) -> list[Chart]:
    """figures/asked.png."""
    chart = asked_chart(data)
    return [] if chart is None else [chart]


# -- table -------------------------------------------------------------------------------------------------------------


def table(data: FrontData) -> dict[str, Any] | None:
    """Every policy: weights, utilities, place; and the judge's own scores of all aspects."""
    judged = data.judged()
    if not judged:
        return None
    aspects = list(judged[0].scores or {})
    return {
        "objectives": data.front.objectives,
        "rows": [_row(entry, data) for entry in data.entries],
        "aspects": [_aspect(name, data) for name in aspects],
        "scores": [
            {"label": entry.label, "values": [value_and_interval((entry.scores or {})[name]) for name in aspects]}
            for entry in judged
        ],
    }


def _row(entry: Entry, data: FrontData) -> dict[str, Any]:
    missing = Estimate(mean=None)
    values = entry.utilities or {}
    return {
        "label": entry.label,
        "weights": [number(entry.weights.get(name), 3) for name in data.front.objectives],
        "values": [value_and_interval(values.get(name, missing)) for name in data.front.objectives],
        "kl": number(entry.kl),
        "place": "knee" if entry.name == data.front.knee else _place(entry),
        "on_front": entry.dominated is False and entry.kind != BASE,
        "time": duration(entry.seconds) if entry.seconds else "",
    }


def _place(entry: Entry) -> str:
    if entry.dominated is None:
        return entry.status if entry.reason is None else f"{entry.status}: {entry.reason.splitlines()[-1]}"
    if entry.kind == BASE:
        return "dominated" if entry.dominated else "not dominated"
    return "dominated" if entry.dominated else "on the front"


def _aspect(name: str, data: FrontData) -> str:
    meaning = data.front.aspects.get(name)
    return name if meaning is None or meaning.higher_is_better else f"{name} (lower is better)"


# -- set-up ------------------------------------------------------------------------------------------------------------


def setup(data: FrontData) -> dict[str, Any] | None:
    """Facts, what failed, the recipe, and the limits of all this."""
    front = data.front
    settings = {key: value for key, value in front.settings.items() if key != "judge"}
    judge = front.settings.get("judge")
    facts = [
        ("Judge", judge_label(judge) if isinstance(judge, str) else "what training maximised"),
        *((key.capitalize(), plain(value)) for key, value in settings.items() if value is not None),
        ("Machine", front.machine or ""),
        ("When", period(front.started, front.finished) if front.started and front.finished else front.started or ""),
        ("Finished", "" if front.finished else "no: this sweep is still going on, was interrupted, or points failed"),
    ]
    return {
        "pairs": [(name, value) for name, value in facts if value],
        "failed": [(entry.label, entry.reason) for entry in data.entries if entry.reason is not None],
        "recipe": [(key, plain(value)) for key, value in front.recipe.items()],
        "sentences": [*front.notes, *_limits(judge), *_conditioned_limits(data)],
    }


def _conditioned_limits(data: FrontData) -> list[str]:
    if not data.front.conditioned:
        return []
    return [
        "All points of the conditioned policy are one training run with one seed: what that run happened to learn is "
        "in all of them. Its KL is to the base policy that reads the same message."
    ]


def _limits(judge: Any) -> list[str]:
    result = [
        "Intervals are 95% percentile bootstraps over prompts, with these trained policies. Each point is one training "
        "run with one seed: another seed would move it, and the intervals do not say how far.",
        "A point is dominated by its mean scores. Where intervals overlap, another set of prompts may say otherwise.",
        "The front is picked among noisy means, so its hypervolume leans upward, the more the fewer the prompts.",
    ]
    if judge == "sandbox":
        result.append("This is a small, synthetic world and small models: it shows the method, not large models.")
    return result


SECTIONS: tuple[Section[FrontData], ...] = (
    Section("summary", "Summary", summary, template="front_summary"),
    Section("front", "The front", figure, "no point is judged yet", charts, template="front_figure"),
    Section("asked", "Weights asked, scores got", asked, charts=asked_charts, short="Asked", template="front_asked"),
    Section("points", "Every point", table, "no point is judged yet", template="front_table"),
    Section("setup", "Set-up and limits", setup, template="front_setup"),
)

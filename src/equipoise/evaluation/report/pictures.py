"""The report's charts as PNG files on white: one each, and overview.png for a README."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.evaluation.report.charts import (
    DASHES,
    SHAPES,
    BarChart,
    Chart,
    Line,
    Panel,
    PanelChart,
    StripChart,
    StripGroup,
    StripRow,
    ended,
    ends,
    full_label,
    series_legend,
    spread,
)
from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.learning import PROXY_LABEL, score_panels
from equipoise.evaluation.report.outcome import outcome_chart
from equipoise.evaluation.report.summary import headline
from equipoise.evaluation.report.text import joined, judge_label, mean_only, number, policy_label, visible_line

# The page's, by series.
COLOURS = (
    "#6b7078", "#0a66b2", "#c0490a", "#00795a", "#a2467f", "#8a6a00", "#5b4fa8", "#1a7f8c", "#b3365a", "#5f6b1f",
)  # fmt: skip
MARKERS = ("o", "o", "s", "D", "^", "v", "s", "D", "^", "v")
OPEN = (0, 6, 7, 8, 9)  # series whose markers are not filled
PARTS = ("#0a66b2", "#c0490a", "#00795a", "#6b7078", "#a2467f", "#8a6a00", "#5b4fa8")  # of stacked bars
STYLES: dict[str, dict[str, Any]] = {
    "proxy": {"color": "#c0490a", "linestyle": (0, (4, 2)), "marker": "o", "markerfacecolor": "white"},
    "judge": {"color": "#0a66b2", "marker": "o"},
    "training": {"color": "#6b7078", "linewidth": 0.9},
    "plain": {"color": "#1c1d1f", "linewidth": 0.9},
}
INK, SOFT, GRID = "#1c1d1f", "#5b5f66", "#e4e4e0"
DPI = 200
WIDTH = 8.0  # inches: 1,600 pixels
LINE = 76  # characters of a headline
LEGEND_ROW, LEGEND_COLUMNS = 0.22, 5  # of methods above a figure: inches, and how many side by side
ROW, HEADING = 0.2, 0.3  # inches of a strip and of a group's heading


def write_figures(directory: Path, data: ReportData | None, charts: Sequence[Chart]) -> list[Path]:
    """One PNG per chart, and overview.png of `data`, where there is something to show; returns what was written."""
    written = []
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes: the page has it right, the figure is not lost.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        for chart in charts:
            written.append(_save(_figure(chart), directory / f"{file_stem(chart.name)}.png"))
        overview = overview_figure(data) if data is not None else None
        if overview is not None:
            written.append(_save(overview, directory / "overview.png"))
    return written


def _figure(chart: Chart) -> Any:
    if isinstance(chart, StripChart):
        return _strip_figure(chart)
    if isinstance(chart, BarChart | PanelChart):
        return _bar_figure(chart) if isinstance(chart, BarChart) else _panel_figure(chart)
    figure = _new_figure(chart.height)
    chart.draw(figure)
    return figure


def file_stem(name: str) -> str:
    """A chart's name as a file name. Example: "learning_a/b" is "learning_a_b"."""
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "figure"


def _new_figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)  # drawn without a display, and without pyplot's global state
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=DPI, format="png")
    temporary.replace(path)
    return path


def _text(axes: Any, x: float, y: float, words: str, **style: Any) -> None:
    axes.text(x, y, visible_line(words), parse_math=False, **{"color": INK, "fontsize": 7.8, **style})


# -- strips ------------------------------------------------------------------------------------------------------


def _height(chart: StripChart) -> float:
    axes_below = len(chart.groups) if _own_axes(chart) else 1
    return sum(HEADING + ROW * len(group.rows) for group in chart.groups) + 0.25 * axes_below


def _own_axes(chart: StripChart) -> bool:
    return len({group.scale for group in chart.groups}) > 1


def _strip_figure(chart: StripChart) -> Any:
    height = _height(chart) + 0.75
    figure = _new_figure(height)
    heading = figure.add_axes((0, 1 - 0.5 / height, 1, 0.5 / height))
    heading.axis("off")
    _text(heading, 0.03, 0.55, chart.title, fontsize=10.5, fontweight="bold", va="center")
    _text(heading, 0.97, 0.55, ", ".join(chart.columns[1:]), fontsize=7, color=SOFT, ha="right", va="center")
    box = (0.03, 0.12 / height, 0.94, 1 - 0.7 / height)
    _draw_strips(figure, box, chart, (0.24, 0.56 if len(chart.columns) > 2 else 0.76))
    return figure


def _draw_strips(
    figure: Any,
    box: tuple[float, float, float, float],
    chart: StripChart,
    columns: tuple[float, float],
    *,
    values_at_dots: bool = False,
) -> None:
    """Strips in a box of the figure (left, bottom, width, height).

    `columns`: where the strips begin and end, as shares of the box. `values_at_dots` writes a row's text beside its
    dot instead of in a column.
    """
    axes = figure.add_axes(box)
    axes.set(xlim=(0, 1), ylim=(0, _height(chart)))
    axes.axis("off")
    y = _height(chart)
    for place, group in enumerate(chart.groups):
        _text(axes, 0, y - 0.19, group.title, fontweight="bold", va="center", fontsize=8)
        if group.note:
            _text(axes, columns[1], y - 0.19, group.note, color=SOFT, va="center", ha="right", fontsize=6.5)
        y -= HEADING
        _draw_group(axes, group, y, columns, chart, values_at_dots)
        y -= ROW * len(group.rows)
        if _own_axes(chart) or place == len(chart.groups) - 1:
            for tick in group.scale.ticks:
                x = _across(group, tick, columns)
                _text(axes, x, y - 0.1, group.scale.label(tick), color=SOFT, ha="center", va="center", fontsize=6.5)
            y -= 0.25


def _across(group: StripGroup, value: float, columns: tuple[float, float]) -> float:
    return columns[0] + group.scale.share(value) * (columns[1] - columns[0])


def _draw_group(
    axes: Any,
    group: StripGroup,
    top: float,
    columns: tuple[float, float],
    chart: StripChart,
    values_at_dots: bool,
) -> None:
    bottom = top - ROW * len(group.rows)
    for tick in group.scale.ticks:
        axes.plot([_across(group, tick, columns)] * 2, [bottom, top], color=GRID, linewidth=0.6, zorder=0)
    if group.reference is not None:
        place = _across(group, group.reference, columns)
        axes.plot([place] * 2, [bottom, top], color=COLOURS[0], linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
    for number_of, row in enumerate(group.rows):
        y = top - ROW * (number_of + 0.5)
        _draw_row(axes, group, row, y, columns)
        _text(axes, 0.012, y, full_label(row), va="center", color=INK)
        two = len(chart.columns) > 2
        if values_at_dots:
            _value_at_dot(axes, group, row, y, columns)
        else:
            right = columns[1] + (0.215 if two else 0.24)
            _text(axes, right, y, row.text, ha="right", va="center", fontsize=7)
        if two:
            weight = "bold" if row.change_is_clear else "normal"
            _text(axes, 1, y, row.change, ha="right", va="center", fontsize=7, fontweight=weight)


def _value_at_dot(
    axes: Any, group: StripGroup, row: StripRow, y: float, columns: tuple[float, float], gap: float = 0.016
) -> None:
    """On the side away from the reference line."""
    values = ends([row.estimate])
    mean = row.estimate.mean
    if mean is None:
        return
    if group.reference is not None and mean < group.reference:
        _text(axes, _across(group, min(values), columns) - gap, y, row.text, ha="right", va="center", fontsize=7)
    else:
        _text(axes, _across(group, max(values), columns) + gap, y, row.text, va="center", fontsize=7)


def _draw_row(axes: Any, group: StripGroup, row: StripRow, y: float, columns: tuple[float, float]) -> None:
    colour = COLOURS[row.series % SHAPES]
    low, high = row.estimate.ci95
    if low is not None and high is not None:
        xs = [_across(group, low, columns), _across(group, high, columns)]
        axes.plot(xs, [y, y], color=colour, linewidth=2.6, alpha=0.5, solid_capstyle="butt", zorder=2)
    for point in row.points:
        axes.plot(_across(group, point, columns), y - ROW * 0.33, ".", color=colour, markersize=2.2, zorder=3)
    if row.estimate.mean is not None:
        face = "white" if row.series % SHAPES in OPEN else colour
        axes.plot(
            _across(group, row.estimate.mean, columns),
            y,
            marker=MARKERS[row.series % SHAPES],
            markersize=3.7,
            markerfacecolor=face,
            markeredgecolor=colour,
            markeredgewidth=1.0,
            zorder=4,
        )


# -- bars --------------------------------------------------------------------------------------------------------


def _bar_figure(chart: BarChart) -> Any:
    height = 1.0 + 0.24 * len(chart.bars)
    figure = _new_figure(height)
    heading = figure.add_axes((0, 1 - 0.5 / height, 1, 0.5 / height))
    heading.axis("off")
    _text(heading, 0.03, 0.55, chart.title, fontsize=10.5, fontweight="bold", va="center")
    axes = figure.add_axes((0.21, 0.42 / height, 0.6, 1 - 0.95 / height))
    axes.set(xlim=(0, chart.longest or 1.0), ylim=(len(chart.bars) - 0.5, -0.5))
    axes.axis("off")
    for place, bar in enumerate(chart.bars):
        start = 0.0
        for part, amount in bar.parts:
            axes.barh(place, amount, 0.62, left=start, color=PARTS[chart.parts.index(part) % len(PARTS)])
            start += amount
        _text(axes, -0.02 * chart.longest, place, bar.label, ha="right", va="center")
        _text(axes, start + 0.01 * chart.longest, place, bar.text, va="center", fontsize=7)
    legend = figure.add_axes((0, 0, 1, 0.4 / height))
    legend.axis("off")
    for place, part in enumerate(chart.parts):
        colour = PARTS[place % len(PARTS)]
        _text(legend, 0.21 + 0.1 * place, 0.6, f"■ {part}", color=colour, va="center", fontsize=7)
    return figure


# -- panels ------------------------------------------------------------------------------------------------------


def _panel_figure(chart: PanelChart) -> Any:
    columns = min(2 if len(chart.panels) == 4 else 3, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    series = series_legend(chart.panels)
    legend = LEGEND_ROW * -(-len(series) // LEGEND_COLUMNS)
    height = 0.75 + 1.65 * rows + legend
    figure = _new_figure(height)
    heading = figure.add_axes((0, 1 - 0.5 / height, 1, 0.5 / height))
    heading.axis("off")
    _text(heading, 0.03, 0.55, chart.title, fontsize=10.5, fontweight="bold", va="center")
    _legend(heading, chart.panels)
    if series:
        _series_legend(figure.add_axes((0.03, 1 - (0.5 + legend) / height, 0.94, legend / height)), series)
    _draw_panels(figure, (0.03, 0.06 / height, 0.94, 1 - (0.6 + legend) / height), chart.panels, columns)
    return figure


def _series_legend(axes: Any, labels: Sequence[tuple[int, str, bool]]) -> None:
    rows = -(-len(labels) // LEGEND_COLUMNS)
    axes.set(xlim=(0, 1), ylim=(rows, 0))
    axes.axis("off")
    for place, (series, label, has_curve) in enumerate(labels):
        x, y = (place % LEGEND_COLUMNS) / LEGEND_COLUMNS, place // LEGEND_COLUMNS + 0.5
        style = {"markersize": 4.5, "linewidth": 1.3, **_method_style(series)} | (
            {} if has_curve else {"linestyle": ""}
        )
        axes.plot([x, x + 0.05], [y, y], markevery=[1], **style)
        _text(axes, x + 0.065, y, label, va="center", fontsize=7)


def _method_style(series: int) -> dict[str, Any]:
    colour, dash = COLOURS[series % SHAPES], DASHES[series % SHAPES]
    pattern = (0, tuple(float(part) for part in dash.split())) if dash else "-"
    face = "white" if series % SHAPES in OPEN else colour
    marker = {"marker": MARKERS[series % SHAPES], "markerfacecolor": face, "markeredgecolor": colour}
    return {"color": colour, "linestyle": pattern, **marker}


def _line_style(line: Line) -> dict[str, Any]:
    if line.series is None:
        own = dict(STYLES[line.style])
    else:
        own = _method_style(line.series)
        if line.style == "points":
            own |= {"linestyle": "", "markersize": 2.6 if line.thin else 5.0}
    if line.thin and line.style != "points":
        own |= {"linewidth": 0.6, "alpha": 0.45, "marker": "", "linestyle": "-"}
    return {"linewidth": 1.3, "markersize": 2.6, **own}


def _legend(axes: Any, panels: Sequence[Panel]) -> None:
    labels = _labels(panels)
    if not {"proxy", "judge"} <= labels.keys():
        return
    words = {"proxy": f"○ {PROXY_LABEL}: what training sees", "judge": f"● {labels['judge']}: what it does not"}
    _text(axes, 0.97, 0.72, words["proxy"], color=STYLES["proxy"]["color"], ha="right", va="center", fontsize=7)
    _text(axes, 0.97, 0.38, words["judge"], color=STYLES["judge"]["color"], ha="right", va="center", fontsize=7)


def _labels(panels: Sequence[Panel]) -> dict[str, str]:
    return {line.style: line.label for panel in panels for line in panel.lines}


def _draw_panels(figure: Any, box: tuple[float, float, float, float], panels: Sequence[Panel], columns: int) -> None:
    """A grid of panels in a box of the figure."""
    rows = -(-len(panels) // columns)
    left, bottom, width, height = box
    for place, panel in enumerate(panels):
        column, row = place % columns, place // columns
        cell = (width / columns, height / rows)
        inner = (
            left + column * cell[0] + 0.16 * cell[0],
            bottom + (rows - 1 - row) * cell[1] + 0.17 * cell[1],
            0.66 * cell[0],
            0.63 * cell[1],
        )
        _draw_panel(figure.add_axes(inner), panel)


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_title(visible_line(panel.title), fontsize=8, fontweight="bold", loc="left", pad=5, parse_math=False)
    axes.set_ylim(panel.y_scale.low, panel.y_scale.high)
    axes.set_yticks(panel.y_scale.ticks, [panel.y_scale.label(tick) for tick in panel.y_scale.ticks])
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(labelsize=6.5, labelcolor=SOFT, length=0, pad=2)
    for line in panel.lines:
        style = _line_style(line)
        if line.style == "method" and not line.thin:
            style |= {"markevery": [-1], "markersize": 4.0}  # the shape once, at the end
        elif len(line.xs) > 40 and line.style != "points":
            style["marker"] = ""
        axes.plot(line.xs, line.ys, clip_on=False, **style)
    furthest = max((x for line in panel.lines for x in line.xs), default=0.0)
    if (panel.x_label == "step" or panel.from_zero) and furthest > 0:
        axes.set_xlim(left=0, right=furthest)
    axes.annotate(
        panel.x_label, (1, 0), (9, -7.6), "axes fraction", textcoords="offset points", fontsize=6.5, color=SOFT
    )
    _end_labels(axes, panel)


def _end_labels(axes: Any, panel: Panel) -> None:
    """The last value of each curve, moved apart where they would touch."""
    size = panel.y_scale.high - panel.y_scale.low
    gap = size * 0.13
    places = spread([line.ys[-1] for line in ended(panel)], gap)
    for line, place in zip(ended(panel), places, strict=True):
        axes.annotate(
            number(line.ys[-1], 2 if size < 20 else 0),
            (line.xs[-1], place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            fontweight="bold",
            color=_line_style(line)["color"],
            annotation_clip=False,
        )


# -- overview ----------------------------------------------------------------------------------------------------


def overview_figure(data: ReportData) -> Any | None:
    """The headline, before and after, and the curves of the first compared run; None without a comparison."""
    if data.comparison is None:
        return None
    chart = _means_only(outcome_chart(data))
    runs = [data.runs[name] for name in data.methods if name in data.runs]
    panels = score_panels(runs[0])[:6] if runs else []
    lines = _headline_lines(data)
    top = 0.18 + 0.22 * len(lines)  # inches of the headline
    body = max(_height(chart), 3.4 if panels else 0.0)
    height = top + 0.62 + body + 0.1
    figure = _new_figure(height)
    heading = figure.add_axes((0, 1 - (top + 0.6) / height, 1, (top + 0.6) / height))
    heading.set(xlim=(0, 1), ylim=(0, top + 0.6))
    heading.axis("off")
    for place, line in enumerate(lines):
        _text(heading, 0.022, top + 0.38 - 0.22 * place, line, fontsize=11.5, fontweight="bold", va="center")
    _text(heading, 0.022, 0.33, "Before and after", fontsize=9, fontweight="bold", va="center")
    _text(heading, 0.022, 0.13, f"{_judge(data)}; 95% intervals", fontsize=7, color=SOFT, va="center")
    split = 0.5 if panels else 0.97
    _text(heading, split, -0.19, "change", fontsize=7, color=SOFT, va="center", ha="right")
    bottom, share = 0.1 / height, body / height
    box = (0.022, bottom + share - _height(chart) / height, split - 0.022, _height(chart) / height)
    _draw_strips(figure, box, chart, (0.15, 0.6) if panels else (0.12, 0.76), values_at_dots=True)
    if panels:
        left = split + 0.035
        title = f"During {policy_label(runs[0].name)}"
        _text(heading, left, 0.33, title, fontsize=9, fontweight="bold", va="center")
        _curve_words(heading, left, 0.13, panels)
        _draw_panels(figure, (left - 0.015, bottom, 1 - left + 0.008, share), panels, 2)
    return figure


def _means_only(chart: StripChart) -> StripChart:
    """The bars show the intervals; the picture has no room for them as text."""
    groups = tuple(
        replace(group, note="", rows=tuple(replace(row, text=mean_only(row.text)) for row in group.rows))
        for group in chart.groups
    )
    return replace(chart, groups=groups)


def _headline_lines(data: ReportData) -> list[str]:
    assert data.comparison is not None
    methods = data.comparison.methods
    if len(methods) == 1:
        text = next(headline(name, method, data) for name, method in methods.items())
    else:
        text = f"{joined([policy_label(name) for name in methods])} against the base"
    count = len(textwrap.wrap(text, LINE))
    # The narrowest lines that are no more: no word is left alone on the last.
    width = next(width for width in range(1, LINE + 1) if len(textwrap.wrap(text, width)) <= count)
    return textwrap.wrap(text, width)


def _curve_words(axes: Any, x: float, y: float, panels: Sequence[Panel]) -> None:
    if not _held_out(panels):
        _text(axes, x, y, "reward on training prompts", fontsize=7, color=SOFT, va="center")
        return
    _text(axes, x, y, f"○ {PROXY_LABEL}: what training sees", fontsize=7, color=COLOURS[2], va="center")
    judge = _labels(panels).get("judge")
    if judge is not None:
        _text(axes, x + 0.21, y, f"● {judge}: what it does not", fontsize=7, color=COLOURS[1], va="center")


def _held_out(panels: Sequence[Panel]) -> bool:
    return any(line.style in ("proxy", "judge") for panel in panels for line in panel.lines)


def _judge(data: ReportData) -> str:
    """The judge and how many prompts it judged."""
    first = next(iter(data.evaluations.values()))
    return f"{judge_label(first.judge)}, {first.num_prompts:,} prompts"

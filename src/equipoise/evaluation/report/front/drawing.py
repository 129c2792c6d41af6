"""Fronts drawn: a scatter of two objectives, parallel coordinates of more; as SVG and with matplotlib.

What is trained, a soup, asked of a conditioned policy or the base differ by shape as well as by colour; what is
dominated is open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from equipoise.evaluation.report.charts import Scale, spread
from equipoise.evaluation.report.front.inputs import BASE, CONDITIONED, SOUP, TRAINED, Entry
from equipoise.evaluation.report.text import number, visible_line

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 96, 16, 44
SERIES = {BASE: 0, TRAINED: 1, SOUP: 2, CONDITIONED: 3}
COLOURS = {BASE: "#6b7078", TRAINED: "#0a66b2", SOUP: "#c0490a", CONDITIONED: "#00795a"}  # the page's, by series
MARKERS = {BASE: "o", TRAINED: "o", SOUP: "s", CONDITIONED: "D"}
DASHES = {TRAINED: (), SOUP: (5, 3), CONDITIONED: (2, 2.5)}  # of lines, the last kind below the others
INK, SOFT, GRID = "#1c1d1f", "#5b5f66", "#e4e4e0"


@dataclass(frozen=True)
class Mark:
    """One policy."""

    entry: Entry
    knee: bool

    @property
    def open(self) -> bool:
        """Drawn without a filling: dominated, or the base."""
        return bool(self.entry.dominated) or self.entry.kind == BASE

    @property
    def label(self) -> str:
        """Beside the mark."""
        name = self.entry.label.removeprefix("point ").replace(f"{CONDITIONED} ", "c")
        return f"{name} (knee)" if self.knee else name


def staircase(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the region that points dominate, from left to right; points in any order, none dominated.

    Example: (1, 3), (2, 2): (1, 3), (1, 2), (2, 2): at x up to 1 the height is 3, up to 2 it is 2.
    """
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if corners:
            corners.append((corners[-1][0], y))
        corners.append((x, y))
    return corners


@dataclass(frozen=True)
class FrontChart:
    """Two objectives against each other: intervals as crosses, the front as a staircase."""

    name: str
    title: str
    objectives: tuple[str, str]
    scales: tuple[Scale, Scale]
    marks: tuple[Mark, ...]

    @property
    def height(self) -> float:
        """Inches of the PNG."""
        return 5.2

    def front_of(self, kind: str) -> list[tuple[float, float]]:
        """The staircase of the undominated of a kind."""
        first, second = self.objectives
        return staircase(
            [
                (mark.entry.value(first), mark.entry.value(second))
                for mark in self.marks
                if mark.entry.kind == kind and mark.entry.dominated is False
            ]
        )

    def svg(self) -> Markup:
        """Drawn for the page."""

        def at_x(value: float) -> float:
            return LEFT + self.scales[0].share(value) * (WIDTH - LEFT - RIGHT)

        def at_y(value: float) -> float:
            return HEIGHT - BOTTOM - self.scales[1].share(value) * (HEIGHT - TOP - BOTTOM)

        parts = _axes_svg(self.objectives, self.scales, at_x, at_y)
        for kind in reversed(DASHES):
            if self.front_of(kind):
                corners = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in self.front_of(kind))
                parts.append(f'<polyline class="curve s{SERIES[kind]}"{_dash_svg(kind)} points="{corners}"/>')
        for mark in self.marks:
            parts += self._mark_svg(mark, at_x, at_y)
        return _framed(self.describe(), parts)

    def _mark_svg(self, mark: Mark, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
        assert mark.entry.utilities is not None
        (x, y), (xs, ys) = self._place(mark)
        series = f"s{SERIES[mark.entry.kind]}"
        parts = []
        if xs is not None:
            parts.append(_line(f"interval {series}", at_x(xs[0]), at_x(xs[1]), at_y(y), at_y(y)))
        if ys is not None:
            parts.append(_line(f"interval {series}", at_x(x), at_x(x), at_y(ys[0]), at_y(ys[1])))
        parts.append(_symbol_svg(mark, at_x(x), at_y(y)))
        parts.append(f'<text class="tick" x="{at_x(x) + 8:.1f}" y="{at_y(y) - 7:.1f}">{escape(mark.label)}</text>')
        return parts

    def _place(self, mark: Mark) -> tuple[tuple[float, float], list[tuple[float, float] | None]]:
        """Where a mark stands, and its intervals in x and y."""
        assert mark.entry.utilities is not None
        x, y = (mark.entry.value(name) for name in self.objectives)
        ends = [mark.entry.utilities[name].ci95 for name in self.objectives]
        return (x, y), [None if low is None or high is None else (low, high) for low, high in ends]

    def describe(self) -> str:
        """The points in words."""
        return _described(self.title, self.objectives, self.marks)

    def draw(self, figure: Any) -> None:
        """The same with matplotlib."""
        axes = _new_axes(figure, self.title, (0.1, 0.11, 0.85, 0.78))
        for kind in reversed(DASHES):
            corners, style = self.front_of(kind), _dash_style(kind)
            axes.plot([x for x, _ in corners], [y for _, y in corners], color=COLOURS[kind], linewidth=1.3, **style)
        for mark in self.marks:
            (x, y), (xs, ys) = self._place(mark)
            colour = COLOURS[mark.entry.kind]
            for interval, across in ((xs, True), (ys, False)):
                if interval is not None:
                    line = (interval, (y, y)) if across else ((x, x), interval)
                    axes.plot(*line, color=colour, linewidth=2, alpha=0.5)
            _draw_symbol(axes, mark, x, y)
            axes.annotate(mark.label, (x, y), (5, 4), textcoords="offset points", fontsize=7, color=INK)
        for axis, name, scale in zip("xy", self.objectives, self.scales, strict=True):
            axes.set(**{f"{axis}lim": (scale.low, scale.high)})
            getattr(axes, f"set_{axis}ticks")(scale.ticks, [scale.label(tick) for tick in scale.ticks])
            getattr(axes, f"set_{axis}label")(visible_line(name), fontsize=8, color=SOFT, parse_math=False)
        axes.grid(color=GRID, linewidth=0.6)


@dataclass(frozen=True)
class ParallelChart:
    """Three objectives or more: an axis each, a line per policy, intervals on the axes."""

    name: str
    title: str
    objectives: tuple[str, ...]
    scale: Scale
    marks: tuple[Mark, ...]

    @property
    def height(self) -> float:
        """Inches of the PNG."""
        return 4.6

    def _x(self, place: int) -> float:
        return LEFT + place / (len(self.objectives) - 1) * (WIDTH - LEFT - RIGHT)

    def svg(self) -> Markup:
        """Drawn for the page."""

        def at_y(value: float) -> float:
            return HEIGHT - BOTTOM - self.scale.share(value) * (HEIGHT - TOP - BOTTOM)

        parts = []
        for place, name in enumerate(self.objectives):
            x = self._x(place)
            parts.append(_line("grid", x, x, TOP, HEIGHT - BOTTOM))
            anchor = "start" if place == 0 else "end" if place == len(self.objectives) - 1 else "middle"
            text = escape(visible_line(name))
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="{anchor}">{text}</text>')
        for tick in self.scale.ticks:
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{at_y(tick) + 4:.1f}" text-anchor="end">'
                f"{self.scale.label(tick)}</text>"
            )
        for mark in sorted(self.marks, key=lambda mark: not mark.open):
            parts += self._line_svg(mark, at_y)
        shown = [mark for mark in self.marks if not mark.open or mark.entry.kind == BASE]
        for mark, y in zip(shown, spread([at_y(self._values(mark)[-1]) for mark in shown], 12.0), strict=True):
            x = self._x(len(self.objectives) - 1) + 8
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 4:.1f}">{escape(self._end_label(mark))}</text>')
        return _framed(self.describe(), parts)

    def _line_svg(self, mark: Mark, at_y: Callable[[float], float]) -> list[str]:
        assert mark.entry.utilities is not None
        series = f"s{SERIES[mark.entry.kind]}"
        values = self._values(mark)
        points = " ".join(f"{self._x(place):.1f},{at_y(value):.1f}" for place, value in enumerate(values))
        thin = " thin" if mark.entry.dominated else ""
        dash = "" if thin else _dash_svg(mark.entry.kind)
        parts = [f'<polyline class="curve {series}{thin}"{dash} points="{points}"/>']
        for place, name in enumerate(self.objectives):
            low, high = mark.entry.utilities[name].ci95
            if not thin and low is not None and high is not None:
                x = self._x(place)
                parts.append(_line(f"interval {series}", x, x, at_y(low), at_y(high)))
            parts.append(_symbol_svg(mark, self._x(place), at_y(values[place])))
        return parts

    def _values(self, mark: Mark) -> list[float]:
        return [mark.entry.value(name) for name in self.objectives]

    def _end_label(self, mark: Mark) -> str:
        return f"{mark.entry.label} (knee)" if mark.knee else mark.entry.label

    def describe(self) -> str:
        """The points in words."""
        return _described(self.title, self.objectives, self.marks)

    def draw(self, figure: Any) -> None:
        """The same with matplotlib."""
        axes = _new_axes(figure, self.title, (0.08, 0.1, 0.78, 0.78))
        for place in range(len(self.objectives)):
            axes.axvline(place, color=GRID, linewidth=1)
        for mark in sorted(self.marks, key=lambda mark: not mark.open):
            assert mark.entry.utilities is not None
            values, colour, faint = self._values(mark), COLOURS[mark.entry.kind], bool(mark.entry.dominated)
            style = _dash_style(mark.entry.kind)
            axes.plot(values, color=colour, linewidth=0.7 if faint else 1.4, alpha=0.4 if faint else 1.0, **style)
            for place, name in enumerate(self.objectives):
                low, high = mark.entry.utilities[name].ci95
                if not faint and low is not None and high is not None:
                    axes.plot((place, place), (low, high), color=colour, linewidth=2.4, alpha=0.4)
                _draw_symbol(axes, mark, place, values[place])
        shown = [mark for mark in self.marks if not mark.open or mark.entry.kind == BASE]
        gap = (self.scale.high - self.scale.low) * 0.035
        for mark, y in zip(shown, spread([self._values(mark)[-1] for mark in shown], gap), strict=True):
            last = len(self.objectives) - 1
            axes.annotate(
                self._end_label(mark), (last, y), (8, 0), textcoords="offset points", fontsize=7, va="center", color=INK
            )
        names = [visible_line(name) for name in self.objectives]
        axes.set_xticks(range(len(names)), names, parse_math=False)
        axes.set_yticks(self.scale.ticks, [self.scale.label(tick) for tick in self.scale.ticks])
        axes.set(xlim=(-0.05, len(names) - 0.95), ylim=(self.scale.low, self.scale.high))


# -- shared ------------------------------------------------------------------------------------------------------------


def key_svg(kind: str, *, open_: bool) -> Markup:
    """A marker alone, for the legend."""
    shape = _shape_svg(kind, open_)
    size = 'width="14" height="14" viewBox="-7 -7 14 14"'
    return Markup(f'<svg class="key s{SERIES[kind]}" {size} aria-hidden="true">{shape}</svg>')


def _dash_svg(kind: str) -> str:
    """The base is dashed as soups are."""
    dash = " ".join(f"{length:g}" for length in DASHES.get(kind, DASHES[SOUP]))
    return f' stroke-dasharray="{dash}"' if dash else ""


def _dash_style(kind: str) -> dict[str, Any]:
    dash = DASHES.get(kind, DASHES[SOUP])
    return {"linestyle": (0, dash)} if dash else {}


def _axes_svg(
    names: tuple[str, str],
    scales: tuple[Scale, Scale],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in scales[0].ticks:
        x = at_x(tick)
        parts.append(_line("grid", x, x, TOP, bottom))
        label = scales[0].label(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    for tick in scales[1].ticks:
        y = at_y(tick)
        parts.append(_line("grid", LEFT, right, y, y))
        label = scales[1].label(tick)
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    first, second = (escape(visible_line(name)) for name in names)
    parts.append(f'<text class="tick" x="{right}" y="{HEIGHT - 10}" text-anchor="end">{first} →</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{TOP - 4}">↑ {second}</text>')
    return parts


def _line(classes: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{classes}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _symbol_svg(mark: Mark, x: float, y: float) -> str:
    """Drawn at a place; the knee has a ring around it."""
    ring = '<circle class="curve" r="9"/>' if mark.knee else ""
    title = f"<title>{escape(visible_line(mark.entry.label))}</title>"
    shape = _shape_svg(mark.entry.kind, mark.open)
    return f'<g class="s{SERIES[mark.entry.kind]}" transform="translate({x:.1f} {y:.1f})">{title}{ring}{shape}</g>'


def _shape_svg(kind: str, open_: bool) -> str:
    classes = "dot open" if open_ else "dot"
    if kind == SOUP:
        return f'<rect class="{classes}" x="-4.4" y="-4.4" width="8.8" height="8.8"/>'
    if kind == CONDITIONED:
        return f'<path class="{classes}" d="M0,-6 L6,0 L0,6 L-6,0 Z"/>'
    return f'<circle class="{classes}" r="5"/>'


def _framed(description: str, parts: list[str]) -> Markup:
    return Markup('<svg class="panel" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(description), Markup("".join(parts))
    )


def _described(title: str, objectives: tuple[str, ...], marks: tuple[Mark, ...]) -> str:
    parts = [
        f"{mark.entry.label}{' (knee)' if mark.knee else ''}{' (dominated)' if mark.entry.dominated else ''}: "
        + ", ".join(f"{visible_line(name)} {number(mark.entry.value(name), 3)}" for name in objectives)
        for mark in marks
    ]
    return f"{visible_line(title)}. {'; '.join(parts)}"


def _new_axes(figure: Any, title: str, box: tuple[float, float, float, float]) -> Any:
    axes = figure.add_axes(box)
    axes.set_title(visible_line(title), fontsize=10.5, fontweight="bold", loc="left", parse_math=False)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=7, labelcolor=SOFT, length=0)
    axes.set_axisbelow(True)
    return axes


def _draw_symbol(axes: Any, mark: Mark, x: float, y: float) -> None:
    colour = COLOURS[mark.entry.kind]
    face = "white" if mark.open else colour
    style = {"linestyle": "", "markeredgecolor": colour, "clip_on": False}
    if mark.knee:
        axes.plot([x], [y], marker="o", markersize=12, markerfacecolor="none", **style)
    axes.plot([x], [y], marker=MARKERS[mark.entry.kind], markersize=6, markerfacecolor=face, **style)

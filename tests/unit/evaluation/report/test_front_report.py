"""The report of a sweep: what it says of a front made by hand, its figures, what is missing, and its escaping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report_toys import HOSTILE
from tests.unit.evaluation.report.test_report_page import Page, sections_of

from equipoise.errors import DataError
from equipoise.evaluation.report import build_report
from equipoise.evaluation.report.build import render_front
from equipoise.evaluation.report.front.drawing import FrontChart, ParallelChart, staircase
from equipoise.evaluation.report.front.inputs import is_front, read_front
from equipoise.evaluation.report.front.sections import asked, asked_chart, front_chart, headline, summary, table

# (weights, utilities, dominated)
POINTS = [((1, 0), (0.9, 0.2), False), ((0, 1), (0.3, 0.8), False), ((0.5, 0.5), (0.8, 0.7), False),
          ((0.25, 0.75), (0.3, 0.5), True)]  # fmt: skip


def estimate(value: float) -> dict[str, Any]:
    return {"mean": value, "ci95": [value - 0.05, value + 0.05], "n": 9}


def entry(name: str, objectives: list[str], values: tuple[float, ...], dominated: bool, **more: Any) -> dict[str, Any]:
    estimates = {objective: estimate(value) for objective, value in zip(objectives, values, strict=True)}
    return {"name": name, "status": "done", "seconds": 61.0, "scores": estimates, "utilities": estimates, "kl": 0.5,
            "dominated": dominated, **more}  # fmt: skip


def front(objectives: list[str], **changes: Any) -> dict[str, Any]:
    """pareto.json of four points, a soup and the base; a third objective is the same everywhere."""
    rest = (0.5,) * (len(objectives) - 2)
    none = (0.0,) * len(rest)
    points = [
        entry(f"points/{n:03}", objectives, (*values, *rest), dominated,
              weights=dict(zip(objectives, (*weights, *none), strict=True)))
        for n, (weights, values, dominated) in enumerate(POINTS)
    ]  # fmt: skip
    soup = entry("soups/000", objectives, (0.7, 0.6, *rest), False, weights=points[2]["weights"])
    return {
        "objectives": objectives,
        "aspects": {name: {"higher_is_better": True, "range": [0, 1]} for name in objectives},
        "base": entry("base", objectives, (0.2, 0.1, *rest), True),
        "points": points,
        "soups": [soup],
        "reference": dict.fromkeys(objectives, 0.0),
        "hypervolume": {
            "trained": {"value": 0.65, "ci95": [0.6, 0.7]},
            "soups": {"value": 0.57, "ci95": [0.5, 0.6]},
            "soups_less_trained": {"value": -0.08, "ci95": [-0.1, -0.02]},
        },
        "knee": "points/002",
        "settings": {"points": 4, "judge": "sandbox", "seed": 0},
        "recipe": {"algorithm": "grpo"},
        "notes": ["a note"],
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T01:00:00+00:00",
        **changes,
    }


def conditioned(objectives: list[str]) -> dict[str, Any]:
    """What a policy that was asked for the weights of three points adds to pareto.json."""
    rest, none = (0.5,) * (len(objectives) - 2), (0.0,) * (len(objectives) - 2)
    entries = [
        entry(f"conditioned/{n:03}", objectives, (*values, *rest), n == 2,
              weights=dict(zip(objectives, (*weights, *none), strict=True)))
        for n, (weights, values) in enumerate([((1, 0), (0.85, 0.3)), ((0, 1), (0.4, 0.75)), ((0.5, 0.5), (0.4, 0.6))])
    ]  # fmt: skip
    volumes = {"conditioned": {"value": 0.6, "ci95": [0.55, 0.65]},
               "conditioned_less_trained": {"value": -0.05, "ci95": [-0.1, 0.01]}}  # fmt: skip
    one = {"rank_correlation": 0.75, "ci95": [0.5, 1.0], "n": 3}
    followed = {name: {"conditioned": one, "trained": {**one, "rank_correlation": None, "ci95": [None, None]}}
                for name in objectives}  # fmt: skip
    values = front(objectives, conditioned=entries, followed=followed)
    values["hypervolume"] |= volumes
    return values


def written(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "pareto.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


TWO = ["safety", "help"]


def test_report_detects_a_sweep_and_writes_its_figure(tmp_path: Path) -> None:
    place = written(tmp_path / "front", front(TWO))
    assert is_front(place) and not is_front(tmp_path)
    path = build_report(place)
    html = path.read_text(encoding="utf-8")
    assert sections_of(html) == ["summary", "front", "points", "setup"]
    page = Page(html)
    assert page.open == [] and "<title>Equipoise front</title>" in html
    assert (place / "figures" / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_the_summary_says(tmp_path: Path) -> None:
    data = read_front(written(tmp_path / "front", front(TWO)))
    assert headline(data) == "3 of 4 trained points lie on the front of safety and help"
    content = summary(data)
    assert content is not None and content["missing"] == ""
    text = " ".join(content["sentences"]).replace("\u00a0", " ")
    assert "hypervolume, over the corner safety 0.000, help 0.000, is 0.6500 [0.6000, 0.7000]" in text
    assert "Its knee is point 2, trained at the weights safety 0.500, help 0.500" in text
    assert "The base policy is dominated" in text
    assert "reach 0.5700 [0.5000, 0.6000], less than that of the trained points" in text
    assert "(difference −0.0800 [−0.1000, −0.0200])" in text


@pytest.mark.parametrize(
    ("low", "high", "words"), [(-0.1, 0.1, "not clearly different"), (0.01, 0.1, "more than that of the trained")]
)
def test_soups_are_said_to_differ_only_where_the_interval_does(
    low: float, high: float, words: str, tmp_path: Path
) -> None:
    values = front(TWO)
    values["hypervolume"]["soups_less_trained"] = {"value": 0.02, "ci95": [low, high]}
    content = summary(read_front(written(tmp_path / "front", values)))
    assert content is not None and words in content["sentences"][-1]


def test_two_objectives_are_a_scatter_with_the_front_as_steps(tmp_path: Path) -> None:
    chart = front_chart(read_front(written(tmp_path / "front", front(TWO))))
    assert isinstance(chart, FrontChart)
    assert chart.front_of("trained") == [(0.3, 0.8), (0.3, 0.7), (0.8, 0.7), (0.8, 0.2), (0.9, 0.2)]
    svg = str(chart.svg())
    assert svg.count('class="interval') == 2 * 6, "a cross for each policy"
    assert svg.count('r="9"') == 1, "one ring, around the knee"
    assert "point 2 (knee): safety 0.800, help 0.700" in svg
    assert "point 3 (dominated)" in svg


def test_staircase() -> None:
    assert staircase([(2, 2), (1, 3)]) == [(1, 3), (1, 2), (2, 2)]
    assert staircase([]) == []


def test_three_objectives_are_parallel_coordinates(tmp_path: Path) -> None:
    place = written(tmp_path / "front", front([*TWO, "tone"]))
    chart = front_chart(read_front(place))
    assert isinstance(chart, ParallelChart)
    svg = str(chart.svg())
    assert svg.count("<polyline") == 6 and svg.count(" thin") == 2, "the dominated point and the base"
    assert all(f">{name}</text>" in svg for name in (*TWO, "tone"))
    build_report(place)
    assert (place / "figures" / "front.png").is_file()


def test_the_table_has_every_point(tmp_path: Path) -> None:
    content = table(read_front(written(tmp_path / "front", front(TWO))))
    assert content is not None
    places = {row["label"]: row["place"] for row in content["rows"]}
    assert places == {
        "base": "dominated", "point 0": "on the front", "point 1": "on the front", "point 2": "knee",
        "point 3": "dominated", "soup 0": "on the front",
    }  # fmt: skip
    row = content["rows"][4]
    assert row["weights"] == ["0.250", "0.750"] and row["time"] == "1 min 1 s"
    assert row["values"][1].replace("\u00a0", " ") == "0.50 [0.45, 0.55]"


def test_a_conditioned_policy_stands_beside_the_others(tmp_path: Path) -> None:
    place = written(tmp_path / "front", conditioned(TWO))
    html = build_report(place).read_text(encoding="utf-8")
    assert sections_of(html) == ["summary", "front", "asked", "points", "setup"]
    assert Page(html).open == [] and (place / "figures" / "asked.png").is_file()
    data = read_front(place)
    chart = front_chart(data)
    assert isinstance(chart, FrontChart)
    assert chart.front_of("conditioned") == [(0.4, 0.75), (0.4, 0.3), (0.85, 0.3)]
    svg = str(chart.svg())
    assert svg.count("M0,-6 L6,0") == 3 and ">c1</text>" in svg and svg.count("<polyline") == 3
    text = " ".join(summary(data)["sentences"]).replace("\u00a0", " ")  # type: ignore[index]
    assert "One conditioned policy, asked for the weights of the points, reaches 0.6000 [0.5500, 0.6500]" in text
    assert "not clearly different from that of the trained points (difference −0.0500" in text
    content = table(data)
    assert content is not None
    assert [row["place"] for row in content["rows"][-3:]] == ["on the front", "on the front", "dominated"]
    assert "Its KL is to the base policy that reads the same message" in html


def test_weights_asked_against_utilities_got(tmp_path: Path) -> None:
    data = read_front(written(tmp_path / "front", conditioned(TWO)))
    chart = asked_chart(data)
    assert chart is not None and [panel.title for panel in chart.panels] == TWO
    lines = chart.panels[1].lines
    trained, follows = (line for line in lines if line.style == "points")
    intervals = [(line.xs, line.ys) for line in lines if line.thin and line.series == 3]
    assert intervals == [((0, 0), pytest.approx((0.25, 0.35))), ((1, 1), pytest.approx((0.7, 0.8))),
                         ((0.5, 0.5), pytest.approx((0.55, 0.65)))]  # fmt: skip
    assert [line.ys for line in lines if line.series == 0] == [(0.1, 0.1)], "the base across"
    assert (follows.xs, follows.ys) == ((0, 1, 0.5), (0.3, 0.75, 0.6)) and follows.series == 3
    assert (trained.xs, trained.ys) == ((0, 1, 0.5, 0.75), (0.2, 0.8, 0.7, 0.5))
    content = asked(data)
    assert content is not None and content["count"] == 3
    assert content["columns"] == ["conditioned policy", "trained"]
    assert [value.replace("\u00a0", " ") for value in content["rows"][0]["values"]] == ["0.75 [0.50, 1.00]", "–"]
    assert asked(read_front(written(tmp_path / "other", front(TWO)))) is None


def test_what_failed_and_what_is_not_there_yet(tmp_path: Path) -> None:
    values = front(TWO, soups=[], knee=None)
    nothing = {"scores": None, "utilities": None, "kl": None, "dominated": None}
    values["points"][0] |= {**nothing, "status": "failed", "reason": "first\nout of memory"}
    values["points"][1] |= {**nothing, "status": "waiting"}
    html = build_report(written(tmp_path / "front", values)).read_text(encoding="utf-8")
    assert "point 0 failed and point 1 waiting" in html and "failed: out of memory" in html
    assert "It has no knee" in html
    for item in (values["base"], *values["points"]):
        item |= nothing
    values |= {"hypervolume": None, "reference": None}
    html = build_report(written(tmp_path / "front", values)).read_text(encoding="utf-8")
    assert sections_of(html) == ["summary", "setup"] and "No point of the sweep is judged yet" in html


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    for objectives in ([HOSTILE, "help"], [HOSTILE, "help", "tone"]):
        values = conditioned(objectives) | {"notes": [HOSTILE], "machine": HOSTILE}
        values["settings"] |= {"conditioned": HOSTILE}
        values["conditioned"][0]["name"] = f"conditioned/{HOSTILE}"
        values["points"][0]["reason"] = HOSTILE
        values["points"][1]["name"] = HOSTILE
        data = read_front(written(tmp_path / "front", values))
        html = render_front(data)
        page = Page(html)
        assert page.open == [] and page.names.count("script") == 0 and "img" not in page.names
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert not set("\u202e\u202c\x00\x1b\u2028\u200b") & set(html)
        build_report(tmp_path / "front")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": "safety"}, "objectives"),
        ({"base": {"name": "base"}}, "base.status"),
        ({"hypervolume": {"trained": {"value": "much", "ci95": [0, 1]}}}, r"hypervolume\.trained\.value"),
        ({"objectives": ["safety", "help", "tone"]}, "base has no utility of 'tone'"),
    ],
)
def test_a_broken_file_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    place = written(tmp_path / "front", {**front(TWO), **change})
    with pytest.raises(DataError, match=rf"pareto\.json.*{message}"):
        build_report(place)

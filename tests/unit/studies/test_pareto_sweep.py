"""A sweep of weights over toy models: what it trains, what pareto.json says, failures, resuming, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.conditioned_toys import ReadingWorld
from tests.front_toys import opened, recipe, swept, written
from tests.run_toys import World, train
from tests.study_toys import InThisProcess

from equipoise.cli.pareto import front_table
from equipoise.errors import ConfigError, DataError
from equipoise.studies.jobs import JobFailed, Stopped
from equipoise.studies.pareto import SweepFailed, run_sweep, trained_weights
from equipoise.studies.pareto_results import read_front


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("front-world"))


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """Three points and the soup between the corners."""
    out = world.directory / "finished"
    launcher = swept(opened(recipe(world), out, soups=True))
    assert [arguments[0] for arguments in launcher.commands] == ["pareto", *["train", "pareto"] * 3, "pareto"]
    return out


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy to go on with; what it holds names no place."""
    return Path(shutil.copytree(finished, tmp_path / "front"))


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "evaluation" / "completions.jsonl").read_text().splitlines()]


def mean_utilities(out: Path, name: str) -> tuple[float, float]:
    """Politeness, and 1 - rudeness; a completion a prompt."""
    scores = [row["scores"] for row in rows_of(out, name)]
    polite = sum(s["politeness"] for s in scores) / len(scores)
    return polite, 1 - sum(s["rudeness"] for s in scores) / len(scores)


def area(points: list[tuple[float, float]]) -> float:
    """Under a staircase above (0, 0), by columns."""
    xs = sorted({0.0, *(x for x, _ in points)})
    return sum((b - a) * max(y for x, y in points if x >= b) for a, b in pairwise(xs))


def dominated(point: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in others)


def test_every_point_is_an_adapter_of_its_weights_on_one_base(world: World, finished: Path) -> None:
    front = written(finished)
    shares = [list(entry["weights"].values()) for entry in front["points"]]
    assert shares == [[1, 0], [0, 1], [0.5, 0.5]]
    for entry, (polite, rude) in zip(front["points"], shares, strict=True):
        run = json.loads((finished / entry["run"] / "config.json").read_text())
        assert run["objective_weights"] == {"politeness": 3 * polite, "rudeness": 3 * rude}, "the recipe's total stays"
        adapter = json.loads((finished / entry["run"] / "model" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(world.model)
    assert [entry["status"] for entry in (front["base"], *front["points"], *front["soups"])] == ["done"] * 5
    assert front["finished"]


def test_numbers_by_hand(finished: Path) -> None:
    front = written(finished)
    names = [entry["name"] for entry in front["points"]]
    points = [mean_utilities(finished, name) for name in names]
    for entry, point in zip(front["points"], points, strict=True):
        assert [v["mean"] for v in entry["utilities"].values()] == pytest.approx(point)
        assert entry["scores"]["rudeness"]["mean"] == pytest.approx(1 - point[1]), "scores are native"
        low, high = entry["utilities"]["politeness"]["ci95"]
        assert low <= point[0] <= high
        assert entry["dominated"] == dominated(point, points)
    assert front["base"]["dominated"] == dominated(mean_utilities(finished, "base"), points)
    assert front["reference"] == {"politeness": 0.0, "rudeness": 0.0}, "the worst that the range allows"
    soup = mean_utilities(finished, "soups/000")
    assert front["soups"][0]["dominated"] == dominated(soup, points[:2]), "among soups and corners"
    volumes = front["hypervolume"]
    assert volumes["trained"]["value"] == pytest.approx(area(points))
    assert volumes["soups"]["value"] == pytest.approx(area([*points[:2], soup]))
    assert volumes["soups_less_trained"]["value"] == pytest.approx(area([*points[:2], soup]) - area(points))
    low, high = volumes["trained"]["ci95"]
    assert low < volumes["trained"]["value"] < high
    assert front["base"]["kl"] is None and all(entry["kl"] is not None for entry in front["points"])


def test_the_soup_is_made_of_the_corners(finished: Path) -> None:
    parts = json.loads((finished / "soups/000/model/soup.json").read_text())["of"]
    assert [Path(part["model"]).parent.parent.name for part in parts] == ["000", "001"]
    assert [part["weight"] for part in parts] == [0.5, 0.5]


def test_table_and_notes(finished: Path) -> None:
    front = written(finished)
    text = front_table(front).plain()
    assert "points/002" in text and "weight of rudeness" in text and "hypervolume trained" in text
    assert front["notes"] == [
        "the judge is the reward that training maximised: part of a gain may be a flaw of it, exploited"
    ]


def test_what_is_done_is_not_done_again(world: World, own: Path) -> None:
    before = written(own)
    shutil.rmtree(own / "points/001/evaluation")
    launcher = swept(opened(recipe(world), own, soups=True))
    assert [arguments[-1] for arguments in launcher.commands] == ["points/001"], "judged again, not trained again"
    after = written(own)
    assert after["hypervolume"] == before["hypervolume"], "and it comes out the same"


def test_a_point_that_fails_is_recorded_and_tried_again(world: World, tmp_path: Path) -> None:
    path, out = recipe(world), tmp_path / "front"

    def spoil(arguments: list[str]) -> None:
        if arguments[0] == "train" and "points/001" in arguments[-1]:
            raise JobFailed("first line\nout of memory")

    with pytest.raises(SweepFailed, match=r"2 failed, the others are done .*points/001: out of memory"):
        swept(opened(path, out, soups=True), spoil)
    front = written(out)
    assert [entry["status"] for entry in front["points"]] == ["done", "failed", "done"]
    assert front["soups"][0]["reason"] == "the corner of rudeness failed, which it needs"
    assert front["points"][1]["reason"] == "first line\nout of memory" and front["points"][1]["dominated"] is None
    assert front["hypervolume"]["trained"]["value"] > 0 and front["finished"] is None
    assert (out / "report.html").is_file()
    launcher = swept(opened(path, out, soups=True))
    assert [arguments[0] for arguments in launcher.commands] == ["train", "pareto", "pareto"]
    assert all(entry["status"] == "done" for entry in [*written(out)["points"], *written(out)["soups"]])


def test_a_signal_leaves_what_can_be_gone_on_with(world: World, tmp_path: Path) -> None:
    path, out = recipe(world), tmp_path / "front"

    def stop(arguments: list[str]) -> None:
        if arguments[0] == "train" and "points/001" in arguments[-1]:
            raise Stopped(signal.SIGTERM)

    sweep, launcher = opened(path, out), InThisProcess(stop)
    with pytest.raises(Stopped):
        run_sweep(sweep, launcher=launcher)
    assert launcher.stopped
    assert [entry["status"] for entry in written(out)["points"]] == ["done", "waiting", "waiting"]
    launcher = swept(opened(path, out))
    assert [arguments[0] for arguments in launcher.commands] == ["train", "pareto"] * 2


def test_a_base_that_cannot_be_judged_ends_it_before_training(world: World, tmp_path: Path) -> None:
    def spoil(arguments: list[str]) -> None:
        raise JobFailed("no such judge")

    sweep = opened(recipe(world), tmp_path / "front")
    with pytest.raises(SweepFailed, match="the base policy could not be judged: no such judge"):
        swept(sweep, spoil)
    assert [entry["status"] for entry in written(tmp_path / "front")["points"]] == ["waiting"] * 3


def test_adaptive_begins_at_the_corners_and_halves_gaps(world: World, tmp_path: Path) -> None:
    out = tmp_path / "front"
    launcher = swept(opened(recipe(world), out, 4, adaptive=True, workers=2))
    shares = [entry["weights"]["politeness"] for entry in written(out)["points"]]
    assert shares[:3] == [1, 0, 0.5] and shares[3] in (0.25, 0.75)
    assert len(launcher.commands) == 1 + 2 * 4
    launcher = swept(opened(recipe(world), out, 5, adaptive=True))
    assert len(launcher.commands) == 2, "one point more"
    assert len({entry["weights"]["politeness"] for entry in written(out)["points"]}) == 5


def test_a_judge_without_a_range_puts_the_corner_at_the_bases_worst_prompt(world: World, tmp_path: Path) -> None:
    out = tmp_path / "front"
    path = recipe(
        world,
        "three",
        lora=False,
        scorers=[{"function": "tests.front_toys:three_aspects", "aspects": dict(three())}],
        objective_weights={"politeness": 1.0, "garden": 1.0, "rudeness": 0.0},
        num_steps=1,
    )
    swept(opened(path, out, 2, judge="tests.front_toys:three_aspects"))
    front = written(out)
    assert front["objectives"] == ["politeness", "garden"], "an objective of weight 0 is logged only"
    worst = min(row["scores"]["garden"] for row in rows_of(out, "base"))
    assert front["reference"] == {"politeness": 0.0, "garden": worst}
    assert front["notes"] == ["the recipe has no policy.lora: every point is a full model of its own"]


def three() -> dict[str, Any]:
    from tests.front_toys import three_aspects

    return three_aspects.aspects  # type: ignore[attr-defined]


def test_trained_weights_keep_the_recipes_total(world: World) -> None:
    sweep = opened(recipe(world), world.directory / "unused")
    assert trained_weights(sweep.recipe, {"politeness": 0.25, "rudeness": 0.75}) == {
        "politeness": 0.75,
        "rudeness": 2.25,
    }


# -- a conditioned policy ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReadingWorld, Path]:
    """A world whose policy can read weights, and the run that taught it to."""
    reading = ReadingWorld(tmp_path_factory.mktemp("reading-world"))
    out = reading.directory / "conditioned"
    train(reading.conditioned(num_steps=1), out)
    return reading, out


def with_conditioned(reading: ReadingWorld, **changes: Any) -> Path:
    return recipe(reading, lora=False, num_steps=1, **changes)


def test_a_conditioned_policy_is_asked_for_every_points_weights(
    reader: tuple[ReadingWorld, Path], tmp_path: Path
) -> None:
    reading, run = reader
    path, out = with_conditioned(reading), tmp_path / "front"
    swept(opened(path, out, 3))
    assert written(out)["conditioned"] == [] and written(out)["followed"] is None
    launcher = swept(opened(path, out, 3, conditioned=str(run)))
    jobs = [arguments[-1] for arguments in launcher.commands]
    assert jobs == [f"conditioned/00{n}" for n in range(3)], "given later; nothing else is done again"
    found = written(out)
    assert [list(entry["weights"].values()) for entry in found["conditioned"]] == [[1, 0], [0, 1], [0.5, 0.5]]
    for entry in found["conditioned"]:
        evaluation = json.loads((out / entry["name"] / "evaluation" / "evaluation.json").read_text())
        assert evaluation["settings"]["asked"] == entry["weights"] and evaluation["policy"] == str(run / "model")
        assert not any("0" in row["prompt"] for row in rows_of(out, entry["name"])), "judged without the message"
    points = [mean_utilities(out, entry["name"]) for entry in found["conditioned"]]
    trained = [mean_utilities(out, entry["name"]) for entry in found["points"]]
    volumes = found["hypervolume"]
    assert volumes["conditioned"]["value"] == pytest.approx(area(points))
    assert volumes["conditioned_less_trained"]["value"] == pytest.approx(area(points) - area(trained))
    assert [entry["dominated"] for entry in found["conditioned"]] == [dominated(point, points) for point in points]
    for k, name in enumerate(("politeness", "rudeness")):
        shares = [list(entry["weights"].values())[k] for entry in found["conditioned"]]
        expected = rank_correlation(shares, [round(point[k], 9) for point in points])
        assert found["followed"][name]["conditioned"]["rank_correlation"] == pytest.approx(expected)
        low, high = found["followed"][name]["conditioned"]["ci95"]
        assert expected is None or low <= high
        assert found["followed"][name]["trained"]["n"] == 3
    assert "conditioned/002" in front_table(found).plain()
    assert not swept(opened(path, out, 3)).commands, "and it stays, also where it is not named again"
    assert len(written(out)["conditioned"]) == 3
    with pytest.raises(ConfigError, match=r"changed since: conditioned"):
        opened(path, out, 3, conditioned=str(shutil.copytree(run, tmp_path / "another")))


def rank_correlation(xs: list[float], ys: list[float]) -> float | None:
    ranks = [[sum(b < a for b in column) + (column.count(a) + 1) / 2 for a in column] for column in (xs, ys)]
    return statistics.correlation(*ranks) if min(map(max, ranks)) > max(map(min, ranks)) else None


def test_notes_say_in_what_its_training_differed(reader: tuple[ReadingWorld, Path], tmp_path: Path) -> None:
    reading, run = reader
    sweep = opened(with_conditioned(reading, beta=0.3), tmp_path / "front", conditioned=str(run))
    (note,) = [note for note in sweep.state["notes"] if "other settings" in note]
    assert "beta" in note and "conditioned.template" not in note and "objective_weights" not in note


def test_a_conditioned_policy_that_does_not_fit(reader: tuple[ReadingWorld, Path], tmp_path: Path) -> None:
    reading, run = reader
    path = with_conditioned(reading)
    for given, message in (
        (str(tmp_path / "nowhere"), "no such directory"),
        (str(reading.model), "was not trained to read weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(path, tmp_path / "front", conditioned=given)
    three_objectives = with_conditioned(
        reading,
        scorers=[{"function": "tests.front_toys:three_aspects", "aspects": dict(three())}],
        objective_weights={"politeness": 1.0, "garden": 1.0, "rudeness": 1.0},
    )
    with pytest.raises(ConfigError, match="reads weights of politeness, rudeness, and the recipe trades off polite"):
        opened(three_objectives, tmp_path / "front", conditioned=str(run))
    with pytest.raises(ConfigError, match="conditioned: every point of a front is trained at one weight"):
        opened(with_conditioned(reading, conditioned={}), tmp_path / "front")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"objective_weights": {"politeness": 1.0, "rudeness": 0.0}}, {}, r"1 of them above 0 \(politeness\)"),
        ({}, {"points": 1}, "--points 1: a front of politeness, rudeness has 2 corners"),
        ({"combine": {"method": "pareto_rank"}}, {}, "'pareto_rank' does not use the weights"),
        ({"combine": {"method": "mo_grpo"}}, {}, "'mo_grpo' does not use the weights"),
        ({"combine": {"method": "nonsense"}}, {}, "combine: unknown method 'nonsense'"),
        ({"evaluation": None}, {}, "--prompts: the recipe has no `evaluation`"),
        ({}, {"judge": "tests.toy:politeness"}, "declares no aspects"),
        ({}, {"judge": "sandbox"}, "--judge sandbox: does not score 'rudeness'"),
        (
            {"weights_schedule": {"piecewise": [{"step": 1, "weights": {"politeness": 1.0, "rudeness": 0.0}}]}},
            {},
            "weights_schedule: every point of a front has weights of its own",
        ),
    ],
)
def test_a_recipe_that_cannot_be_swept(
    changes: dict[str, Any], options: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(recipe(world, "bad", **changes), tmp_path / "front", **options)
    assert not (tmp_path / "front").exists()


def test_weighted_mo_grpo_is_swept(world: World, tmp_path: Path) -> None:
    combine = {"method": "mo_grpo", "options": {"weighted": True}}
    assert len(opened(recipe(world, "weighted", combine=combine), tmp_path / "front").state["points"]) == 3


def test_another_algorithm_and_another_directory(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a recipe of sft; weights are swept for grpo"):
        opened(world.sft(), tmp_path / "front")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a sweep"):
        opened(recipe(world), tmp_path)
    with pytest.raises(ConfigError, match="holds no sweep"):
        read_front(tmp_path / "pareto.json")
    for text, message in (("{", "not valid JSON"), ("{}", "not the state of a sweep")):
        (tmp_path / "pareto.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            opened(recipe(world), tmp_path)


def test_a_sweep_with_other_settings_is_refused(world: World, own: Path) -> None:
    for path, options, key in (
        (recipe(world, "other", beta=0.5), {}, "beta"),
        (recipe(world), {"points": 4}, "points"),
        (recipe(world), {"samples": 3}, "samples"),
    ):
        with pytest.raises(ConfigError, match=rf"begun with other settings \(changed since: {key}\)"):
            opened(path, own, **options)


def test_points_judged_on_other_prompts_do_not_compare(world: World, own: Path) -> None:
    path = own / "points/002/evaluation/completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["prompt"] = "another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="was judged on other prompts"):
        opened(recipe(world), own)

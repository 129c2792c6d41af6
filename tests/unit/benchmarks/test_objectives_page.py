"""docs/results/objectives.md: its numbers against plain sums over a fabricated study, and what its tables say."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import objectives
from benchmarks.comparison import BY_HAND
from benchmarks.objectives_constraint import ALLOWED, constraint_lines, constraints_of, title
from benchmarks.objectives_methods import EQUAL, methods_of, weighting_lines
from tests.report_toys import ASPECTS, edit, write_json
from tests.study_report_toys import random_rows, study_directory, write_evaluation

from equipoise.errors import ConfigError
from equipoise.evaluation.report.study.inputs import SizeData, read_study

EVEN: dict[str, float] = {aspect: 0.5 for aspect in ASPECTS}
SKEWED = {"politeness": 1.0, "meaningfulness": 0.0, "actionability": 0.0, "safety": 3.0}
# The toys know these names: what each stands for here.
STANDS_FOR: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "grpo": ({"method": "weighted_sum", "options": {}}, EVEN),
    "ppo": ({"method": "gdpo", "options": {}}, EVEN),
    "dpo": ({"method": "min_norm", "options": {}}, EVEN),
    "rloo": ({"method": "weighted_sum", "options": {}}, SKEWED),
    "grpo_safety": ({"method": "mo_grpo", "options": {"weighted": True}}, SKEWED),
}
LOGGED = [
    {"zero_variance_groups": 2, "reward_vectors": 30, "collapsed_vectors": 3, "advantage/std": 0.5},
    {"zero_variance_groups": 0, "reward_vectors": 10, "collapsed_vectors": 5, "advantage/std": 1.5},
]


def study_of(directory: Path) -> Path:
    """Five methods at one size, two seeds: three of equal weights, two of others."""
    study_directory(directory, sizes=("1m",), methods=tuple(STANDS_FOR), num_prompts=12, steps=2)
    for method, (combine, weights) in STANDS_FOR.items():
        for seed in (0, 1):
            run = directory / "1m" / "runs" / method / f"seed_{seed}"
            edit(run / "config.json", lambda values, c=combine, w=weights: values.update(
                combine=c, objective_weights=w, prompts_per_step=8))  # fmt: skip
            lines = [
                {"step": step, **line, **{f"advantage/{name}/variance_share": 0.25 for name in ASPECTS}}
                for step, line in enumerate(LOGGED, start=1)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def only_size(directory: Path) -> SizeData:
    (size,) = read_study(directory).sizes
    return size


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_of(tmp_path_factory.mktemp("study"))


def mean(method: str, aspect: str, seed: int, kinds: tuple[str, ...] = ()) -> float:
    """Of the toys' own rows; every prompt has two completions."""
    rows = random_rows(method, seed, 12)
    return statistics.fmean(row["scores"][aspect] for row in rows if not kinds or row["kind"] in kinds)


def over_seeds(method: str, weights: dict[str, float]) -> float:
    total = sum(weights.values())
    return statistics.fmean(
        sum(weight / total * mean(method, aspect, seed) for aspect, weight in weights.items()) for seed in (0, 1)
    )


def test_methods_stand_under_their_weights_and_those_without_under_all(directory: Path) -> None:
    even, skewed = methods_of(only_size(directory))["weightings"]
    assert even["title"] == "equal weights" and list(even["methods"]) == ["grpo", "ppo", "dpo"]
    assert skewed["title"] == "politeness 0.25, meaningfulness 0, actionability 0, safety 0.75"
    assert list(skewed["methods"]) == ["dpo", "rloo", "grpo_safety"]
    assert [even["sum"], skewed["sum"]] == ["grpo", "rloo"]
    assert [method["takes_weights"] for method in skewed["methods"].values()] == [False, True, True]
    assert EQUAL not in even["scores"] and skewed["scores"][-1] == EQUAL


def test_differences_are_those_of_plain_means(directory: Path) -> None:
    _, skewed = methods_of(only_size(directory))["weightings"]
    base = sum(weight / 4 * mean("base", aspect, 0) for aspect, weight in SKEWED.items())
    assert skewed["base_combined"] == pytest.approx(base)
    method = skewed["methods"]["grpo_safety"]
    after = over_seeds("grpo_safety", SKEWED)
    assert method["to_base"]["combined"]["mean"] == pytest.approx(after - base)
    assert method["to_sum"]["combined"]["mean"] == pytest.approx(after - over_seeds("rloo", SKEWED))
    alike = over_seeds("grpo_safety", EVEN) - over_seeds("rloo", EVEN)
    assert method["to_sum"][EQUAL]["mean"] == pytest.approx(alike)
    assert method["each_seed"][1] == pytest.approx(
        sum(weight / 4 * mean("grpo_safety", aspect, 1) for aspect, weight in SKEWED.items())
    )
    assert skewed["methods"]["rloo"]["to_sum"] is None
    lowest = min(ASPECTS, key=lambda aspect: method["means"][aspect])
    assert method["worst"] == {"aspect": lowest, "mean": method["means"][lowest]}


def test_tests_are_corrected_over_a_table(directory: Path) -> None:
    """Holm: the smallest of n p-values is multiplied by n, and none falls below its own."""
    _, skewed = methods_of(only_size(directory))["weightings"]
    found = [method["to_base"][score] for method in skewed["methods"].values() for score in skewed["scores"]]
    smallest = min(found, key=lambda value: value["p"])
    assert len(found) == 18 and smallest["adjusted"] == pytest.approx(18 * smallest["p"])
    assert all(value["adjusted"] >= value["p"] for value in found)
    assert all(value["clear"] == (value["adjusted"] <= 0.05) for value in found)


def test_what_training_logged(directory: Path) -> None:
    """One dead group a step of eight; 8 of 40 vectors collapsed."""
    even, _ = methods_of(only_size(directory))["weightings"]
    assert even["methods"]["ppo"]["training"] == {
        "dead_groups": 1 / 8, "collapsed_vectors": 8 / 40, "advantage_std": 1.0,
        "variance_share": dict.fromkeys(ASPECTS, 0.25),
    }  # fmt: skip


def test_the_tables_mark_what_takes_no_weights(directory: Path) -> None:
    found = methods_of(only_size(directory))
    text = "\n".join(weighting_lines(found["weightings"][1], found["base"]))
    assert "| DPO (\\*) |" in text and "| RLOO | 2 |" in text and "Less RLOO:" in text
    assert "| 12% | 20% | 1.00 | 0.25, 0.25, 0.25, 0.25 |" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("| base policy")}
    assert columns == {10, 12}


# -- a constraint ------------------------------------------------------------------------------------------------------

BOUND = {"min": 0.8, "max": None, "margin": 0.1, "on": "adversarial"}


def constrained(directory: Path) -> Path:
    """grpo is constrained: its safety on adversarial prompts is 0.785 with seed 0 and 0.775 with seed 1."""
    study_directory(directory, sizes=("1m",), methods=("grpo", "ppo"), num_prompts=12, steps=2)
    for seed, safety in ((0, 0.785), (1, 0.775)):
        run, place = (directory / "1m" / part / "grpo" / f"seed_{seed}" for part in ("runs", "evaluation"))
        edit(run / "config.json", lambda values: values.update(constraints={"safety": BOUND}))
        rows = random_rows("grpo", seed, 12)
        for row in rows:
            row["scores"]["safety"] = safety if row["kind"] == "adversarial" else row["scores"]["safety"]
        write_evaluation(place, rows)
        said = {"verdict": "holds", "judge": {"verdict": "not clear"}, "multiplier": 1.5 + seed}
        write_json(run / "constraints.json", {"step": 2, "constraints": {"safety": said}})
    return directory


def test_who_keeps_the_level_and_at_what_price(tmp_path: Path) -> None:
    (found,) = constraints_of(constrained(tmp_path), only_size(tmp_path))
    assert ALLOWED == 0.02 and title(found) == "GRPO: safety on adversarial prompts at least 0.8, margin 0.1"
    ours, theirs = found["seeds"]["grpo"], found["seeds"]["ppo"]
    assert [seed["kept"] for seed in ours] == [True, False]
    assert [seed["rubric"] for seed in ours] == pytest.approx([0.785, 0.775]) and ours[0]["n"] == 4
    assert [(seed["multiplier"], seed["verdict"], seed["judge"]) for seed in ours] == [
        (1.5, "holds", "not clear"), (2.5, "holds", "not clear")
    ]  # fmt: skip
    assert theirs[0]["multiplier"] is None and theirs[0]["rubric"] == pytest.approx(
        mean("ppo", "safety", 0, ("adversarial",))
    )
    assert list(found["price"]) == ["all", "adversarial", "benign", "borderline"]
    change = statistics.fmean(
        mean("grpo", "politeness", seed, ("benign",)) - mean("ppo", "politeness", seed, ("benign",)) for seed in (0, 1)
    )
    assert found["price"]["benign"]["politeness"]["mean"] == pytest.approx(change)
    lines = constraint_lines(found)
    assert lines[0].startswith("- GRPO: 1 of 2 seeds keep the level, less 0.02, by the rubric (means 0.775 to 0.785)")
    assert any(line.startswith("| GRPO | 0 | 0.785 [0.785, 0.785] |") for line in lines)
    assert any("| yes | 1.50 | holds, not clear |" in line for line in lines)
    assert any(line.startswith("| PPO | 0 |") and line.endswith("| - | - |") for line in lines)


def test_an_upper_bound_is_kept_below(tmp_path: Path) -> None:
    constrained(tmp_path)
    for seed in (0, 1):
        upper = {"safety": {**BOUND, "min": None, "max": 0.76}}
        edit(tmp_path / "1m" / "runs" / "grpo" / f"seed_{seed}" / "config.json",
             lambda values, bound=upper: values.update(constraints=bound))  # fmt: skip
    (found,) = constraints_of(tmp_path, only_size(tmp_path))
    assert [seed["kept"] for seed in found["seeds"]["grpo"]] == [False, True]
    assert title(found).endswith("at most 0.76, margin 0.1")


def test_a_study_without_an_unconstrained_method_is_refused(tmp_path: Path) -> None:
    constrained(tmp_path)
    for seed in (0, 1):
        edit(tmp_path / "1m" / "runs" / "ppo" / f"seed_{seed}" / "config.json",
             lambda values: values.update(constraints={"safety": BOUND}))  # fmt: skip
    with pytest.raises(ConfigError, match="needs one without"):
        constraints_of(tmp_path, only_size(tmp_path))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_keeps_what_was_written_by_hand(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "results", constrained(tmp_path / "constrained")
    monkeypatch.setattr(sys, "argv", ["objectives.py", str(directory), str(other), "--out", str(out)])
    objectives.main()
    page = out / "objectives.md"
    text = page.read_text()
    assert text.endswith(f"{BY_HAND}\n") and "## A constraint" in text and "### 1m, equal weights" in text
    assert "### 1m, GRPO: safety on adversarial prompts at least 0.8, margin 0.1" in text
    assert set(json.loads((out / "objectives.json").read_text())) == {"methods", "constraint"}
    page.write_text(text + "\n## What it says\n\nNothing.\n")
    monkeypatch.setattr(sys, "argv", ["objectives.py", str(directory), "--out", str(out)])
    objectives.main()
    assert page.read_text().endswith("\n## What it says\n\nNothing.\n") and "## A constraint" not in page.read_text()

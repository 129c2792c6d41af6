"""Constraints of a run: what a recipe may say, what is measured, who moves a multiplier, what is said at the end."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import Table, TableScorer
from tests.toy import grpo_values, toy_rollout

from equipoise.algorithms.constraints import RECENT_STEPS, STEPS_AT_CAP, Constraints, check_kinds
from equipoise.algorithms.grpo_records import completion_columns, step_metrics
from equipoise.algorithms.grpo_signal import Objectives, Signal, make_signal
from equipoise.algorithms.ppo_signal import combine_scores, constrain_scores
from equipoise.algorithms.run import Run
from equipoise.algorithms.steering import Steering
from equipoise.algorithms.verdicts import estimate, verdict
from equipoise.config import GRPOConfig, recipe_from_mapping
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.rollout.types import Rollout

SAFETY = {"higher_is_better": True, "range": [0, 1]}
TOXICITY = {"higher_is_better": False, "range": [1, 5]}
ASPECTS = {"safety": SAFETY, "toxicity": TOXICITY, "style": {"higher_is_better": True}}
WEIGHTS = {"safety": 1.0, "toxicity": 1.0, "style": 1.0}
PROMPTS = [PromptRecord(prompt="a", kind="benign"), PromptRecord(prompt="b", kind="adversarial")]


class Judge(TableScorer):
    """Three aspects, one of them better when lower, one without a range."""

    def __init__(self, table: Table) -> None:
        super().__init__(table, tuple(ASPECTS))
        self.aspects = [
            Aspect("safety", True, (0.0, 1.0)), Aspect("toxicity", False, (1.0, 5.0)), Aspect("style", True, None, 2, 4)
        ]  # fmt: skip


# Two groups of three, the second adversarial.
TABLE: Table = [[0.9, 1.0, 4.0], [0.2, 2.0, 8.0], [0.5, None, 3.0], [0.3, 4.0, 2.0], [0.9, 3.0, None], [None, 5.0, 2.0]]
LENGTHS = [3, 5, 2, 6, 1, 4]


def config_of(**changes: Any) -> GRPOConfig:
    values = grpo_values(Path("model"), Path("prompts")) | {
        "scorers": {"function": "tests.toy:politeness", "aspects": ASPECTS},
        "objective_weights": WEIGHTS,
        "sampling": {"max_tokens": 10},
    }
    config = recipe_from_mapping(values | changes)
    assert isinstance(config, GRPOConfig)
    return config


def setting(out: Path, **changes: Any) -> tuple[Constraints, Objectives, Rollout, GRPOConfig, Run]:
    config = config_of(**changes)
    objectives, run = Objectives.of(config, [Judge(TABLE)]), Run(out, config)
    rollout = replace(toy_rollout([2] * 6, LENGTHS, group_size=3), kinds=("benign",) * 3 + ("adversarial",) * 3)
    return Constraints(objectives.constraints, objectives.aspects, run), objectives, rollout, config, run


def scores() -> torch.Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in TABLE], dtype=torch.float64)


# -- what a recipe may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"safety": {}}, r"constraints\.safety.*one bound, min or max: neither is given"),
        ({"safety": {"min": 0.5, "max": 0.6}}, r"min 0\.5 and max 0\.6 are given"),
        ({"safety": {"min": 0.5, "margin": -0.1}}, r"constraints\.safety\.margin.*greater than or equal to 0"),
        ({"safety": {"min": 0.5, "on": "evil"}}, r"constraints\.safety\.on.*'adversarial'"),
        ({"safety": {"min": 0.5, "ki": 0}}, r"ki, kp and kd are all 0"),
        ({"safety": {"min": 0.5, "initial_multiplier": 200}}, r"initial_multiplier 200 lies outside .* 0\.001 .* 100"),
        ({"safty": {"min": 0.5}}, r"unknown aspect 'safty' \(did you mean 'safety'\?\).*length is known too"),
        ({"safety": {"min": 1.2}}, r"constraints\.safety\.min 1\.2 lies outside its range, 0 to 1: it cannot be kept"),
        ({"safety": {"min": 0.97, "margin": 0.04}}, r"min 0\.97 with margin 0\.04 is 1\.01, and lies outside"),
        ({"toxicity": {"max": 1.5, "margin": 1}}, r"max 1\.5 with margin 1 is 0\.5, and lies outside .* 1 to 5"),
        ({"safety": {"min": 0}}, r"min 0 is the end of its range, 0 to 1: it always holds"),
        ({"toxicity": {"max": 5}}, r"max 5 is the end of its range, 1 to 5: it always holds"),
        ({"length": {"max": 10}}, r"length\.max 10 is the end of 1 to sampling\.max_tokens, 1 to 10: it always holds"),
        ({"length": {"min": 11}}, r"length\.min 11 lies outside 1 to sampling\.max_tokens, 1 to 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(constraints: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objectives.of(config_of(constraints=constraints), [Judge(TABLE)])


def test_an_aspect_called_length_is_ambiguous() -> None:
    config = config_of(constraints={"length": {"max": 5}}, objective_weights={"length": 1.0})
    with pytest.raises(ConfigError, match=r"constraints\.length: is it the tokens or the aspect"):
        Objectives.of(config, [TableScorer([[0.0]], ("length",))])


def test_a_kind_that_no_training_prompt_has(tmp_path: Path) -> None:
    constraints, objectives, _, config, run = setting(
        tmp_path / "run", constraints={"safety": {"min": 0.5, "on": "borderline"}}
    )
    message = (
        r"constraints\.safety\.on 'borderline': no training prompt is of that kind; `data` holds adversarial, benign"
    )
    with pytest.raises(ConfigError, match=message):
        check_kinds(constraints.all, PROMPTS)
    with pytest.raises(ConfigError, match=message):
        Steering(config, objectives, PROMPTS, run)
    check_kinds(constraints.all, [PromptRecord(prompt="c", kind="borderline")])


def test_a_bound_that_pushes_the_worse_way_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        setting(tmp_path / "right", constraints={"safety": {"min": 0.5}, "toxicity": {"max": 2}, "length": {"max": 5}})
        assert not caplog.records
        setting(tmp_path / "wrong", constraints={"toxicity": {"min": 2}})
    assert "constraints.toxicity: min pushes it the worse way, as toxicity is better when lower; is max meant?" in (
        caplog.text
    )


# -- what is measured --------------------------------------------------------------------------------------------------

FOUR = {
    "safety": {"min": 0.7, "margin": 0.1, "on": "adversarial"},
    "toxicity": {"max": 3, "margin": 0.5},
    "style": {"min": 4.0},
    "length": {"max": 4},
}


def test_values_and_slacks_by_hand(tmp_path: Path) -> None:
    """In units of the range (1 and 4), the std (4) and the level (4), towards the level and its margin."""
    constraints, _, rollout, *_ = setting(tmp_path / "run", constraints=FOUR)
    values = constraints.values_of(rollout, scores())
    nan = math.nan
    expected = [[nan, 1, 4, 3], [nan, 2, 8, 5], [nan, nan, 3, 2], [0.3, 4, 2, 6], [0.9, 3, nan, 1], [nan, 5, 2, 4]]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    slacks = constraints.slacks(values)
    assert slacks[3].tolist() == pytest.approx([0.3 - 0.8, (2.5 - 4) / 4, (2 - 4) / 4, (4 - 6) / 4])
    assert slacks[0, 1:].tolist() == pytest.approx([(2.5 - 1) / 4, 0, (4 - 3) / 4])
    assert slacks[:3, 0].isnan().all()


def test_metrics_are_native_and_every_multiplier_follows_its_own_violation(tmp_path: Path) -> None:
    constraints, _, rollout, *_ = setting(tmp_path / "run", constraints=FOUR)
    metrics = constraints.observe(constraints.values_of(rollout, scores()), rollout.group_ids_B)
    assert metrics["constraint/safety/multiplier"] == pytest.approx(0.1), "of the step, not the one it leads to"
    assert metrics["constraint/safety/value"] == pytest.approx(0.6)
    assert metrics["constraint/safety/violation"] == pytest.approx(0.2), "of what is aimed at, 0.8"
    assert metrics["constraint/toxicity/value"] == pytest.approx(3.0)
    assert metrics["constraint/toxicity/violation"] == pytest.approx(0.5)
    assert metrics["constraint/style/violation"] == pytest.approx(4 - 19 / 5)
    assert metrics["constraint/length/violation"] == pytest.approx(3.5 - 4)
    raw = [0.2, 0.5 / 4, 0.2 / 4, -0.5 / 4]
    expected = [0.1 * math.exp(0.5 * violation) for violation in raw]
    assert constraints.multipliers_C.tolist() == pytest.approx(expected)


def test_a_step_without_such_prompts_moves_nothing(tmp_path: Path) -> None:
    constraints, _, rollout, *_ = setting(tmp_path / "run", constraints={"safety": {"min": 0.7, "on": "borderline"}})
    before = constraints.multipliers_C
    metrics = constraints.observe(constraints.values_of(rollout, scores()), rollout.group_ids_B)
    assert metrics == {
        "constraint/safety/multiplier": pytest.approx(0.1),
        "constraint/safety/value": None,
        "constraint/safety/violation": None,
    }
    assert torch.equal(constraints.multipliers_C, before)


def test_state_survives_json(tmp_path: Path) -> None:
    first, _, rollout, *_ = setting(tmp_path / "one", constraints=FOUR)
    values = first.values_of(rollout, scores())
    for _ in range(3):
        first.observe(values, rollout.group_ids_B)
    second, *_ = setting(tmp_path / "two", constraints=FOUR)
    second.load(json.loads(json.dumps(first.values())))
    assert second.observe(values, rollout.group_ids_B) == first.observe(values, rollout.group_ids_B)
    assert torch.equal(second.multipliers_C, first.multipliers_C) and second.values() == first.values()


def test_a_multiplier_at_its_cap_with_the_level_still_missed_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constraints, _, rollout, *_ = setting(
        tmp_path / "run", constraints={"safety": {"min": 0.95, "max_multiplier": 0.1}, "length": {"max": 4}}
    )
    values = constraints.values_of(rollout, scores())
    kept = torch.full_like(values, 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(STEPS_AT_CAP - 1):
            constraints.observe(values, rollout.group_ids_B)
        constraints.observe(kept, rollout.group_ids_B)
        for _ in range(STEPS_AT_CAP - 1):
            constraints.observe(values, rollout.group_ids_B)
        assert not caplog.records, "it was kept in between"
        for _ in range(3):
            constraints.observe(values, rollout.group_ids_B)
    (record,) = caplog.records
    assert "constraints.safety: its multiplier has been at max_multiplier (0.1) for 10 steps, and with 0.56" in (
        record.getMessage()
    )
    assert "misses 0.95: the level may be infeasible" in record.getMessage()


# -- advantages and scores ---------------------------------------------------------------------------------------------


def signal_of(out: Path, with_constraints: bool = True, **changes: Any) -> tuple[Signal, Objectives, Rollout, Run]:
    constraints, objectives, rollout, config, run = setting(out, **changes)
    used = constraints if with_constraints else None
    return make_signal(rollout, scores(), objectives, config, run, constraints=used), objectives, rollout, run


def test_advantages_are_those_of_the_lagrangian(tmp_path: Path) -> None:
    """(A_r + sum lambda A_c) / (1 + sum lambda), each A_c a group's slacks as GRPO would scale them alone."""
    bounds = {
        "safety": {"min": 0.7, "on": "adversarial", "initial_multiplier": 2},
        "length": {"max": 4, "initial_multiplier": 0.5},
    }
    plain, *_ = signal_of(tmp_path / "plain", with_constraints=False, constraints=bounds)
    signal, objectives, rollout, run = signal_of(tmp_path / "run", constraints=bounds)
    expected = plain.advantages_B.clone()
    for multiplier, column, groups in ((2, [0.3, 0.9], [[3, 4]]), (0.5, [-v for v in LENGTHS], [[0, 1, 2], [3, 4, 5]])):
        for rows in groups:
            values = column if len(column) == 2 else [column[row] for row in rows]
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            unit = 1.0 if len(column) == 2 else 4.0  # delta is added to a std in units of the slack
            for row, value in zip(rows, values, strict=True):
                expected[row] += multiplier * (value - mean) / unit / (std / unit + 1e-4)
    torch.testing.assert_close(signal.advantages_B, expected / 3.5)
    assert signal.contributors == [*WEIGHTS, "constraint/safety", "constraint/length"]
    torch.testing.assert_close(signal.contributions_BK.sum(1), signal.advantages_B)
    assert signal.contributions_BK[:3, 3].tolist() == [0, 0, 0] and signal.contributions_BK[5, 3] == 0

    metrics = step_metrics(rollout, scores(), signal, objectives, run)
    shares = [metrics[f"advantage/{name}/variance_share"] for name in signal.contributors]
    assert sum(shares) == pytest.approx(1)
    columns = completion_columns(rollout, scores(), signal, objectives)
    assert columns["share/constraint/length"] == signal.contributions_BK[:, 4].tolist()


def test_the_scale_is_that_of_the_reward(tmp_path: Path) -> None:
    signal, *_ = signal_of(
        tmp_path / "run", scale="none", constraints={"length": {"max": 4, "initial_multiplier": 1.0}}
    )
    found = signal.contributions_BK[:3, 3].tolist()
    assert found == pytest.approx([0.5 * (10 / 3 - length) / 4 for length in LENGTHS[:3]])


def test_a_constraint_gives_a_signal_where_the_reward_gives_none(tmp_path: Path) -> None:
    constraints, objectives, rollout, config, run = setting(tmp_path / "run", constraints={"length": {"max": 4}})
    nothing = torch.full((6, 3), math.nan, dtype=torch.float64)
    assert make_signal(rollout, nothing, objectives, config, run).zero_variance_groups == 2
    signal = make_signal(rollout, nothing, objectives, config, run, constraints=constraints)
    assert signal.zero_variance_groups == 0 and float(signal.advantages_B[2]) > 0 > float(signal.advantages_B[1])


def test_scores_of_ppo_by_hand() -> None:
    """Row 2 has no slack: the mean of 1, -3 and 5; row 3 has no score and gets none."""
    nan = math.nan
    combined = combine_scores(
        torch.tensor([[1.0], [2.0], [3.0], [nan]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    )
    slacks = torch.tensor([[1.0], [-3.0], [nan], [5.0]], dtype=torch.float64)
    found = constrain_scores(combined, slacks, torch.tensor([3.0], dtype=torch.float64))
    assert found.scores_N[:3].tolist() == [1.0, -1.75, 1.5] and found.scores_N[3].isnan()
    assert found.contributions_NK[3].tolist() == [0, 0]


# -- what is said at the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "values", "expected"),
    [
        ({"min": 0.5}, [0.5, 0.5], "holds"),
        ({"min": 0.5}, [0.49, 0.49], "does not hold"),
        ({"min": 0.5}, [0.3, 0.9], "not clear"),
        ({"min": 0.5}, [0.9], "not clear"),
        ({"min": 0.5}, [], "not measured"),
        ({"max": 0.5}, [0.5, 0.5], "holds"),
        ({"max": 0.5}, [0.51, 0.51], "does not hold"),
        ({"max": 0.5}, [0.3, 0.9], "not clear"),
        ({"min": 0.5, "margin": 0.4}, [0.5, 0.5], "holds"),
    ],
)
def test_verdicts(tmp_path: Path, bound: dict[str, Any], values: list[float], expected: str) -> None:
    """About the level, not the margin; one prompt has no interval."""
    constraints, *_ = setting(tmp_path / "run", constraints={"safety": bound})
    assert verdict(constraints.all[0], estimate(values, seed=0)) == expected


class HeldOut:
    """An evaluation whose prompts have these values; the judge knows safety only."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, bool]] = []
        self.safety = [0.9, 0.95, 0.9]

    def __call__(self, step: int) -> dict[str, Any]:
        return {"evaluation/combined": 0.5}

    def prompt_values(self, name: str, kind: str | None, *, judged: bool = False) -> list[float]:
        self.asked.append((name, kind, judged))
        if judged:
            return [0.6, 0.65, 0.6] if name == "safety" else []
        return self.safety if name == "safety" else []


class Low(HeldOut):
    """None of its prompts is safe."""

    def __init__(self) -> None:
        super().__init__()
        self.safety = [0.5, 0.55, 0.5]


BOUNDS = {"safety": {"min": 0.8, "margin": 0.05, "on": "adversarial"}, "length": {"max": 4}}


def steering_of(out: Path, **changes: Any) -> tuple[Steering, Objectives, Rollout, GRPOConfig, Run]:
    _, objectives, rollout, config, run = setting(out, **changes)
    return Steering(config, objectives, PROMPTS, run), objectives, rollout, config, run


def statement(run: Run) -> dict[str, Any]:
    return json.loads((run.out / "constraints.json").read_text())


def test_the_statement_is_about_held_out_prompts_where_there_are_any(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steering, objectives, rollout, config, run = steering_of(tmp_path / "run", constraints=BOUNDS)
    evaluate = HeldOut()
    observed = steering.observing(evaluate)
    assert observed is not None
    for _ in range(2):
        signal = make_signal(rollout, scores(), objectives, config, run, constraints=steering.constraints)
        steering.observe(objectives, scores(), signal)
    evaluate.safety = [0.1, 0.2]
    observed(1)
    evaluate.safety = [0.9, 0.95, 0.9]
    metrics = observed(2)
    assert metrics["evaluation/combined"] == 0.5
    assert metrics["constraint/safety/held_out"] == pytest.approx(2.75 / 3)
    assert metrics["constraint/safety/held_out_low"] == pytest.approx(0.9)
    assert metrics["constraint/safety/held_out_high"] <= 0.95
    assert metrics["constraint/safety/judge"] == pytest.approx(1.85 / 3)
    assert metrics["constraint/length/held_out"] is None and "constraint/length/judge" not in metrics
    assert evaluate.asked[:2] == [("safety", "adversarial", False), ("safety", "adversarial", True)]
    with caplog.at_level(logging.INFO):
        steering.conclude(2)
    found = statement(run)
    assert found["step"] == 2
    safety, length = found["constraints"]["safety"], found["constraints"]["length"]
    assert safety["verdict"] == "holds" and safety["source"] == "held-out prompts" and safety["n"] == 3
    assert (safety["min"], safety["max"], safety["margin"], safety["on"]) == (0.8, None, 0.05, "adversarial")
    assert safety["judge"]["verdict"] == "does not hold" and safety["judge"]["n"] == 3
    assert length["source"] == "training prompts of the last 2 steps" and length["n"] == 4 and length["judge"] is None
    assert length["mean"] == pytest.approx((10 / 3 + 11 / 3) / 2)
    assert steering.constraints is not None
    assert safety["multiplier"] == pytest.approx(steering.constraints.multipliers_C[0].item())
    text = caplog.records[-1].getMessage()
    assert "safety on adversarial prompts at least 0.8: holds: 0.9167 (95% interval 0.9 to" in text
    assert "3 held-out prompts; by the judge does not hold: 0.6167" in text
    assert "length at most 4: holds: 3.5 (95% interval 3.333 to 3.667), 4 training prompts of the last 2 steps" in text
    assert "not hold: 0.6167 (95% interval 0.6 to 0.65); multiplier 0.1" in text and "infeasible" not in text
    assert safety["at_cap"] is False


def test_the_statement_is_about_the_parameters_that_are_kept(tmp_path: Path) -> None:
    steering, *_, run = steering_of(
        tmp_path / "run", constraints=BOUNDS,
        evaluation={"every": 1, "prompts": "held.jsonl"}, stop={"on": "evaluation/combined", "keep": "best"},
    )  # fmt: skip
    evaluate = HeldOut()
    observed = steering.observing(evaluate)
    assert observed is not None
    observed(1)
    evaluate.safety = [0.1, 0.2]
    observed(2)
    run.write_stopped({"step": 2, "rule": "num_steps", "value": None, "limit": None, "best_step": 1})
    steering.conclude(2)
    assert statement(run)["step"] == 1 and statement(run)["constraints"]["safety"]["verdict"] == "holds"


@pytest.mark.parametrize(("level", "is_said"), [(0.95, True), (0.5, False)])
def test_a_multiplier_that_ends_at_its_cap_is_said_with_the_verdict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, level: float, is_said: bool
) -> None:
    """Safety is 0.54 on average; where the level holds, the cap is nothing to worry about."""
    bound = {"min": level, "initial_multiplier": 0.2, "max_multiplier": 0.2, "min_multiplier": 0.2}
    steering, objectives, rollout, config, run = steering_of(tmp_path / "run", constraints={"safety": bound})
    signal = make_signal(rollout, scores(), objectives, config, run, constraints=steering.constraints)
    steering.observe(objectives, scores(), signal)
    observed = steering.observing(HeldOut() if not is_said else Low())
    assert observed is not None
    observed(1)
    with caplog.at_level(logging.INFO):
        steering.conclude(1)
    found = statement(run)["constraints"]["safety"]
    assert found["at_cap"] is True and found["verdict"] == ("does not hold" if is_said else "holds")
    said = "multiplier 0.2, as high as max_multiplier allows: the level may be infeasible"
    assert (said in caplog.records[-1].getMessage()) == is_said


def test_a_plain_function_evaluates_and_training_prompts_stand_in(tmp_path: Path) -> None:
    steering, objectives, rollout, config, run = steering_of(tmp_path / "run", constraints=BOUNDS)

    def evaluate(step: int) -> dict[str, Any]:
        return {}

    assert steering.observing(evaluate) is evaluate and steering.observing(None) is None
    steering.conclude(0)
    assert statement(run)["constraints"]["length"]["verdict"] == "not measured"
    for _ in range(RECENT_STEPS + 3):
        signal = make_signal(rollout, scores(), objectives, config, run, constraints=steering.constraints)
        steering.observe(objectives, scores(), signal)
    steering.conclude(RECENT_STEPS + 3)
    safety = statement(run)["constraints"]["safety"]
    assert safety["source"] == f"training prompts of the last {RECENT_STEPS} steps" and safety["n"] == RECENT_STEPS


def test_without_constraints_and_schedule_nothing_is_saved_or_said(tmp_path: Path) -> None:
    steering, objectives, rollout, config, run = steering_of(tmp_path / "run")
    signal = make_signal(rollout, scores(), objectives, config, run, constraints=steering.constraints)
    assert steering.constraints is None and steering.objectives(7) is objectives
    assert steering.observe(objectives, scores(), signal) == {} and steering.values() == {}
    steering.conclude(3)
    assert not (run.out / "constraints.json").exists()

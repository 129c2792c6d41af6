"""When training ends early: the decisions one by one, and what a run remembers of them."""

from __future__ import annotations

import doctest
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equipoise.algorithms import stopping as module
from equipoise.algorithms.run import Run
from equipoise.algorithms.stopping import (
    Ending,
    best_index,
    evaluations_without_improvement,
    explained,
    kl_average,
    kl_too_large,
    spent_budget,
)
from equipoise.config import BudgetConfig, StopConfig, load_recipe, recipe_from_mapping
from equipoise.errors import CheckpointError, ConfigError

ON = "evaluation/combined"
SFT: dict[str, Any] = {"algorithm": "sft", "policy": {"model": "m"}, "data": "d"}
GRPO: dict[str, Any] = {
    "algorithm": "grpo",
    "policy": {"model": "m"},
    "data": "p.jsonl",
    "scorers": {"function": "a.b:c", "aspects": {"x": {"higher_is_better": True}}},
    "objective_weights": {"x": 1},
    "num_steps": 3,
}
EVALUATION = {"every": 1, "prompts": "h.jsonl"}
Scores = st.lists(st.none() | st.integers(-20, 20).map(lambda n: n / 4), max_size=12)


# -- decisions -------------------------------------------------------------------------------------------------------


def test_worked_examples() -> None:
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted >= 11


def naive_wait(scores: list[float | None], min_delta: float) -> int:
    """Counts on from the last improvement by looking at every prefix again."""
    improvements = [-1]
    reference = -math.inf
    for index, score in enumerate(scores):
        gain = -math.inf if score is None else score - reference
        if gain > 0 and gain >= min_delta:
            improvements.append(index)
            reference = score if score is not None else reference
    return len(scores) - 1 - improvements[-1]


@given(Scores, st.sampled_from([0.0, 0.25, 1.0]))
def test_waiting_against_a_twin(scores: list[float | None], min_delta: float) -> None:
    assert evaluations_without_improvement(scores, min_delta) == naive_wait(scores, min_delta)


@given(Scores, st.sampled_from([0.0, 0.5]), st.integers(-8, 8))
def test_a_shift_of_all_scores_changes_nothing(scores: list[float | None], min_delta: float, shift: int) -> None:
    moved = [None if score is None else score + shift for score in scores]
    assert evaluations_without_improvement(moved, min_delta) == evaluations_without_improvement(scores, min_delta)
    assert best_index(moved) == best_index(scores)


@given(Scores)
def test_the_best_is_the_first_maximum(scores: list[float | None]) -> None:
    known = [score for score in scores if score is not None]
    assert best_index(scores) == (scores.index(max(known)) if known else None)
    if known:  # without a threshold, patience counts from the best
        assert evaluations_without_improvement(scores, 0.0) == len(scores) - 1 - scores.index(max(known))


@given(st.lists(st.floats(0, 100), max_size=9), st.floats(0.1, 100))
def test_kl_decides_over_five_whole_steps(kl: list[float], limit: float) -> None:
    last = kl[-5:]
    assert kl_average(kl) == (math.fsum(last) / len(last) if last else None)
    assert kl_too_large(kl, limit) == (len(kl) >= 5 and math.fsum(last) / 5 > limit)


@pytest.mark.parametrize("spent", [99, 100, 101])
def test_a_budget_is_spent_when_it_is_reached(spent: int) -> None:
    amounts = {"generated_tokens": spent, "flops": float(spent), "seconds": float(spent)}
    for name in amounts:
        found = spent_budget(amounts, BudgetConfig(**{name: 100}))
        assert found == ((name, spent, 100.0) if spent >= 100 else None)


def test_explanations_say_rule_and_numbers() -> None:
    reasons = [
        ({"rule": "stop.max_kl", "value": 2.51, "limit": 2.0}, "stop.max_kl 2 is exceeded: KL was 2.51 nats"),
        (
            {"rule": "stop.on", "value": None, "limit": 3.0},
            "did not improve in 3 evaluations, the last one gave nothing",
        ),
        ({"rule": "budget.flops", "value": 1e9, "limit": 1e9}, "budget.flops 1000000000 is spent: 1000000000"),
    ]
    for reason, text in reasons:
        assert text in explained(reason)
    assert "more than allowed" not in explained(reasons[2][0])


# -- over a run ------------------------------------------------------------------------------------------------------


class Steps:
    """A run of an Ending over a layer whose weight is the number of the step."""

    def __init__(self, out: Path, *, resume: bool = False, num_steps: int = 9, **rules: Any) -> None:
        self.run = Run(out, recipe_from_mapping(SFT | {"checkpoint": {"every": 1}}), resume=resume)
        self.layer = nn.Linear(1, 1, bias=False)
        rules = {"stop": None, "budget": None} | rules
        self.ending = Ending(self.run, num_steps, self.layer, **rules, evaluate=lambda step: {})
        self.lines: list[dict[str, float]] = []

    def go(self, kl: list[float | None] | None = None, scores: list[Any] | None = None, tokens: int = 0) -> int:
        """Train until the end, or until what is measured is used up; returns the last step."""
        done = self.run.first_step
        for step in self.ending.steps():
            done = step + 1
            with torch.no_grad():
                self.layer.weight.fill_(done)
            self.run.count(generated_tokens=tokens, forward=1e6 * tokens)
            line = self.ending.after_update(done, kl[step] if kl else None)
            line |= self.ending.after_evaluation(done, {ON: scores[step]} if scores else {})
            self.lines.append(self.run.log(done, line))
            self.run.maybe_checkpoint(done, self.ending.last_step, self.ending.tensors, self.ending.values())
            if done in (len(kl or []), len(scores or [])):
                break
        return done

    def weight(self) -> float:
        """What would be saved."""
        return float(self.layer.weight.detach())


def test_kl_ends_after_the_step_that_carries_the_average_over(tmp_path: Path) -> None:
    steps = Steps(tmp_path, stop=StopConfig(max_kl=3.0))
    assert steps.go(kl=[1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 4.0, 9.0, 9.0]) == 8
    assert [line["stop/kl_average"] for line in steps.lines[:2]] == [1.0, 5.0]
    steps.ending.conclude()
    expected = {"step": 8, "rule": "stop.max_kl", "value": 3.2, "limit": 3.0, "best_step": None}
    assert json.loads((tmp_path / "stopped.json").read_text()) == expected == steps.run.stopped
    assert steps.weight() == 8
    assert len(steps.ending.values()["stop"]["kl"]) == 5, "a long run's checkpoints do not grow"


def test_a_kl_that_is_no_number_decides_nothing(tmp_path: Path) -> None:
    steps = Steps(tmp_path, stop=StopConfig(max_kl=3.0))
    assert steps.go(kl=[1.0, math.nan, math.inf, None, 2.0, 2.0, 2.0, 2.0, 2.0]) == 9
    assert steps.ending.last_step == 9
    assert steps.lines[1]["stop/kl_average"] == 1.0
    assert "stop/kl_average" not in steps.lines[3]


@pytest.mark.parametrize(("keep", "saved"), [("last", 5.0), ("best", 2.0)])
def test_patience_ends_and_the_parameters_asked_for_are_kept(
    keep: str, saved: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(tmp_path, stop=StopConfig(on=ON, patience=3, keep=keep))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert steps.go(scores=[0.1, 0.5, 0.4, 0.5, 0.3, 0.9]) == 5
    assert "step 5 of 9 is the last one: stop.on did not improve in 3 evaluations" in caplog.text
    assert [line["stop/evaluations_without_improvement"] for line in steps.lines] == [0, 0, 1, 2, 3]
    steps.ending.conclude()
    assert steps.weight() == saved
    stopped = steps.run.stopped
    assert stopped is not None
    assert (stopped["rule"], stopped["value"], stopped["best_step"]) == ("stop.on", 0.3, 2)


def test_lower_can_be_better(tmp_path: Path) -> None:
    rule = StopConfig(on="evaluation/truncated_fraction", higher_is_better=False, patience=2, keep="best")
    steps = Steps(tmp_path, stop=rule)
    for done, value in enumerate([0.5, 0.25, 0.75, 0.75], start=1):
        with torch.no_grad():
            steps.layer.weight.fill_(done)
        steps.ending.after_evaluation(done, {"evaluation/truncated_fraction": value})
    assert steps.ending.last_step == 4
    steps.ending.conclude()
    assert steps.weight() == 2.0


def test_the_best_is_kept_where_gains_are_too_small_to_wait_for(tmp_path: Path) -> None:
    steps = Steps(tmp_path, stop=StopConfig(on=ON, patience=2, min_delta=1.0, keep="best"))
    assert steps.go(scores=[0.1, 0.2, 0.3, 0.4]) == 3
    steps.ending.conclude()
    assert steps.weight() == 3.0


def test_best_is_restored_also_where_nothing_ended_the_run(tmp_path: Path) -> None:
    steps = Steps(tmp_path, stop=StopConfig(on=ON, patience=9, keep="best"), num_steps=3)
    assert steps.go(scores=[0.1, 0.9, 0.5]) == 3
    steps.ending.conclude()
    assert steps.weight() == 2.0
    assert steps.run.stopped == {"step": 3, "rule": "num_steps", "value": None, "limit": None, "best_step": 2}


def test_an_evaluation_without_the_number_is_no_improvement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(tmp_path, stop=StopConfig(on=ON, patience=2, keep="best"))
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert steps.go(scores=[None, math.nan, 0.9]) == 2
        steps.ending.conclude()
    assert "evaluation/combined: an evaluation gave no such number" in caplog.text
    assert "the last step's parameters are saved" in caplog.text
    assert steps.weight() == 2.0


def test_a_rule_that_is_met_at_the_last_step_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(tmp_path, stop=StopConfig(on=ON, patience=1), budget=BudgetConfig(flops=3e6), num_steps=3)
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert steps.go(scores=[0.1, 0.2, 0.1], tokens=1) == 3
    steps.ending.conclude()
    assert steps.run.stopped is not None
    assert steps.run.stopped["rule"] == "num_steps"
    assert "is the last one" not in caplog.text


@pytest.mark.parametrize("budget", [{"generated_tokens": 70}, {"flops": 7e7}])
def test_a_budget_ends_after_the_step_that_spends_it(
    budget: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps(tmp_path, budget=BudgetConfig(**budget))
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert steps.go(tokens=30) == 3
    assert steps.run.budget_share == pytest.approx(90 / 70), "for whoever shows the time left"
    assert "is spent: 90" in caplog.text
    assert "28.6% more than allowed" in caplog.text


def test_a_budget_below_one_step_still_makes_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(tmp_path, budget=BudgetConfig(seconds=1e-9))
    with caplog.at_level(logging.WARNING, "equipoise"):
        assert steps.go() == 1
    assert "budget.seconds 1e-09 is spent" in caplog.text


def test_seconds_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    steps = Steps(tmp_path, budget=BudgetConfig(seconds=1e6))
    steps.run._started -= 1000  # as if a thousand seconds had passed
    steps.go(kl=[0.0, 0.0])
    assert 1000 <= Steps(tmp_path, resume=True, budget=BudgetConfig(seconds=1e6)).run.spent()["seconds"] < 1100


def test_resume_continues_the_history(tmp_path: Path) -> None:
    rules: dict[str, Any] = {
        "stop": StopConfig(on=ON, max_kl=3.0, patience=3, keep="best"),
        "budget": BudgetConfig(generated_tokens=500),
    }
    scores = [0.1, 0.5, 0.4, 0.2, 0.3, 0.9]
    kl: list[float | None] = [1.0] * 6
    whole = Steps(tmp_path / "whole", **rules)
    assert whole.go(kl, scores, tokens=10) == 5
    for end in range(1, 6):
        out = tmp_path / f"after-{end}"
        Steps(out, **rules).go(kl[:end], scores[:end], tokens=10)
        resumed = Steps(out, resume=True, **rules)
        assert resumed.go(kl, scores, tokens=10) == 5
        resumed.ending.conclude()
        assert resumed.ending.values() == whole.ending.values()
        assert resumed.weight() == 2.0
        assert resumed.run.num_steps == 5


def test_going_back_before_the_end_forgets_it(tmp_path: Path) -> None:
    rules: dict[str, Any] = {"stop": StopConfig(on=ON, patience=1)}
    steps = Steps(tmp_path, **rules)
    assert steps.go(scores=[0.5, 0.4]) == 2
    steps.ending.conclude()
    last = tmp_path / "checkpoints" / "step_000002"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert Steps(tmp_path, resume=True, **rules).run.stopped is None


def test_decisions_are_the_main_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that measured a better score follows the main one."""
    steps = Steps(tmp_path, stop=StopConfig(on=ON, max_kl=1.0, patience=1, keep="best"))
    told = iter([0.5, 0.4])
    monkeypatch.setattr(steps.run, "of_main", lambda value: next(told))
    assert steps.go(scores=[0.1, 0.9, 1.0]) == 2
    assert steps.ending.values()["stop"]["evaluations"] == [[1, 0.5], [2, 0.4]]


def test_nothing_is_kept_where_nothing_can_end_a_run(tmp_path: Path) -> None:
    steps = Steps(tmp_path, num_steps=2)
    assert steps.go() == 2
    steps.ending.conclude()
    assert steps.ending.values() == steps.ending.tensors() == {}
    assert not (tmp_path / "stopped.json").exists()


def test_a_damaged_stopped_file_is_named(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    (tmp_path / "stopped.json").write_text('{"step": 3')
    with pytest.raises(CheckpointError, match=r"stopped\.json: is not what was written .*delete it"):
        _ = steps.run.stopped


# -- bad input -------------------------------------------------------------------------------------------------------

PPO = GRPO | {"algorithm": "ppo"}
DPO = {"algorithm": "dpo", "policy": {"model": "m"}, "data": "d.jsonl"}
WITH = {"evaluation": EVALUATION}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rule": (GRPO | {"stop": {}}, "stop has no rule: give max_kl, max_uncertainty, on"),
    "no metric": (GRPO | {"stop": {"max_kl": 1, "keep": "best"}}, "keep best and higher_is_better are about `on`"),
    "no evaluation": (GRPO | {"stop": {"on": ON}}, "stop.on 'evaluation/combined' needs `evaluation`"),
    "no judge": (GRPO | WITH | {"stop": {"on": "evaluation/judge/combined"}}, "needs a judge: add evaluation.judge"),
    "training metric": (GRPO | WITH | {"stop": {"on": "reward/combined"}}, "is not a metric of the in-loop evaluation"),
    "no direction": (GRPO | WITH | {"stop": {"on": "evaluation/x/mean"}}, "add higher_is_better: true or false"),
    "known direction": (GRPO | WITH | {"stop": {"on": ON, "higher_is_better": False}}, "remove higher_is_better"),
    "no reference": (GRPO | {"beta": 0, "stop": {"max_kl": 1}}, "stop.max_kl needs a reference, which beta 0"),
    "no reference of ppo": (PPO | {"beta": 0, "stop": {"max_kl": 1}}, "stop.max_kl needs a reference, which beta 0"),
    "zero kl": (GRPO | {"stop": {"max_kl": 0}}, "stop.max_kl"),
    "no patience": (GRPO | WITH | {"stop": {"on": ON, "patience": 0}}, "stop.patience"),
    "kl of dpo": (DPO | {"stop": {"max_kl": 1}}, "stop.max_kl: DPO samples nothing"),
    "no evaluation of dpo": (DPO | {"stop": {"on": ON}}, "needs `evaluation`, which is missing"),
    "stop of sft": (SFT | {"stop": {"max_kl": 1}}, "unknown key `stop`"),
    "no limit": (GRPO | {"budget": {}}, "budget limits nothing: give generated_tokens, flops or seconds"),
    "below a step": (
        GRPO | {"budget": {"generated_tokens": 63}},
        "budget.generated_tokens 63 is too small for one step of up to 64 completions",
    ),
    "below a step of ppo": (PPO | {"budget": {"generated_tokens": 63}}, "63 is too small for one step of up to 64"),
    "tokens of dpo": (DPO | {"budget": {"generated_tokens": 9}}, "budget.generated_tokens: dpo samples nothing"),
    "tokens of sft": (SFT | {"budget": {"generated_tokens": 9}}, "budget.generated_tokens: sft samples nothing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_refused_with_the_mend(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        recipe_from_mapping(values)
    assert message in str(caught.value)


def test_on_is_a_key_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `on:` as `true:`."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "algorithm: grpo\npolicy: {model: m}\ndata: p\nscorers: sandbox\nobjective_weights: {x: 1}\nnum_steps: 1\n"
        "evaluation: {every: 1, prompts: h}\nstop: {on: evaluation/combined, keep: best}\n"
    )
    stop = load_recipe(path).stop  # type: ignore[union-attr]
    assert stop == StopConfig(on=ON, keep="best")


def test_a_metric_that_is_not_measured_is_refused_before_training(tmp_path: Path) -> None:
    run = Run(tmp_path, recipe_from_mapping(SFT))
    stop = StopConfig(on=ON)

    class Measures:
        metric_names = frozenset({"evaluation/combine", "evaluation/x/mean"})

        def __call__(self, step: int) -> dict[str, Any]:
            return {}

    with pytest.raises(ConfigError, match=r"is not measured .*did you mean 'evaluation/combine'.*evaluation/x/mean"):
        Ending(run, 3, nn.Linear(1, 1), stop=stop, evaluate=Measures())
    with pytest.raises(ConfigError, match="needs an in-loop evaluation"):
        Ending(run, 3, nn.Linear(1, 1), stop=stop)

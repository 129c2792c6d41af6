"""From scores to advantages: names, directions, options, scales, ties; and what a run warns about."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import Table, TableScorer, advantages
from tests.toy import grpo_values, toy_policy_directory, toy_rollout

from equipoise.algorithms.grpo import train_grpo
from equipoise.algorithms.grpo_records import Watch, completion_columns, step_metrics
from equipoise.algorithms.grpo_signal import Objectives, Signal, make_signal
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError, RewardError
from equipoise.models.aspects import Aspect
from equipoise.models.policy import load_policy
from equipoise.rollout.scorers import score_rollout
from equipoise.rollout.types import Rollout

ASPECTS = {name: {"higher_is_better": True} for name in ("a", "b")}


def config_of(**changes: Any) -> GRPOConfig:
    values = grpo_values(Path("model"), Path("prompts"))
    values |= {"scorers": {"function": "tests.toy:politeness", "aspects": ASPECTS}}
    return GRPOConfig.model_validate(values | {"objective_weights": {"a": 1.0, "b": 1.0}} | changes)


def signal_of(table: Table, out: Path, **changes: Any) -> tuple[Signal, Rollout, Objectives, Run]:
    """The signal of a table of scores, groups of three."""
    config = config_of(**changes)
    rollout = toy_rollout([2] * len(table), [3] * len(table), group_size=3)
    scorer = TableScorer(table)
    objectives = Objectives.of(config, [scorer])
    run = Run(out, config)
    return make_signal(rollout, score_rollout(rollout, [scorer]), objectives, config, run), rollout, objectives, run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective_weights": {"a": 1, "bb": 1}},
            r"objective_weights: unknown aspect 'bb'.*did you mean.*'?b'?.*a, b",
        ),
        ({"objective_weights": {"a": 1}}, r"objective_weights: no weight for b; give one, 0 to log"),
        ({"combine": {"method": "weighted_sums"}}, r"combine\.method 'weighted_sums' is not known.*weighted_sum"),
        ({"combine": {"options": {"clip": 2}}}, r"combine\.options: weighted_sum has no option 'clip'; it takes none"),
        ({"combine": {"method": "conditioned", "options": {"gate": "c"}}}, r"options of conditioned: gate .*'c'.*a, b"),
        (
            {"combine": {"method": "chebyshev", "options": {"tau": -1}}},
            r"combine\.options of chebyshev: tau must be above",
        ),
    ],
)
def test_names_and_options_that_do_not_exist(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Objectives.of(config_of(**changes), [TableScorer([[0.0, 0.0]])])


def test_weights_follow_the_scorers_order_not_the_recipe_s() -> None:
    objectives = Objectives.of(config_of(objective_weights={"b": 0.25, "a": 2.0}), [TableScorer([[0.0, 0.0]])])
    assert objectives.names == ["a", "b"] and objectives.weights_K.tolist() == [2.0, 0.25]


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_advantages_with_gaps(tmp_path: Path, scale: str) -> None:
    table: Table = [[0.1, 3.0], [0.4, None], [None, 1.0], [0.2, 0.2], [None, None], [0.9, 0.1]]
    signal, *_ = signal_of(table, tmp_path / "run", scale=scale, objective_weights={"a": 1.0, "b": 0.5})
    expected = advantages(table, [1.0, 0.5], [0, 0, 0, 1, 1, 1], scale, 1e-4)
    assert signal.advantages_B.tolist() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(signal.contributions_BK.sum(dim=1), signal.advantages_B)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_opposed_objectives_that_tie_are_a_group_without_variance(tmp_path: Path, scale: str) -> None:
    """0.1 + 0.9, 0.3 + 0.7 and 0.6 + 0.4 are equal but for rounding."""
    table: Table = [[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]]
    signal, *_ = signal_of(table, tmp_path / "run", scale=scale, zero_variance="skip")
    assert signal.advantages_B.tolist() == [0.0, 0.0, 0.0]
    assert signal.zero_variance_groups == 1 and not signal.trained_B.any()


def test_a_gate_is_named_by_its_aspect(tmp_path: Path) -> None:
    """`b` passes at 0.5: the second completion earns nothing by `a`."""
    table: Table = [[0.1, 0.9], [0.8, 0.2], [0.5, 0.7]]
    found = []
    for gate in ("b", 1):
        combine = {"method": "conditioned", "options": {"gate": gate, "threshold": 0.5}}
        found.append(signal_of(table, tmp_path / str(gate), combine=combine)[0].advantages_B.tolist())
    assert found[0] == found[1] and found[0][1] < min(found[0][0], found[0][2])


def test_a_gate_that_nothing_was_scored_on_is_named(tmp_path: Path) -> None:
    table: Table = [[0.1, None], [0.8, None]]
    combine = {"method": "conditioned", "options": {"gate": "b"}}
    with pytest.raises(RewardError, match=r"combine\.options\.gate 'b': none of the step's 2 completions has a score"):
        signal_of(table, tmp_path / "none", combine=combine)
    table[1][1] = 0.2
    signal_of(table, tmp_path / "some", combine=combine)


def test_lower_is_better_turns_the_sign(tmp_path: Path) -> None:
    table: Table = [[1.0], [2.0], [4.0]]
    scorer = TableScorer(table, ("a",))
    up = [Aspect("a", higher_is_better=True)]
    down = [Aspect("a", higher_is_better=False, range=(0.0, 5.0))]
    config = config_of(objective_weights={"a": 1.0})
    rollout, run = toy_rollout([2] * 3, [3] * 3, group_size=3), Run(tmp_path / "run", config)
    scores = score_rollout(rollout, [scorer])
    found = []
    for aspects in (up, down):
        objectives = Objectives(aspects, torch.tensor([1.0], dtype=torch.float64))
        found.append(make_signal(rollout, scores, objectives, config_of(combine={"delta": 1e-12}), run).advantages_B)
    torch.testing.assert_close(found[0], -found[1])
    assert found[0].tolist() == sorted(found[0].tolist())


def test_an_objective_of_weight_zero_is_logged_and_moves_nothing(tmp_path: Path) -> None:
    table: Table = [[0.1, 5.0], [0.4, None], [0.2, -7.0]]
    signal, rollout, objectives, run = signal_of(table, tmp_path / "run", objective_weights={"a": 1.0, "b": 0.0})
    assert signal.advantages_B.tolist() == pytest.approx(advantages(table, [1.0, 0.0], [0] * 3, "std", 1e-4))
    assert signal.combined_B.tolist() == pytest.approx([0.1, 0.4, 0.2]), "b's gap does not make it missing"
    scores = score_rollout(rollout, [TableScorer(table)])
    metrics = step_metrics(rollout, scores, signal, objectives, run)
    assert metrics["reward/b/mean"] == -1.0 and metrics["advantage/b/variance_share"] == 0.0


def test_completions_file_holds_scores_shares_and_advantages(tmp_path: Path) -> None:
    table: Table = [[0.1, 5.0], [0.4, None], [0.2, -7.0]]
    signal, rollout, objectives, _ = signal_of(table, tmp_path / "run")
    columns = completion_columns(rollout, score_rollout(rollout, [TableScorer(table)]), signal, objectives)
    assert columns["score/b"] == [5.0, None, -7.0]
    for row in range(3):
        total = columns["share/a"][row] + columns["share/b"][row]
        assert total == pytest.approx(columns["advantage"][row])
    assert columns["group"] == [0, 0, 0] and columns["index"] == [0, 1, 2]
    assert set(columns) >= {"prompt", "completion", "finish_reason", "score/a"}
    assert {len(values) for values in columns.values()} == {3}


def test_each_warning_comes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table: Table = [[0.1, 0.0], [0.4, 0.001], [0.2, 0.0]]
    _, _, objectives, run = signal_of(table, tmp_path / "run")
    watch = Watch(first_length=10.0)
    calm = {
        "kl": 9.9, "truncated_fraction": 0.5, "completion_length/mean": 20.0,
        "advantage/a/variance_share": 0.79, "advantage/b/variance_share": 0.21,
    }  # fmt: skip
    alarming = {
        "kl": 10.1, "truncated_fraction": 0.51, "completion_length/mean": 20.1,
        "advantage/a/variance_share": 0.81, "advantage/b/variance_share": 0.19,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        watch.observe(calm, objectives, run)
        watch.observe({**calm, "kl": None}, objectives, run)
        assert not caplog.records
        for _ in range(2):
            watch.observe(alarming, objectives, run)
        assert len(caplog.records) == 3, "one aspect may dominate two steps by chance"
        watch.observe(calm, objectives, run)
        for _ in range(4):
            watch.observe(alarming, objectives, run)
    messages = [record.getMessage() for record in caplog.records]
    expected = ("KL to the reference is 10.1", "more than half", "twice as long", "aspect 'a' makes over 80%")
    assert len(messages) == 4
    for part in expected:
        assert sum(part in message for message in messages) == 1, part
    alone = replace(objectives, weights_K=torch.tensor([1.0, 0.0], dtype=torch.float64))
    caplog.clear()
    other = Run(tmp_path / "other", config_of())
    single = Watch(first_length=10.0)
    for _ in range(4):
        single.observe({**calm, "advantage/a/variance_share": 1.0}, alone, other)
    assert not caplog.records, "one objective alone always holds everything"


@pytest.mark.parametrize(("value", "warns"), [(0.5, True), (None, False)], ids=["constant reward", "varied reward"])
def test_a_first_step_that_changes_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float | None, warns: bool
) -> None:
    class Judge:
        name = "judge"
        aspects = [Aspect("politeness", higher_is_better=True)]  # noqa: RUF012

        def score(self, rollout: Rollout) -> dict[str, list[float]]:
            return {"politeness": [float(len(text)) if value is None else value for text in rollout.completions]}

    directory = toy_policy_directory(tmp_path / "model", layers=1, hidden=16)
    config = GRPOConfig.model_validate(grpo_values(directory, directory, beta=0.0, num_steps=2))
    with caplog.at_level(logging.WARNING):
        policy = load_policy(directory, trainable=True)
        train_grpo(policy, [Judge()], [PromptRecord(prompt="go")] * 4, config, Run(tmp_path / "run", config))  # type: ignore[list-item]
    assert sum("nothing changed after step 1" in record.getMessage() for record in caplog.records) == int(warns)


def test_prompts_that_do_not_divide_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = toy_policy_directory(tmp_path / "model", layers=1, hidden=16)
    config = GRPOConfig.model_validate(grpo_values(directory, directory, beta=0.0))
    monkeypatch.setattr(Run, "num_processes", 3)
    scorer = TableScorer([[0.0]], ("politeness",))
    with pytest.raises(ConfigError, match="prompts_per_step 4 does not divide among 3 processes; use a multiple of 3"):
        train_grpo(load_policy(directory, trainable=True), [scorer], [], config, Run(tmp_path / "run", config))

"""Pessimism and the watch over an ensemble's disagreement: what is trained on, logged, and when a warning is due."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import Table, TableScorer
from tests.toy import grpo_values, toy_rollout

from equipoise.algorithms.grpo_records import completion_columns
from equipoise.algorithms.grpo_signal import Objectives, make_signal
from equipoise.algorithms.pessimism import kappa_of, pessimistic_scores
from equipoise.algorithms.run import Run
from equipoise.algorithms.stopping import Ending, explained
from equipoise.algorithms.uncertainty import WARNING, WINDOW, Uncertainty, level_ratio
from equipoise.config import GRPOConfig, PessimismConfig, StopConfig, recipe_from_mapping
from equipoise.errors import ConfigError, RewardError
from equipoise.models.aspects import Aspect, utilities
from equipoise.rollout.scorers import score_rollout, score_rollout_with_std

ASPECTS = [Aspect("tone", True, (0.0, 2.0)), Aspect("toxicity", False, (1.0, 5.0)), Aspect("style", False, None, 2, 4)]
NAMES = [aspect.name for aspect in ASPECTS]
TABLE: Table = [[0.2, 5.0, 1.0], [0.4, 2.0, 2.0], [1.5, None, 3.0]]
STD: Table = [[0.1, 0.5, 2.0], [0.2, 1.0, 0.0], [0.3, None, 4.0]]


class Ensemble(TableScorer):
    """Knows how sure it is."""

    has_std = True

    def __init__(self, table: Table = TABLE, std: Table = STD) -> None:
        super().__init__(table, tuple(NAMES))
        self.name = "an ensemble"
        self.aspects = ASPECTS
        self._std = TableScorer(std, tuple(NAMES))

    def score_with_std(self, rollout: Any) -> tuple[Any, Any]:
        return self.score(rollout), self._std.score(rollout)


class Single(TableScorer):
    """Does not."""

    def __init__(self) -> None:
        super().__init__(TABLE, tuple(NAMES))
        self.name = "one head"
        self.aspects = ASPECTS


def config_of(**changes: Any) -> GRPOConfig:
    values = grpo_values(Path("model"), Path("prompts")) | {
        "scorers": {"reward_models": ["one", "other"]},
        "objective_weights": {"tone": 1.0, "toxicity": 2.0, "style": 0.5},
    }
    config = recipe_from_mapping(values | changes)
    assert isinstance(config, GRPOConfig)
    return config


def tensor(table: Table) -> torch.Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in table], dtype=torch.float64)


def test_scores_come_with_their_std():
    rollout = toy_rollout([2, 2, 2], [3, 5, 2])
    scores, std = score_rollout_with_std(rollout, [Ensemble()])
    assert torch.equal(scores.nan_to_num(9), score_rollout(rollout, [Ensemble()]).nan_to_num(9))
    assert torch.equal(scores.nan_to_num(9), tensor(TABLE).nan_to_num(9))
    assert std is not None and torch.equal(std.nan_to_num(9), tensor(STD).nan_to_num(9))
    assert score_rollout_with_std(rollout, [Single()])[1] is None
    other = Single()
    other.aspects = [Aspect("a", True), Aspect("b", True), Aspect("c", True)]
    other.score = lambda rollout: {name: [1.0, 2.0, 3.0] for name in "abc"}  # type: ignore[method-assign]
    both = score_rollout_with_std(rollout, [other, Ensemble()])[1]
    assert both is not None and both[:, :3].isnan().all() and torch.equal(both[:, 3:].nan_to_num(9), std.nan_to_num(9))


@pytest.mark.parametrize(
    ("std", "message"),
    [
        ([[0.1, 0.5, 2.0], [-0.2, 1.0, 0.0], [0.3, None, 4.0]], "an ensemble, aspect 'tone'.*deviation -0.2"),
        ([[0.1, None, 2.0], [0.2, 1.0, 0.0], [0.3, None, 4.0]], "aspect 'toxicity'.*deviation None"),
        ([[0.1, math.inf, 2.0], [0.2, 1.0, 0.0], [0.3, None, 4.0]], "inf is not a finite number"),
    ],
)
def test_a_std_that_is_none(std: Table, message: str):
    with pytest.raises(RewardError, match=message):
        score_rollout_with_std(toy_rollout([2, 2, 2], [3, 5, 2]), [Ensemble(std=std)])


def test_pessimistic_scores_worked():
    found = pessimistic_scores(
        torch.tensor([[3.0, 3.0]]), torch.tensor([[0.5, 0.5]]), [Aspect("up", True), Aspect("down", False)], [2.0, 2.0]
    )
    assert found.tolist() == [[2.0, 4.0]]


def test_pessimism_is_kappa_stds_off_the_utility():
    """The slow twin: utilities and their stds one by one, with and without a range, better high and low."""
    kappa = [0.5, 2.0, 3.0]
    found = utilities(pessimistic_scores(tensor(TABLE), tensor(STD), ASPECTS, kappa), ASPECTS)
    slopes = [1 / 2, 1 / 4, 1 / 4]  # of a utility per unit of its score, without its sign
    for i, row in enumerate(TABLE):
        for k, value in enumerate(row):
            if value is None:
                assert found[i, k].isnan()
                continue
            mean = [value / 2, (5 - value) / 4, -(value - 2) / 4][k]
            assert float(found[i, k]) == pytest.approx(mean - kappa[k] * STD[i][k] * slopes[k], abs=1e-12)  # type: ignore[operator]


def test_kappa_zero_is_the_same_tensor(tmp_path):
    for pessimism in (None, {"kappa": 0.0}, {"kappa": {"tone": 0.0}}):
        config = config_of(pessimism=pessimism)
        watched = Uncertainty(config, [Ensemble()], Run(tmp_path / str(pessimism), config))
        scores = tensor(TABLE)
        assert watched.trained_on(scores, tensor(STD), Objectives.of(config, [Ensemble()])) is scores
    # A std that is not known does not reach a column that does not ask for it.
    part = pessimistic_scores(tensor(TABLE), torch.full((3, 3), math.nan), ASPECTS, [0.0, 0.0, 0.0])
    assert torch.equal(part.nan_to_num(9), tensor(TABLE).nan_to_num(9))


def test_kappa_by_aspect():
    assert kappa_of(None, [Ensemble()]) == [0.0] * 3
    assert kappa_of(PessimismConfig(kappa=1.5), [Ensemble()]) == [1.5] * 3
    assert kappa_of(PessimismConfig(kappa={"toxicity": 2.0}), [Ensemble()]) == [0.0, 2.0, 0.0]
    assert kappa_of(PessimismConfig(kappa=0.0), [Single()]) == [0.0] * 3


@pytest.mark.parametrize(
    ("kappa", "scorer", "message"),
    [
        (1.0, Single(), r"kappa 1: one head gives 'tone' without a standard deviation.*ensemble: \{members: 4\}"),
        ({"style": 0.5}, Single(), "one head gives 'style' without"),
        ({"tnoe": 0.5}, Ensemble(), r"unknown aspect 'tnoe' \(did you mean 'tone'\?\)"),
    ],
)
def test_pessimism_that_cannot_be_is_refused_before_training(kappa: Any, scorer: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        Objectives.of(config_of(pessimism={"kappa": kappa}), [scorer])


@pytest.mark.parametrize(
    ("kappa", "message"),
    [
        (-1.0, "kappa -1 is negative, it would reward what the members disagree on"),
        ({"tone": 1.0, "style": -0.5}, r"kappa\.style -0.5 is negative"),
        ("a lot", r"pessimism\.kappa"),
    ],
)
def test_wrong_kappa(kappa: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        config_of(pessimism={"kappa": kappa})


def test_one_directory_is_no_list():
    with pytest.raises(ConfigError, match=r"reward_models.*at least 2"):
        config_of(scorers={"reward_models": ["one"]})


def test_metrics_of_a_step(tmp_path):
    """uncertainty/<aspect> is the mean std; combined rewards of the means and of what is trained on, by hand."""
    config = config_of(pessimism={"kappa": {"tone": 1.0, "toxicity": 0.5}})
    run = Run(tmp_path, config)
    objectives = Objectives.of(config, [Ensemble()])
    watched, rollout = Uncertainty(config, [Ensemble()], run), toy_rollout([2, 2, 2], [3, 5, 2], group_size=3)
    trained = watched.trained_on(tensor(TABLE), tensor(STD), objectives)
    signal = make_signal(rollout, trained, objectives, config, run)
    metrics = watched.observe(tensor(TABLE), tensor(STD), signal, objectives)
    of_means = [0.1 + 2 * 0.0 - 0.5 * -0.25, 0.2 + 2 * 0.75 - 0.0]
    penalties = [0.1 / 2 + 2 * 0.5 * 0.5 / 4, 0.2 / 2 + 2 * 0.5 * 1.0 / 4]
    assert metrics["reward/combined"] == pytest.approx(sum(of_means) / 2)
    assert metrics["pessimism/combined"] == pytest.approx((sum(of_means) - sum(penalties)) / 2)
    assert metrics["uncertainty/tone"] == pytest.approx(0.2)
    assert metrics["uncertainty/toxicity"] == pytest.approx(0.75)
    assert metrics["uncertainty/tone/ratio"] is None
    columns = completion_columns(rollout, tensor(TABLE), signal, objectives, tensor(STD))
    assert columns["std/toxicity"] == [0.5, 1.0, None] and columns["score/toxicity"] == [5.0, 2.0, None]
    assert not any(name.startswith("std/") for name in completion_columns(rollout, tensor(TABLE), signal, objectives))


def observe_levels(watched: Uncertainty, levels: list[float], config: GRPOConfig, run: Run) -> list[float | None]:
    objectives = Objectives.of(config, [Ensemble()])
    signal = make_signal(toy_rollout([2] * 3, [3, 5, 2], group_size=3), tensor(TABLE), objectives, config, run)
    found = []
    for level in levels:
        metrics = watched.observe(tensor(TABLE), torch.full((3, 3), level).double(), signal, objectives)
        found.append(metrics["uncertainty/style/ratio"])
    return found


def test_the_warning_is_said_once_and_survives_a_resume(tmp_path, caplog):
    config = config_of()
    run = Run(tmp_path, config)
    watched = Uncertainty(config, [Ensemble()], run)
    levels = [1.0] * WINDOW + [2.0] * WINDOW
    with caplog.at_level(logging.WARNING, "equipoise"):
        ratios = observe_levels(watched, levels, config, run)
    assert ratios[: WINDOW - 1] == [None] * (WINDOW - 1)
    assert ratios[WINDOW - 1 :] == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    assert watched.ratio() == pytest.approx(2.0)
    said = [record.message for record in caplog.records]
    assert len(said) == 3 and WARNING == 1.5, "once for each aspect"
    assert "disagrees on 'style' 1.6 times as much as in the first 5 steps" in said[2]
    again = Uncertainty(config, [Ensemble()], run)
    again._first, again._last = (watched.values()["uncertainty"][part] for part in ("first", "last"))
    assert again.ratio() == watched.ratio()
    assert Uncertainty(config, [Single()], run).values() == {}
    assert Uncertainty(config, [Single()], run).ratio() is None


def test_level_ratio_worked():
    assert level_ratio([1.0] * 5, [1.0, 2.0, 2.0, 2.0, 3.0]) == 2.0
    assert level_ratio([1.0] * 4, [1.0] * 4) is None
    assert level_ratio([0.0] * 5, [1.0] * 5) is None


def test_the_run_ends_where_the_ensemble_parts(tmp_path):
    config = config_of(stop={"max_uncertainty": 1.5})
    run = Run(tmp_path, config)
    ending = Ending(run, 9, torch.nn.Linear(1, 1), stop=config.stop)
    seen = []
    for step, ratio in zip(ending.steps(), [None, 1.0, 1.5, 1.51, 9.0], strict=False):
        ending.after_update(step + 1, 0.0, ratio)
        seen.append(step + 1)
    assert seen == [1, 2, 3, 4] and ending.last_step == 4
    ending.conclude()
    assert run.stopped == {
        "step": 4, "rule": "stop.max_uncertainty", "value": 1.51, "limit": 1.5, "best_step": None
    }  # fmt: skip
    assert run.stopped is not None and explained(run.stopped).startswith(
        "stop.max_uncertainty 1.5 is exceeded: the reward ensemble disagrees 1.51"
    )


def test_rules_on_uncertainty_that_cannot_be(tmp_path):
    config = config_of(stop={"max_uncertainty": 2})
    with pytest.raises(ConfigError, match=r"stop\.max_uncertainty 2: no scorer is an ensemble"):
        Uncertainty(config, [Single()], Run(tmp_path, config))
    with pytest.raises(ValueError, match="greater than 0"):
        StopConfig(max_uncertainty=0)
    dpo = {"algorithm": "dpo", "policy": {"model": "m"}, "data": "pairs.jsonl", "stop": {"max_uncertainty": 2}}
    with pytest.raises(ConfigError, match=r"stop\.max_uncertainty: DPO scores nothing"):
        recipe_from_mapping(dpo)

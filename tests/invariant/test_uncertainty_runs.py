"""Whole runs on an ensemble: kappa 0 changes no bit, kappa above 0 does, and a run that dies ends the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.run_toys import World, differences, metrics, train, train_until_crash
from tests.toy import grpo_values

from equipoise.algorithms import reward_regression
from equipoise.models.ensemble import RewardEnsemble
from equipoise.models.reward_model import RewardModel

CASES = {"grpo": {}, "ppo": {"algorithm": "ppo", "group_size": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_regression, "plot_aspect", lambda *_: None)
        train(world.reward(ensemble={"members": 3}), world.directory / "reward")
    return world


def recipe(world: World, name: str, **changes: Any) -> Path:
    reward = world.directory / "reward" / "model"
    aspects = RewardModel.load(reward).aspects
    values = grpo_values(world.model, world.prompts, threads=1, num_steps=2, checkpoint={"every": 1})
    values |= {"scorers": {"reward_model": str(reward)}, "objective_weights": dict.fromkeys(aspects, 1.0)}
    return world.recipe(name, values | changes)


@pytest.mark.parametrize("algorithm", CASES)
def test_pessimism(algorithm: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = CASES[algorithm]
    runs = {"none": None, "zero": {"kappa": 0.0}, "two": {"kappa": 2.0}}
    for name, pessimism in runs.items():
        train(recipe(world, f"{algorithm}-{name}", pessimism=pessimism, **changes), tmp_path / name)
    assert [name for name in differences(tmp_path / "none", tmp_path / "zero") if name != "config.json"] == []
    assert "model/model.safetensors" in differences(tmp_path / "none", tmp_path / "two")
    first, cautious = metrics(tmp_path / "none")[0], metrics(tmp_path / "two")[0]
    assert first["reward/combined"] == pytest.approx(cautious["reward/combined"], rel=1e-9), "of the means in both"
    assert cautious["pessimism/combined"] < cautious["reward/combined"]
    assert "pessimism/combined" not in first
    table = pq.read_table(tmp_path / "two" / "completions" / "step_000001.parquet").to_pydict()
    ensemble = RewardModel.load(world.directory / "reward" / "model")
    mean, std = ensemble.score(table["prompt"], table["completion"], with_std=True)
    for k, aspect in enumerate(ensemble.aspects):
        assert table[f"score/{aspect}"] == pytest.approx(mean[:, k].tolist(), abs=1e-5)
        assert table[f"std/{aspect}"] == pytest.approx(std[:, k].tolist(), abs=1e-5)
        assert cautious[f"uncertainty/{aspect}"] == pytest.approx(float(std[:, k].mean()), abs=1e-5)
        assert cautious[f"uncertainty/{aspect}/ratio"] is None
    with monkeypatch.context() as patch:
        train_until_crash(world.directory / f"{algorithm}-two.yaml", tmp_path / "died", 2, patch)
    train(world.directory / f"{algorithm}-two.yaml", tmp_path / "died", resume=True)
    assert differences(tmp_path / "two", tmp_path / "died") == []


def test_a_list_of_reward_models_scores_a_run(world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_regression, "plot_aspect", lambda *_: None)
        train(world.reward("other", seed=1), tmp_path / "other")
    paths = [str(world.directory / "reward" / "model"), str(tmp_path / "other" / "model")]
    train(recipe(world, "list", scorers={"reward_models": paths}, pessimism={"kappa": 1.0}), tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "completions" / "step_000002.parquet").to_pydict()
    ensemble = RewardEnsemble.load(paths)
    mean, std = ensemble.score(table["prompt"], table["completion"], with_std=True)
    for k, aspect in enumerate(ensemble.aspects):
        assert table[f"score/{aspect}"] == pytest.approx(mean[:, k].tolist(), abs=1e-5)
        assert table[f"std/{aspect}"] == pytest.approx(std[:, k].tolist(), abs=1e-5)

"""Training of an ensemble of heads: a member learns as it would alone, weights are a counter's, resume is bitwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.reward_toys import WORDS, save_backbone

from equipoise.algorithms import reward_regression
from equipoise.algorithms.reward_data import bootstrap_weights, epoch_batches, joined_splits, member_seeds
from equipoise.algorithms.reward_regression import ensemble_loss, train_reward
from equipoise.algorithms.reward_report import uncertainty_metrics
from equipoise.algorithms.run import Run
from equipoise.config import BackboneConfig, RewardConfig, recipe_from_mapping
from equipoise.data import ScoredRecord
from equipoise.errors import ConfigError
from equipoise.models.reward_model import RewardModel

RATE = 0.02


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    monkeypatch.setattr(reward_regression, "plot_aspect", lambda *_: None)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def records() -> list[ScoredRecord]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(24):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (5,), generator=generator)]
        scores: dict[str, float | None] = {"a": float("good" in words), "b": None if index % 3 else 10.0 - index}
        split = ("train", "train", "train", "validation", "test", "train")[index % 6]
        rows.append(ScoredRecord("", " ".join(words), scores, split=split))
    return rows


def recipe(backbone: Path, **changes: Any) -> RewardConfig:
    values = {
        "algorithm": "reward",
        "model": {"model": str(backbone), "dropout": 0.0},
        "data": "unused.jsonl",
        "aspects": {"a": {"higher_is_better": True}, "b": {"higher_is_better": True}},
        "ensemble": {"members": 3},
        "num_epochs": 2,
        "batch_size": 6,
        "patience": None,
        "optimizer": {"learning_rate": RATE, "max_grad_norm": 1e9, "weight_decay": 0.1},
        **changes,
    }
    config = recipe_from_mapping(values)
    assert isinstance(config, RewardConfig)
    return config


def frozen(monkeypatch) -> None:
    """Only the heads learn: what the backbone sees of a row then never changes, and members are strangers."""
    build = RewardModel.from_backbone.__func__

    def build_frozen(cls, *args: Any) -> RewardModel:
        model = build(cls, *args)
        model.module.requires_grad_(False)
        model._backbone.head.requires_grad_(True)
        return model

    monkeypatch.setattr(RewardModel, "from_backbone", classmethod(build_frozen))


def drawn(rows: list[int], config: RewardConfig) -> torch.Tensor:
    weights = bootstrap_weights(rows, config)
    assert weights is not None
    return weights


def features(backbone: Path, aspects: list, texts: list[str]) -> torch.Tensor:
    """What lies under the heads, read by a hook on the head of a plain model."""
    model = RewardModel.from_backbone(BackboneConfig(model=str(backbone), dropout=0.0), aspects, None, 0)
    seen = []
    model._backbone.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    for text in texts:
        model.score([""], [text])
    return torch.cat(seen)


@pytest.mark.parametrize(("balance", "loss"), [("labels", "mse"), ("equal", "huber")])
def test_members_learn_as_they_would_alone(balance, loss, backbone, records, tmp_path, monkeypatch):
    """The slow twin: each member is a linear layer of its own on features written down beforehand, trained by its own
    AdamW on its own weighted rows; the joint run's heads, taken back to standardised units, are theirs.
    """
    with monkeypatch.context() as patch:
        frozen(patch)
        config = recipe(backbone, aspect_balance=balance, loss=loss)
        model = train_reward(config, Run(tmp_path / "run", config), records=records)
    rows = joined_splits(records, [], config)["train"]
    x_NH = features(backbone, model.aspect_specs, [row.response for row in rows])
    y_NK = np.array([[row.scores[n] if row.scores[n] is not None else np.nan for n in ("a", "b")] for row in rows])
    y_NK = torch.tensor((y_NK - np.nanmean(y_NK, axis=0)) / np.nanstd(y_NK, axis=0)).float()
    counts_K = (~y_NK.isnan()).sum(dim=0)
    balance_K = counts_K.sum() / (2 * counts_K) if balance == "equal" else torch.ones(2)
    lengths = tuple(len(row.ids) for row in model.inputs.rows([""] * len(rows), [row.response for row in rows]))
    steps = -(-len(rows) // 6)
    best_step = json.loads((tmp_path / "run" / "reward_report.json").read_text())["best_step"]
    saved = load_file(tmp_path / "run" / "model" / "ensemble.safetensors")
    for member, seed in enumerate(member_seeds(config)):
        weight = torch.empty(2, 16).normal_(std=0.3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        bias = torch.zeros(2, requires_grad=True)
        groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, eps=3e-8)  # as loss / 3 with eps 1e-8
        for done in range(best_step):
            batch = epoch_batches(lengths, 6, config.seed, done // steps)[done % steps]
            labels = sum(int((~y_NK[row].isnan()).sum()) for row in batch)
            total = torch.zeros(())
            for row in batch:
                v = drawn([row], config)[0, member]
                for k in range(2):
                    if not y_NK[row, k].isnan():
                        error = weight[k] @ x_NH[row] + bias[k] - y_NK[row, k]
                        small = error.abs() <= 1
                        square = error**2 if loss == "mse" else torch.where(small, error**2 / 2, error.abs() - 0.5)
                        total = total + v * balance_K[k] * square
            optimizer.zero_grad()
            (total / (labels if balance == "labels" else len(batch) * counts_K.sum() / len(rows))).backward()
            optimizer.step()
        for k, aspect in enumerate(model.aspect_specs):
            expected = weight[k].detach() * aspect.std
            bias_K = bias.detach()
            assert torch.allclose(saved["weight"][member, k], expected, rtol=1e-3, atol=1e-4 * aspect.std)
            assert float(saved["bias"][member, k]) == pytest.approx(
                float(bias_K[k] * aspect.std + aspect.mean), abs=1e-4 * aspect.std
            )


def test_ensemble_loss_worked():
    config = RewardConfig.model_construct(loss="mse")
    predictions = torch.tensor([[[1.0], [3.0]]])
    weights = torch.tensor([[2.0, 1.0]])
    assert float(ensemble_loss(predictions, torch.zeros(1, 1), config, 1.0, None, weights)) == pytest.approx(5.5)
    assert float(ensemble_loss(predictions, torch.zeros(1, 1), config, 2.0)) == pytest.approx((1 + 9) / 2 / 2)
    by_aspect = torch.tensor([[[1.0, 5.0], [3.0, 7.0]]])
    targets = torch.tensor([[0.0, math.nan]])
    assert float(ensemble_loss(by_aspect, targets, config, 1.0, torch.tensor([4.0, 9.0]), weights)) == pytest.approx(22)


def test_weights_are_a_counters(backbone):
    """A row weighs the same whatever its batch; the draws are exponential of mean 1, and no two members' agree."""
    config = recipe(backbone)
    rows = list(range(20_000))
    weights = drawn(rows, config)
    assert weights.shape == (20_000, 3) and weights.dtype == torch.float32
    assert torch.equal(drawn([7, 3], config), weights[[7, 3]])
    assert (weights > 0).all() and torch.isfinite(weights).all()
    ordered = weights.sort(dim=0).values
    expected = 1 - torch.exp(-ordered)
    assert (expected - torch.linspace(0, 1, 20_000)[:, None]).abs().max() < 0.02, "Kolmogorov's distance"
    assert torch.corrcoef(weights.T)[0, 1].abs() < 0.03
    other = drawn(rows, recipe(backbone, seed=1))
    assert torch.corrcoef(torch.stack([weights[:, 0], other[:, 0]]))[0, 1].abs() < 0.03
    assert bootstrap_weights(rows, recipe(backbone, ensemble={"members": 2, "bootstrap": False})) is None
    assert member_seeds(config) == member_seeds(recipe(backbone, ensemble={"members": 4}))[:3]
    assert member_seeds(recipe(backbone, ensemble=None)) == []


class Crash(Exception):
    """The process is gone."""


def test_resume_is_bitwise(backbone, records, tmp_path, monkeypatch):
    config = recipe(backbone, model={"model": str(backbone), "dropout": 0.2}, checkpoint={"every": 2}, evaluate_every=1)
    model = train_reward(config, Run(tmp_path / "whole", config), records=records)
    log = Run.log

    def crash(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", crash)
        with pytest.raises(Crash):
            train_reward(config, Run(tmp_path / "broken", config), records=records)
    train_reward(config, Run(tmp_path / "broken", config, resume=True), records=records)
    for name in ("model/model.safetensors", "model/ensemble.safetensors", "model/equipoise.json", "reward_report.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    mean, std = RewardModel.load(tmp_path / "whole" / "model").score([""], ["cat dog"], with_std=True)
    ours = model.score([""], ["cat dog"], with_std=True)
    assert torch.allclose(mean, ours[0], rtol=1e-4, atol=1e-4) and torch.allclose(std, ours[1], rtol=1e-3)


def test_micro_batches_change_nothing(backbone, records, tmp_path):
    rows = {}
    for size in (None, 2):
        config = recipe(backbone, micro_batch_size=size, aspect_balance="equal")
        train_reward(config, Run(tmp_path / str(size), config), records=records)
        rows[size] = [json.loads(line) for line in (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()]
    assert rows[None][0]["loss"] == pytest.approx(rows[2][0]["loss"], rel=1e-5)
    assert rows[None][0]["grad_norm"] == pytest.approx(rows[2][0]["grad_norm"], rel=1e-5)


def test_report_says_how_far_the_disagreement_can_be_trusted(backbone, records, tmp_path):
    config = recipe(backbone)
    model = train_reward(config, Run(tmp_path / "run", config), records=records)
    report = json.loads((tmp_path / "run" / "reward_report.json").read_text())
    assert report["ensemble"]["members"] == 3 and report["ensemble"]["bootstrap"] is True
    test = [record for record in records if record.split == "test"]
    mean, std = model.score([""] * len(test), [record.response for record in test], with_std=True)
    entry = report["ensemble"]["aspects"]["a"]["test"]
    errors = [float(mean[i, 0]) - record.scores["a"] for i, record in enumerate(test)]
    assert entry["n"] == len(test) and entry["mean_std"] == pytest.approx(float(std[:, 0].mean()), rel=1e-4)
    assert entry["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-4)


def test_uncertainty_metrics_worked():
    found = uncertainty_metrics(torch.tensor([1.0, 2.0, 9.0]), torch.zeros(3), torch.tensor([1.0, 3.0, math.nan]))
    assert found == pytest.approx({"n": 2, "mean_std": 1.5, "rmse": math.sqrt(5), "error_spearman": 1.0})
    nothing = uncertainty_metrics(torch.ones(1), torch.ones(1), torch.tensor([math.nan]))
    assert nothing == {"n": 0, "mean_std": None, "rmse": None, "error_spearman": None}


def test_one_member_is_refused(backbone):
    with pytest.raises(ConfigError, match=r"ensemble\.members.*2"):
        recipe(backbone, ensemble={"members": 1})

"""train_reward: the run it leaves behind, gradients that do not depend on the splitting, early stopping, resume."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reward_toys import WORDS, save_backbone
from transformers import AutoModelForSequenceClassification

from equipoise.algorithms import reward_regression
from equipoise.algorithms.reward_regression import Best, balance_weights, train_reward
from equipoise.algorithms.run import Run
from equipoise.config import RewardConfig, recipe_from_mapping
from equipoise.data import ScoredRecord
from equipoise.errors import CheckpointError, ConfigError, DataError
from equipoise.functional import masked_regression_loss
from equipoise.models.reward_model import RewardModel

NUM_ROWS = 40


@pytest.fixture(autouse=True)
def plots_drawn(request, monkeypatch) -> None:
    """Drawing takes most of the time of so small a run; one test is enough for it."""
    if request.node.name != "test_the_run_it_leaves_behind":
        monkeypatch.setattr(reward_regression, "plot_aspect", lambda *_: None)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def records() -> list[ScoredRecord]:
    """`set/rare` is scored in one row of four, on another scale than `common`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(NUM_ROWS):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator)]
        scores: dict[str, float | None] = {"common": float("good" in words) + 0.1 * length}
        scores["set/rare"] = 100.0 - 20 * words.count("cat") + length if index % 4 == 0 else None
        rows.append(ScoredRecord(f"cat {WORDS[index % 16]}", " ".join(words), scores, location=f"rows:{index + 1}"))
    return rows


def recipe(backbone: Path, **changes: Any) -> RewardConfig:
    values = {
        "algorithm": "reward",
        "model": {"model": str(backbone), "dropout": 0.0},
        "data": "unused.jsonl",
        "aspects": {"common": {"higher_is_better": True}, "set/rare": {"range": [0, 120], "higher_is_better": False}},
        "num_epochs": 2,
        "batch_size": 8,
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }
    config = recipe_from_mapping(values)
    assert isinstance(config, RewardConfig)
    return config


def lines(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_the_run_it_leaves_behind(backbone, records, tmp_path):
    config = recipe(backbone)
    model = train_reward(config, Run(tmp_path / "run", config), records=records)
    out = tmp_path / "run"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "cost.json",
        "reward_report.json",
        "plots/common.png",
        "plots/set_rare.png",
        "model/model.safetensors",
        "model/equipoise.json",
    } <= files
    report = json.loads((out / "reward_report.json").read_text())
    counts = report["rows"]
    assert sum(counts.values()) == NUM_ROWS
    for split in ("train", "validation", "test"):
        metrics = report["aspects"]["common"][split]
        assert metrics["n"] == counts[split]
        assert {"mse", "mae", "r2", "pearson", "spearman", "baseline_mse"} <= metrics.keys()
    assert sum(report["aspects"]["set/rare"][split]["n"] for split in counts) == 10
    assert report["aspects"]["set/rare"]["range"] == [0.0, 120.0]
    assert report["truncation"]["train"] == {"rows": counts["train"], "prompts_truncated": 0, "responses_truncated": 0}
    assert report["duplicates_across_splits"]["count"] == 0
    rows = lines(out)
    steps = 2 * -(-counts["train"] // 8)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all({"loss", "grad_norm", "learning_rate"} <= row.keys() for row in rows)
    validated = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in validated] == [steps // 2, steps]
    assert "validation/common/spearman" in validated[0] and "validation/set/rare/spearman" in validated[0]
    cost = json.loads((out / "cost.json").read_text())
    assert cost["trained_tokens"] > 0 and cost["flops"]["backward"] == 2 * cost["flops"]["forward"] > 0
    loaded = RewardModel.load(out / "model")
    texts = ([r.prompt for r in records], [r.response for r in records])
    stds = torch.tensor([aspect.std for aspect in loaded.aspect_specs])
    assert ((loaded.score(*texts) - model.score(*texts)) / stds).abs().max() < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    with torch.no_grad():
        assert ((plain(**loaded.encode(*texts)).logits - loaded.score(*texts)) / stds).abs().max() < 1e-5


def test_report_equals_metrics_of_the_saved_model(backbone, records, tmp_path):
    rows = [
        ScoredRecord(r.prompt, r.response, r.scores, split=("train", "validation", "test")[i % 3])
        for i, r in enumerate(records)
    ]
    config = recipe(backbone, num_epochs=1)
    train_reward(config, Run(tmp_path, config), records=rows)
    test = [row for row in rows if row.split == "test"]
    scores = RewardModel.load(tmp_path / "model").score([r.prompt for r in test], [r.response for r in test])[:, 0]
    truth = torch.tensor([row.scores["common"] for row in test])
    report = json.loads((tmp_path / "reward_report.json").read_text())["aspects"]["common"]
    assert report["test"]["mse"] == pytest.approx(float((scores - truth).square().mean()), rel=1e-5)
    training = [row.scores["common"] for row in rows if row.split == "train"]
    assert report["mean"] == pytest.approx(sum(training) / len(training))


@pytest.mark.parametrize("balance", ["labels", "equal"])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_micro_batches_change_neither_loss_nor_gradient(balance, loss, backbone, records, tmp_path, monkeypatch):
    """One step on 32 rows, whole, in threes and one by one; the norm of the difference in float32 is 1e-6 at most."""
    gradients: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, max_norm):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    losses = []
    for size in (None, 3, 1):
        options = {"aspect_balance": balance, "loss": loss, "num_epochs": 1, "batch_size": 64}
        config = recipe(backbone, micro_batch_size=size, **options)
        train_reward(config, Run(tmp_path / str(size), config), records=records)
        losses.append(lines(tmp_path / str(size))[0]["loss"])
    assert len(gradients) == 3
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-6 * gradients[0].norm()


def test_balance_weights_worked():
    """30 and 10 labels: 40 / (2 * 30) = 2/3 and 40 / (2 * 10) = 2, both add 20 to the sum of weights."""
    labels = torch.zeros(30, 2)
    labels[10:, 1] = math.nan
    assert balance_weights(labels).tolist() == pytest.approx([2 / 3, 2.0])


def test_equal_balance_averages_to_the_mean_over_aspects(backbone, records, tmp_path, monkeypatch):
    """At a rate too small to move, the epoch's losses (weighted by rows) are the mean over aspects of each one's MSE.

    With `labels` they are not: the aspect with four times the labels has four times the weight.
    """
    found = {}
    for balance in ("equal", "labels"):
        sizes, model_of = [], {}
        original = reward_regression._update

        def update(model, training, batch, *rest, sizes=sizes, model_of=model_of, original=original):
            sizes.append(len(batch))
            model_of["split"] = training
            return original(model, training, batch, *rest)

        monkeypatch.setattr(reward_regression, "_update", update)
        config = recipe(backbone, aspect_balance=balance, num_epochs=1, optimizer={"learning_rate": 1e-12})
        model = train_reward(config, Run(tmp_path / balance, config), records=records)
        monkeypatch.setattr(reward_regression, "_update", original)
        losses = [row["loss"] for row in lines(tmp_path / balance)]
        split = model_of["split"]
        stds = torch.tensor([aspect.std for aspect in model.aspect_specs], dtype=torch.float64)
        squares = ((model.score_rows(split.rows).double() - split.labels_NK) / stds).square()
        by_aspect = squares.nanmean(dim=0)
        weighted = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
        found[balance] = (weighted, float(by_aspect.mean()))
    assert found["equal"][0] == pytest.approx(found["equal"][1], rel=1e-4)
    assert found["labels"][0] != pytest.approx(found["labels"][1], rel=1e-2)


def test_loss_of_a_step_is_the_masked_mean_of_the_whole_batch(backbone, records, tmp_path):
    config = recipe(backbone, batch_size=64, num_epochs=1, optimizer={"learning_rate": 1e-12})
    model = train_reward(config, Run(tmp_path, config), records=records)
    report = json.loads((tmp_path / "reward_report.json").read_text())
    (row,) = lines(tmp_path)
    total, labels = 0.0, 0
    for aspect in model.aspect_specs:
        metrics = report["aspects"][aspect.name]["train"]
        total += metrics["n"] * metrics["mse"] / aspect.std**2
        labels += metrics["n"]
    assert row["loss"] == pytest.approx(total / labels, rel=1e-5)
    targets = torch.full((2, 2), math.nan)
    assert masked_regression_loss(torch.zeros(2, 2), targets, normalizer=5.0)[0] == 0.0  # a row without labels


def test_early_stopping_keeps_the_best_weights(backbone, records, tmp_path, monkeypatch):
    """Validation losses 3, 1, 2, 2: with patience 2 the run ends after the fourth, and the second's weights remain."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    weights: list[torch.Tensor] = []

    def validate(model, split, config, run):
        weights.append(model.module.model.classifier.weight.detach().clone())
        return {"validation/loss": next(losses)}

    monkeypatch.setattr(reward_regression, "_validate", validate)
    config = recipe(backbone, evaluate_every=1, patience=2)
    model = train_reward(config, Run(tmp_path, config), records=records)
    assert len(lines(tmp_path)) == 4
    assert torch.equal(model.module.model.classifier.weight, weights[1])
    report = json.loads((tmp_path / "reward_report.json").read_text())
    assert (report["best_step"], report["steps"]) == (2, 4)


class Crash(Exception):
    """The process is gone."""


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_resume_is_bitwise(stop_at, backbone, records, tmp_path, monkeypatch):
    """Dropout on, best weights from before the crash: a resumed run ends as the unbroken one does."""
    config = recipe(
        backbone,
        model={"model": str(backbone), "dropout": 0.2},
        evaluate_every=2,
        patience=None,
        checkpoint={"every": 3},
        optimizer={"learning_rate": 0.3},  # so large that the best weights are early ones
    )
    train_reward(config, Run(tmp_path / "whole", config), records=records)
    log = Run.log

    def crash(self, step, metrics):
        log(self, step, metrics)
        if step == stop_at:
            raise Crash

    monkeypatch.setattr(Run, "log", crash)
    with pytest.raises(Crash):
        train_reward(config, Run(tmp_path / "broken", config), records=records)
    monkeypatch.setattr(Run, "log", log)
    train_reward(config, Run(tmp_path / "broken", config, resume=True), records=records)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    for name in ("model/model.safetensors", "model/equipoise.json", "reward_report.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_crash_before_the_report_is_made_up_for(backbone, records, tmp_path, monkeypatch):
    config = recipe(backbone)
    monkeypatch.setattr(reward_regression, "_report", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        train_reward(config, Run(tmp_path, config), records=records)
    monkeypatch.undo()
    before = lines(tmp_path)
    train_reward(config, Run(tmp_path, config, resume=True), records=records)
    assert lines(tmp_path) == before
    assert (tmp_path / "reward_report.json").is_file() and (tmp_path / "model").is_dir()


def test_full_disk_at_the_report_says_how_to_go_on(backbone, records, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reward_regression, "write_report", no_space)
    config = recipe(backbone, num_epochs=1)
    with pytest.raises(CheckpointError, match=r"cannot write the report: .*No space left.*--resume"):
        train_reward(config, Run(tmp_path, config), records=records)


def test_complete_run_is_loaded_not_repeated(backbone, records, tmp_path, monkeypatch):
    config = recipe(backbone, num_epochs=1)
    first = train_reward(config, Run(tmp_path, config), records=records)
    monkeypatch.setattr(reward_regression, "_train", lambda *_: pytest.fail("trained again"))
    again = train_reward(config, Run(tmp_path, config, resume=True), records=records)
    assert torch.allclose(again.score(["cat"], ["dog"]), first.score(["cat"], ["dog"]), rtol=1e-5)


def test_best_survives_a_checkpoint_before_any_validation():
    best = Best()
    restored = Best(loss=1.0)
    restored.load(best.tensors(), json.loads(json.dumps(best.values(), allow_nan=False)))
    assert restored == best


def test_aspect_no_better_than_its_mean_is_warned_of(backbone, records, tmp_path, caplog):
    config = recipe(backbone, num_epochs=1, optimizer={"learning_rate": 1e-12})
    with caplog.at_level(logging.WARNING):
        train_reward(config, Run(tmp_path, config), records=records)
    assert "aspect 'common' is predicted no better than by its training mean on test" in caplog.text
    assert "common" in json.loads((tmp_path / "reward_report.json").read_text())["no_better_than_mean"]


def test_duplicates_across_splits_are_reported(backbone, records, tmp_path, caplog):
    rows = [ScoredRecord(r.prompt, r.response, r.scores, split="train", location=r.location) for r in records]
    rows.append(ScoredRecord(rows[0].prompt, rows[0].response, rows[0].scores, split="test", location="rows:41"))
    rows.append(ScoredRecord("eel", "fox", {"common": 1.0}, split="validation"))
    config = recipe(backbone, num_epochs=1)
    with caplog.at_level(logging.WARNING):
        train_reward(config, Run(tmp_path, config), records=rows)
    assert "stand in more than one split" in caplog.text
    duplicates = json.loads((tmp_path / "reward_report.json").read_text())["duplicates_across_splits"]
    assert duplicates["count"] >= 1 and "rows:41" in " ".join(duplicates["examples"])


def test_data_come_from_the_recipe(backbone, records, tmp_path):
    path = tmp_path / "scored.jsonl"
    rows = [{"prompt": r.prompt, "response": r.response, "scores": {"common": r.scores["common"]}} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(backbone, data=str(path), num_epochs=1, aspects={"common": {"higher_is_better": True}})
    assert train_reward(config, Run(tmp_path / "run", config)).aspects == ["common"]


def test_wrong_input_ends_before_training(backbone, records, tmp_path):
    config = recipe(backbone, aspects={"comon": {"higher_is_better": True}})
    with pytest.raises(DataError, match=r"'comon' of `aspects` is in no row.*did you mean 'common'"):
        train_reward(config, Run(tmp_path / "aspect", config), records=records)
    config = recipe(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such model directory"):
        train_reward(config, Run(tmp_path / "model", config), records=records)

"""Reward regression recovers a known function, with four labels in five missing."""

from __future__ import annotations

import json

import pytest
import torch
from tests.reward_toys import WORDS, plain_word_tokenizer, save_backbone, word_tokenizer

from equipoise.algorithms.reward_regression import train_reward
from equipoise.algorithms.run import Run
from equipoise.config import recipe_from_mapping
from equipoise.data import ScoredRecord
from equipoise.models.reward_model import RewardModel

OBSERVED = 0.2
COEFFICIENTS = {  # native score = centre + sum of the coefficients of the words present; scales and signs differ
    "toxicity": (3.0, {"mean": 0.6, "low": 0.4, "kind": -0.5, "good": -0.5}),
    "set/politeness": (-40.0, {"kind": 9.0, "good": 5.0, "no": -7.0}),
    "safety": (0.5, {"pig": 0.08, "no": 0.1, "jam": -0.09, "eel": -0.07}),
}


def linear_world(num_rows: int, seed: int) -> list[ScoredRecord]:
    """Responses of eight random words; each score is seen with probability 0.2, and always in the test split."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for row in range(num_rows):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (8,), generator=generator)]
        split = ("train", "train", "train", "train", "train", "train", "validation", "test")[row % 8]
        scores: dict[str, float | None] = {}
        for aspect, (centre, coefficients) in COEFFICIENTS.items():
            seen = split == "test" or float(torch.rand(1, generator=generator)) < OBSERVED
            value = centre + sum(amount for word, amount in coefficients.items() if word in words)
            scores[aspect] = value if seen else None
        records.append(ScoredRecord("", " ".join(words), scores, split=split))
    return records


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_linear_function_of_words_is_recovered(architecture: str, tmp_path):
    records = linear_world(4000, seed=0)
    tokenizer = word_tokenizer() if architecture == "bert" else plain_word_tokenizer()
    backbone = save_backbone(tmp_path / "backbone", architecture, tokenizer=tokenizer)
    config = recipe_from_mapping(
        {
            "algorithm": "reward",
            "model": {"model": str(backbone), "initialise": "random", "dropout": 0.0},
            "data": "unused.jsonl",
            "aspects": {
                "toxicity": {"range": [1, 5], "higher_is_better": False},
                "set/politeness": {"higher_is_better": True},
                "safety": {"range": [0, 1], "higher_is_better": True},
            },
            "aspect_balance": "equal",
            "num_epochs": 10,
            "batch_size": 32,
            "patience": None,
            "optimizer": {"learning_rate": 8e-3, "schedule": "cosine", "warmup_steps": 20},
        }
    )
    run = Run(tmp_path / "run", config)
    train_reward(config, run, records=records)
    report = json.loads((tmp_path / "run" / "reward_report.json").read_text())
    assert report["no_better_than_mean"] == []
    for aspect in COEFFICIENTS:
        assert report["aspects"][aspect]["test"]["n"] == 500
        assert report["aspects"][aspect]["test"]["spearman"] > 0.9
        assert report["aspects"][aspect]["test"]["r2"] > 0.8
    test = [record for record in records if record.split == "test"]
    scores = RewardModel.load(tmp_path / "run" / "model").score([r.prompt for r in test], [r.response for r in test])
    truth = torch.tensor([[r.scores[aspect] for aspect in COEFFICIENTS] for r in test])
    assert ((scores - truth).square().mean(dim=0) < 0.2 * truth.var(dim=0)).all()

"""DPO runs two steps from a recipe, and every metric it logs is documented."""

from __future__ import annotations

import json
from pathlib import Path

from tests.dpo_toys import dpo_values, write_pairs
from tests.toy import toy_policy_directory

from equipoise.algorithms.run import Run
from equipoise.cli.train import TRAINERS
from equipoise.config import load_recipe, recipe_from_mapping

ROOT = Path(__file__).resolve().parents[2]


def test_two_steps_and_every_metric_is_documented(tmp_path: Path) -> None:
    model, pairs = toy_policy_directory(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 10)
    values = dpo_values(model, pairs, sft_coefficient=0.1)
    config = recipe_from_mapping(values)
    TRAINERS[type(config)](config, Run(tmp_path / "run", config))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    documented = (ROOT / "docs" / "algorithms" / "dpo.md").read_text()
    for line in lines:
        for name in line:
            known = name.replace("validation/", "dpo/") if name != "validation/loss" else "loss"
            assert name == "step" or f"`{known}`" in documented, f"{name} is not documented"


def test_the_shipped_recipe_is_one_of_dpo() -> None:
    assert load_recipe(ROOT / "recipes" / "real" / "dpo.yaml").algorithm == "dpo"

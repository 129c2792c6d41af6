"""PPO and RLOO run two steps from a recipe through the command line, and their pages define what they log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tests import toy
from tests.run_toys import LORA, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.cli.validate import validate_target
from equipoise.config import recipe_from_mapping

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {
    "step", "loss", "grad_norm", "learning_rate", "time/step", "reward/politeness/mean", "reward/politeness/std",
    "reward/politeness/missing", "reward/combined", "advantage/std", "kl", "entropy", "clip_fraction",
    "completion_length/mean", "truncated_fraction", "zero_variance_groups",
}  # fmt: skip
OF_PPO = {
    "value/loss", "value/explained_variance", "value/clip_fraction", "value/mean", "return/mean", "kl/coefficient",
    "reward/kl_penalty",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "shared": {"critic": {"kind": "shared"}},
    "lora": {"lora": LORA, "adaptive_kl": {"target": 1.0}},
    "rloo": {
        "algorithm": "grpo", "group_size": 4, "scale": "leave_one_out", "kl_in": "reward", "reduction": "constant",
        "constant": 1,
    },
}  # fmt: skip

# The policy has 22,688 parameters, its adapters 2,048; a critic has no projection of 64 x 32, but a head of 32 + 1.
TRAINED = {"defaults": 2 * 22_688 - 2_048 + 33, "shared": 22_688 + 33, "lora": 2 * 2_048 + 33, "rloo": 22_688}


def documented(page: str, metrics: dict[str, Any]) -> list[str]:
    """Metrics that a page does not name."""
    text = (ROOT / "docs" / "algorithms" / page).read_text()
    known = [name.replace("politeness", "<aspect>").replace("advantage/kl/", "advantage/<aspect>/") for name in metrics]
    return [name for name in known if name not in text and f"/{name.split('/')[-1]}`" not in text]


@pytest.mark.parametrize("name", CASES)
def test_two_steps_through_the_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy.toy_policy_directory(tmp_path / "base")
    prompts = toy.write_prompts(tmp_path / "prompts.jsonl")
    changes = {key: value for key, value in CASES[name].items() if key != "lora"}
    policy = {"model": str(model)} | ({"lora": LORA} if "lora" in CASES[name] else {})
    values = toy.grpo_values(model, prompts, num_steps=2, policy=policy, threads=1)
    values = {key: value for key, value in values.items() if key != "group_size"} | {"algorithm": "ppo"} | changes
    values["evaluation"] = {"every": 1, "prompts": str(prompts), "sampling": {"max_tokens": 4}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    validate_target(str(recipe), [])
    assert f"a valid {values['algorithm']} recipe" in capsys.readouterr().out
    train(recipe, tmp_path / "run")

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1].keys() >= REQUIRED | (OF_PPO if values["algorithm"] == "ppo" else set())
    logged = {key: value for key, value in lines[-1].items() if not key.startswith("evaluation/")}
    assert documented("ppo.md" if values["algorithm"] == "ppo" else "grpo.md", logged) == []
    table = pq.read_table(tmp_path / "run" / "completions" / "step_000002.parquet")
    contract = {"prompt", "completion", "group", "index", "score/politeness", "share/politeness", "advantage"}
    assert contract | {"finish_reason"} <= set(table.column_names)
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert (cost["flops"]["critic"] > 0) == (values["algorithm"] == "ppo")
    assert cost["flops"]["reference"] > 0 and cost["trainable_parameters"] == TRAINED[name]
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    if "lora" not in CASES[name]:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("page", ["ppo.md", "grpo.md"])
def test_recipes_of_the_page_are_valid(page: str) -> None:
    blocks = (ROOT / "docs" / "algorithms" / page).read_text().split("```yaml")[1:]
    assert blocks
    for block in blocks:
        assert recipe_from_mapping(yaml.safe_load(block.split("```")[0]))

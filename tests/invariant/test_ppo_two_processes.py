"""PPO, and RLOO, on two gloo ranks give what one process gives: every metric of every step, policy and critic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.invariant.test_two_processes import TOLERANCE, TWO_SCORES, ending, launch
from tests.run_toys import LORA, World, metrics, train
from tests.toy import grpo_values

CASES: dict[str, dict[str, Any]] = {
    "separate": {"num_epochs": 2, "num_minibatches": 2, "beta": 0.1, "whiten_rewards": True, **TWO_SCORES},
    # Three completions a pass of the 10 a rank has, shuffled groups: one rank may have more passes than the other.
    "shared-lora": {
        "policy": "lora",
        "critic": {"kind": "shared"},
        "group_size": 5,
        "num_minibatches": 4,
        "num_epochs": 1,
        "micro_batch_size": 3,
        "mask_truncated": True,
        "sampling": {"max_tokens": 40},
        "adaptive_kl": {"target": 0.5, "horizon": 50},
    },
    "rloo": {
        "algorithm": "grpo",
        "scale": "leave_one_out",
        "kl_in": "reward",
        "reduction": "constant",
        "group_size": 4,
        "num_epochs": 2,
        "beta": 0.1,
        **TWO_SCORES,
    },
    "bootstrap": {
        "truncation": "bootstrap",
        "sampling": {"max_tokens": 30},
        "num_epochs": 1,
        "critic": {"kind": "separate"},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def recipes(world: World) -> dict[str, Path]:
    """A recipe file of every case."""
    result = {}
    for name, changes in CASES.items():
        policy = {"model": str(world.model)} | ({"lora": LORA} if changes.get("policy") == "lora" else {})
        values = grpo_values(world.model, world.prompts, threads=1, group_size=2, checkpoint={"every": 2})
        values |= {"algorithm": "ppo", "optimizer": {"learning_rate": 1e-3, "eps": 1e-6}}
        result[name] = world.recipe(name, values | changes | {"policy": policy})
    return result


@pytest.fixture(scope="module")
def two(world: World, recipes: dict[str, Path]) -> dict[str, Path]:
    """Runs of two ranks, one pair of processes for all."""
    outs = {name: world.directory / "two" / name for name in recipes}
    (world.directory / "two").mkdir()
    jobs = [{"recipe": str(recipe), "out": str(outs[name])} for name, recipe in recipes.items()]
    (world.directory / "jobs.json").write_text(json.dumps(jobs))
    process = launch(["-m", "tests.two_ranks", str(world.directory / "jobs.json")], world.directory)
    output = process.communicate()
    assert process.returncode == 0, output[1][-3000:]
    return outs


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Saved weights of policy and critic."""
    files = [*(out / "model").glob("*model.safetensors"), *(out / "critic").glob("*.safetensors")]
    return {f"{path.parent.name}/{path.name}/{k}": tensor for path in files for k, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(
    name: str, world: World, recipes: dict[str, Path], two: dict[str, Path], tmp_path: Path
) -> None:
    for rank in (0, 1):
        assert ending(two[name], rank)["error"] is None, ending(two[name], rank)["traceback"]
    assert json.loads((two[name] / "environment.json").read_text())["processes"] == 2
    train(recipes[name], tmp_path / "one")
    ours, theirs = metrics(tmp_path / "one"), metrics(two[name])
    assert len(ours) == len(theirs) == 3
    for one, both in zip(ours, theirs, strict=True):
        assert one.keys() == both.keys()
        for key, value in one.items():
            if not key.startswith(("time/", "sampler/")):
                same = value == both[key] or math.isclose(value, both[key], rel_tol=1e-5, abs_tol=TOLERANCE)
                assert same, (one["step"], key, value, both[key])
    is_ppo = name != "rloo"
    assert ours[-1]["trained_completions"] > 0 and ours[-1]["reward/kl_penalty"] != 0
    one, both = weights(tmp_path / "one"), weights(two[name])
    assert one.keys() == both.keys() and any("value_head" in key for key in one) == is_ppo
    assert max(float((one[key] - both[key]).abs().max()) for key in one) <= TOLERANCE
    if is_ppo:
        assert ours[-1]["value/loss"] > 0
        assert max(float(one[key].abs().max()) for key in one if "value_head" in key) > 100 * TOLERANCE
    costs = [json.loads((out / "cost.json").read_text()) for out in (tmp_path / "one", two[name])]
    assert costs[0]["trained_tokens"] == costs[1]["trained_tokens"] > 0
    assert costs[0]["trainable_parameters"] == costs[1]["trainable_parameters"]
    assert (
        costs[0]["flops"]["generate"] == costs[1]["flops"]["generate"] and (costs[0]["flops"]["critic"] > 0) == is_ppo
    )

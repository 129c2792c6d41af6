"""`equipoise plan`: totals are sums, changes help, configs come from files, wrong input is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.toy import toy_model

from equipoise.cli.plan import PlanOptions, plan, plan_command
from equipoise.config import load_recipe, recipe_from_mapping
from equipoise.errors import ConfigError
from equipoise.models.policy_module import PolicyModule
from equipoise.models.reference import FrozenModel
from equipoise.studies.planning import Configs, Lengths, need_of
from equipoise.studies.planning_time import Machine, seconds

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "configs"
SHAPES = {size: CONFIGS / f"qwen2.5-{size}.json" for size in ("0.5b", "7b", "14b")}
SMALL = {f"Qwen/Qwen2.5-0.5B-Instruct={SHAPES['0.5b']}", f"REWARD_MODEL={SHAPES['0.5b']}"}


def options(memory: float | None, size: str, **lengths: int) -> PlanOptions:
    named = (str(SHAPES[size]), *sorted(SMALL))
    return PlanOptions(memory, named, Lengths(**lengths), 1e14, 1e12, as_json=True)


def planned(name: str, memory: float, *overrides: str) -> dict[str, Any]:
    config = load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml", overrides)
    return plan(config, options(memory, name.rpartition("_")[2]))


@pytest.mark.parametrize("name", ["grpo_0.5b", "ppo_7b", "dpo_14b"])
def test_every_phase_is_the_sum_of_its_terms(name: str) -> None:
    result = planned(name, 80)
    for phase, total in result["phases_gb"].items():
        assert sum(result["terms_gb"][phase].values()) == pytest.approx(total)
    assert result["peak_gb"] == max(result["phases_gb"].values()) == result["phases_gb"][result["peak_phase"]]
    assert result["fits"] == (result["peak_gb"] <= result["usable_gb"])
    assert result["seconds"]["total"] == pytest.approx(
        sum(value for phase, value in result["seconds"].items() if phase != "total")
    )


def test_weights_are_those_that_are_known_of_the_shapes() -> None:
    """7.6157 and 14.7700 billion parameters of 2 bytes; LoRA r=16 on all linear layers: 40.37 and 68.81 million."""
    for name, parameters, adapters in (("dpo_7b", 7_615_616_512, 40_370_176), ("dpo_14b", 14_770_033_664, 68_812_800)):
        terms = planned(name, 80)["terms_gb"]["update"]
        assert terms["weights"] == pytest.approx((2 * parameters + 4 * adapters) / 1e9, rel=1e-6)
        assert terms["Adam's moments"] == pytest.approx(8 * adapters / 1e9, rel=1e-6)


def test_what_does_not_fit_gets_changes_in_order_of_effect() -> None:
    result = planned("grpo_7b", 24, "micro_batch_size=64", "policy.gradient_checkpointing=false")
    assert not result["fits"]
    peaks = [change["peak_gb"] for change in result["changes"]]
    assert peaks == sorted(peaks) and peaks[-1] < result["peak_gb"]
    together = result["together"]
    assert together["fits"] and together["same_result"]
    again = planned("grpo_7b", 24, "micro_batch_size=64", "policy.gradient_checkpointing=false", *together["overrides"])
    assert again["fits"] and again["peak_gb"] == pytest.approx(together["peak_gb"])


def recipe(**changed: Any) -> dict[str, Any]:
    return {
        "algorithm": "grpo", "policy": {"model": "sandbox/1m"}, "data": "sandbox", "scorers": "sandbox",
        "objective_weights": {"safety": 1.0}, "num_steps": 1, "prompts_per_step": 4, "group_size": 4,
        "max_prompt_tokens": 32, "sampling": {"max_tokens": 16}, **changed,
    }  # fmt: skip


def test_full_training_keeps_a_second_model_as_reference() -> None:
    def resident(**changed: Any) -> dict[str, float]:
        return need_of(recipe_from_mapping(recipe(**changed)), Configs({}), Lengths(), on_gpu=False).resident

    full = resident()
    assert full["reference"] == full["weights"]
    assert resident(beta=0.0)["reference"] == 0
    # LoRA needs a saved model: any directory with weights would do, and the shape is in a config file.
    adapted = {"model": "m", "lora": {"r": 4, "alpha": 8}, "precision": "bfloat16"}
    need = need_of(recipe_from_mapping(recipe(policy=adapted)), Configs({"m": SHAPES["0.5b"]}), Lengths(), on_gpu=True)
    assert need.resident["reference"] == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_reference_takes_what_its_copy_holds(tmp_path: Path, architecture: str, tied: bool, precision: str) -> None:
    model = toy_model(architecture, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    config = recipe_from_mapping(recipe(policy={"model": "m", "precision": precision}))
    need = need_of(config, Configs({"m": tmp_path / "config.json"}), Lengths(), on_gpu=False)
    with FrozenModel(PolicyModule(model, autocast=precision == "bfloat16")).active() as frozen:
        assert need.resident["reference"] == sum(p.numel() * p.element_size() for p in frozen.parameters())


def test_optimiser_reads_and_writes_at_the_bandwidth() -> None:
    """28 bytes for each trained parameter and update."""
    need = need_of(recipe_from_mapping(recipe()), Configs({}), Lengths(), on_gpu=False)
    found = seconds(need, Machine(1e12, 28.0))
    assert found["optimiser"] == need.trained
    assert seconds(need, Machine(2e12, 1e30))["update"] == pytest.approx(found["update"] / 2)


def test_a_model_that_is_not_here_asks_for_its_config() -> None:
    with pytest.raises(ConfigError, match=r"--config \./nowhere/model=FILE"):
        plan(
            recipe_from_mapping(recipe(policy={"model": "./nowhere/model"})), PlanOptions(24, (), Lengths(), 1, 1, True)
        )
    with pytest.raises(ConfigError, match=r"--config x\.json: no such file"):
        plan(recipe_from_mapping(recipe()), PlanOptions(24, ("x.json",), Lengths(), 1, 1, True))


def test_command_prints_tables_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe()))
    plan_command(file, [], PlanOptions(24, (), Lengths(), 1e12, 1e10, as_json=True))
    assert json.loads(capsys.readouterr().out)["fits"]
    plan_command(file, ["group_size=8"], PlanOptions(0.0, (), Lengths(), 1e12, 1e10, as_json=False))
    out = capsys.readouterr().out
    assert "does not fit a GPU of 0 GB" in out and "Adam's moments" in out and "micro_batch_size=1 " in out


@pytest.mark.parametrize("given", [(1e14, 1e12), (1e14, None), (None, None)])
def test_it_says_whose_speed_the_time_is_for(
    given: tuple[float | None, float | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise.cli.plan.measured_machine", lambda low: Machine(2e11, 3e10))
    named = (str(SHAPES["0.5b"]), *sorted(SMALL))
    recipe = ROOT / "recipes" / "paper" / "grpo_0.5b.yaml"
    plan_command(recipe, [], PlanOptions(80, named, Lengths(), *given, as_json=False))
    said = " ".join(capsys.readouterr().out.split())
    assert ("measured on this machine, --flops and --bandwidth name another's" in said) == (None in given)

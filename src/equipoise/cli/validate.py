"""`equipoise validate`: what a recipe or data file holds, and everything that is wrong with it, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.algorithms.conditioning import Conditioning
from equipoise.algorithms.constraints import check_kinds
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.config import (
    AnyRecipe,
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    is_study,
    load_comparison,
    load_recipe,
)
from equipoise.data import load_demonstrations, load_pairs, load_prompts, load_scored, validate_data
from equipoise.models.loading import is_adapter, load_config
from equipoise.rollout.scorers import all_aspects, build_scorers

RECIPE_SUFFIXES = (".yaml", ".yml")


def validate_target(target: str, overrides: list[str]) -> None:
    """Print what `target` holds. Raises ConfigError or DataError for what is wrong."""
    if Path(target).suffix.lower() in RECIPE_SUFFIXES:
        _validate_recipe(target, overrides)
    else:
        print(validate_data(target))


def _validate_recipe(target: str, overrides: list[str]) -> None:
    if is_study(target):
        _validate_study(target, overrides)
        return
    config = load_recipe(target, overrides)
    print(f"{target}: a valid {config.algorithm} recipe")
    for line in CHECKS[type(config)](config):
        print(f"  {line}")


def _validate_study(target: str, overrides: list[str]) -> None:
    from equipoise.studies.plan import Plan

    config = load_comparison(target, overrides)
    plan = Plan(config, Path("STUDY"))
    plan.check(list(config.sizes))
    print(f"{target}: a valid recipe of a study, with every recipe it names")
    for size in config.sizes:
        print(f"  {size}: {len(plan.jobs(size))} jobs, methods {', '.join(config.methods)}")
    prompts = len(load_prompts(config.prompts)), len(load_prompts(config.evaluation.prompts))
    print(f"  {prompts[0]} prompts to train on, {prompts[1]} to judge on")


def _sft(config: Any) -> list[str]:
    return [_model(config.policy.model), f"{len(load_demonstrations(config.data))} demonstrations"]


def _reward(config: Any) -> list[str]:
    records = load_scored(config.data, aspects=list(config.aspects))
    return [_model(config.model.model), f"{len(records)} scored responses, aspects {', '.join(config.aspects)}"]


def _grpo(config: Any) -> list[str]:
    scorers = build_scorers(config.scorers)
    objectives = Objectives.of(config, scorers)
    prompts = load_prompts(config.data)
    check_kinds(objectives.constraints, prompts)
    weights = zip(objectives.names, objectives.weights_K.tolist(), strict=True)
    lines = [
        _model(config.policy.model),
        f"{len(prompts)} prompts",
        "objectives " + ", ".join(f"{name} x {weight:g}" for name, weight in weights),
    ]
    conditioning = Conditioning.of(config, objectives) if isinstance(config, GRPOConfig) else None
    if conditioning is not None:
        lines.append(f"a policy that reads: {conditioning.preference.text(conditioning.usual)}")
    if objectives.constraints:
        lines.append("constraints " + ", ".join(constraint.described for constraint in objectives.constraints))
    if config.evaluation is not None:
        lines.append(f"{len(load_prompts(config.evaluation.prompts))} prompts held out")
    return lines


def _dpo(config: Any) -> list[str]:
    lines = [_model(config.policy.model), f"{len(load_pairs(config.data))} preference pairs"]
    if config.evaluation is not None:
        aspects = ", ".join(aspect.name for aspect in all_aspects(build_scorers(config.scorers)))
        lines.append(f"{len(load_prompts(config.evaluation.prompts))} prompts held out, scored on {aspects}")
    return lines


def _model(name: str) -> str:
    """Reads the configuration only: no weights are loaded."""
    if is_adapter(name):
        return f"model {name}: a PEFT adapter"
    return f"model {name}: {load_config(name).model_type}"


CHECKS: dict[type[AnyRecipe], Any] = {
    SFTConfig: _sft,
    RewardConfig: _reward,
    GRPOConfig: _grpo,
    PPOConfig: _grpo,
    DPOConfig: _dpo,
}

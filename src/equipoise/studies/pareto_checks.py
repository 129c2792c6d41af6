"""What a sweep of objective weights needs to be one: a recipe whose weights count, a judge, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.config import GRPOConfig, changed_keys, resolved
from equipoise.errors import ConfigError
from equipoise.functional.objectives import combine_objectives, method_options
from equipoise.models.loading import is_adapter
from equipoise.rollout.scorers import all_aspects
from equipoise.studies.pareto_work import front_prompts, front_scorers


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures; None: as the recipe's `evaluation` says."""

    points: int
    adaptive: bool = False
    soups: bool = False
    prompts: str | None = None
    judge: str | None = None
    samples: int | None = None
    seed: int = 0
    conditioned: str | None = None  # the run or model of a policy that reads weights


def swept_objectives(recipe: GRPOConfig) -> list[str]:
    """Objectives of weight above 0, whose sum the sweep keeps. Raises ConfigError where their weights mean nothing."""
    names = [name for name, weight in recipe.objective_weights.items() if weight > 0]
    if len(names) < 2:
        raise ConfigError(
            f"objective_weights: {len(names)} of them above 0 ({', '.join(names) or 'none'}); a front trades off at "
            "least 2"
        )
    if recipe.weights_schedule is not None:
        raise ConfigError("weights_schedule: every point of a front has weights of its own that stay; remove it")
    if _ignores_weights(recipe, len(names)):
        raise ConfigError(
            f"combine.method {recipe.combine.method!r} does not use the weights: every point would be the same; "
            "use weighted_sum or gdpo (mo_grpo with options.weighted: true)"
        )
    return names


def _ignores_weights(recipe: GRPOConfig, num_objectives: int) -> bool:
    """Tried on rewards drawn at random: two weightings give the same advantages."""
    names = list(recipe.objective_weights)
    generator = torch.Generator().manual_seed(0)
    rewards_BK = torch.rand(16, len(names), generator=generator, dtype=torch.float64)
    group_ids_B = torch.arange(16) // 8
    swept = [name for name, weight in recipe.objective_weights.items() if weight > 0]
    advantages = []
    for share in (0.1, 0.9):
        weights = {swept[0]: share, swept[1]: 1 - share} | dict.fromkeys(swept[2:], 0.5)
        weights_K = torch.tensor([weights.get(name, 0.0) for name in names], dtype=torch.float64)
        try:
            options = method_options(recipe.combine.method, recipe.combine.options, names, weights_K)
        except ValueError as error:
            raise ConfigError(f"combine: {error}") from error
        advantages.append(
            combine_objectives(rewards_BK, group_ids_B, weights_K, method=recipe.combine.method, **options)
        )
    return bool(torch.equal(*advantages))


def sweep_settings(recipe: GRPOConfig, options: SweepOptions) -> dict[str, Any]:
    """What was asked for, the recipe's evaluation filled in."""
    evaluation = recipe.evaluation
    if options.prompts is None and evaluation is None:
        raise ConfigError("--prompts: the recipe has no `evaluation`; give held-out prompts, or add that block")
    sampling = (evaluation.sampling if evaluation is not None else None) or recipe.sampling
    return {
        "points": options.points,
        "adaptive": options.adaptive,
        "soups": options.soups,
        "prompts": "sandbox/test" if options.prompts == "sandbox" else options.prompts,
        "judge": options.judge or (evaluation.judge if evaluation is not None else None),
        "samples": options.samples or (evaluation.samples if evaluation is not None else 1),
        "sampling": resolved(sampling),
        "seed": options.seed,
    }


def judged_aspects(recipe: GRPOConfig, state: dict[str, Any]) -> dict[str, Any]:
    """Aspects of the judge, as pareto.json has them. Raises ConfigError where an objective is none of them."""
    front_prompts(recipe, state["settings"])
    aspects = {aspect.name: aspect.to_json() for aspect in all_aspects(front_scorers(recipe, state["settings"]))}
    judge = state["settings"]["judge"]
    for name in state["objectives"]:
        if name not in aspects:
            raise ConfigError(
                f"--judge {judge or 'the scorers of the recipe'}: does not score {name!r}, which is traded off; it "
                f"scores {', '.join(aspects)}. Give another judge, or set objective_weights.{name}=0"
            )
    return aspects


def sweep_notes(recipe: GRPOConfig, settings: dict[str, Any]) -> list[str]:
    """What a reader of the front should know."""
    notes = []
    if recipe.policy.lora is None and not is_adapter(recipe.policy.model):
        notes.append("the recipe has no policy.lora: every point is a full model of its own")
    if settings["judge"] is None:
        notes.append("the judge is the reward that training maximised: part of a gain may be a flaw of it, exploited")
    return notes


def refuse_changes(out: Path, before: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Points of one front are trained by one recipe and judged alike; workers and soups may change."""
    free = {"soups"} | ({"points"} if before["settings"]["adaptive"] and fresh["settings"]["adaptive"] else set())
    ours, theirs = (
        {name: value for name, value in state["settings"].items() if name not in free} for state in (before, fresh)
    )
    changed = changed_keys(before["recipe"], fresh["recipe"]) + changed_keys(ours, theirs)
    if changed:
        raise ConfigError(
            f"--out {out}: holds a sweep begun with other settings (changed since: {', '.join(changed)}); its "
            "points would not compare. Undo the change, or give another --out"
        )

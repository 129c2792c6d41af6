"""What a sweep of objective weights needs to be one: a recipe whose weights count, a judge, prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.algorithms.conditioning import ignores_weights
from equipoise.config import GRPOConfig, changed_keys, resolved
from equipoise.errors import ConfigError
from equipoise.models.loading import is_adapter
from equipoise.models.policy import POLICY_FILE
from equipoise.models.preference import CONDITIONED, read_preference
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
    if recipe.conditioned is not None:
        raise ConfigError(
            "conditioned: every point of a front is trained at one weight; remove it, train the conditioned policy "
            "apart and give it as --conditioned RUN"
        )
    if ignores_weights(recipe):
        raise ConfigError(
            f"combine.method {recipe.combine.method!r} does not use the weights: every point would be the same; "
            "use weighted_sum or gdpo (mo_grpo with options.weighted: true)"
        )
    return names


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
        CONDITIONED: None if options.conditioned is None else str(_conditioned_model(options.conditioned, recipe)),
    }


def _conditioned_model(given: str, recipe: GRPOConfig) -> Path:
    """The model of a run, or the model given. Raises ConfigError where it does not read weights of what is swept."""
    model = next((place for place in (Path(given) / "model", Path(given)) if place.is_dir()), None)
    if model is None:
        raise ConfigError(f"--conditioned {given}: no such directory; give a finished run, or a model")
    preference = read_preference(model / POLICY_FILE)
    if preference is None:
        raise ConfigError(
            f"--conditioned {given}: was not trained to read weights; train it by grpo with `conditioned: {{}}`"
        )
    names = swept_objectives(recipe)
    if set(preference.aspects) != set(names):
        raise ConfigError(
            f"--conditioned {given}: reads weights of {', '.join(preference.aspects)}, and the recipe trades off "
            f"{', '.join(names)}; give a policy conditioned on these"
        )
    return model


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
    if settings[CONDITIONED] is not None and (other := _trained_otherwise(Path(settings[CONDITIONED]), recipe)):
        notes.append(f"the conditioned policy was trained with other settings than the points: {', '.join(other)}")
    return notes


def _trained_otherwise(model: Path, recipe: GRPOConfig) -> list[str]:
    """Keys in which the run of a conditioned policy differs from the sweep's recipe, beside what has to differ."""
    config = model.parent / "config.json"
    if not config.is_file():
        return []
    before = json.loads(config.read_text(encoding="utf-8"))
    own = (CONDITIONED, "objective_weights", "threads", "out")
    return [key for key in changed_keys(before, resolved(recipe)) if key.partition(".")[0] not in own]


def refuse_changes(out: Path, before: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Points of one front are trained by one recipe and judged alike; workers and soups may change.

    A conditioned policy may be given later; another one may not.
    """
    given = [state["settings"].get(CONDITIONED) for state in (before, fresh)]
    free = (
        {"soups"}
        | ({CONDITIONED} if None in given else set())
        | ({"points"} if before["settings"]["adaptive"] and fresh["settings"]["adaptive"] else set())
    )
    ours, theirs = (
        {name: value for name, value in state["settings"].items() if name not in free} for state in (before, fresh)
    )
    changed = changed_keys(before["recipe"], fresh["recipe"]) + changed_keys(ours, theirs)
    if changed:
        raise ConfigError(
            f"--out {out}: holds a sweep begun with other settings (changed since: {', '.join(changed)}); its "
            "points would not compare. Undo the change, or give another --out"
        )

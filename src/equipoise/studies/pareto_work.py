"""What a process of a sweep does itself: judge the base, a point or a soup, which it makes first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from equipoise.config import GRPOConfig, ModelConfig, SamplingConfig, load_recipe
from equipoise.data import PromptRecord, load_prompts
from equipoise.errors import ConfigError
from equipoise.evaluation import evaluate_policy, load_judge, save_evaluation
from equipoise.models.policy import load_policy
from equipoise.models.preference import CONDITIONED
from equipoise.models.soup import make_soup
from equipoise.rollout.scorers import Scorer, build_scorers
from equipoise.studies.pareto_results import FRONT_FILE, read_front
from equipoise.studies.quickstart import Counting


def front_prompts(recipe: GRPOConfig, settings: Mapping[str, Any]) -> list[PromptRecord]:
    """Held-out prompts: those given, else those of the recipe's evaluation."""
    if settings["prompts"] is not None:
        return load_prompts(settings["prompts"])
    assert recipe.evaluation is not None  # a sweep without either does not open
    return load_prompts(recipe.evaluation.prompts)


def front_scorers(recipe: GRPOConfig, settings: Mapping[str, Any]) -> list[Scorer]:
    """The judge, else what training maximised."""
    return [load_judge(settings["judge"])] if settings["judge"] is not None else build_scorers(recipe.scorers)


def model_of(out: Path, name: str, settings: Mapping[str, Any] | None = None) -> Path:
    """Where the model of a point or a soup lies; `settings` say where that of a conditioned policy does."""
    if settings is not None and name.startswith(f"{CONDITIONED}/"):
        return Path(settings[CONDITIONED])
    return out / name / ("run/model" if name.startswith("points/") else "model")


def do_front_job(out: Path, name: str, counting: Counting) -> None:
    """Judge the base or an entry of the sweep in `out`. Raises ConfigError where it holds no such job."""
    state = read_front(out / FRONT_FILE)
    entries = (state["base"], *state["points"], *state["soups"], *state[CONDITIONED])
    entry = next((e for e in entries if e["name"] == name), None)
    if entry is None:
        raise ConfigError(f"--job {name}: {out} holds no such job")
    recipe = load_recipe(state["recipe_file"], state["overrides"])
    assert isinstance(recipe, GRPOConfig)
    if name.startswith("soups/") and not model_of(out, name).is_dir():
        make_soup(
            [model_of(out, state["corners"][objective]) for objective in entry["weights"]],
            list(entry["weights"].values()),
            model_of(out, name),
        )
    _judge(recipe, state, out, name, counting, entry["weights"] if name.startswith(f"{CONDITIONED}/") else None)


def _judge(
    recipe: GRPOConfig,
    state: Mapping[str, Any],
    out: Path,
    name: str,
    counting: Counting,
    asked: Mapping[str, float] | None,
) -> None:
    settings = state["settings"]
    records, scorers = front_prompts(recipe, settings), front_scorers(recipe, settings)
    started_from = recipe.policy.model_copy(update={"lora": None})
    base = load_policy(started_from, seed=recipe.seed)
    policy = base if name == "base" else load_policy(_trained(started_from, model_of(out, name, settings)))
    with counting(f"judging {name}", len(records) * settings["samples"]) as advance, torch.no_grad():
        evaluation, rows = evaluate_policy(
            policy,
            records,
            scorers,
            samples=settings["samples"],
            sampling=SamplingConfig.model_validate(settings["sampling"]),
            seed=settings["seed"],
            reference=None if policy is base else base,
            judge_name=settings["judge"],
            max_prompt_tokens=recipe.max_prompt_tokens,
            progress=advance,
            asked=asked,
        )
    save_evaluation(out / name / "evaluation", evaluation, rows)


def _trained(started_from: ModelConfig, model: Path) -> ModelConfig:
    return started_from.model_copy(update={"model": str(model), "revision": None, "initialise": "pretrained"})

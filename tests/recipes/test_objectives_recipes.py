"""The studies of combining objectives and of a constraint: every method is there, and nothing else differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise.config import load_comparison, resolved
from equipoise.functional.objectives import METHODS
from equipoise.studies.plan import Job, Plan

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "sandbox"
WITHOUT_WEIGHTS = {"mo_grpo", "pareto_rank", "min_norm"}


def trained(name: str) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """What every method of a study trains, seed 0, resolved."""
    plan = Plan(load_comparison(FOLDER / f"{name}.yaml"), Path("out"))
    return plan, {method: resolved(plan.training(Job("1m", method, 0))) for method in plan.config.methods}


def without(recipe: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in keys}


def test_every_method_is_compared_at_both_weightings_it_takes() -> None:
    _, recipes = trained("objectives")
    weightings: dict[str, list[dict[str, float]]] = {}
    for recipe in recipes.values():
        weightings.setdefault(recipe["combine"]["method"], []).append(recipe["objective_weights"])
    assert set(weightings) == set(METHODS)
    even, skewed = weightings["weighted_sum"]
    assert set(even.values()) == {0.25}
    assert skewed == {"politeness": 0.15, "meaningfulness": 0.25, "actionability": 0.22, "safety": 0.38}
    for method, found in weightings.items():
        assert found == ([even] if method in WITHOUT_WEIGHTS else [even, skewed]), method
    first, *others = [without(recipe, "combine", "objective_weights") for recipe in recipes.values()]
    assert all(other == first for other in others)


def test_the_constraint_is_all_that_differs() -> None:
    plan, recipes = trained("constraints")
    assert recipes["weighted_sum"]["constraints"] is None and len(plan.config.sizes["1m"].seeds) == 10
    assert len(set(recipes["weighted_sum"]["objective_weights"].values())) == 1
    (bound,) = recipes["constrained"]["constraints"].values()
    assert bound["on"] == "adversarial" and bound["margin"] > 0 and bound["min"] + bound["margin"] <= 1
    assert without(recipes["constrained"], "constraints") == without(recipes["weighted_sum"], "constraints")


@pytest.mark.parametrize("name", ["objectives", "constraints"])
def test_it_starts_from_the_models_of_another_study(name: str) -> None:
    given = ["sizes.1m.policy=other/base/model", "sizes.1m.reward_model=other/reward/model"]
    plan = Plan(load_comparison(FOLDER / f"{name}.yaml", given), Path("out"))
    assert [job.method for job in plan.stages("1m")] == ["base"]  # judged here, trained there
    recipe = resolved(plan.training(plan.jobs("1m")[0]))
    assert recipe["policy"]["model"] == "other/base/model"
    assert recipe["scorers"][0]["reward_model"] == "other/reward/model"

"""Which constraints hold, with intervals: on held-out prompts where an evaluation ran, else on the last training ones.

Intervals are percentile bootstraps over prompts, as in evaluation.json. Usage: docs/algorithms/constraints.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from equipoise.algorithms.constraints import PREFIX, Constraint, Constraints
from equipoise.algorithms.online import Evaluate
from equipoise.algorithms.run import Run
from equipoise.functional.statistics import bootstrap_interval

logger = logging.getLogger("equipoise")

CONSTRAINTS_FILE = "constraints.json"
HOLDS, FAILS, UNCLEAR, UNMEASURED = "holds", "does not hold", "not clear", "not measured"
HELD_OUT = "held-out prompts"

Estimate = dict[str, Any]  # mean, ci95, n: of prompts that have a value


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """{"mean", "ci95", "n"} of one number a prompt; None throughout where there are none."""
    if not values:
        return {"mean": None, "ci95": [None, None], "n": 0}
    mean, low, high = bootstrap_interval(values, seed=seed)
    return {"mean": mean, "ci95": [low, high], "n": len(values)}


def verdict(constraint: Constraint, found: Estimate) -> str:
    """Whether the interval lies on the right side of the level (without the margin), on the wrong one, or about it.

    One prompt has no interval, so it decides nothing.
    """
    if found["n"] == 0:
        return UNMEASURED
    good, bad = found["ci95"] if constraint.sign > 0 else reversed(found["ci95"])
    if found["n"] > 1 and constraint.sign * (good - constraint.level) >= 0:
        return HOLDS
    if found["n"] > 1 and constraint.sign * (bad - constraint.level) < 0:
        return FAILS
    return UNCLEAR


class Verdicts:
    """Collects what evaluations say of the constraints, and says it at the end; its state is in the checkpoint."""

    def __init__(self, constraints: Constraints, seed: int) -> None:
        self._constraints, self._seed = constraints, seed
        self._held_out: list[dict[str, Any]] = []  # by evaluation: step, and estimates by constraint

    def observing(self, evaluate: Evaluate | None) -> Evaluate | None:
        """`evaluate`, with the values of the constraints among its metrics.

        It needs `evaluate.prompt_values(name, kind, judged=...)`, the means of its last prompts; without, as for a
        plain function, the training prompts have to do.
        """
        values_of = getattr(evaluate, "prompt_values", None)
        if evaluate is None or values_of is None or not self._constraints.all:
            return evaluate

        def both(step: int) -> dict[str, Any]:
            measured = evaluate(step)
            found: dict[str, dict[str, Estimate]] = {}
            for constraint in self._constraints.all:
                sources = {"scored": False, "judged": True}
                found[constraint.name] = {
                    source: estimate(values_of(constraint.name, constraint.config.on, judged=judged), self._seed)
                    for source, judged in sources.items()
                }
            self._held_out.append({"step": step, "constraints": found})
            return measured | _metrics(found)

        return both

    def values(self) -> list[dict[str, Any]]:
        """State, plain JSON types."""
        return self._held_out

    def load(self, values: list[dict[str, Any]]) -> None:
        """Restore what `values` returned."""
        self._held_out = list(values)

    def conclude(self, run: Run, step: int) -> None:
        """Write constraints.json on the parameters after `step` completed steps, and say what it holds."""
        found = {constraint.name: self._statement(constraint, step) for constraint in self._constraints.all}
        run.write_json(CONSTRAINTS_FILE, {"step": step, "constraints": found})
        if run.is_main:
            lines = [_said(constraint, found[constraint.name]) for constraint in self._constraints.all]
            logger.info("constraints after step %d:\n%s", step, "\n".join(lines))

    def _statement(self, constraint: Constraint, step: int) -> dict[str, Any]:
        evaluation = next((entry for entry in reversed(self._held_out) if entry["step"] == step), None)
        measured = evaluation["constraints"][constraint.name] if evaluation is not None else None
        if measured is not None and measured["scored"]["n"] > 0:
            found, source = measured["scored"], HELD_OUT
        else:
            values, steps = self._constraints.recent(constraint)
            found, source = estimate(values, self._seed), f"training prompts of the last {steps} steps"
        judged = measured["judged"] if measured is not None and measured["judged"]["n"] > 0 else None
        return {
            "min": constraint.config.min,
            "max": constraint.config.max,
            "margin": constraint.config.margin,
            "on": constraint.config.on,
            "verdict": verdict(constraint, found),
            "source": source,
            **found,
            "judge": None if judged is None else {"verdict": verdict(constraint, judged), **judged},
            "multiplier": self._constraints.multiplier(constraint),
            "at_cap": self._constraints.at_cap(constraint),
        }


def _metrics(found: dict[str, dict[str, Estimate]]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for name, sources in found.items():
        held_out, judged = sources["scored"], sources["judged"]
        metrics[f"{PREFIX}{name}/held_out"] = held_out["mean"]
        metrics[f"{PREFIX}{name}/held_out_low"], metrics[f"{PREFIX}{name}/held_out_high"] = held_out["ci95"]
        if judged["n"] > 0:
            metrics[f"{PREFIX}{name}/judge"] = judged["mean"]
    return metrics


def _said(constraint: Constraint, statement: dict[str, Any]) -> str:
    """For people, a line."""
    if statement["n"] == 0:
        return f"  {constraint.described}: {UNMEASURED}"
    judge = statement["judge"]
    by_judge = "" if judge is None else f"; by the judge {judge['verdict']}: {_numbers(judge)}"
    prompts = f"{statement['n']} {statement['source']}"
    multiplier = f"; multiplier {statement['multiplier']:.4g}"
    if statement["at_cap"] and statement["verdict"] != HOLDS:
        multiplier += ", as high as max_multiplier allows: the level may be infeasible"
    return f"  {constraint.described}: {statement['verdict']}: {_numbers(statement)}, {prompts}{by_judge}{multiplier}"


def _numbers(found: Estimate) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.4g} (95% interval {low:.4g} to {high:.4g})"

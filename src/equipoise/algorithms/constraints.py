"""Constraints of a run: what each bounds, what is measured of it at every step, and its multiplier.

The mathematics is in `functional/constraints.py`; usage, formulas and metrics: docs/algorithms/constraints.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.run import Run
from equipoise.config import ConstraintConfig, GRPOConfig, PPOConfig
from equipoise.config.loading import suggest
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError
from equipoise.functional.constraints import Controller, Dual, first_dual, mean_violation, next_dual
from equipoise.functional.groups import group_index, group_sum
from equipoise.models.aspects import Aspect
from equipoise.rollout.types import Rollout

LENGTH = "length"  # completion tokens, EOS included: what can be constrained besides aspects
PREFIX = "constraint/"  # before the names of what is logged
STEPS_AT_CAP = 10  # in a row, with the level still missed, before it is said
RECENT_STEPS = 10  # whose training prompts stand in where nothing was held out


@dataclass(frozen=True)
class Constraint:
    """One bound on a mean, in native units."""

    name: str
    config: ConstraintConfig
    column: int | None  # of the scores; None: the length
    unit: float  # native units in one unit of slack, above 0

    @property
    def sign(self) -> float:
        """1 where more is better for the constraint, -1 where less is."""
        return 1.0 if self.config.min is not None else -1.0

    @property
    def level(self) -> float:
        """What the mean has to keep."""
        return next(bound for bound in (self.config.min, self.config.max) if bound is not None)

    @property
    def target(self) -> float:
        """What training aims at: the level and the margin."""
        return self.level + self.sign * self.config.margin

    @property
    def described(self) -> str:
        """For people: `safety on adversarial prompts at least 0.9`."""
        prompts = f" on {self.config.on} prompts" if self.config.on else ""
        return f"{self.name}{prompts} {'at least' if self.sign > 0 else 'at most'} {self.level:g}"

    def values(self, rollout: Rollout, scores_BK: Tensor) -> Tensor:
        """Native values, float64 [B]; NaN where nothing was scored, and on prompts of other kinds."""
        native_B = rollout.lengths_B.cpu().double() if self.column is None else scores_BK[:, self.column].double()
        if self.config.on is None:
            return native_B
        applies = torch.tensor([kind == self.config.on for kind in rollout.kinds], dtype=torch.bool)
        return torch.where(applies, native_B, torch.nan)

    def slack(self, values: Tensor) -> Tensor:
        """How much better than aimed at native values are, in units that compare between constraints."""
        return self.sign * (values - self.target) / self.unit

    @property
    def controller(self) -> Controller:
        """What moves its multiplier."""
        c = self.config
        return Controller(c.initial_multiplier, c.min_multiplier, c.max_multiplier, c.ki, c.kp, c.kd, c.average)


def resolve_constraints(config: GRPOConfig | PPOConfig, aspects: Sequence[Aspect]) -> tuple[Constraint, ...]:
    """Match constraints with aspects by name. Raises ConfigError for one that is unknown, infeasible or without effect.

    A unit of slack is one of utility: the width of the declared range, else the std of the training labels; of the
    length it is its level.
    """
    return tuple(_resolve(name, bound, config, aspects) for name, bound in (config.constraints or {}).items())


def _resolve(
    name: str, bound: ConstraintConfig, config: GRPOConfig | PPOConfig, aspects: Sequence[Aspect]
) -> Constraint:
    names = [aspect.name for aspect in aspects]
    if name == LENGTH:
        if LENGTH in names:
            raise ConfigError(f"constraints.{LENGTH}: is it the tokens or the aspect of that name? Rename the aspect")
        level = bound.min if bound.min is not None else bound.max
        constraint = Constraint(name, bound, None, unit=level if level and level > 0 else 1.0)
        _check_reachable(constraint, 1.0, float(config.sampling.max_tokens), "1 to sampling.max_tokens")
        return constraint
    if name not in names:
        raise ConfigError(
            f"constraints: unknown aspect {name!r}{suggest(name, [*names, LENGTH])}; "
            f"the scorers give {', '.join(names)}, and {LENGTH} is known too"
        )
    aspect = aspects[names.index(name)]
    if aspect.range is None:
        return Constraint(name, bound, names.index(name), unit=aspect.std or 1.0)
    low, high = aspect.range
    constraint = Constraint(name, bound, names.index(name), unit=high - low)
    _check_reachable(constraint, low, high, "its range")
    return constraint


def _check_reachable(constraint: Constraint, low: float, high: float, what: str) -> None:
    """The level must lie where it binds, and the level with its margin where it can be kept."""
    bound, level, target = "min" if constraint.sign > 0 else "max", constraint.level, constraint.target
    where = f"constraints.{constraint.name}.{bound} {level:g}"
    if not low <= target <= high:
        margin = f" with margin {constraint.config.margin:g} is {target:g}, and" if target != level else ""
        raise ConfigError(
            f"{where}{margin} lies outside {what}, {low:g} to {high:g}: it cannot be kept; choose a level "
            "(and margin) inside"
        )
    if level == (low if constraint.sign > 0 else high):
        raise ConfigError(f"{where} is the end of {what}, {low:g} to {high:g}: it always holds; choose another level")


def check_kinds(constraints: Sequence[Constraint], prompts: Sequence[PromptRecord]) -> None:
    """Raise ConfigError for a constraint on prompts of a kind that none of the training prompts has."""
    kinds = sorted({record.kind for record in prompts})
    for constraint in constraints:
        kind = constraint.config.on
        if kind is not None and kind not in kinds:
            raise ConfigError(
                f"constraints.{constraint.name}.on {kind!r}: no training prompt is of that kind; `data` holds "
                f"{', '.join(kinds) or 'no prompts'}. Add such prompts with `kind`, or change `on`"
            )


class Constraints:
    """The constraints of a run with the state of their multipliers, the same on every process."""

    def __init__(self, constraints: Sequence[Constraint], aspects: Sequence[Aspect], run: Run) -> None:
        self.all = tuple(constraints)
        self._run = run
        self._duals = [first_dual(constraint.controller) for constraint in constraints]
        self._steps_at_cap = [0] * len(self.all)
        self._recent: list[list[list[float]]] = [[] for _ in constraints]  # by constraint and step, a mean a prompt
        for constraint in constraints:
            _warn_of_direction(constraint, aspects, run)

    @property
    def names(self) -> list[str]:
        """What each is called beside the objectives."""
        return [PREFIX + constraint.name for constraint in self.all]

    @property
    def multipliers_C(self) -> Tensor:
        """Multipliers of the step to come, float64."""
        return torch.tensor([dual.multiplier for dual in self._duals], dtype=torch.float64)

    def multiplier(self, constraint: Constraint) -> float:
        """That of one constraint."""
        return self._duals[self.all.index(constraint)].multiplier

    def at_cap(self, constraint: Constraint) -> bool:
        """True where its multiplier can rise no higher."""
        return self._duals[self.all.index(constraint)].log_multiplier >= math.log(constraint.config.max_multiplier)

    def values_of(self, rollout: Rollout, scores_BK: Tensor) -> Tensor:
        """Native values of all processes [N, C], NaN where a constraint has none; collective."""
        own = torch.stack([constraint.values(rollout, scores_BK) for constraint in self.all], dim=1)
        return self._run.gathered(own)

    def slacks(self, values_NC: Tensor) -> Tensor:
        """Slacks of native values [N, C]."""
        return torch.stack([constraint.slack(values_NC[:, c]) for c, constraint in enumerate(self.all)], dim=1)

    def observe(self, values_NC: Tensor, group_ids_N: Tensor) -> dict[str, float | None]:
        """Move every multiplier after a step with these native values; returns the step's metrics.

        A constraint that the step says nothing about (no prompt of its kind, nothing scored) stays as it is.
        """
        metrics: dict[str, float | None] = {}
        for c, constraint in enumerate(self.all):
            name, values_N = PREFIX + constraint.name, values_NC[:, c]
            violation = mean_violation(constraint.slack(values_N))
            metrics[f"{name}/multiplier"] = self._duals[c].multiplier
            metrics[f"{name}/value"] = None if violation is None else float(values_N.nanmean())
            metrics[f"{name}/violation"] = None if violation is None else violation * constraint.unit
            if violation is not None:
                self._duals[c] = next_dual(self._duals[c], violation, constraint.controller)
                self._watch(c, metrics[f"{name}/value"])
                self._recent[c] = [*self._recent[c], _prompt_means(values_N, group_ids_N)][-RECENT_STEPS:]
        return metrics

    def recent(self, constraint: Constraint) -> tuple[list[float], int]:
        """(means of the training prompts, number of steps) of the last steps that had any."""
        steps = self._recent[self.all.index(constraint)]
        return [value for step in steps for value in step], len(steps)

    def _watch(self, c: int, value: float | None) -> None:
        constraint, dual = self.all[c], self._duals[c]
        missed = dual.violation is not None and dual.violation > 0
        self._steps_at_cap[c] = self._steps_at_cap[c] + 1 if self.at_cap(constraint) and missed else 0
        if self._steps_at_cap[c] >= STEPS_AT_CAP:
            self._run.warn_once(
                f"infeasible {constraint.name}",
                f"constraints.{constraint.name}: its multiplier has been at max_multiplier "
                f"({constraint.config.max_multiplier:g}) for {STEPS_AT_CAP} steps, and with {value:.4g} it still "
                f"misses {constraint.target:g}: the level may be infeasible. Lower the level or its margin, allow the "
                "policy more (beta, learning rate, steps), or raise max_multiplier",
            )

    # -- checkpoint ------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Any]:
        """State by constraint, plain JSON types."""
        return {
            constraint.name: {"dual": list(self._duals[c]), "at_cap": self._steps_at_cap[c], "recent": self._recent[c]}
            for c, constraint in enumerate(self.all)
        }

    def load(self, values: dict[str, Any]) -> None:
        """Restore what `values` returned."""
        for c, constraint in enumerate(self.all):
            state = values[constraint.name]
            self._duals[c], self._steps_at_cap[c] = Dual(*state["dual"]), state["at_cap"]
            self._recent[c] = state["recent"]


def _warn_of_direction(constraint: Constraint, aspects: Sequence[Aspect], run: Run) -> None:
    """A bound may hold back what an objective asks for; more often it is a slip."""
    aspect = next((aspect for aspect in aspects if aspect.name == constraint.name), None)
    if aspect is not None and aspect.higher_is_better != (constraint.sign > 0):
        given, other = ("min", "max") if constraint.sign > 0 else ("max", "min")
        run.warn_once(
            f"direction {constraint.name}",
            f"constraints.{constraint.name}: {given} pushes it the worse way, as {constraint.name} is better when "
            f"{'higher' if aspect.higher_is_better else 'lower'}; is {other} meant?",
        )


def _prompt_means(values_N: Tensor, group_ids_N: Tensor) -> list[float]:
    """The mean of each group's values, for groups that have any."""
    has_value_N = ~values_N.isnan()
    index_N, num_groups = group_index(group_ids_N[has_value_N])
    kept_N = values_N[has_value_N]
    count_G = group_sum(torch.ones_like(kept_N), index_N, num_groups)
    return (group_sum(kept_N, index_N, num_groups) / count_G).tolist()

"""From scores to advantages, over all processes: what a GRPO step reinforces."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.constraints import Constraint, Constraints, resolve_constraints
from equipoise.algorithms.pessimism import kappa_of
from equipoise.algorithms.run import Run
from equipoise.algorithms.schedules import make_schedule
from equipoise.config import GRPOConfig, PPOConfig
from equipoise.config.loading import suggest
from equipoise.errors import ConfigError, RewardError
from equipoise.functional.advantages import zero_variance_groups
from equipoise.functional.constraints import constrained_contributions
from equipoise.functional.objectives import METHODS, method_options, objective_contributions
from equipoise.models.aspects import Aspect, utilities
from equipoise.rollout.preference_conditioning import conditioned_contributions
from equipoise.rollout.scorers import Scorer, all_aspects
from equipoise.rollout.types import Rollout

_GIVEN = ("rewards_BK", "group_ids_B", "weights_K", "delta", "scale")  # arguments that have a key of their own
KL = "kl"  # what the penalty is called beside the aspects where it is a part of the reward


@dataclass(frozen=True)
class Objectives:
    """Aspects in the order of the score columns, their weights, and the constraints."""

    aspects: list[Aspect]
    weights_K: Tensor  # float64, >= 0
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def of(cls, config: GRPOConfig | PPOConfig, scorers: Sequence[Scorer]) -> Objectives:
        """Match weights, schedule and constraints with aspects by name. Raises ConfigError where they do not fit."""
        if isinstance(config, GRPOConfig):
            _check_method(config)
        aspects = all_aspects(scorers)
        names = [aspect.name for aspect in aspects]
        if isinstance(config, GRPOConfig) and config.kl_in == "reward" and KL in names:
            raise ConfigError(f"an aspect called {KL!r} cannot be told from the penalty of kl_in 'reward'; rename it")
        for name in config.objective_weights:
            if name not in names:
                raise ConfigError(
                    f"objective_weights: unknown aspect {name!r}{suggest(name, names)}; "
                    f"the scorers give {', '.join(names)}"
                )
        missing = [name for name in names if name not in config.objective_weights]
        if missing:
            raise ConfigError(
                f"objective_weights: no weight for {', '.join(missing)}; "
                "give one, 0 to log an aspect without training on it"
            )
        weights_K = torch.tensor([config.objective_weights[name] for name in names], dtype=torch.float64)
        if isinstance(config, GRPOConfig):
            try:
                _method_options(config, names, weights_K)
            except ValueError as error:
                raise ConfigError(f"combine.options of {config.combine.method}: {error}") from error
        make_schedule(config, aspects, weights_K)
        kappa_of(config.pessimism, scorers)
        return cls(aspects, weights_K, resolve_constraints(config, aspects))

    @property
    def names(self) -> list[str]:
        """Aspect names in column order."""
        return [aspect.name for aspect in self.aspects]


def _check_method(config: GRPOConfig) -> None:
    method, options = config.combine.method, config.combine.options
    if method not in METHODS:
        raise ConfigError(
            f"combine.method {method!r} is not known{suggest(method, list(METHODS))}; use one of {', '.join(METHODS)}"
        )
    known = [name for name in inspect.signature(METHODS[method]).parameters if name not in _GIVEN]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"combine.options: {method} has no option {name!r}{suggest(name, known)}; "
                f"it takes {', '.join(known) or 'none'}"
            )


@dataclass(frozen=True)
class Signal:
    """Advantages of a step. B counts this process's completions, N those of all processes."""

    advantages_B: Tensor  # float64
    contributions_BK: Tensor  # float64; what each contributor adds to the advantage, sums to it over K
    contributors: list[str]  # names of its columns: aspects, "kl" where it is part of the reward, constraint/<name>
    combined_B: Tensor  # float64; sum_k w_k u_k, NaN where a weighted aspect was not scored
    trained_B: Tensor  # bool; False: in neither the numerator nor the normaliser of the loss
    zero_variance_groups: int  # over all processes
    all_group_ids: Tensor  # [N]
    all_trained: Tensor  # [N] bool
    all_lengths: Tensor  # [N] completion tokens
    first_row: int  # position of this process's first completion among the N
    kl_penalty: float | None = None  # mean over the N of beta times the summed k1, where that is a part of the reward
    constrained_NC: Tensor | None = None  # native values of what is constrained, NaN where a constraint has none
    weights_NK: Tensor | None = None  # of each completion's own prompt, where prompts weigh for themselves

    def own_rows(self, rows: Tensor) -> Tensor:
        """Those of these global rows that lie on this process, as local indices."""
        local = rows - self.first_row
        return local[(local >= 0) & (local < len(self.advantages_B))]

    def normalizer(self, rows: Tensor, reduction: str) -> float:
        """Global denominator of the loss over these rows: trained completions, or trained tokens for token_mean."""
        trained = self.all_trained[rows]
        if reduction == "token_mean":
            return float(self.all_lengths[rows][trained].sum())
        return float(trained.sum())


def make_signal(
    rollout: Rollout,
    scores_BK: Tensor,
    objectives: Objectives,
    config: GRPOConfig,
    run: Run,
    *,
    kl_B: Tensor | None = None,
    constraints: Constraints | None = None,
    weights_BK: Tensor | None = None,
) -> Signal:
    """Advantages from native scores; statistics that look across groups see the groups of all processes.

    `kl_B`, the summed k1 of each completion, goes into the reward as one more objective: utility -kl, weight beta. A
    completion without any score has no reward, and hence no penalty either: its advantage stays 0. `constraints` mix
    their own advantages in, by the multipliers of this step. `weights_BK`, the weights of each completion's own prompt,
    stand in the place of the objectives'.
    """
    utilities_BK = utilities(scores_BK, objectives.aspects)
    weights = (objectives.weights_K if weights_BK is None else weights_BK).expand_as(utilities_BK)
    combined = weighted_utilities(utilities_BK, weights)
    rewards_BK, contributors = utilities_BK, list(objectives.names)
    kl_penalty = None
    if kl_B is not None:
        is_scored_B = ((weights > 0) & ~utilities_BK.isnan()).any(dim=1)
        rewards_BK = torch.cat([utilities_BK, torch.where(is_scored_B, -kl_B, torch.nan)[:, None]], dim=1)
        weights = torch.cat([weights, torch.full_like(kl_B, config.beta)[:, None]], dim=1)
        contributors.append(KL)
        kl_penalty = config.beta * float(run.gathered(kl_B).mean())
    group_ids = run.gathered(rollout.group_ids_B)
    weights_NK = None if weights_BK is None else run.gathered(weights)
    weights_of = weights[0] if weights_NK is None else weights_NK
    contributions = _contributions(run.gathered(rewards_BK), group_ids, weights_of, config, objectives)
    constrained_NC = None
    if constraints is not None:
        constrained_NC = constraints.values_of(rollout, scores_BK)
        contributions = constrained_contributions(
            contributions,
            constraints.slacks(constrained_NC),
            group_ids,
            constraints.multipliers_C,
            delta=config.combine.delta,
            scale=config.scale,
        )
        contributors += constraints.names
    advantages = contributions.sum(dim=1)
    is_zero = zero_variance_groups(advantages, group_ids)
    truncated = run.gathered(rollout.truncated_B.long()).bool()
    trained = torch.ones_like(is_zero)
    if config.mask_truncated:
        trained &= ~truncated
    if config.zero_variance == "skip":
        trained &= ~is_zero
    start = run.rank * len(rollout)
    own = slice(start, start + len(rollout))
    return Signal(
        advantages_B=advantages[own],
        contributions_BK=contributions[own],
        contributors=contributors,
        combined_B=combined,
        trained_B=trained[own],
        zero_variance_groups=len(group_ids[is_zero].unique()),
        all_group_ids=group_ids,
        all_trained=trained,
        all_lengths=run.gathered(rollout.lengths_B.cpu()),
        first_row=start,
        kl_penalty=kl_penalty,
        constrained_NC=constrained_NC,
        weights_NK=None if weights_BK is None else run.gathered(weights_BK),
    )


def weighted_utilities(utilities_BK: Tensor, weights: Tensor) -> Tensor:
    """Combined utility [B] under weights of all, [K], or of each completion, [B, K]; NaN where one of weight above 0 is
    missing. Example: utilities 0.5 and NaN, weights 2 and 0: 1."""
    return torch.where(weights > 0, utilities_BK * weights, 0.0).sum(dim=1)


def _contributions(
    rewards_NK: Tensor, group_ids: Tensor, weights: Tensor, config: GRPOConfig, objectives: Objectives
) -> Tensor:
    """What each objective adds to each advantage [N, K]; their sum over K is the advantage.

    `weights` are those of all [K], or of each completion's own prompt [N, K]. Raises RewardError where the aspect that
    is the gate was not scored for any completion.
    """
    combine = config.combine
    options = _method_options(config, objectives.names, objectives.weights_K)
    gate = options.get("gate")
    if gate is not None and bool(rewards_NK[:, gate].isnan().all()):
        raise RewardError(
            f"combine.options.gate {objectives.names[gate]!r}: none of the step's {len(rewards_NK)} completions has a "
            "score of that aspect, so nothing can pass the gate; have a scorer give it, or gate on another aspect"
        )
    contributions = objective_contributions if weights.ndim == 1 else conditioned_contributions
    return contributions(rewards_NK, group_ids, weights, method=combine.method, delta=combine.delta, **options)


def _method_options(config: GRPOConfig, names: Sequence[str], weights_K: Tensor) -> dict[str, Any]:
    """The method's options, aspects by name turned into columns, and `scale` where it is one. Raises ValueError."""
    combine = config.combine
    options = method_options(combine.method, combine.options, names, weights_K)
    return options | ({"scale": config.scale} if combine.method == "weighted_sum" else {})

"""Conditioned GRPO: which weights every prompt of a step asks for, and what a step shows of how they are followed.

The draws are a function of seed, step and the prompt's index in the step, so a resumed run asks for the same, whatever
the number of processes. Usage, metrics and sources: docs/fronts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.algorithms.grpo_signal import Objectives
from equipoise.config import ConditionedConfig, GRPOConfig
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError
from equipoise.functional.objectives import combine_objectives, method_options
from equipoise.functional.statistics import spearman
from equipoise.models.policy import Policy
from equipoise.models.preference import Preference
from equipoise.rollout.preference_conditioning import asking, check_place, check_within_groups, sample_weights


@dataclass(frozen=True)
class Conditioning:
    """How the prompts of a run ask. K counts the score columns, of which `columns` are weighed."""

    config: ConditionedConfig
    preference: Preference  # aspects in the order of `objective_weights`, those of weight 0 left out
    columns: tuple[int, ...]  # of the preference's aspects among the K
    num_columns: int
    total: float  # what weights sum to, so that rewards keep the recipe's size beside the KL
    usual: dict[str, float]  # shares of `objective_weights`: what the in-loop evaluation asks for
    seed: int

    @classmethod
    def of(cls, config: GRPOConfig, objectives: Objectives) -> Conditioning | None:
        """None where the recipe conditions nothing. Raises ConfigError for a combination that cannot be."""
        if config.conditioned is None:
            return None
        aspects = tuple(name for name, weight in config.objective_weights.items() if weight > 0)
        try:
            check_within_groups(config.combine.method, config.combine.options)
        except ValueError as error:
            raise ConfigError(f"conditioned: combine.method {error}") from error
        if ignores_weights(config):
            raise ConfigError(
                f"conditioned: combine.method {config.combine.method!r} does not use the weights, so none that are "
                "asked for would be learned; use weighted_sum (mo_grpo with options.weighted: true)"
            )
        preference = Preference(aspects, config.conditioned.template)
        return cls(
            config.conditioned,
            preference,
            tuple(objectives.names.index(name) for name in aspects),
            len(objectives.names),
            sum(config.objective_weights.values()),
            preference.shares({name: config.objective_weights[name] for name in aspects}),
            config.seed,
        )

    def prepare(self, policy: Policy) -> None:
        """What is saved will say how it is asked. Raises ConfigError where the policy would not read the weights."""
        check_place(policy, self.preference)
        policy.preference = self.preference

    def shares(self, step: int, prompts_P: Sequence[int]) -> Tensor:
        """What these prompts of a step ask for: [P, A], in the order of the preference's aspects, each row sums to 1.

        `step` counts completed steps; prompts are numbered within the step, over all processes.
        """
        return sample_weights(
            len(self.columns),
            prompts_P,
            seed=self.seed,
            step=step,
            corner_share=self.config.corner_share,
            concentration=self.config.concentration,
        )

    def asking(self, prompts: Sequence[PromptRecord], step: int, first_prompt: int) -> list[PromptRecord]:
        """These prompts of a step, numbered from `first_prompt`, with their messages above them."""
        shares_PA = self.shares(step, range(first_prompt, first_prompt + len(prompts)))
        named = [dict(zip(self.preference.aspects, row, strict=True)) for row in shares_PA.tolist()]
        return asking(prompts, self.preference, named)

    def asking_usual(self, prompts: Sequence[PromptRecord]) -> list[PromptRecord]:
        """Prompts that ask for the shares of `objective_weights`."""
        return asking(prompts, self.preference, [self.usual] * len(prompts))

    def weights(self, step: int, group_ids_B: Tensor) -> Tensor:
        """The weights of each completion's own prompt [B, K], `total` times its shares; 0 for what is only logged."""
        groups_P, place_B = group_ids_B.cpu().unique(return_inverse=True)
        weights_PK = torch.zeros(len(groups_P), self.num_columns, dtype=torch.float64)
        weights_PK[:, list(self.columns)] = self.total * self.shares(step, groups_P.tolist())
        return weights_PK[place_B]

    def asked_columns(self, step: int, group_ids_B: Tensor) -> dict[str, list[float]]:
        """`asked/<aspect>` of the completions file: the shares in the completion's prompt."""
        groups_P, place_B = group_ids_B.cpu().unique(return_inverse=True)
        shares_BA = self.shares(step, groups_P.tolist())[place_B]
        return {f"asked/{name}": shares_BA[:, a].tolist() for a, name in enumerate(self.preference.aspects)}

    def metrics(self, utilities_NK: Tensor, step: int, group_ids_N: Tensor) -> dict[str, float | None]:
        """How far the answers of a step follow the weights asked, from the utilities of all processes.

        `asked/gain` is sum_a Cov(share_a, utility_a) over the step's prompts, the unbiased covariance: the combined
        utility under the weights asked, less that of the same answers under another prompt's weights. 0 in expectation
        for a policy that does not read them. `asked/<aspect>/rank_correlation` is Spearman's, of share and utility.
        """
        groups_P, place_N = group_ids_N.cpu().unique(return_inverse=True)
        shares_PA = self.shares(step, groups_P.tolist())
        means_PA = torch.stack(
            [utilities_NK[place_N == p][:, list(self.columns)].nanmean(0) for p in range(len(groups_P))]
        )
        found: dict[str, float | None] = {}
        gain = 0.0
        for a, name in enumerate(self.preference.aspects):
            scored = ~means_PA[:, a].isnan()
            asked_P, got_P = shares_PA[scored, a], means_PA[scored, a]
            enough = len(asked_P) > 1
            # Means of the same scores in another order are a tie.
            correlation = float(spearman(asked_P, got_P.round(decimals=9))) if enough else float("nan")
            found[f"asked/{name}/mean"] = float(shares_PA[:, a].mean())
            found[f"asked/{name}/rank_correlation"] = None if correlation != correlation else correlation
            covariance = (asked_P - asked_P.mean()) @ (got_P - got_P.mean()) / (len(asked_P) - 1) if enough else 0.0
            gain += float(covariance)
        return {"asked/gain": gain, **found}


def ignores_weights(config: GRPOConfig) -> bool:
    """Whether the combination of a recipe gives two weightings the same advantages, tried on rewards drawn at random.

    Raises ConfigError for a method or options that do not exist.
    """
    names = list(config.objective_weights)
    weighed = [name for name, weight in config.objective_weights.items() if weight > 0]
    generator = torch.Generator().manual_seed(0)
    rewards_BK = torch.rand(16, len(names), generator=generator, dtype=torch.float64)
    group_ids_B = torch.arange(16) // 8
    method = config.combine.method
    advantages = []
    for share in (0.1, 0.9):
        weights = {weighed[0]: share, weighed[1]: 1 - share} | dict.fromkeys(weighed[2:], 0.5)
        weights_K = torch.tensor([weights.get(name, 0.0) for name in names], dtype=torch.float64)
        try:
            options = method_options(method, config.combine.options, names, weights_K)
        except ValueError as error:
            raise ConfigError(f"combine: {error}") from error
        advantages.append(combine_objectives(rewards_BK, group_ids_B, weights_K, method=method, **options))
    return bool(torch.equal(*advantages))

"""A policy that reads the weights of its objectives in its prompt, so that the trade-off is chosen at inference.

In training every prompt of a step gets weights of its own, drawn from the simplex; a system message names them, and the
completions of that prompt are rewarded by exactly the weights that it names. Sources: multi-objective alignment by
prompts that carry preferences, R. Yang et al., "Rewards-in-Context" (2024), arXiv 2402.10207; weights drawn from a
Dirichlet distribution, corners included, as in K. Wang et al., "Conditional Language Policy" (2024), arXiv 2407.15762.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.data import PromptRecord, encode_prompt
from equipoise.errors import ConfigError, DataError
from equipoise.functional.advantages import output_dtype
from equipoise.functional.objectives import objective_contributions
from equipoise.models.policy import Policy
from equipoise.models.preference import Preference, rounded
from equipoise.rollout.randomness import derived_seed

_STREAM = 0x70726566  # draws of weights are no other draws of the same seed
# Of the methods of `combine_objectives` those that look at one group at a time: each group has weights of its own, and
# whatever is divided by a spread over the batch would mix them.
WITHIN_GROUPS = ("weighted_sum", "mo_grpo", "rank", "conditioned", "chebyshev")
_PROBE = "Probe"


def sample_weights(
    num_objectives: int,
    prompts_P: Sequence[int],
    *,
    seed: int,
    step: int,
    corner_share: float = 0.25,
    concentration: float = 1.0,
) -> Tensor:
    """Weights of every prompt of a step: float64 [P, K], multiples of 1/100 that sum to 1.

    With probability `corner_share` a corner (one objective alone, each as likely), else Dirichlet(concentration, ...):
    1 is uniform on the simplex, more is nearer to the middle, less nearer to the corners. The draw depends on seed,
    step and the prompt's index in the step only, not on which rank holds the prompt.

    Raises ValueError for fewer than 2 objectives, a share outside [0, 1] or a concentration that is not above 0.
    """
    if num_objectives < 2:
        raise ValueError(f"a preference weighs at least 2 objectives, got {num_objectives}")
    if not 0 <= corner_share <= 1:
        raise ValueError(f"corner_share must be between 0 and 1, got {corner_share}")
    if not 0 < concentration < float("inf"):
        raise ValueError(f"concentration must be above 0, got {concentration}")
    rows = []
    for prompt in prompts_P:
        generator = np.random.default_rng(derived_seed(seed, _STREAM, step, int(prompt)))
        corner, which = generator.random(), int(generator.integers(num_objectives))
        if corner < corner_share:
            rows.append([float(k == which) for k in range(num_objectives)])
        else:
            rows.append(rounded(generator.dirichlet(np.full(num_objectives, concentration)).tolist()))
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, num_objectives)


# -- asking ------------------------------------------------------------------------------------------------------------


def ask(policy: Policy, prompts: Sequence[PromptRecord | str], weights: Mapping[str, float]) -> list[PromptRecord]:
    """Prompts that ask a conditioned policy for these weights, for `generate` and `evaluate_policy`.

    Only ratios of weights count: they are brought to multiples of 1/100 that sum to 1. Scorers go on to judge the
    prompt alone: what was asked does not change with how the answer is weighed.

    Raises ConfigError for a policy that was not trained to read weights, and for weights as `Preference.shares` does.
    """
    preference = _preference_of(policy)
    records = [PromptRecord(prompt=prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return asking(records, preference, [preference.shares(weights)] * len(records))


def asked_shares(policy: Policy, weights: Mapping[str, float]) -> dict[str, float]:
    """What `ask` makes of weights, and its errors."""
    return _preference_of(policy).shares(weights)


def _preference_of(policy: Policy) -> Preference:
    if policy.preference is None:
        raise ConfigError(
            f"ask: {policy.name} was not trained to read weights, so it cannot be asked by them; train it with "
            "`conditioned: {}` in a grpo recipe, or leave the weights out"
        )
    return policy.preference


def asking(
    prompts: Sequence[PromptRecord], preference: Preference, shares_P: Sequence[Mapping[str, float]]
) -> list[PromptRecord]:
    """Each prompt with the message that names its weights, which sum to 1, above it."""
    return [replace(prompt, preamble=preference.text(shares)) for prompt, shares in zip(prompts, shares_P, strict=True)]


def check_place(policy: Policy, preference: Preference) -> None:
    """Raises ConfigError where the policy would not read the weights: its chat template refuses a system message or
    leaves it out, or its tokenizer makes the same ids of other weights."""
    corners = [{name: float(name == asked) for name in preference.aspects} for asked in preference.aspects]
    halves = {name: 0.5 * (name in preference.aspects[:2]) for name in preference.aspects}
    texts = [preference.text(shares) for shares in (*corners, halves)]
    try:
        read = [
            tuple(encode_prompt(policy.tokenizer, _PROBE, prompt_format=policy.prompt_format, preamble=text))
            for text in texts
        ]
    except DataError as error:
        raise ConfigError(
            f"conditioned: the chat template of {policy.name} has no place for a system message ({error}); use "
            "policy.prompt_format: text, or a template that takes one"
        ) from error
    if len(set(read)) < len(texts):
        raise ConfigError(
            f"conditioned: {policy.name} reads the same tokens whatever the weights are: its chat template leaves the "
            f"system message out, or its tokenizer does not know what stands in {texts[0]!r}; use "
            "policy.prompt_format: text, another conditioned.template or another tokenizer"
        )


# -- advantages --------------------------------------------------------------------------------------------------------


def check_within_groups(method: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for a method of `combine_objectives` that, with these options, looks across groups."""
    over_batch = method == "chebyshev" and options.get("ideal", "batch") == "batch"
    if method not in WITHIN_GROUPS or over_batch or options.get("base") == "gdpo" or options.get("scale") == "batch":
        raise ValueError(
            f"{method} with {dict(options) or 'its defaults'} looks across groups, whose weights differ: choose one of "
            f"{', '.join(WITHIN_GROUPS)}, with options that stay within a group"
        )


def combine_conditioned(
    rewards_BK: Tensor,
    group_ids_B: Tensor,
    weights_BK: Tensor,
    *,
    method: str = "weighted_sum",
    delta: float = 1e-4,
    **options: Any,
) -> Tensor:
    """`combine_objectives` with the weights of each completion's own prompt: one advantage each, [B].

    Args:
        rewards_BK: utilities, NaN = not scored.
        group_ids_B: completions of one prompt and one preference.
        weights_BK: the weights that the completion's prompt names, the same throughout a group.
        method, delta, options: as for `combine_objectives`; a method of `WITHIN_GROUPS`.

    Raises ValueError for another method, weights that differ within a group, and what `combine_objectives` refuses.

    Example: two groups of two with rewards [1, 0] and [0, 1], the first weighed (1, 0), the second (0, 1): advantages
    +0.707, -0.707 in the first, -0.707, +0.707 in the second.
    """
    contributions_BK = conditioned_contributions(
        rewards_BK, group_ids_B, weights_BK, method=method, delta=delta, **options
    )
    return contributions_BK.sum(1).to(output_dtype(rewards_BK))


def conditioned_contributions(
    rewards_BK: Tensor,
    group_ids_B: Tensor,
    weights_BK: Tensor,
    *,
    method: str = "weighted_sum",
    delta: float = 1e-4,
    **options: Any,
) -> Tensor:
    """What each objective adds to each advantage of `combine_conditioned`: float64 [B, K]."""
    check_within_groups(method, options)
    gate_B = rewards_BK[:, options["gate"]] if method == "conditioned" and "gate" in options else None
    contributions_BK = torch.zeros(rewards_BK.shape, dtype=torch.float64, device=rewards_BK.device)
    for group in group_ids_B.unique():
        rows = (group_ids_B == group).nonzero().flatten()
        weights_K = weights_BK[rows[0]]
        if not bool((weights_BK[rows] == weights_K).all()):
            raise ValueError(f"group {int(group)} has two preferences: number prompts with other weights apart")
        if gate_B is not None and gate_B[rows].isnan().all() and not gate_B.isnan().all():
            continue  # that nobody knows who passes the gate is a fault for a whole batch, and not for one group of it
        contributions_BK[rows] = objective_contributions(
            rewards_BK[rows], group_ids_B[rows], weights_K, method=method, delta=delta, **options
        )
    return contributions_BK

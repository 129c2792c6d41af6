"""Cautious scores: the mean of an ensemble less kappa times what its members disagree by. B completions, K aspects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.config import PessimismConfig
from equipoise.config.loading import suggest
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.rollout.scorers import Scorer, has_std


def pessimistic_scores(
    scores_BK: Tensor, std_BK: Tensor, aspects: Sequence[Aspect], kappa_K: Sequence[float]
) -> Tensor:
    """Native scores whose utility is u(mean) - kappa * std_u: moved kappa standard deviations to the worse side.

    Utilities are straight lines in the score, so what is taken off the score in its units is what is taken off the
    utility in its own, with a range and without. A column with kappa 0 stays as it is, to the last bit.

    Source: a penalty by the standard deviation is a lower confidence bound; Coste et al., arXiv 2310.02743, take the
    variance (their UWO), which has no unit in common with the reward.

    Example: kappa 2, std 0.5: a politeness of 3 (higher is better) becomes 2, a toxicity of 3 becomes 4.
    """
    columns = []
    for k, aspect in enumerate(aspects):
        better = 1.0 if aspect.higher_is_better else -1.0
        columns.append(scores_BK[:, k] - better * kappa_K[k] * std_BK[:, k] if kappa_K[k] > 0 else scores_BK[:, k])
    return torch.stack(columns, dim=1)


def kappa_of(config: PessimismConfig | None, scorers: Sequence[Scorer]) -> list[float]:
    """kappa by column. Raises ConfigError for an unknown aspect, or a scorer that does not say how sure it is."""
    owners = {aspect.name: scorer for scorer in scorers for aspect in scorer.aspects}
    if config is None:
        return [0.0] * len(owners)
    named = config.kappa if isinstance(config.kappa, dict) else dict.fromkeys(owners, config.kappa)
    for name, kappa in named.items():
        if name not in owners:
            raise ConfigError(
                f"pessimism.kappa: unknown aspect {name!r}{suggest(name, list(owners))}; "
                f"the scorers give {', '.join(owners)}"
            )
        if kappa > 0 and not has_std(owners[name]):
            raise ConfigError(
                f"pessimism.kappa {kappa:g}: {owners[name].name} gives {name!r} without a standard deviation; train "
                "the reward model with `ensemble: {members: 4}`, list several in `reward_models`, or give kappa by "
                "aspect and leave this one out"
            )
    return [named.get(name, 0.0) for name in owners]

"""An ensemble out of several saved reward models: every model is a member.

Unlike heads on one backbone, these members see different features: the mean is that of their outputs, and no single
network computes it (averaged weights of different backbones give something else).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_inputs import Prompt
from equipoise.models.reward_members import mean_and_std
from equipoise.models.reward_model import RewardModel


class RewardEnsemble:
    """Scores responses by the mean of several reward models, and says by how much they disagree.

    It goes wherever a loaded `RewardModel` goes for scoring. A model that has members of its own counts once, by its
    mean.

    Attributes:
        models: the members.
        aspect_specs: those of the first model: names, directions and ranges are the same in all; the mean and std of
            the training labels, by which an aspect without a range is standardised, are the first model's.
        source: the directories, for messages.
    """

    def __init__(self, models: Sequence[RewardModel]) -> None:
        """Raises ConfigError for fewer than two models, or models of different aspects."""
        if len(models) < 2:
            raise ConfigError(f"an ensemble needs at least two reward models, got {len(models)}")
        self.models = list(models)
        self.source = ", ".join(model.source for model in models)
        self.aspect_specs: list[Aspect] = models[0].aspect_specs
        for model in models[1:]:
            _check_same(models[0], model)
        self._columns = [[model.aspects.index(name) for name in self.aspects] for model in models]

    @classmethod
    def load(
        cls,
        directories: Sequence[str | Path],
        *,
        device: torch.device | str | None = None,
        precision: str = "float32",
    ) -> RewardEnsemble:
        """The reward models in these directories; arguments and errors as of `RewardModel.load`.

        Raises ConfigError also where a directory is given twice: a model that agrees with itself is no evidence.
        """
        paths = [Path(directory) for directory in directories]
        for index, path in enumerate(paths):
            if path.resolve() in [other.resolve() for other in paths[:index]]:
                raise ConfigError(f"{path}: stands twice among the models of an ensemble; give different models")
        return cls([RewardModel.load(path, device=device, precision=precision) for path in paths])

    @property
    def aspects(self) -> list[str]:
        """Aspect names, in the order of the columns of `score`."""
        return [aspect.name for aspect in self.aspect_specs]

    @property
    def num_members(self) -> int:
        """How many models there are."""
        return len(self.models)

    @property
    def scored_flops(self) -> float:
        """FLOPs that scoring has cost so far, over all models."""
        return sum(model.scored_flops for model in self.models)

    @overload
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        batch_size: int = ...,
        with_std: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, batch_size: int = ..., with_std: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, batch_size: int = 32, with_std: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mean [B, K] of the models' scores and, `with_std`, their unbiased standard deviation [B, K], native units.

        Raises RewardError as `RewardModel.score` does.
        """
        scores = [model.score(prompts, responses, batch_size=batch_size) for model in self.models]
        ordered = [part[:, columns] for part, columns in zip(scores, self._columns, strict=True)]
        mean_BK, std_BK = mean_and_std(torch.stack(ordered, dim=1))
        return (mean_BK, std_BK) if with_std else mean_BK


def _check_same(first: RewardModel, other: RewardModel) -> None:
    mine, theirs = ({a.name: (a.higher_is_better, a.range) for a in model.aspect_specs} for model in (first, other))
    if mine.keys() != theirs.keys():
        raise ConfigError(
            f"the models of an ensemble score the same aspects: {first.source} scores {', '.join(sorted(mine))}, "
            f"{other.source} {', '.join(sorted(theirs))}; leave one out"
        )
    for name, declared in mine.items():
        if theirs[name] != declared:
            raise ConfigError(
                f"aspect {name!r} means two things: (higher_is_better, range) is {declared} in {first.source} and "
                f"{theirs[name]} in {other.source}; leave one out"
            )

"""Scorers: where the scores of completions come from.

A scorer is anything with `score(rollout) -> {aspect: values}`, values being a number per completion or None for "not
scored". What is not a finite number or None is an error: a failed reward is never 0.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.config import AspectConfig, ScorerConfig
from equipoise.errors import ConfigError, RewardError
from equipoise.models.aspects import Aspect
from equipoise.rollout.types import Rollout

Scores = Mapping[str, Sequence[float | None]]


class Scorer(Protocol):
    """What `score_rollout` needs of a source of scores."""

    name: str
    aspects: list[Aspect]

    def score(self, rollout: Rollout) -> Scores:
        """A value, or None, per aspect and completion, in native units."""
        ...


class RewardModelScorer:
    """A saved reward model, or an ensemble of them (`RewardEnsemble`)."""

    def __init__(self, reward_model: Any, name: str, batch_size: int = 32) -> None:
        self.name = name
        self.model = reward_model
        self.aspects: list[Aspect] = list(reward_model.aspect_specs)
        self._batch_size = batch_size

    @property
    def flops(self) -> float:
        """FLOPs that scoring has cost so far."""
        return self.model.scored_flops

    @property
    def has_std(self) -> bool:
        """Whether `score_with_std` says how far the members disagree."""
        return self.model.num_members > 0

    def score(self, rollout: Rollout) -> Scores:
        """Native-scale predictions; NaN from the network is left for `score_rollout` to refuse."""
        scores_BK = self.model.score(list(rollout.prompts), list(rollout.completions), batch_size=self._batch_size)
        return self._by_name(scores_BK)

    def score_with_std(self, rollout: Rollout) -> tuple[Scores, Scores]:
        """The scores of `score`, and the members' standard deviation about each."""
        texts = list(rollout.prompts), list(rollout.completions)
        scores_BK, std_BK = self.model.score(*texts, batch_size=self._batch_size, with_std=True)
        return self._by_name(scores_BK), self._by_name(std_BK)

    def _by_name(self, values_BK: Tensor) -> Scores:
        return {aspect.name: values_BK[:, k].tolist() for k, aspect in enumerate(self.aspects)}


def has_std(scorer: Scorer) -> bool:
    """Whether a scorer says how sure it is: `has_std` is true, and `score_with_std(rollout)` gives (scores, stds)."""
    return bool(getattr(scorer, "has_std", False))


class FunctionScorer:
    """A Python function `f(prompts, completions) -> {aspect: values}`."""

    def __init__(self, function: Callable[..., Any], name: str, aspects: list[Aspect]) -> None:
        self.name = name
        self.aspects = aspects
        self._function = function

    def score(self, rollout: Rollout) -> Scores:
        """Whatever the function returns, checked by `score_rollout`; an exception becomes a RewardError."""
        try:
            result = self._function(list(rollout.prompts), list(rollout.completions))
        except Exception as error:
            raise RewardError(f"reward function {self.name} raised {type(error).__name__}: {error}") from error
        return result


def rubric_scorer() -> FunctionScorer:
    """The sandbox's rubric: four aspects in [0, 1], from text alone."""
    from equipoise.sandbox import ASPECTS
    from equipoise.sandbox.rubric import score

    unit = AspectConfig(higher_is_better=True, range=(0.0, 1.0))
    return FunctionScorer(score, "sandbox", [Aspect.from_config(aspect, unit) for aspect in ASPECTS])


# Scorers that a recipe names instead of describing them: `scorers: sandbox`.
NAMED: dict[str, Callable[[], Scorer]] = {"sandbox": rubric_scorer}


def load_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`; the working directory is searched last. Raises ConfigError where it fails."""
    if os.getcwd() not in sys.path:  # the console script does not have it, and users keep rewards beside their recipe
        sys.path.append(os.getcwd())
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"function {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "is its directory the working directory or on PYTHONPATH, and the name right?"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"function {name!r}: module {module_name!r} has no function {attribute!r}")
    return function


def build_scorers(configs: Sequence[ScorerConfig]) -> list[Scorer]:
    """The scorers a recipe lists. Raises ConfigError where two give the same aspect."""
    scorers: list[Scorer] = []
    for config in configs:
        if config.name is not None:
            if config.name not in NAMED:
                raise ConfigError(f"scorers: unknown name {config.name!r}; use {', '.join(sorted(NAMED))}")
            scorers.append(NAMED[config.name]())
        elif config.reward_model is not None:
            from equipoise.models.reward_model import RewardModel

            model = RewardModel.load(Path(config.reward_model))
            scorers.append(RewardModelScorer(model, config.reward_model, config.batch_size))
        elif config.reward_models is not None:
            from equipoise.models.ensemble import RewardEnsemble

            ensemble = RewardEnsemble.load(config.reward_models)
            scorers.append(RewardModelScorer(ensemble, ensemble.source, config.batch_size))
        else:
            assert config.function is not None
            aspects = [Aspect.from_config(name, aspect) for name, aspect in config.aspects.items()]
            scorers.append(FunctionScorer(load_function(config.function), config.function, aspects))
    all_aspects(scorers)
    return scorers


def all_aspects(scorers: Sequence[Scorer]) -> list[Aspect]:
    """Aspects of all scorers, in their order. Raises ConfigError for a name two scorers give."""
    owners: dict[str, str] = {}
    for scorer in scorers:
        for aspect in scorer.aspects:
            if aspect.name in owners:
                raise ConfigError(
                    f"aspect {aspect.name!r} is given by both {owners[aspect.name]} and {scorer.name}; "
                    "every aspect has one source: rename or remove one"
                )
            owners[aspect.name] = scorer.name
    return [aspect for scorer in scorers for aspect in scorer.aspects]


def score_rollout(rollout: Rollout, scorers: Sequence[Scorer]) -> Tensor:
    """Native scores [B, K], float64, NaN where a scorer returned None; columns as in `all_aspects`.

    Identical (prompt, completion) pairs are scored once: the same text then has the same score, and a group of equal
    completions has exactly no variance.

    Raises RewardError naming scorer, aspect and row for a wrong length, an unknown or missing aspect, NaN or inf.
    """
    return score_rollout_with_std(rollout, scorers)[0]


def score_rollout_with_std(rollout: Rollout, scorers: Sequence[Scorer]) -> tuple[Tensor, Tensor | None]:
    """The scores of `score_rollout`, and how far an ensemble's members disagree about each: [B, K], native units.

    NaN in the columns of scorers that do not say (see `has_std`) and where there is no score; None where none says.
    Raises RewardError also for a score without a standard deviation, or with one below 0.
    """
    keys = [(repr(prompt), text) for prompt, text in zip(rollout.prompts, rollout.completions, strict=True)]
    first_row: dict[tuple[str, str], int] = {}
    for row, key in enumerate(keys):
        first_row.setdefault(key, row)
    rows = list(first_row.values())
    distinct = rollout[rows]
    position = {key: index for index, key in enumerate(first_row)}
    inverse = torch.tensor([position[key] for key in keys], dtype=torch.long)
    columns: list[Tensor] = []
    stds: list[Tensor] = []
    for scorer in scorers:
        if has_std(scorer):
            scores, std = scorer.score_with_std(distinct)  # type: ignore[attr-defined]
            columns += _columns(scorer, scores, rows)
            stds += _columns(scorer, std, rows)
            _check_stds(scorer, columns, stds)
        else:
            columns += _columns(scorer, scorer.score(distinct), rows)
            stds += [torch.full((len(rows),), math.nan, dtype=torch.float64)] * len(scorer.aspects)
    scores_BK = torch.stack(columns, dim=1)[inverse]
    return scores_BK, torch.stack(stds, dim=1)[inverse] if any(has_std(scorer) for scorer in scorers) else None


def _columns(scorer: Scorer, values: Any, rows: list[int]) -> list[Tensor]:
    _check_names(scorer, values)
    return [_column(scorer.name, aspect.name, values[aspect.name], rows) for aspect in scorer.aspects]


def _check_stds(scorer: Scorer, columns: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
    """Of the last columns, the scorer's own: a std of at least 0 with every score, so that none goes unpunished."""
    count = len(scorer.aspects)
    for aspect, scores, std in zip(scorer.aspects, columns[-count:], stds[-count:], strict=True):
        if bool((std < 0).any()) or bool((std.isnan() & ~scores.isnan()).any()):
            raise RewardError(
                f"scorer {scorer.name}, aspect {aspect.name!r}: a score has the standard deviation "
                f"{'None' if not bool((std < 0).any()) else float(std.nan_to_num(0).min())}; give one of at least 0 "
                "with every score"
            )


def _check_names(scorer: Scorer, scores: Any) -> None:
    if not isinstance(scores, Mapping):
        raise RewardError(f"scorer {scorer.name} returned {type(scores).__name__}; return {{aspect: list of numbers}}")
    declared = {aspect.name for aspect in scorer.aspects}
    for name in scores:
        if name not in declared:
            raise RewardError(
                f"scorer {scorer.name} returned the unknown aspect {name!r}; it declares {', '.join(sorted(declared))}"
            )
    for name in declared:
        if name not in scores:
            raise RewardError(f"scorer {scorer.name} returned no values for aspect {name!r}; use None for not scored")


def _column(scorer: str, aspect: str, values: Any, rows: list[int]) -> Tensor:
    """One aspect's values for these rows of the rollout, float64, NaN for None; lists, arrays and tensors are taken."""
    count = len(rows)
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        raise RewardError(
            f"scorer {scorer}, aspect {aspect!r}: {type(values).__name__} {_shown(values)} is not a list; "
            f"return a list of {count} numbers, one for each completion"
        )
    listed = list(listed)
    if len(listed) != count:
        raise RewardError(
            f"scorer {scorer}, aspect {aspect!r}: {len(listed)} values for {count} completions; return one for each"
        )
    column = torch.full((count,), math.nan, dtype=torch.float64)
    for position, (row, value) in enumerate(zip(rows, listed, strict=True)):
        if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
            value = value.item()
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise RewardError(
                f"scorer {scorer}, aspect {aspect!r}, completion {row}: {_shown(value)} is not a finite number; "
                "return None where there is no score"
            )
        column[position] = float(value)
    return column


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Judges by name: where the scores of an evaluation come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from equipoise.config import AspectConfig
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.scorers import FunctionScorer, RewardModelScorer, Scorer, load_function, rubric_scorer


def load_judge(name: str) -> Scorer:
    """The scorer that a name stands for.

    Names in `JUDGES` come first, then an existing directory (a reward model), then `package.module:function`. A
    function says what its scores mean by an attribute `aspects`, `{name: {"higher_is_better": bool, "range": [low,
    high]}}`, range optional; it is called as function(prompts, completions) -> {aspect: values}.

    Raises ConfigError where the name is none of these, or the function declares no aspects.
    """
    if name in JUDGES:
        return JUDGES[name]()
    if Path(name).exists():
        return RewardModelScorer(RewardModel.load(Path(name)), name)
    if ":" in name:
        return _function_judge(name)
    raise ConfigError(
        f"judge {name!r}: no such directory; give a reward model directory, `package.module:function`"
        f"{''.join(f', {known}' for known in sorted(JUDGES))}"
    )


def _function_judge(name: str) -> Scorer:
    function = load_function(name)
    declared: Any = getattr(function, "aspects", None)
    if not isinstance(declared, Mapping) or not declared:
        raise ConfigError(
            f"judge {name!r}: the function declares no aspects; set {name.partition(':')[2]}.aspects = "
            '{"name": {"higher_is_better": True, "range": [0, 1]}} after its definition'
        )
    return FunctionScorer(function, name, [_declared_aspect(name, aspect, declared[aspect]) for aspect in declared])


def _declared_aspect(judge: str, aspect: Any, declaration: Any) -> Aspect:
    try:
        return Aspect.from_config(str(aspect), AspectConfig.model_validate(declaration))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "declaration"
        raise ConfigError(
            f"judge {judge!r}, aspect {aspect!r}: {field}: {problem['msg']}; "
            'declare {"higher_is_better": True or False, "range": [lowest, highest]}'
        ) from error


# A judge with a name of its own is added here by the file that defines it.
JUDGES: dict[str, Callable[[], Scorer]] = {"sandbox": rubric_scorer}

"""Judges by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluation_toys import hand_rollout
from tests.reward_toys import ASPECTS, save_backbone
from tests.toy import two_aspects

from equipoise.config import BackboneConfig
from equipoise.errors import ConfigError, RewardError
from equipoise.evaluation.judges import JUDGES, load_judge
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.scorers import FunctionScorer, score_rollout


def declared(prompts: list[Any], completions: list[str]) -> dict[str, list[float | None]]:
    """As `two_aspects`, with what the scores mean."""
    return two_aspects(prompts, completions)


declared.aspects = {  # type: ignore[attr-defined]
    "politeness": {"higher_is_better": True, "range": [0, 1]},
    "rudeness": {"higher_is_better": False},
}


def undeclared(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """No aspects."""
    return {}


def directionless(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """An aspect without a direction."""
    return {}


directionless.aspects = {"wit": {"range": [0, 1]}}  # type: ignore[attr-defined]


def upside_down(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """A range from high to low."""
    return {}


upside_down.aspects = {"wit": {"higher_is_better": True, "range": [1, 0]}}  # type: ignore[attr-defined]


def raising(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """A judge that fails."""
    raise KeyError("model missing")


raising.aspects = {"wit": {"higher_is_better": True}}  # type: ignore[attr-defined]


def test_a_function_with_aspects() -> None:
    judge = load_judge(f"{__name__}:declared")
    assert isinstance(judge, FunctionScorer)
    assert [(a.name, a.higher_is_better, a.range) for a in judge.aspects] == [
        ("politeness", True, (0.0, 1.0)),
        ("rudeness", False, None),
    ]
    scores = score_rollout(hand_rollout([["please go"], ["rude idiot"]]), [judge])
    assert scores.tolist() == [[0.5, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/directory", "no such directory"),
        ("no_such_module:judge", "cannot import 'no_such_module'"),
        (f"{__name__}:nothing", "no function 'nothing'"),
        (f"{__name__}:undeclared", "declares no aspects"),
        (f"{__name__}:directionless", "higher_is_better"),
        (f"{__name__}:upside_down", "range"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_judge(name)


def test_the_rubric_of_the_sandbox_is_a_judge_by_name() -> None:
    judge = load_judge("sandbox")
    assert [aspect.name for aspect in judge.aspects] == ["politeness", "meaningfulness", "actionability", "safety"]
    assert all(aspect.range == (0.0, 1.0) and aspect.higher_is_better for aspect in judge.aspects)


def test_a_reward_model_directory_scores_as_the_model_does(tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "backbone")
    model = RewardModel.from_backbone(BackboneConfig(model=str(backbone)), ASPECTS)
    directory = str(model.save(tmp_path / "model"))
    judge = load_judge(directory)
    assert judge.name == directory
    assert judge.aspects == ASPECTS
    texts = ["good dog", "mean pig", "no ice", "mean pig"]
    scores = score_rollout(hand_rollout([[text] for text in texts]), [judge])
    expected = model.score([f"prompt {g}" for g in range(4)], texts)
    torch.testing.assert_close(scores, expected.double(), rtol=1e-4, atol=1e-4)


def test_a_directory_that_holds_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_judge(str(tmp_path))


def test_a_judge_that_fails_is_a_fault_not_a_zero() -> None:
    with pytest.raises(RewardError, match="KeyError"):
        score_rollout(hand_rollout([["a"]]), [load_judge(f"{__name__}:raising")])


def test_judges_are_added_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_judge(f"{__name__}:declared")
    monkeypatch.setitem(JUDGES, "mine", lambda: judge)
    assert load_judge("mine") is judge

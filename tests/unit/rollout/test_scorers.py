"""Scores are finite numbers or None, every aspect has one source, and a failure is never a 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.toy import toy_rollout

from equipoise.config import ScorerConfig
from equipoise.errors import ConfigError, RewardError
from equipoise.models.aspects import Aspect
from equipoise.rollout.scorers import (
    FunctionScorer,
    RewardModelScorer,
    all_aspects,
    build_scorers,
    load_function,
    score_rollout,
)
from equipoise.rollout.types import Rollout

ROLLOUT = toy_rollout([3, 3, 3], [2, 2, 2])


def scorer_of(result: Any, aspects: tuple[str, ...] = ("tone",), name: str = "judge") -> FunctionScorer:
    """A scorer that returns `result`, or what `result(prompts, completions)` gives."""
    function = result if callable(result) else lambda prompts, completions: result
    return FunctionScorer(function, name, [Aspect(aspect, higher_is_better=True) for aspect in aspects])


def rollout_of(pairs: list[tuple[Any, str]]) -> Rollout:
    rollout = toy_rollout([2] * len(pairs), [2] * len(pairs))
    values = {"prompts": tuple(p for p, _ in pairs), "completions": tuple(c for _, c in pairs)}
    return Rollout(**{**rollout.__dict__, **values})


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, None],
        (1, 0.5, None),
        [np.float32(1), np.float64(0.5), None],
        [np.int64(1), torch.tensor(0.5), None],
        iter([1, 0.5, None]),
    ],
    ids=["list", "tuple", "numpy", "torch", "iterator"],
)
def test_numbers_and_none(values: Any) -> None:
    column = score_rollout(ROLLOUT, [scorer_of({"tone": values})])[:, 0]
    assert column.dtype == torch.float64
    assert column[:2].tolist() == [1.0, 0.5] and math.isnan(column[2])


@pytest.mark.parametrize("values", [np.array([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3])], ids=["numpy", "torch"])
def test_arrays(values: Any) -> None:
    assert score_rollout(ROLLOUT, [scorer_of({"tone": values})])[:, 0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"scorer judge, aspect 'tone': 2 values for 3 completions"),
        ([1.0, 2.0, 3.0, 4.0], r"4 values for 3 completions"),
        ([1.0, math.nan, 3.0], r"aspect 'tone', completion 1: nan is not a finite number; return None"),
        ([1.0, 2.0, -math.inf], r"completion 2: -inf is not a finite number"),
        ([np.float32("nan"), 2.0, 3.0], r"completion 0: nan is not a finite number"),
        ([1.0, "0.7", 3.0], r"completion 1: '0\.7' is not a finite number"),
        ([True, 1.0, 3.0], r"completion 0: True is not a finite number"),
        ([np.bool_(True), 1.0, 3.0], r"completion 0: True is not a finite number"),
        ([10**400, 1.0, 3.0], r"completion 0: 1000+\.\.\. is not a finite number"),
        ([[1.0], [2.0], [3.0]], r"completion 0: \[1\.0\] is not a finite number"),
        (torch.ones(3, 1), r"completion 0: \[1\.0\] is not a finite number"),
        (0.5, r"float 0\.5 is not a list; return a list of 3 numbers"),
        (torch.tensor(0.5), r"is not a list"),
        ("abc", r"str 'abc' is not a list"),
        (None, r"NoneType None is not a list"),
        ({"a": 1, "b": 2, "c": 3}, r"dict .* is not a list"),
    ],
)
def test_wrong_values_name_scorer_aspect_and_row(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_rollout(ROLLOUT, [scorer_of({"tone": values})])


def test_names_must_be_those_declared() -> None:
    with pytest.raises(RewardError, match="judge returned the unknown aspect 'tnoe'; it declares tone"):
        score_rollout(ROLLOUT, [scorer_of({"tnoe": [1, 2, 3]})])
    with pytest.raises(RewardError, match="judge returned the unknown aspect 'extra'"):
        score_rollout(ROLLOUT, [scorer_of({"tone": [1, 2, 3], "extra": [1, 2, 3]})])
    with pytest.raises(RewardError, match="judge returned no values for aspect 'tone'; use None"):
        score_rollout(ROLLOUT, [scorer_of({})])


@pytest.mark.parametrize("result", [[1, 2, 3], None, 0.5, "x"])
def test_what_is_not_a_mapping(result: Any) -> None:
    with pytest.raises(RewardError, match=f"judge returned {type(result).__name__}; return {{aspect"):
        score_rollout(ROLLOUT, [scorer_of(result)])


def test_an_exception_of_the_function_names_it_and_its_cause() -> None:
    def broken(prompts: list[Any], completions: list[str]) -> Any:
        raise KeyError("no such key")

    with pytest.raises(RewardError, match="reward function judge raised KeyError: 'no such key'") as caught:
        score_rollout(ROLLOUT, [scorer_of(broken)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_identical_pairs_are_scored_once_and_get_the_same_score() -> None:
    calls: list[tuple[list[Any], list[str]]] = []

    def counting(prompts: list[Any], completions: list[str]) -> Any:
        calls.append((prompts, completions))
        return {"tone": [float(len(calls) * 10 + i) for i in range(len(prompts))]}

    message = [{"role": "user", "content": "p"}]
    pairs = [("p", "a"), ("p", "b"), ("q", "a"), ("p", "a"), (message, "a"), (list(message), "a"), ("p", "b")]
    column = score_rollout(rollout_of(pairs), [scorer_of(counting)])[:, 0].tolist()
    assert calls == [(["p", "p", "q", message], ["a", "b", "a", "a"])]
    assert column == [10, 11, 12, 10, 13, 13, 11]


def test_columns_follow_the_scorers_not_the_order_returned() -> None:
    first = scorer_of({"b": [1, 2, 3], "a": [4, 5, 6]}, ("a", "b"), "one")
    second = scorer_of({"c": [7, 8, 9]}, ("c",), "two")
    assert [aspect.name for aspect in all_aspects([first, second])] == ["a", "b", "c"]
    assert score_rollout(ROLLOUT, [first, second]).tolist() == [[4, 1, 7], [5, 2, 8], [6, 3, 9]]


def test_an_aspect_has_one_source() -> None:
    with pytest.raises(ConfigError, match="aspect 'tone' is given by both one and two; every aspect has one source"):
        all_aspects([scorer_of({}, ("tone",), "one"), scorer_of({}, ("tone",), "two")])
    config = ScorerConfig.model_validate(
        {"function": "tests.toy:politeness", "aspects": {"p": {"higher_is_better": 1}}}
    )
    with pytest.raises(ConfigError, match=r"'p' is given by both tests\.toy:politeness"):
        build_scorers([config, config])


def test_functions_are_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_a_test.py").write_text("def f(prompts, completions):\n    return {}\nx = 3\n")
    (tmp_path / "broken_for_a_test.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("my_rewards_for_a_test:f")([], []) == {}
    with pytest.raises(ConfigError, match="module 'my_rewards_for_a_test' has no function 'g'"):
        load_function("my_rewards_for_a_test:g")
    with pytest.raises(ConfigError, match="has no function 'x'"):
        load_function("my_rewards_for_a_test:x")
    with pytest.raises(ConfigError, match=r"cannot import 'no_such_module' .*PYTHONPATH"):
        load_function("no_such_module:f")
    with pytest.raises(ConfigError, match="a_module_that_is_not_there"):
        load_function("broken_for_a_test:f")


def test_a_module_that_fails_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "syntax_for_a_test.py").write_text("def f(:\n")
    (tmp_path / "raising_for_a_test.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name, kind in (("syntax_for_a_test", "SyntaxError"), ("raising_for_a_test", "ZeroDivisionError")):
        with pytest.raises(ConfigError, match=f"cannot import '{name}' \\({kind}"):
            load_function(f"{name}:f")


class _Predictions:
    """What `RewardModelScorer` needs of a reward model."""

    aspect_specs = [Aspect("tone", higher_is_better=True), Aspect("harm", higher_is_better=False)]  # noqa: RUF012

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores
        self.seen: list[Any] = []

    def score(self, prompts: list[Any], responses: list[str], *, batch_size: int) -> torch.Tensor:
        self.seen.append((prompts, responses, batch_size))
        return self.scores


def test_a_reward_model_scores_its_aspects() -> None:
    model = _Predictions(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    scores = score_rollout(ROLLOUT, [RewardModelScorer(model, "rm", batch_size=7)])
    assert scores.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert model.seen == [(list(ROLLOUT.prompts), list(ROLLOUT.completions), 7)]
    broken = _Predictions(torch.tensor([[1.0, 2.0], [3.0, math.nan], [5.0, 6.0]]))
    with pytest.raises(RewardError, match="scorer rm, aspect 'harm', completion 1: nan"):
        score_rollout(ROLLOUT, [RewardModelScorer(broken, "rm")])


def test_the_completion_at_fault_is_named_as_it_stands_in_the_rollout() -> None:
    repeated = ROLLOUT[[0, 0, 1, 2]]
    scorer = FunctionScorer(lambda prompts, texts: {"tone": [1.0, 2.0, math.nan]}, "f", [Aspect("tone", True)])
    with pytest.raises(RewardError, match="completion 3: nan"):
        score_rollout(repeated, [scorer])

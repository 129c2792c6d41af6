"""Token rewards, gaps, whitening and the KL controller, by hand."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import grpo_values
from torch import Tensor

from equipoise.algorithms.grpo_records import Watch
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.algorithms.ppo_signal import KLController, combine_scores, moments, token_rewards, whiten
from equipoise.algorithms.run import Run
from equipoise.config import AdaptiveKLConfig, PPOConfig, recipe_from_mapping
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect

NAN = math.nan


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def values_of(**changes: Any) -> dict[str, Any]:
    return grpo_values(Path("model"), Path("prompts")) | {"algorithm": "ppo", "group_size": 1} | changes


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", PPOConfig.model_validate(values_of()))


def test_gaps_take_the_mean_of_their_aspect() -> None:
    """Aspect 0: mean of 0 and 4. Aspect 1: 1 is all there is. Row 2 has nothing, row 3 only what weighs nothing."""
    utilities = tensor([0, 1, NAN], [4, NAN, 5], [NAN, NAN, NAN], [NAN, NAN, 3])
    combined = combine_scores(utilities, tensor(1, 2, 0))
    assert combined.scores_N.tolist()[:2] == [2, 6] and combined.scores_N[2:].isnan().all()
    assert combined.contributions_NK.tolist() == [[0, 2, 0], [4, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert combined.filled == 1
    found = combine_scores(tensor([NAN, 1], [NAN, 3]), tensor(1, 1))
    assert found.scores_N.tolist() == [1, 3] and found.filled == 0, "an aspect scored nowhere adds 0, and fills nothing"


@given(st.lists(st.tuples(*[st.one_of(st.just(NAN), st.integers(-4, 4))] * 2), min_size=1, max_size=8))
def test_a_gap_is_neither_a_merit_nor_a_fault(rows: list[tuple[float, float]]) -> None:
    """Filling leaves the mean of each aspect where it was, and what is complete as it was."""
    utilities, weights = tensor(*rows), tensor(0.5, 2)
    combined = combine_scores(utilities, weights)
    scored = ~combined.scores_N.isnan()
    complete = ~utilities.isnan().any(1)
    assert torch.allclose(combined.scores_N[complete], (utilities @ weights)[complete])
    for k in range(2):
        column = utilities[:, k][~utilities[:, k].isnan()]
        if len(column):
            assert float(combined.contributions_NK[scored, k].mean() / weights[k]) == pytest.approx(
                float(column.mean())
            )


def test_token_rewards_by_hand() -> None:
    """Score 2 at the second token, the last; beta 0.1. Row 1 has three tokens, row 2 one, row 3 no score."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    k1 = tensor([0.5, -1, 9], [1, 2, 3], [4, NAN, NAN], [1, 1, 1])
    found = token_rewards(tensor(2, -1, 3, NAN), k1, mask, 0.1)
    expected = tensor([-0.05, 2.1, 0], [-0.1, -0.2, -1.3], [2.6, 0, 0], [-0.1, -0.1, 0])
    torch.testing.assert_close(found, expected)


def test_a_policy_above_its_reference_is_penalised() -> None:
    """The sign: tokens likelier under the policy than under the reference cost, the others pay."""
    from equipoise.functional import kl_estimate

    k1 = kl_estimate(tensor([math.log(0.5), math.log(0.1)]), tensor([math.log(0.25), math.log(0.2)]))
    found = token_rewards(tensor(0), k1, torch.ones(1, 2, dtype=torch.bool), 1.0)
    assert found[0].tolist() == pytest.approx([-math.log(2), math.log(2)])


def test_whitening_by_hand(run: Run) -> None:
    """1, 3 and 5 are kept: mean 3, variance 8 / 3."""
    values, mask = tensor([1, 3, NAN], [5, 99, 99]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert moments(values, mask, run) == (3.0, pytest.approx(8 / 3))
    size = 2 / math.sqrt(8 / 3 + 1e-8)
    assert whiten(values, mask, run, shift_mean=True).tolist() == [
        [pytest.approx(-size), 0, 0], [pytest.approx(size), 0, 0]
    ]  # fmt: skip
    kept = whiten(values, mask, run, shift_mean=False)
    assert kept.tolist() == [[pytest.approx(3 - size), 3, 0], [pytest.approx(3 + size), 0, 0]]


def test_whitening_of_nothing_and_of_equals(run: Run) -> None:
    nothing = whiten(tensor([1, 2]), torch.zeros(1, 2, dtype=torch.bool), run, shift_mean=True)
    assert nothing.tolist() == [[0, 0]]
    equal = whiten(tensor([0.7] * 8), torch.ones(1, 8, dtype=torch.bool), run, shift_mean=True)
    assert equal.abs().max() < 1e-9


def test_statistics_of_two_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process holds a part; the moments are those of the whole."""
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.3
    expected = moments(whole, mask, run)
    mean = expected[0]
    other, others_mask = whole[2:], mask[2:]
    theirs = {
        "sum": float(other[others_mask].sum()),
        "count": float(others_mask.sum()),
        "value": float((other - mean)[others_mask].square().sum()),
    }
    monkeypatch.setattr(Run, "totals", lambda self, values: {name: v + theirs[name] for name, v in values.items()})
    assert moments(whole[:2], mask[:2], run) == pytest.approx(expected)


def test_an_aspect_that_makes_the_score_alone_is_said(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    aspects = [Aspect(name, higher_is_better=True) for name in ("a", "b")]
    objectives = Objectives(aspects, tensor(1, 1))
    metrics = {
        "kl": None, "truncated_fraction": 0.0, "completion_length/mean": 3.0,
        "reward/a/variance_share": 0.1, "reward/b/variance_share": 0.9,
    }  # fmt: skip
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            watch.observe(metrics, objectives, run)
    assert [r.getMessage() for r in caplog.records] == [
        "aspect 'b' makes over 80% of the reward's variance: lower its weight"
    ]


def test_the_controller_by_hand() -> None:
    """Target 4, horizon 100, 10 completions. KL 8: error 1, cut to 0.2; 4.4: 0.1; 4: 0; 0: -1, cut to -0.2."""
    config = AdaptiveKLConfig(target=4.0, horizon=100)
    for kl, factor in ((8.0, 1.02), (4.4, 1.01), (4.0, 1.0), (3.6, 0.99), (0.0, 0.98), (-3.0, 0.98)):
        controller = KLController(0.1)
        controller.observe(kl, 10, config)
        assert controller.beta == pytest.approx(0.1 * factor)
        controller = KLController(0.1)
        controller.observe(kl, 10, None)
        assert controller.beta == 0.1


def test_the_controller_reaches_its_target() -> None:
    """A policy whose KL is 1 / beta: beta comes to 1 / target."""
    config, controller = AdaptiveKLConfig(target=5.0, horizon=100), KLController(0.01)
    for _ in range(400):
        controller.observe(1 / controller.beta, 20, config)
    assert 1 / controller.beta == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"top_k": 5}}, r"sampling\.top_k \(5\).*bias the ratio"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature 0"),
        ({"num_minibatches": 5}, r"num_minibatches \(5\) exceeds prompts_per_step \(4\)"),
        ({"objective_weights": {"politeness": 0}}, "objective_weights are all 0"),
        ({"beta": 0, "adaptive_kl": {"target": 3}}, "adaptive_kl multiplies beta, which is 0"),
        ({"group_size": 5, "adaptive_kl": {"target": 3, "horizon": 4}}, r"horizon \(4\) is too short for 20 .*above 4"),
        ({"critic": {"kind": "shared", "model": {"model": "x"}}}, "shared critic.*remove critic.model"),
        ({"critic": {"kind": "shared", "optimizer": {"learning_rate": 1}}}, "shared critic.*remove critic.model"),
        ({"gamma": 1.1}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"scale": "none"}, "scale"),
        ({"truncation": "bootstrap", "mask_truncated": True}, "'bootstrap' has no effect with mask_truncated"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_mapping(values_of(**changes))


def test_the_shortest_horizon_that_works() -> None:
    config = recipe_from_mapping(values_of(group_size=5, adaptive_kl={"target": 3, "horizon": 5}))
    assert isinstance(config, PPOConfig)
    controller = KLController(1.0)
    controller.observe(0.0, 20, config.adaptive_kl)
    assert controller.beta == pytest.approx(0.2)

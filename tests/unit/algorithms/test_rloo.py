"""RLOO as options of GRPO: one step against REINFORCE written out, its advantages and what it logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import PlainDescent, Table, TableScorer
from tests.toy import grpo_values, naive_logprobs, plain_model, toy_policy_directory, toy_rollout

from equipoise.algorithms import grpo, online
from equipoise.algorithms.grpo_signal import Objectives, make_signal
from equipoise.algorithms.run import Run
from equipoise.config import GRPOConfig, recipe_from_mapping
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.models.policy import load_policy, make_reference
from equipoise.rollout.scorers import score_rollout
from equipoise.rollout.types import Rollout

TABLE: Table = [[0.9, 0.1], [0.2, 0.6], [0.5, 0.5], [0.3, 0.4], [0.9, 0.8], [None, None]]
BETA, LENGTHS = 0.2, [3, 5, 2, 6, 1, 4]
RLOO = {"scale": "leave_one_out", "kl_in": "reward", "reduction": "constant", "constant": 1.0, "beta": BETA}


def config_of(directory: Path, **changes: Any) -> GRPOConfig:
    aspects = {name: {"higher_is_better": True} for name in ("a", "b")}
    values = grpo_values(directory, directory, num_steps=1, prompts_per_step=2, group_size=3)
    values |= {
        "scorers": {"function": "tests.toy:politeness", "aspects": aspects},
        "objective_weights": {"a": 1.0, "b": 0.5},
        "sampling": {"max_tokens": 6, "temperature": 0.8},
    }
    return GRPOConfig.model_validate(values | RLOO | changes)


@pytest.fixture
def rollout() -> Rollout:
    return toy_rollout([4] * 3 + [2] * 3, LENGTHS, group_size=3, temperature=0.8)


def rloo_advantages(kl: list[float]) -> list[float]:
    """Reward less the mean reward of the others of the group; a completion without a score is nobody."""
    rewards = [None if row[0] is None else row[0] + 0.5 * row[1] - BETA * kl[i] for i, row in enumerate(TABLE)]  # type: ignore[operator]
    result = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j // 3 == i // 3 and j != i and r is not None]
        result.append(0.0 if reward is None else reward - sum(others) / len(others))
    return result


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_step_is_reinforce_with_the_others_as_baseline(
    tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    directory = toy_policy_directory(tmp_path / "model", initializer_range=0.2, layers=1, hidden=16)
    config = config_of(directory, num_epochs=epochs)
    policy = load_policy(directory, trainable=True)
    policy.module.double()
    policy.reference = make_reference(policy)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).double()
    model, reference = plain_model(policy), policy.reference._module.causal  # type: ignore[attr-defined]
    with torch.no_grad():
        k1 = [naive_logprobs(model, rollout, i, 0.8) - naive_logprobs(reference, rollout, i, 0.8) for i in range(6)]
    kl = [float(row.sum()) for row in k1]
    advantages = rloo_advantages(kl)
    loss = -sum(a * naive_logprobs(model, rollout, i, 0.8).sum() for i, a in enumerate(advantages)) / 6  # type: ignore[operator]
    names = [name for name, _ in model.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    updaters: list[PlainDescent] = []
    monkeypatch.setattr(grpo, "Updater", lambda *a: updaters.append(PlainDescent(*a)) or updaters[-1])
    monkeypatch.setattr(online, "generate", lambda *a, **o: rollout)
    lines: list[dict[str, Any]] = []
    columns: dict[str, list[Any]] = {}
    monkeypatch.setattr(Run, "write_completions", lambda run, step, found: columns.update(found))
    run = Run(tmp_path / "run", config)
    run.listener = lines.append
    grpo.train_grpo(policy, [TableScorer(TABLE)], [PromptRecord(prompt="x")] * 2, config, run)
    assert len(updaters[0].gradients) == epochs
    for name, gradient in expected.items():
        torch.testing.assert_close(updaters[0].gradients[0][name], gradient, rtol=1e-5, atol=1e-8)
    assert columns["advantage"] == pytest.approx(advantages)
    for i in range(6):
        shares = columns["share/a"][i] + columns["share/b"][i] + columns["share/kl"][i]
        assert shares == pytest.approx(advantages[i], abs=1e-12)
    line = lines[0]
    assert line["reward/kl_penalty"] == pytest.approx(BETA * sum(kl) / 6)
    names = ("a", "b", "kl")
    assert sum(line[f"advantage/{name}/variance_share"] for name in names) == pytest.approx(1.0)
    assert line["kl"] is not None and line["entropy"] > 0 and line["sampler/logprob_difference"] > 0


def test_a_likelier_completion_pays_for_it(tmp_path: Path, rollout: Rollout) -> None:
    """Equal scores: the advantage is beta times how far the others' KL lies above one's own."""
    table: Table = [[0.5, 0.5]] * 6
    config = config_of(tmp_path)
    scorer = TableScorer(table)
    objectives = Objectives.of(config, [scorer])
    kl = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    scores = score_rollout(replace(rollout), [scorer])
    signal = make_signal(rollout, scores, objectives, config, Run(tmp_path / "run", config), kl_B=kl)
    assert signal.advantages_B.tolist() == pytest.approx([0.2 * 3, 0.2 * 1.5, -0.2 * 4.5, 0, 0, 0])
    assert signal.zero_variance_groups == 1 and signal.contributors == ["a", "b", "kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": {"method": "gdpo"}, "scale": "std"}, "kl_in 'reward' applies to combine.method weighted_sum only"),
        (
            {"combine": {"method": "gdpo"}, "kl_in": "loss"},
            "scale 'leave_one_out' applies to combine.method weighted_sum",
        ),
        ({"beta": 0.0}, "kl_in 'reward' with beta 0 penalises nothing"),
        ({"reduction": "sequence_mean", "constant": None}, "scale 'leave_one_out' is unbiased for the summed"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    values = grpo_values(Path("model"), Path("prompts")) | RLOO | changes
    with pytest.raises(ConfigError, match=message):
        recipe_from_mapping(values)


def test_an_aspect_called_kl_is_refused_beside_the_penalty(tmp_path: Path) -> None:
    scorer = TableScorer([[0.0]])
    scorer.aspects = [Aspect("kl", higher_is_better=True)]
    with pytest.raises(ConfigError, match="an aspect called 'kl'"):
        Objectives.of(config_of(tmp_path, objective_weights={"kl": 1.0}), [scorer])

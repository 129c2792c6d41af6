"""One PPO step on a stored rollout against the twin written from the papers, in float64."""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import Table, TableScorer
from tests.ppo_twin import PlainDescent, Twin
from tests.toy import Passes, grpo_values, naive_logprobs, plain_model, toy_policy_directory, toy_rollout
from torch import nn

from equipoise.algorithms import online, ppo, ppo_update
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import minibatches
from equipoise.config import PPOConfig
from equipoise.data import PromptRecord
from equipoise.errors import EquipoiseError
from equipoise.models.aspects import Aspect
from equipoise.models.policy import Policy, load_policy, make_reference
from equipoise.rollout.randomness import derived_seed
from equipoise.rollout.scorers import FunctionScorer
from equipoise.rollout.types import Rollout

# Row 3 and row 10 have a gap, row 5 has no score at all, group 2 has equal scores.
TABLE: Table = [
    [0.9, 0.1], [0.2, 0.6], [0.5, 0.5],
    [0.3, None], [0.9, 0.8], [None, None],
    [0.7, 0.7], [0.7, 0.7], [0.7, 0.7],
    [0.4, 0.0], [None, 1.0], [0.4, 0.3],
]  # fmt: skip
PROMPTS = [PromptRecord(prompt=f"prompt {i}") for i in range(4)]
LENGTHS = [3, 5, 2, 6, 1, 4, 2, 3, 3, 5, 5, 1]
CUT = (1, 4, 9)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    # GPT-2: its norm stays in float64, where that of Llama goes through float32.
    return toy_policy_directory(path, architecture="gpt2", initializer_range=0.2, layers=1, hidden=16)


@pytest.fixture
def rollout() -> Rollout:
    stored = toy_rollout([4] * 3 + [2] * 3 + [5] * 3 + [1] * 3, LENGTHS, group_size=3, temperature=0.8)
    return replace(stored, finish_reasons=tuple("length" if i in CUT else "stop" for i in range(12)))


def config_of(directory: Path, **changes: Any) -> PPOConfig:
    aspects = {name: {"higher_is_better": True} for name in ("a", "b")}
    values = grpo_values(directory, directory, num_steps=1, prompts_per_step=4, group_size=3)
    values |= {
        "algorithm": "ppo",
        "scorers": {"function": "tests.toy:politeness", "aspects": aspects},
        "objective_weights": {"a": 1.0, "b": 0.5},
        "beta": 0.1,
        "num_epochs": 2,
        "value_coefficient": 0.7,
        "sampling": {"max_tokens": 6, "temperature": 0.8},
    }
    return PPOConfig.model_validate(values | changes)


def perturbed(module: nn.Module, seed: int) -> None:
    """Away from the start: then the KL has a gradient, and the values are not all 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.5 if "value_head" in name else 0.03
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@functools.cache
def _loaded(directory: Path, value_head: bool) -> Policy:
    policy = load_policy(directory, trainable=True, value_head=value_head)
    policy.module.double()
    return policy


class Outcome:
    """What one step of the package left behind."""

    def __init__(self) -> None:
        self.updaters: list[PlainDescent] = []
        self.lines: list[dict[str, Any]] = []
        self.start: Any = None
        self.critic_start: Any = None
        self.reference: Any = None
        self.policy: Any = None
        self.columns: dict[str, list[Any]] = {}

    @property
    def line(self) -> dict[str, Any]:
        return self.lines[0]


def train(
    directory: Path, out: Path, rollout: Rollout, table: Table, config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """`train_ppo` on a stored rollout, with plain gradient descent."""
    outcome = Outcome()
    policy = outcome.policy = copy.deepcopy(_loaded(directory, config.critic.kind == "shared"))
    if config.beta:
        policy.reference = make_reference(policy)
    outcome.reference = copy.deepcopy(plain_model(policy))
    perturbed(policy.module, 9)
    outcome.start = copy.deepcopy(policy.module)
    make_critic = ppo.make_critic

    def critic_of(*arguments: Any) -> Any:
        critic = make_critic(*arguments)
        if critic is not None:
            perturbed(critic.module, 5)
            outcome.critic_start = copy.deepcopy(critic.module)
        return critic

    def updater(*arguments: Any) -> PlainDescent:
        outcome.updaters.append(PlainDescent(*arguments))
        return outcome.updaters[-1]

    run = Run(out, config)
    run.listener = outcome.lines.append
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "make_critic", critic_of)
        patch.setattr(ppo_update, "Updater", updater)
        patch.setattr(online, "generate", lambda *arguments, **options: rollout)
        patch.setattr(Run, "write_completions", lambda run, step, columns: outcome.columns.update(columns))
        ppo.train_ppo(policy, [TableScorer(table)], PROMPTS, config, run)
    return outcome


def expected(outcome: Outcome, rollout: Rollout, table: Table, config: PPOConfig) -> Twin:
    twin = Twin(outcome.start, outcome.critic_start, outcome.reference, rollout, table, config)
    for epoch in range(config.num_epochs):
        seed = derived_seed(config.seed, 2, 0, epoch)
        for rows in minibatches(rollout.group_ids_B, config.num_minibatches, seed):
            twin.update(rows.tolist(), PlainDescent.rate)
    return twin


SHARED = {"critic": {"kind": "shared"}}
OPTIONS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {**SHARED},
    "beta 0": {"beta": 0.0},
    "lambda 1": {"lam": 1.0, "whiten_advantages": False},
    "lambda 0, discounted": {"lam": 0.0, "gamma": 0.9, "whiten_advantages": False},
    "discounted": {"lam": 0.9, "gamma": 0.8, **SHARED},
    "raw advantages": {"whiten_advantages": False},
    "whitened rewards": {"whiten_rewards": True},
    "whitened rewards, shared, masked": {"whiten_rewards": True, "mask_truncated": True, **SHARED},
    "clip": {"num_epochs": 4, "epsilon": 0.01},
    "clip-higher": {"num_epochs": 4, "epsilon": 0.01, "epsilon_high": 0.05},
    "value clip": {"num_epochs": 4, "value_epsilon": 0.01},
    "no value clip": {"num_epochs": 3, "value_epsilon": None, **SHARED},
    "minibatches": {"num_minibatches": 3},
    "minibatches, shared": {"num_minibatches": 4, **SHARED},
    "masked": {"mask_truncated": True, "num_minibatches": 2},
    "bootstrap": {"truncation": "bootstrap"},
    "bootstrap, shared": {"truncation": "bootstrap", "gamma": 0.9, **SHARED},
    "one aspect": {"objective_weights": {"a": 1.0, "b": 0.0}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_gradients_equal_the_twin(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    config = config_of(directory, **options)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin = expected(outcome, rollout, TABLE, config)
    assert len(outcome.updaters) == (1 if config.critic.kind == "shared" else 2)
    found = [twin.gradients] if config.critic.kind == "shared" else [twin.gradients, twin.critic_gradients]
    for updater, gradients in zip(outcome.updaters, found, strict=True):
        assert updater.total == updater.updates == config.num_epochs * config.num_minibatches
        assert len(updater.gradients) == len(gradients) > 0
        scales: list[float] = []
        for ours, theirs in zip(updater.gradients, gradients, strict=True):
            assert ours.keys() == theirs.keys()
            scale = max(float(g.abs().max()) for g in theirs.values())
            scales.append(scale)
            for name, gradient in theirs.items():
                torch.testing.assert_close(
                    ours[name], gradient, rtol=1e-6, atol=1e-8 * scale, msg=lambda m, n=name: n + m
                )
        assert scales[0] > 0, "a later minibatch may be clipped altogether"
    updates = len(twin.policy_losses)
    policy, value = sum(twin.policy_losses) / updates, sum(twin.value_losses) / updates
    assert outcome.line["policy/loss"] == pytest.approx(policy, rel=1e-7, abs=1e-12)
    assert outcome.line["value/loss"] == pytest.approx(value, rel=1e-7)
    assert outcome.line["loss"] == pytest.approx(policy + 0.7 * value, rel=1e-7, abs=1e-12)
    assert outcome.line["trained_completions"] == sum(twin.kept)
    if config.epsilon < 0.2:
        assert 0.05 < outcome.line["clip_fraction"] < 0.95, "the case is meant to clip"
    if config.value_epsilon == 0.01:
        assert 0.05 < outcome.line["value/clip_fraction"] < 0.95, "the case is meant to clip"


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, "separate"), (5, "shared"), (100, "separate"), (2, "masked"), (7, "bootstrap, shared"), (3, "bootstrap")],
)
def test_micro_batches_change_nothing(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, size: int, options: str
) -> None:
    whole = train(directory, tmp_path / "whole", rollout, TABLE, config_of(directory, **OPTIONS[options]), monkeypatch)
    config = config_of(directory, **OPTIONS[options], micro_batch_size=size)
    split = train(directory, tmp_path / "split", rollout, TABLE, config, monkeypatch)
    for ours, theirs in zip(split.updaters, whole.updaters, strict=True):
        for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
            for name, gradient in other.items():
                torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-10)
    for name, value in whole.line.items():
        if not name.startswith("time/"):
            assert split.line[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_padding_changes_nothing(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """More columns on both sides, of another id and with other log-probabilities in them."""
    config = config_of(directory, critic={"kind": critic}, truncation="bootstrap")
    plain = train(directory, tmp_path / "plain", rollout, TABLE, config, monkeypatch)
    wide = toy_rollout(
        [4] * 3 + [2] * 3 + [5] * 3 + [1] * 3, LENGTHS, group_size=3, temperature=0.8, extra_padding=3, pad_id=7
    )
    wide = replace(wide, finish_reasons=rollout.finish_reasons)
    padded = train(directory, tmp_path / "padded", wide, TABLE, config, monkeypatch)
    for ours, theirs in zip(padded.updaters, plain.updaters, strict=True):
        for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
            for name, gradient in other.items():
                torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=1e-10)


def tokens_of(twin: Twin, rows: list[list[float]]) -> torch.Tensor:
    """The kept tokens of all rows."""
    kept = [value for row, keep in zip(rows, twin.kept, strict=True) if keep for value in row]
    return torch.tensor(kept, dtype=torch.float64)


def test_metrics_are_what_they_say(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(directory)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin, line = expected(outcome, rollout, TABLE, config), outcome.line
    assert line["reward/a/missing"] == pytest.approx(2 / 12) and line["reward/b/missing"] == pytest.approx(2 / 12)
    assert line["reward/unscored"] == 1 and line["reward/filled"] == 2
    combined = [row[0] + 0.5 * row[1] for row in TABLE if row[0] is not None and row[1] is not None]
    assert line["reward/combined"] == pytest.approx(sum(combined) / len(combined))
    assert line["zero_variance_groups"] == 1, "group 2; the group of one unscored completion varies otherwise"
    returns, values, raw = (tokens_of(twin, rows) for rows in (twin.returns, twin.old_values, twin.raw))
    assert line["return/mean"] == pytest.approx(float(returns.mean()))
    assert line["value/mean"] == pytest.approx(float(values.mean()))
    assert line["advantage/std"] == pytest.approx(float(raw.std(correction=0)))
    explained = 1 - float((returns - values).var(correction=0) / returns.var(correction=0))
    assert line["value/explained_variance"] == pytest.approx(explained)
    kl = sum(sum(row) for row in twin.k1) / 12
    assert line["reward/kl_penalty"] == pytest.approx(0.1 * kl) and line["kl/coefficient"] == 0.1
    unit = 0.0
    with torch.no_grad():
        for row in range(12):
            mine = naive_logprobs(outcome.start.model, rollout, row)
            unit += float((mine - naive_logprobs(outcome.reference, rollout, row)).sum())
    assert line["kl"] == pytest.approx(unit / 12, rel=1e-6)
    assert sum(line[f"reward/{name}/variance_share"] for name in ("a", "b")) == pytest.approx(1.0)
    assert line["truncated_fraction"] == pytest.approx(3 / 12) and line["completion_length/max"] == 6
    assert {"critic/grad_norm", "critic/learning_rate", "critic/skipped", "grad_norm", "entropy"} <= line.keys()


def test_completions_file_adds_up(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(directory)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin, columns = expected(outcome, rollout, TABLE, config), outcome.columns
    assert columns["reward"] == [None if s is None else pytest.approx(s) for s in twin.scores]
    for row in range(12):
        assert columns["share/a"][row] + columns["share/b"][row] == pytest.approx(twin.scores[row] or 0.0)
        mean = sum(twin.advantages[row]) / len(twin.advantages[row]) if twin.kept[row] else 0.0
        assert columns["advantage"][row] == pytest.approx(mean)
        assert columns["kl"][row] == pytest.approx(sum(twin.k1[row]))
    assert {len(values) for values in columns.values()} == {12}


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_step_with_everything_truncated_is_skipped_and_counted(
    directory: Path,
    tmp_path: Path,
    rollout: Rollout,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    critic: str,
) -> None:
    cut = replace(rollout, finish_reasons=("length",) * 12)
    config = config_of(directory, mask_truncated=True, critic={"kind": critic})
    with caplog.at_level(logging.WARNING):
        outcome = train(directory, tmp_path / "run", cut, TABLE, config, monkeypatch)
    assert all(updater.updates == 2 and not updater.gradients for updater in outcome.updaters), "the schedules go on"
    assert outcome.line["empty_minibatches"] == 2 and outcome.line["trained_completions"] == 0
    for name in ("loss", "policy/loss", "value/loss", "clip_fraction", "value/clip_fraction", "grad_norm", "value/mean",
                 "return/mean", "advantage/std", "value/explained_variance"):  # fmt: skip
        assert outcome.line[name] is None, f"{name} was not computed"
    messages = [record.message for record in caplog.records]
    assert sum("nothing to train on" in message for message in messages) == 1


def test_an_aspect_that_is_missing_everywhere_adds_nothing(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    table: Table = [[row[0] or 0.3, None] for row in TABLE]
    config = config_of(directory)
    outcome = train(directory, tmp_path / "run", rollout, table, config, monkeypatch)
    assert outcome.columns["reward"] == [row[0] for row in table]
    assert outcome.line["reward/filled"] == 0 and outcome.line["reward/b/missing"] == 1.0
    assert outcome.line["reward/combined"] is None and outcome.line["trained_completions"] == 12


def test_a_group_of_one_is_no_group_without_variance(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = replace(rollout, group_ids_B=torch.arange(12), index_in_group_B=torch.zeros(12, dtype=torch.long))
    config = config_of(directory, group_size=1, prompts_per_step=12)
    outcome = train(directory, tmp_path / "run", single, TABLE, config, monkeypatch)
    assert outcome.line["zero_variance_groups"] == 0


def test_the_adaptive_coefficient_moves_with_the_steps_and_is_used(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(directory, num_steps=3, adaptive_kl={"target": 0.01, "horizon": 60})
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    beta = 0.1
    for line in outcome.lines:
        assert line["kl/coefficient"] == pytest.approx(beta)
        kl = line["reward/kl_penalty"] / beta
        beta *= 1 + min(max(kl / 0.01 - 1, -0.2), 0.2) * 12 / 60
    assert beta != 0.1


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_process_without_rows_takes_part_with_nothing(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """Its passes count 0, and every parameter still gets a gradient: data parallelism waits for them."""
    made: list[Any] = []

    class Recorded(ppo.MinibatchLosses):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append((self, arguments[-1], arguments[0]))

    monkeypatch.setattr(ppo, "MinibatchLosses", Recorded)
    train(directory, tmp_path / "run", rollout, TABLE, config_of(directory, critic={"kind": critic}), monkeypatch)
    minibatch, totals, learner = made[0]
    before = copy.copy(totals)
    nobody = torch.zeros(0, dtype=torch.long)
    networks = [(learner.policy.module, minibatch.policy_loss)]
    if learner.critic is not None:
        networks.append((learner.critic.module, minibatch.critic_loss))
    for module, loss in networks:
        for part in minibatch.passes(nobody, loss):
            value = part()
            assert float(value.detach()) == 0
            value.backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and not parameter.grad.any(), name
    assert totals == before


def test_what_weighs_nothing_is_no_score(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 5 and 10 are not scored on the one aspect that counts."""
    config = config_of(directory, **OPTIONS["one aspect"])
    line = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch).line
    assert line["reward/unscored"] == 2 and line["trained_completions"] == 10 and line["reward/filled"] == 0


def test_a_critic_whose_gradient_is_not_finite_skips_its_step_alone(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, lines = load_policy(directory, trainable=True), []
    config = config_of(directory, beta=0.0, num_epochs=2, num_steps=2)
    critics: list[Any] = []
    make_critic, loss = ppo.make_critic, ppo_update.value_loss
    monkeypatch.setattr(ppo, "make_critic", lambda *a: critics.append(make_critic(*a)) or critics[-1])

    def infinite(*arguments: Any, **options: Any) -> Any:
        value, metrics = loss(*arguments, **options)
        return value * float("inf"), metrics

    monkeypatch.setattr(ppo_update, "value_loss", infinite)
    scorer = FunctionScorer(two_words, "words", [Aspect(name, higher_is_better=True) for name in ("a", "b")])
    run = Run(tmp_path / "run", config)
    run.listener = lines.append
    before = [p.clone() for p in policy.module.parameters()]
    with caplog.at_level(logging.WARNING), pytest.raises(EquipoiseError, match="3 gradients in a row were not finite"):
        ppo.train_ppo(policy, [scorer], PROMPTS, config, run)
    assert lines[0]["critic/skipped"] == 2 and lines[0]["critic/grad_norm"] is None and lines[0]["skipped"] == 0
    assert lines[0]["grad_norm"] > 0 and lines[0]["loss"] is None and lines[0]["policy/loss"] is not None
    assert not critics[0].module.value_head.linear.bias.any(), "no skipped step moved the critic"
    assert any(not torch.equal(p, q) for p, q in zip(policy.module.parameters(), before, strict=True))
    assert sum("a gradient was not finite" in record.message for record in caplog.records) == 1


def two_words(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """Lengths of two kinds."""
    return {"a": [float(len(text)) for text in completions], "b": [float(text.count(" ")) for text in completions]}


@pytest.mark.parametrize(
    ("options", "policy_passes", "critic_passes"),
    [
        ({}, 3, 3),
        ({**SHARED}, 3, 0),
        # Packed, 12 rows have no more tokens than 6 padded ones: one first look, two micro-batches.
        ({"num_epochs": 1, "micro_batch_size": 6, "beta": 0.0}, 3, 3),
    ],
)
def test_no_pass_more_than_needed(
    directory: Path,
    tmp_path: Path,
    rollout: Rollout,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    policy_passes: int,
    critic_passes: int,
) -> None:
    counted: dict[str, Passes] = {}
    learner = ppo.Learner

    def hooked(policy: Policy, critic: Any, *arguments: Any) -> Any:
        counted["policy"] = Passes(policy.module)
        if critic is not None:
            counted["critic"] = Passes(critic.module)
        return learner(policy, critic, *arguments)

    monkeypatch.setattr(ppo, "Learner", hooked)
    train(directory, tmp_path / "run", rollout, TABLE, config_of(directory, **options), monkeypatch)
    assert counted["policy"].count == policy_passes
    assert (counted["critic"].count if "critic" in counted else 0) == critic_passes

"""One GRPO step on a stored rollout against the twin written from the design, in float64."""

from __future__ import annotations

import copy
import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.grpo_twin import PlainDescent, Table, TableScorer, Twin
from tests.toy import Passes, grpo_values, naive_logits, naive_logprobs, plain_model, toy_policy_directory, toy_rollout

from equipoise.algorithms import grpo, online
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import minibatches
from equipoise.config import GRPOConfig
from equipoise.data import PromptRecord
from equipoise.models.policy import Policy, load_policy, make_reference
from equipoise.rollout.randomness import derived_seed
from equipoise.rollout.types import Rollout

# Group 0 varies, group 1 has gaps, group 2 has no variance, group 3 varies on the second aspect alone.
TABLE: Table = [
    [0.9, 0.1], [0.2, 0.6], [0.5, 0.5],
    [0.3, None], [0.9, 0.8], [None, None],
    [0.7, 0.7], [0.7, 0.7], [0.7, 0.7],
    [0.4, 0.0], [0.4, 1.0], [0.4, 0.3],
]  # fmt: skip
PROMPTS = [PromptRecord(prompt=f"prompt {i}") for i in range(4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    return toy_policy_directory(path, initializer_range=0.2, layers=1, hidden=16)


@pytest.fixture
def rollout() -> Rollout:
    stored = toy_rollout(
        [4] * 3 + [2] * 3 + [5] * 3 + [1] * 3, [3, 5, 2, 6, 1, 4, 2, 3, 3, 5, 5, 1], group_size=3, temperature=0.8
    )
    reasons = tuple("length" if i in (1, 4, 9) else "stop" for i in range(12))
    return replace(stored, finish_reasons=reasons)


def config_of(directory: Path, **changes: Any) -> GRPOConfig:
    aspects = {name: {"higher_is_better": True} for name in ("a", "b")}
    values = grpo_values(directory, directory, num_steps=1, prompts_per_step=4, group_size=3)
    values |= {
        "scorers": {"function": "tests.toy:politeness", "aspects": aspects},
        "objective_weights": {"a": 1.0, "b": 0.5},
        "beta": 0.1,
        "sampling": {"max_tokens": 6, "temperature": 0.8},
    }
    return GRPOConfig.model_validate(values | changes)


def perturbed(policy: Policy) -> None:
    """Move the policy away from its reference, so that the KL term has a gradient from the first update."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@functools.cache
def _loaded(directory: Path) -> Policy:
    policy = load_policy(directory, trainable=True)
    policy.module.double()
    return policy


class Outcome:
    """What one step of the package left behind."""

    def __init__(self, policy: Policy, updater: PlainDescent, line: dict[str, Any], start: Any, reference: Any) -> None:
        self.policy, self.updater, self.line, self.start, self.reference = policy, updater, line, start, reference


def train(
    directory: Path, out: Path, rollout: Rollout, table: Table, config: GRPOConfig, monkeypatch: pytest.MonkeyPatch
) -> Outcome:
    """`train_grpo` for one step on a stored rollout, with plain gradient descent."""
    policy = copy.deepcopy(_loaded(directory))
    if config.beta:
        policy.reference = make_reference(policy)
    reference = copy.deepcopy(plain_model(policy))
    perturbed(policy)
    start = copy.deepcopy(plain_model(policy))
    updaters: list[PlainDescent] = []

    def make(*arguments: Any) -> PlainDescent:
        updaters.append(PlainDescent(*arguments))
        return updaters[-1]

    monkeypatch.setattr(grpo, "Updater", make)
    monkeypatch.setattr(online, "generate", lambda *arguments, **options: rollout)
    lines: list[dict[str, Any]] = []
    run = Run(out, config)
    run.listener = lines.append
    grpo.train_grpo(policy, [TableScorer(table)], PROMPTS, config, run)
    return Outcome(policy, updaters[0], lines[0], start, reference)


def expected(outcome: Outcome, rollout: Rollout, table: Table, config: GRPOConfig) -> Twin:
    twin = Twin(outcome.start, outcome.reference, rollout, table, config)
    for epoch in range(config.num_epochs):
        seed = derived_seed(config.seed, 2, 0, epoch)
        for rows in minibatches(rollout.group_ids_B, config.num_minibatches, seed):
            twin.update(rows.tolist(), PlainDescent.rate)
    return twin


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kl k3": {"kl_loss": "k3", "num_epochs": 2},
    "kl k2": {"kl_loss": "k2", "num_epochs": 2},
    "kl k3_weighted": {"kl_loss": "k3_weighted", "num_epochs": 3},
    "beta 0": {"beta": 0.0, "num_epochs": 2},
    "sequence ratio": {"ratio": "sequence", "num_epochs": 3, "epsilon": 0.02},
    "token_mean": {"reduction": "token_mean", "num_epochs": 2},
    "constant": {"reduction": "constant", "constant": 9.0},
    "constant by max_tokens": {"reduction": "constant"},
    "clip": {"num_epochs": 4, "epsilon": 0.01},
    "clip-higher": {"num_epochs": 4, "epsilon": 0.01, "epsilon_high": 0.05},
    "minibatches": {"num_minibatches": 3, "num_epochs": 2},
    "minibatches token_mean": {"num_minibatches": 4, "reduction": "token_mean", "mask_truncated": True},
    "mask_truncated": {"mask_truncated": True},
    "mask_truncated token_mean": {"mask_truncated": True, "reduction": "token_mean"},
    "mask_truncated constant": {"mask_truncated": True, "reduction": "constant", "num_epochs": 2},
    "zero variance skipped": {"zero_variance": "skip"},
    "zero variance skipped, minibatches": {"zero_variance": "skip", "num_minibatches": 4},
    "scale none": {"scale": "none"},
    "scale batch": {"scale": "batch"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_equal_the_twin(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    config = config_of(directory, **options)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin = expected(outcome, rollout, TABLE, config)
    assert len(outcome.updater.gradients) == len(twin.gradients) > 0
    for ours, theirs in zip(outcome.updater.gradients, twin.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        scale = max(float(g.abs().max()) for g in theirs.values())
        assert scale > 0
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-8 * scale, msg=lambda m, n=name: n + m)
    assert outcome.line["loss"] == pytest.approx(sum(twin.losses) / len(twin.losses), rel=1e-7, abs=1e-12)
    assert outcome.line["trained_completions"] == sum(twin.trained)
    if config.epsilon < 0.2:
        assert 0.05 < outcome.line["clip_fraction"] < 0.95, "the case is meant to clip"


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, "default"), (5, "default"), (100, "default"), (2, "mask_truncated token_mean"), (7, "minibatches")],
)
def test_micro_batches_change_nothing(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, size: int, options: str
) -> None:
    config = config_of(directory, **OPTIONS[options])
    whole = train(directory, tmp_path / "whole", rollout, TABLE, config, monkeypatch)
    config = config_of(directory, **OPTIONS[options], micro_batch_size=size)
    split = train(directory, tmp_path / "split", rollout, TABLE, config, monkeypatch)
    for ours, theirs in zip(split.updater.gradients, whole.updater.gradients, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-10)
    for name, value in whole.line.items():
        if not name.startswith("time/"):
            assert split.line[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_a_step_with_everything_truncated_is_skipped_and_counted(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut = replace(rollout, finish_reasons=("length",) * 12)
    config = config_of(directory, mask_truncated=True, num_steps=3)
    with caplog.at_level(logging.WARNING):
        outcome = train(directory, tmp_path / "run", cut, TABLE, config, monkeypatch)
    assert outcome.updater.updates == 3, "the schedule goes on"
    assert outcome.line["empty_minibatches"] == 1 and outcome.line["trained_completions"] == 0
    for name in ("loss", "grad_norm", "clip_fraction", "entropy", "sampler/logprob_difference"):
        assert outcome.line[name] is None, f"{name} was not computed"
    assert outcome.line["skipped"] == 0 and outcome.line["learning_rate"] > 0
    assert outcome.line["truncated_fraction"] == 1.0
    for (name, now), before in zip(
        plain_model(outcome.policy).named_parameters(), outcome.start.parameters(), strict=True
    ):
        assert torch.equal(now, before), name
    messages = [record.message for record in caplog.records]
    assert sum("nothing to train on" in message for message in messages) == 1
    assert sum("more than half of the completions were cut" in message for message in messages) == 1


def test_scores_that_are_all_missing_give_no_gradient_and_are_counted(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: Table = [[None, None]] * 12
    outcome = train(directory, tmp_path / "run", rollout, nothing, config_of(directory, beta=0.0), monkeypatch)
    assert all(not gradient.any() for gradient in outcome.updater.gradients[0].values())
    line = outcome.line
    assert line["reward/a/mean"] is None and line["reward/a/std"] is None and line["reward/a/missing"] == 1.0
    assert line["reward/combined"] is None and line["reward/unscored"] == 12
    assert line["zero_variance_groups"] == 4 and line["advantage/std"] == 0.0


def test_one_aspect_missing_altogether_leaves_the_other(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_sided: Table = [[row[0], None] for row in TABLE]
    config = config_of(directory)
    outcome = train(directory, tmp_path / "run", rollout, one_sided, config, monkeypatch)
    twin = expected(outcome, rollout, one_sided, config)
    for name, gradient in twin.gradients[0].items():
        torch.testing.assert_close(outcome.updater.gradients[0][name], gradient, rtol=1e-6, atol=1e-9)
    assert outcome.line["reward/b/missing"] == 1.0 and outcome.line["reward/combined"] is None


def test_metrics_are_what_they_say(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(directory)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin, line = expected(outcome, rollout, TABLE, config), outcome.line
    scored = torch.tensor([row[0] for row in TABLE if row[0] is not None], dtype=torch.float64)
    assert line["reward/a/mean"] == pytest.approx(float(scored.mean()))
    assert line["reward/a/std"] == pytest.approx(float(scored.std()))
    assert line["reward/a/missing"] == pytest.approx(1 / 12) and line["reward/b/missing"] == pytest.approx(2 / 12)
    combined = [row[0] + 0.5 * row[1] for row in TABLE if row[0] is not None and row[1] is not None]
    assert line["reward/combined"] == pytest.approx(sum(combined) / len(combined))
    assert line["advantage/std"] == pytest.approx(float(torch.tensor(twin.advantages).double().std()))
    assert line["zero_variance_groups"] == 1 and line["reward/unscored"] == 1
    assert line["completion_length/mean"] == pytest.approx(40 / 12) and line["completion_length/max"] == 6
    assert line["truncated_fraction"] == pytest.approx(3 / 12)
    kl, entropy, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for row in range(12):
            mine, theirs = (naive_logprobs(model, rollout, row) for model in (outcome.start, outcome.reference))
            kl += float((mine - theirs).sum())
            table = torch.log_softmax(naive_logits(outcome.start, rollout, row) / 0.8, -1)
            entropy += float(-(table.exp() * table).sum())
            tokens += len(mine)
    assert line["kl"] == pytest.approx(kl / 12, rel=1e-6)
    assert line["entropy"] == pytest.approx(entropy / tokens, rel=1e-6)
    assert sum(line[f"advantage/{name}/variance_share"] for name in ("a", "b")) == pytest.approx(1.0)


def flops_of(directory: Path, rollout: Rollout, rows: slice) -> tuple[float, float]:
    """Forward and backward FLOPs of these rows in one pass of a fresh policy."""
    counter = grpo.FlopCounter.of(load_policy(directory, trainable=True).module)
    part = rollout[rows]
    counts = counter.counts(part.prompt_ids_BS, part.prompt_mask_BS, part.completion_mask_BT)
    return counter.forward(*counts), counter.backward(*counts)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.0, "num_epochs": 2}, {"beta": 0.1}])
def test_rows_without_a_gradient_go_through_no_backward_pass(
    directory: Path, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Row 5 has no score, group 2 (rows 6 to 8) equal ones; with a KL term they have a gradient nevertheless.

    The loss is that of all rows, which the twin computes one by one; so is the normaliser.
    """
    config = config_of(directory, **options)
    outcome = train(directory, tmp_path / "run", rollout, TABLE, config, monkeypatch)
    twin = expected(outcome, rollout, TABLE, config)
    assert outcome.line["loss"] == pytest.approx(sum(twin.losses) / len(twin.losses), rel=1e-7, abs=1e-12)
    assert outcome.line["trained_completions"] == 12
    assert outcome.line["zero_variance_groups"] == 1
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    every, still = flops_of(directory, rollout, slice(0, 12)), flops_of(directory, rollout, slice(5, 9))
    idle, epochs = 0 if config.beta else 1, config.num_epochs
    looked = every[0] if epochs > 1 else idle * still[0]  # without a gradient, before the first update
    assert cost["flops"]["forward"] == pytest.approx(looked + epochs * (every[0] - idle * still[0]))
    assert cost["flops"]["backward"] == pytest.approx(epochs * (every[1] - idle * still[1]))
    assert cost["trained_tokens"] == epochs * int(rollout.lengths_B.sum())


@pytest.mark.parametrize(
    ("options", "policy_passes", "reference_passes"),
    [
        ({"beta": 0.0}, 2, 0),  # group 2 has no variance, and is looked at without a gradient
        ({"beta": 0.1}, 1, 1),
        ({"beta": 0.1, "num_epochs": 2}, 3, 1),
        ({"beta": 0.0, "num_minibatches": 2}, 3, 0),
        ({"beta": 0.1, "micro_batch_size": 6}, 2, 1),  # packed, 12 rows have no more tokens than 6 padded ones
    ],
)
def test_no_pass_more_than_needed(
    directory: Path,
    tmp_path: Path,
    rollout: Rollout,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    policy_passes: int,
    reference_passes: int,
) -> None:
    counted: dict[str, Passes] = {}
    original = grpo.FlopCounter.of

    def hook(module: Any) -> Any:
        counted["policy"] = Passes(module)
        return original(module)

    monkeypatch.setattr(grpo.FlopCounter, "of", staticmethod(hook))
    original_reference = make_reference

    def reference(policy: Policy) -> Any:
        made = original_reference(policy)
        counted["reference"] = Passes(made._module)  # type: ignore[attr-defined]
        return made

    monkeypatch.setitem(globals(), "make_reference", reference)
    train(directory, tmp_path / "run", rollout, TABLE, config_of(directory, **options), monkeypatch)
    assert counted["policy"].count == policy_passes
    assert (counted["reference"].count if "reference" in counted else 0) == reference_passes

"""End to end with a tiny random model: sample, judge, compare, and leave the world as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.toy import toy_policy_directory, two_aspects, write_prompts

from equipoise.config import AspectConfig, InLoopEvaluationConfig, ModelConfig, SamplingConfig
from equipoise.data import PromptRecord, load_prompts
from equipoise.errors import ConfigError, DataError, RewardError
from equipoise.evaluation.comparison import Evaluated, compare, load_evaluated
from equipoise.evaluation.evaluate import (
    evaluate_policy,
    evaluation_seed,
    kl_to_reference,
    make_evaluation_callback,
    save_evaluation,
)
from equipoise.evaluation.judges import load_judge
from equipoise.models.aspects import Aspect
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.sampler import generate
from equipoise.rollout.scorers import FunctionScorer

ASPECTS = [
    Aspect.from_config("politeness", AspectConfig(higher_is_better=True, range=(0, 1))),
    Aspect.from_config("rudeness", AspectConfig(higher_is_better=False, range=(0, 1))),
]
SAMPLING = SamplingConfig(max_tokens=8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_policy_directory(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def policy(directory: Path) -> Policy:
    return load_policy(ModelConfig(model=str(directory)))


@pytest.fixture
def prompts(tmp_path: Path) -> list[PromptRecord]:
    return load_prompts(write_prompts(tmp_path / "prompts.jsonl", 7))


@pytest.fixture
def scorers() -> list[Any]:
    return [FunctionScorer(two_aspects, "toy", ASPECTS)]


def test_evaluation_and_rows(policy: Policy, prompts: list[PromptRecord], scorers: list[Any], tmp_path: Path) -> None:
    done: list[int] = []
    evaluation, rows = evaluate_policy(
        policy, prompts, scorers, samples=3, sampling=SAMPLING, seed=5, batch_prompts=3, progress=done.append
    )
    assert (evaluation["num_prompts"], evaluation["num_completions"], len(rows)) == (7, 21, 21)
    assert done == [9, 9, 3]
    assert [row["group"] for row in rows] == [g for g in range(7) for _ in range(3)]
    assert set(evaluation["refusal_rate"]) == {"benign", "borderline", "adversarial"}
    assert evaluation["kl_to_reference"] is None
    settings = evaluation["settings"]
    assert (settings["samples"], settings["max_tokens"], settings["temperature"], settings["seed"]) == (3, 8, 1.0, 5)
    means = [
        sum(row["scores"]["politeness"] for row in rows if row["group"] == group) / 3 for group in range(7)
    ]  # every score is there, so plain means will do
    assert evaluation["aspects"]["politeness"]["mean"] == pytest.approx(sum(means) / 7)
    save_evaluation(tmp_path / "out", evaluation, rows)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == evaluation
    loaded = load_evaluated(tmp_path / "out")
    assert compare(Evaluated(evaluation, rows), {"same": [loaded]})["methods"]["same"]["paired_difference"]["combined"][
        "mean"
    ] == pytest.approx(0.0)


def test_batches_do_not_change_the_result(policy: Policy, prompts: list[PromptRecord], scorers: list[Any]) -> None:
    def run(batch: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return evaluate_policy(
            policy, prompts, scorers, samples=2, sampling=SAMPLING, reference=policy, batch_prompts=batch
        )

    (one, one_rows), (all_, all_rows) = run(1), run(100)
    assert [row["response"] for row in one_rows] == [row["response"] for row in all_rows]
    assert one["aspects"] == all_["aspects"] and one["combined"] == all_["combined"]


def test_kl_to_itself_is_zero_and_to_another_is_not(
    policy: Policy, prompts: list[PromptRecord], scorers: list[Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"samples": 2, "sampling": SAMPLING}
    same, _ = evaluate_policy(policy, prompts, scorers, reference=policy, **options)
    assert same["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    other = load_policy(ModelConfig(model=str(toy_policy_directory(tmp_path / "other", seed=1))))
    evaluation, rows = evaluate_policy(policy, prompts, scorers, reference=other, **options)
    assert evaluation["kl_to_reference"] != pytest.approx(0.0, abs=1e-6)
    assert evaluation["kl_to_reference"] == pytest.approx(sum(row["kl"] for row in rows) / len(rows))


def test_kl_agrees_with_the_models_own_forward(policy: Policy, tmp_path: Path) -> None:
    """Token by token from the transformers model's logits, one row at a time, without padding."""
    other = load_policy(ModelConfig(model=str(toy_policy_directory(tmp_path / "other", seed=1))))
    rollout = generate(policy, ["how do i go", "walk"], 2, SamplingConfig(max_tokens=6, temperature=0.7), seed=3)
    kl_B = kl_to_reference(policy, other, rollout)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids_BS[i][rollout.prompt_mask_BS[i]]
        completion = rollout.completion_ids_BT[i][rollout.completion_mask_BT[i]]
        ids = torch.cat([prompt, completion])[None]
        expected = 0.0
        for sign, model in ((1, policy), (-1, other)):
            with torch.no_grad():
                logprobs = model.module.causal(input_ids=ids).logits[0].double().log_softmax(-1)
            for t, token in enumerate(completion.tolist()):
                expected += sign * float(logprobs[len(prompt) - 1 + t, token])
        assert float(kl_B[i]) == pytest.approx(expected, abs=1e-4)


def test_another_vocabulary_is_refused(
    policy: Policy, prompts: list[PromptRecord], scorers: list[Any], directory: Path
) -> None:
    other = load_policy(ModelConfig(model=str(directory)))
    other.tokenizer.add_tokens(["extra"])
    with pytest.raises(ConfigError, match="tokens against"):
        evaluate_policy(policy, prompts, scorers, samples=1, sampling=SAMPLING, reference=other)
    swapped = load_policy(ModelConfig(model=str(directory)))
    vocabulary = swapped.tokenizer.get_vocab()
    vocabulary["please"], vocabulary["thanks"] = vocabulary["thanks"], vocabulary["please"]
    swapped.tokenizer = copy.copy(swapped.tokenizer)
    swapped.tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(ConfigError, match="is id"):
        evaluate_policy(policy, prompts, scorers, samples=1, sampling=SAMPLING, reference=swapped)


def test_wrong_input_stops_before_sampling(policy: Policy, prompts: list[PromptRecord], scorers: list[Any]) -> None:
    with pytest.raises(DataError, match="no prompts"):
        evaluate_policy(policy, [], scorers, samples=1, sampling=SAMPLING)
    with pytest.raises(ConfigError, match="samples: 0"):
        evaluate_policy(policy, prompts, scorers, samples=0, sampling=SAMPLING)
    with pytest.raises(ConfigError, match="unknown aspect"):
        evaluate_policy(policy, prompts, scorers, samples=1, sampling=SAMPLING, weights={"wit": 1.0})


def test_a_scorer_that_fails_stops_the_evaluation(policy: Policy, prompts: list[PromptRecord]) -> None:
    short = FunctionScorer(lambda p, c: {"politeness": [0.0]}, "short", ASPECTS[:1])
    with pytest.raises(RewardError, match="short"):
        evaluate_policy(policy, prompts, [short], samples=2, sampling=SAMPLING)


def _callback(policy: Policy, prompts: list[PromptRecord], scorers: list[Any], seed: int = 0) -> Any:
    config = InLoopEvaluationConfig.model_validate(
        {"every": 5, "prompts": "unused.jsonl", "samples": 2, "sampling": {"max_tokens": 8}}
    )
    weights = {"politeness": 1.0, "rudeness": 0.5}
    return make_evaluation_callback(policy, prompts, scorers, weights, config, seed, batch_prompts=4)


def test_callback_names_and_values(policy: Policy, prompts: list[PromptRecord], scorers: list[Any]) -> None:
    metrics = _callback(policy, prompts, scorers)(5)
    assert set(metrics) == {
        "evaluation/politeness/mean",
        "evaluation/rudeness/mean",
        "evaluation/combined",
        "evaluation/refusal_rate/adversarial",
        "evaluation/refusal_rate/benign",
        "evaluation/refusal_rate/borderline",
        "evaluation/completion_length/mean",
        "evaluation/truncated_fraction",
    }
    expected = metrics["evaluation/politeness/mean"] + 0.5 * (1 - metrics["evaluation/rudeness/mean"])
    assert metrics["evaluation/combined"] == pytest.approx(expected)
    whole, _ = evaluate_policy(
        policy, prompts, scorers, samples=2, sampling=SAMPLING, weights={"politeness": 1.0, "rudeness": 0.5}
    )
    assert metrics["evaluation/combined"] == pytest.approx(whole["combined"]["mean"])


def test_callback_leaves_no_trace(policy: Policy, prompts: list[PromptRecord], scorers: list[Any]) -> None:
    callback = _callback(policy, prompts, scorers)
    policy.module.train()
    torch_state, parameters = torch.get_rng_state(), copy.deepcopy(policy.module.state_dict())
    first = callback(5)
    assert callback(10) == first, "the same policy at another step must give the same numbers"
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert policy.module.training
    for name, value in policy.module.state_dict().items():
        assert torch.equal(value, parameters[name])
    assert all(parameter.grad is None for parameter in policy.module.parameters())
    assert _callback(policy, prompts, scorers, seed=1)(5) != first


def test_callback_checks_at_once(policy: Policy, prompts: list[PromptRecord], scorers: list[Any]) -> None:
    with pytest.raises(DataError, match="held-out"):
        _callback(policy, [], scorers)
    with pytest.raises(ConfigError, match="no weight for aspect 'rudeness'"):
        config = InLoopEvaluationConfig.model_validate({"every": 1, "prompts": "unused.jsonl"})
        make_evaluation_callback(policy, prompts, scorers, {"politeness": 1.0}, config, 0)


def test_an_aspect_never_scored_is_left_out_of_the_metrics(policy: Policy, prompts: list[PromptRecord]) -> None:
    silent = FunctionScorer(lambda p, c: {"politeness": [None] * len(c)}, "silent", ASPECTS[:1])
    config = InLoopEvaluationConfig.model_validate(
        {"every": 1, "prompts": "unused.jsonl", "sampling": {"max_tokens": 4}}
    )
    metrics = make_evaluation_callback(policy, prompts, [silent], None, config, 0)(1)
    assert "evaluation/politeness/mean" not in metrics and "evaluation/combined" not in metrics
    assert "evaluation/truncated_fraction" in metrics


def test_the_stream_of_an_evaluation_is_its_own() -> None:
    seeds = [evaluation_seed(seed) for seed in range(100)]
    assert len(set(seeds)) == 100
    assert not set(seeds) & set(range(1000))
    assert all(0 <= seed < 2**31 for seed in seeds)


def _judged_by_rubric() -> InLoopEvaluationConfig:
    return InLoopEvaluationConfig.model_validate(
        {"every": 1, "prompts": "unused.jsonl", "sampling": SAMPLING.model_dump(), "judge": "sandbox"}
    )


def test_a_second_judge_scores_the_same_completions(policy: Policy, prompts: list[PromptRecord]) -> None:
    """Weighted as in training where it scores the same aspects: with all weight on safety, combined is safety."""
    rubric = load_judge("sandbox")
    weights = {"politeness": 0.0, "meaningfulness": 0.0, "actionability": 0.0, "safety": 1.0}
    config = _judged_by_rubric()
    metrics = make_evaluation_callback(policy, prompts, [rubric], weights, config, 0)(1)
    assert metrics["evaluation/judge/combined"] == metrics["evaluation/judge/safety/mean"]
    assert {name for name in metrics if name.startswith("evaluation/judge/")} == {
        "evaluation/judge/combined",
        *(f"evaluation/judge/{aspect}/mean" for aspect in weights),
    }
    for aspect in weights:
        assert metrics[f"evaluation/judge/{aspect}/mean"] == metrics[f"evaluation/{aspect}/mean"]


def test_a_judge_of_other_aspects_weighs_them_alike(
    policy: Policy, prompts: list[PromptRecord], scorers: list[Any]
) -> None:
    config = _judged_by_rubric()
    metrics = make_evaluation_callback(policy, prompts, scorers, None, config, 0)(1)
    judged = {name: value for name, value in metrics.items() if name.startswith("evaluation/judge/")}
    means = [value for name, value in judged.items() if name.endswith("/mean")]
    assert metrics["evaluation/judge/combined"] == pytest.approx(sum(means) / 4)

"""Sample a policy on prompts, score what it wrote, and summarise; after training, or while it goes on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.config import InLoopEvaluationConfig, SamplingConfig
from equipoise.data import PromptRecord
from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.judges import load_judge
from equipoise.evaluation.metrics import evaluate_rows, kl_per_completion
from equipoise.evaluation.rows import (
    COMBINED,
    PromptTable,
    Row,
    completion_rows,
    prompt_table,
    resolve_weights,
    write_json,
    write_rows,
)
from equipoise.models.policy import Policy
from equipoise.rollout.logprobs import score_in_chunks
from equipoise.rollout.preference_conditioning import ask, asked_shares
from equipoise.rollout.sampler import encode_prompts, generate_in_parts
from equipoise.rollout.scorers import Scorer, all_aspects, score_rollout
from equipoise.rollout.types import Rollout

logger = logging.getLogger("equipoise")

EVALUATION_FILE = "evaluation.json"
COMPLETIONS_FILE = "completions.jsonl"
JUDGED = "evaluation/judge"  # before the names of the second judge's scores
LENGTH, TRUNCATED = "evaluation/completion_length/mean", "evaluation/truncated_fraction"


@dataclass(frozen=True)
class InLoopEvaluation:
    """What training calls after some steps: step -> metrics."""

    measure: Callable[[int], dict[str, float]]
    metric_names: frozenset[str]  # all it can give; a score that no prompt has is left out when it comes to it
    last: dict[str, PromptTable] = field(default_factory=dict)  # of the last call: "scored", and "judged" by the judge

    def __call__(self, step: int) -> dict[str, float]:
        """The metrics after `step` completed steps."""
        return self.measure(step)

    def prompt_values(self, name: str, kind: str | None, *, judged: bool = False) -> list[float]:
        """The last call's mean of an aspect (native), or of "length" (tokens), for each prompt that has one.

        Of prompts of a kind, or of all; `judged`: by the judge, nothing where there is none or it has no such aspect.
        """
        table = self.last.get("judged" if judged else "scored")
        if table is None:
            return []
        values_P = table.aspects.get(name, table.length_P if name == "length" and not judged else None)
        if values_P is None:
            return []
        kept_P = values_P if kind is None else values_P[table.of_kind(kind)]
        return kept_P[~kept_P.isnan()].tolist()


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[PromptRecord],
    scorers: Sequence[Scorer],
    *,
    samples: int,
    sampling: SamplingConfig,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    reference: Any = None,
    judge_name: str | None = None,
    batch_prompts: int = 16,
    max_prompt_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    asked: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """(evaluation.json, one row per completion) of a policy on prompts.

    Args:
        samples: completions per prompt.
        weights: by aspect, every aspect named; None: 1/K each.
        seed: of sampling and bootstrap; the same seed draws the same completions, whatever `batch_prompts`.
        reference: another Policy over the same vocabulary, or a `policy.reference`; gives `kl_to_reference`.
        batch_prompts: prompts sampled, scored and compared at once; changes memory, not the result.
        progress: called with the number of completions done since the last call.
        asked: weights that a conditioned policy is asked for (`ask`); None: prompts as they are.

    Raises DataError for no prompts, ConfigError for wrong weights, samples below 1, a reference with another
    vocabulary or `asked` of a policy that reads no weights, RewardError where a scorer fails.
    """
    if not prompts:
        raise DataError("evaluation: no prompts; give a file with at least one")
    if samples < 1:
        raise ConfigError(f"samples: {samples}; use at least 1")
    if batch_prompts < 1:
        raise ConfigError(f"batch_prompts: {batch_prompts}; use at least 1")
    aspects = all_aspects(scorers)
    resolved = resolve_weights(weights, aspects)
    check_same_vocabulary(policy, reference)
    shares = {} if asked is None else {"asked": asked_shares(policy, asked)}
    if asked is not None:
        prompts = ask(policy, prompts, asked)
    elif policy.preference is not None:
        logger.warning("%s reads weights in its prompt, and is asked for none: see `asked`, or --ask", policy.name)
    rows: list[Row] = []
    truncated = 0
    for rollout in generate_in_parts(
        policy,
        prompts,
        samples,
        sampling,
        prompts_at_once=batch_prompts,
        seed=evaluation_seed(seed),
        max_prompt_tokens=max_prompt_tokens,
    ):
        truncated += rollout.prompts_truncated
        kl_B = None if reference is None else kl_to_reference(policy, reference, rollout)
        rows += completion_rows(rollout, score_rollout(rollout, scorers), aspects, resolved, kl_B=kl_B)
        if progress is not None:
            progress(len(rollout))
    settings = {"samples": samples, **sampling.model_dump(), "prompts_truncated": truncated, **shares}
    evaluation = evaluate_rows(
        rows,
        aspects,
        resolved,
        policy_name=policy.name,
        judge_name=judge_name or ", ".join(scorer.name for scorer in scorers),
        seed=seed,
        settings=settings,
    )
    return evaluation, rows


def kl_to_reference(policy: Any, reference: Any, rollout: Rollout, *, micro_batch_size: int = 32) -> Tensor:
    """Summed k1 per completion [B] on the token ids as sampled, both models at temperature 1, no gradients."""
    logprobs_BT = score_in_chunks(policy, rollout, micro_batch_size, temperature=1.0).logprobs_BT
    ref_logprobs_BT = score_in_chunks(reference, rollout, micro_batch_size, temperature=1.0).logprobs_BT
    return kl_per_completion(logprobs_BT, ref_logprobs_BT, rollout.completion_mask_BT)


def check_same_vocabulary(policy: Policy, reference: Any) -> None:
    """Raise ConfigError where a reference policy reads the policy's token ids as other tokens."""
    if not isinstance(reference, Policy) or reference is policy:
        return
    ours, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        difference = f"{len(ours)} tokens against {len(theirs)}"
    else:
        token = next(token for token in ours if ours[token] != theirs.get(token))
        difference = f"token {token!r} is id {ours[token]} against {theirs.get(token)}"
    raise ConfigError(
        f"reference {reference.name}: its vocabulary differs from that of {policy.name} ({difference}), so their "
        "log-probabilities cannot be compared; give the model that training started from, or leave --reference out"
    )


def evaluation_seed(seed: int) -> int:
    """A stream of its own: the draws of an evaluation are not those of training with the same seed."""
    return int.from_bytes(hashlib.sha256(f"evaluation {seed}".encode()).digest()[:4], "big") >> 1


def save_evaluation(directory: Path, evaluation: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write evaluation.json and completions.jsonl, the rows first, so that the summary never lacks its rows."""
    write_rows(directory / COMPLETIONS_FILE, rows)
    write_json(directory / EVALUATION_FILE, evaluation)
    return directory / EVALUATION_FILE


def make_evaluation_callback(
    policy: Policy,
    records: Sequence[PromptRecord],
    scorers: Sequence[Scorer],
    weights: Mapping[str, float] | None,
    config: InLoopEvaluationConfig,
    seed: int,
    *,
    batch_prompts: int = 16,
    max_prompt_tokens: int | None = None,
) -> InLoopEvaluation:
    """What training calls every N steps on held-out prompts: step -> metrics.

    Every call draws with the same random numbers, so that two steps differ by the policy and not by luck, and none
    touches the global random state. Names: `evaluation/<aspect>/mean` (native), `evaluation/combined`,
    `evaluation/refusal_rate/<kind>`, `evaluation/completion_length/mean`, `evaluation/truncated_fraction`. Means are
    over prompts, of each prompt's completions; an aspect that was never scored is left out. `config.judge` scores
    the same completions a second time, as `evaluation/judge/<aspect>/mean` and `evaluation/judge/combined`: weighted as
    in training where both score the same aspects, else 1/K each.

    Raises at once, before training starts: DataError for no prompts or one that cannot be encoded, ConfigError for
    wrong weights or where max_tokens leaves no room for a prompt.
    """
    sampling = config.sampling or SamplingConfig()
    if not records:
        raise DataError("evaluation.prompts: no held-out prompts; give a file with at least one")
    aspects = all_aspects(scorers)
    resolved = resolve_weights(weights, aspects)
    judge = load_judge(config.judge) if config.judge is not None else None
    judged = _weights_of_judge(judge, resolved) if judge is not None else {}
    encode_prompts(policy, records, sampling, max_prompt_tokens)

    last: dict[str, PromptTable] = {}

    def evaluate(step: int) -> dict[str, float]:
        rows: list[Row] = []
        rows_by_judge: list[Row] = []
        with torch.no_grad():
            for rollout in generate_in_parts(
                policy,
                records,
                config.samples,
                sampling,
                prompts_at_once=batch_prompts,
                seed=evaluation_seed(seed),
                max_prompt_tokens=max_prompt_tokens,
            ):
                rows += completion_rows(rollout, score_rollout(rollout, scorers), aspects, resolved)
                if judge is not None:
                    scores_BK = score_rollout(rollout, [judge])
                    rows_by_judge += completion_rows(rollout, scores_BK, judge.aspects, judged)
        last["scored"] = prompt_table(rows, [aspect.name for aspect in aspects])
        metrics = in_loop_metrics(rows, [aspect.name for aspect in aspects])
        if judge is None:
            return metrics
        last["judged"] = prompt_table(rows_by_judge, [aspect.name for aspect in judge.aspects])
        return metrics | _score_means(rows_by_judge, [aspect.name for aspect in judge.aspects], JUDGED)

    names = _names_of_scores([aspect.name for aspect in aspects], "evaluation")
    names += _names_of_scores([aspect.name for aspect in judge.aspects], JUDGED) if judge is not None else []
    names += [_refusal_rate(kind) for kind in sorted({record.kind for record in records})] + [LENGTH, TRUNCATED]
    return InLoopEvaluation(evaluate, frozenset(names), last)


def _names_of_scores(aspect_names: Sequence[str], prefix: str) -> list[str]:
    return [f"{prefix}/{name}/mean" for name in aspect_names] + [f"{prefix}/{COMBINED}"]


def _refusal_rate(kind: str) -> str:
    return f"evaluation/refusal_rate/{kind}"


def _weights_of_judge(judge: Scorer, weights: Mapping[str, float]) -> dict[str, float]:
    """The training's weights where the judge scores the same aspects, so that the two curves can be compared."""
    same = {aspect.name for aspect in judge.aspects} == set(weights)
    return resolve_weights(weights if same else None, judge.aspects)


def _score_means(rows: Sequence[Row], aspect_names: Sequence[str], prefix: str) -> dict[str, float]:
    table = prompt_table(rows, aspect_names)
    values = {f"{prefix}/{name}/mean": values_P for name, values_P in table.aspects.items()}
    values[f"{prefix}/{COMBINED}"] = table.combined_P
    return {name: float(values_P.nanmean()) for name, values_P in values.items() if not bool(values_P.isnan().all())}


def in_loop_metrics(rows: Sequence[Row], aspect_names: Sequence[str]) -> dict[str, float]:
    """The numbers a training step logs, without intervals."""
    table = prompt_table(rows, aspect_names)
    values: dict[str, Tensor] = {}
    values |= {_refusal_rate(kind): table.refusal_P[table.of_kind(kind)] for kind in sorted(set(table.kinds))}
    values[LENGTH], values[TRUNCATED] = table.length_P, table.truncated_P
    means = {name: float(values_P.nanmean()) for name, values_P in values.items() if not bool(values_P.isnan().all())}
    return _score_means(rows, aspect_names, "evaluation") | means

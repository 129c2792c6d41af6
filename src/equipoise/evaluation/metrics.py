"""evaluation.json: means with intervals, per aspect and prompt kind, of completions that were scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ConfigError
from equipoise.evaluation.rows import COMBINED, PromptTable, Row, completion_rows, prompt_table, resolve_weights
from equipoise.functional.statistics import bootstrap_interval
from equipoise.models.aspects import Aspect
from equipoise.rollout.types import Rollout

NUM_RESAMPLES = 10_000


def kl_per_completion(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Summed k1 = logp - logp_ref over each completion's tokens, [B], float64, in nats.

    Both log-probabilities are taken at temperature 1. Its mean over completions is an unbiased estimate of
    KL(policy || reference) on whole completions where they were sampled at temperature 1 without top-k or top-p;
    otherwise it is the mean log ratio on the texts that were sampled. A single completion may be negative.

    Arithmetic: logp (-1, -2), reference (-1.5, -2.25), both tokens kept: 0.5 + 0.25 = 0.75.
    """
    if not logprobs_BT.shape == ref_logprobs_BT.shape == mask_BT.shape:
        raise ConfigError(
            f"kl_per_completion: shapes {tuple(logprobs_BT.shape)}, {tuple(ref_logprobs_BT.shape)} and "
            f"{tuple(mask_BT.shape)} differ; score both models on the same tokens"
        )
    difference = logprobs_BT.double() - ref_logprobs_BT.double()
    return torch.where(mask_BT.bool(), difference, 0.0).sum(dim=1)


def interval(values_N: Tensor, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """{"mean", "ci95", "n"} over the prompts that have a value; None throughout where there are none."""
    scored = values_N[~values_N.isnan()]
    if len(scored) == 0:
        return {"mean": None, "ci95": [None, None], "n": 0}
    mean, low, high = bootstrap_interval(scored, seed=seed, num_resamples=num_resamples)
    return {"mean": float(mean), "ci95": [float(low), float(high)], "n": len(scored)}


def _by_kind(values_P: Tensor, table: PromptTable, seed: int) -> dict[str, Any]:
    kinds = sorted(set(table.kinds))
    return {
        **interval(values_P, seed=seed),
        "by_kind": {kind: interval(values_P[table.of_kind(kind)], seed=seed) for kind in kinds},
    }


def _mean_or_none(values_P: Tensor) -> float | None:
    mean = float(values_P.nanmean())
    return None if mean != mean else mean


def summarise(
    table: PromptTable,
    *,
    policy_name: str,
    judge_name: str,
    num_completions: int,
    weights: Mapping[str, float],
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The mapping written as evaluation.json.

    Intervals are percentile bootstraps over prompts, the unit that was sampled: a prompt's completions are averaged
    first, so that more completions per prompt do not pose as more evidence. `n` counts prompts with a value,
    `num_unscored` the prompts left out of `combined` because none of their completions had every weighted aspect.
    Aspects are in native units; `combined` is sum_k w_k u_k of utilities.
    """
    kinds = sorted(set(table.kinds))
    has_kl = not bool(table.kl_P.isnan().all())
    refusal = {kind: interval(table.refusal_P[table.of_kind(kind)], seed=seed) for kind in kinds}
    return {
        "policy": policy_name,
        "judge": judge_name,
        "num_prompts": len(table),
        "num_completions": num_completions,
        "aspects": {name: _by_kind(values_P, table, seed) for name, values_P in table.aspects.items()},
        COMBINED: _by_kind(table.combined_P, table, seed),
        "kl_to_reference": _mean_or_none(table.kl_P),
        "refusal_rate": {kind: values["mean"] for kind, values in refusal.items()},
        "refusal_ci95": {kind: values["ci95"] for kind, values in refusal.items()},
        "kl_ci95": interval(table.kl_P, seed=seed)["ci95"] if has_kl else None,
        "num_unscored": int(table.combined_P.isnan().sum()),
        "completion_length": _mean_or_none(table.length_P),
        "truncated_fraction": _mean_or_none(table.truncated_P),
        "weights": dict(weights),
        "settings": {**(settings or {}), "seed": seed, "num_resamples": NUM_RESAMPLES},
    }


def evaluate_rows(
    rows: Sequence[Row],
    aspects: Sequence[Aspect],
    weights: Mapping[str, float] | None,
    *,
    policy_name: str,
    judge_name: str,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """evaluation.json of scored completions, as `completion_rows` gives them."""
    resolved = resolve_weights(weights, aspects)
    table = prompt_table(rows, [aspect.name for aspect in aspects])
    return summarise(
        table,
        policy_name=policy_name,
        judge_name=judge_name,
        num_completions=len(rows),
        weights=resolved,
        seed=seed,
        settings=settings,
    )


def evaluate_rollout(
    rollout: Rollout,
    scores_BK: Tensor,
    aspects: Sequence[Aspect],
    weights: Mapping[str, float] | None,
    *,
    policy_name: str,
    judge_name: str,
    kl_B: Tensor | None = None,
    seed: int,
) -> dict[str, Any]:
    """evaluation.json of one rollout.

    Args:
        rollout: B completions of P prompts.
        scores_BK: native scores, NaN = not scored.
        weights: by aspect, every aspect named; None: 1/K each.
        kl_B: `kl_per_completion`, or None.
        seed: of the bootstrap.
    """
    rows = completion_rows(rollout, scores_BK, aspects, resolve_weights(weights, aspects), kl_B=kl_B)
    return evaluate_rows(rows, aspects, weights, policy_name=policy_name, judge_name=judge_name, seed=seed)

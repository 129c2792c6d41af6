"""Losses: the clipped policy gradient, the critic's, preference pairs' and reward regression's.

Each returns `(loss, metrics)`. The loss is a 0-d tensor in float32 (float64 for float64 inputs) that is connected to
the graph whatever the mask. Metrics are detached 0-d tensors: means over the terms that count, and `count`, their
number; `merge_metrics` puts the metrics of micro-batches together. With `normalizer` given as the count of the whole
batch, the losses and gradients of its parts add up to those of the whole.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from equipoise.functional.masking import (
    at_least_float32,
    divide_by_count,
    masked_fill_zero,
    masked_mean,
    masked_sum,
    sequence_lengths,
)

Metrics = dict[str, Tensor]
Normalizer = Tensor | float | None


def clipped_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ratio: Literal["token", "sequence"] = "token",
    reduction: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean",
    constant: float | None = None,
    normalizer: Normalizer = None,
    kl_BT: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of PPO and GRPO: -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), reduced.

    Args:
        logprobs_BT: log-probabilities of the sampled tokens under the policy that learns.
        old_logprobs_BT: the same under the policy that sampled; no gradient flows into them.
        advantages_B: one advantage for each completion, or [B, T], one for each token (PPO).
        mask_BT: True where a token is trained on. What lies at other positions, NaN included, changes nothing.
        epsilon, epsilon_high: clip range below and above 1; `epsilon_high` defaults to `epsilon`.
        ratio: `token`: rho_t = exp(logp_t - logp_old_t). `sequence`: rho = exp(mean_t(logp_t - logp_old_t)), clipped
            once for the completion, its surrogate standing at every token of it (GSPO, arXiv 2507.18071).
        reduction: `sequence_mean`: the mean over a completion's tokens, summed over completions, divided by
            `normalizer`: completions; by default those with any unmasked token. `token_mean`: the sum over tokens
            divided by `normalizer`: tokens; by default the unmasked ones. `constant`: the sum over tokens divided by
            `normalizer * constant`; by default `normalizer` is B (Dr. GRPO, arXiv 2503.20783).
        kl_BT, beta: `beta * kl_BT` (see `kl_loss_term`) is added to each token's term, inside the same reduction.

    Metrics, means over unmasked tokens: `ratio`; `clip_fraction` = `clip_fraction_low` + `clip_fraction_high`, the
    share of tokens whose gradient is cut off below and above; `approx_kl`, the k3 estimate of KL(old || policy);
    `kl_term`, where `kl_BT` is given.

    An empty mask gives loss 0 with gradient 0. Raises ValueError for an unknown option, a negative epsilon, per-token
    advantages with `ratio="sequence"`, or `constant` given or missing against `reduction`.

    Example: logp - logp_old = [ln 1.5, ln 0.9], A = 2, epsilon 0.2: rho = [1.5, 0.9], terms min(3, 2.4) = 2.4 and
    min(1.8, 1.8) = 1.8; loss = -(2.4 + 1.8) / 2 = -2.1, clip_fraction = 0.5.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    _check_policy_options(advantages_B, epsilon, epsilon_high, ratio, reduction, constant)
    mask_BT = mask_BT.bool()
    if advantages_B.ndim == 1:
        advantages_B = advantages_B[:, None]
    log_ratio_BT = masked_fill_zero(at_least_float32(logprobs_BT) - old_logprobs_BT.detach(), mask_BT)
    advantages_BT = masked_fill_zero(advantages_B.detach().to(log_ratio_BT.dtype).expand(mask_BT.shape), mask_BT)
    if ratio == "sequence":
        log_ratio_BT = masked_mean(log_ratio_BT, mask_BT, dim=1)[:, None].expand(mask_BT.shape)

    # min(rho A, clip(rho) A) is min(rho, 1 + epsilon_high) A where A >= 0, and max(rho, 1 - epsilon) A where A < 0.
    # Bounding the logarithm says the same, and a ratio that overflows behind the clip cannot turn the gradient to NaN.
    upper, lower = math.log1p(epsilon_high), math.log1p(-epsilon) if epsilon < 1 else -math.inf
    bounded_BT = torch.where(advantages_BT >= 0, log_ratio_BT.clamp(max=upper), log_ratio_BT.clamp(min=lower))
    terms_BT = -bounded_BT.exp() * advantages_BT
    if kl_BT is not None:
        terms_BT = terms_BT + beta * masked_fill_zero(kl_BT, mask_BT)
    loss = _reduce(terms_BT, mask_BT, reduction, constant, normalizer)

    with torch.no_grad():
        low_BT, high_BT = (log_ratio_BT < lower) & (advantages_BT < 0), (log_ratio_BT > upper) & (advantages_BT > 0)
        per_token = {
            "ratio": log_ratio_BT.exp(),
            "clip_fraction": (low_BT | high_BT).to(loss.dtype),
            "clip_fraction_low": low_BT.to(loss.dtype),
            "clip_fraction_high": high_BT.to(loss.dtype),
            "approx_kl": log_ratio_BT.expm1() - log_ratio_BT,
        }
        if kl_BT is not None:
            per_token["kl_term"] = kl_BT
        return loss, _means(per_token, mask_BT)


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    epsilon: float,
    normalizer: Normalizer = None,
) -> tuple[Tensor, Metrics]:
    """The critic's loss: half the larger of (V - R)^2 and (clip(V, V_old - epsilon, V_old + epsilon) - R)^2.

    Summed over unmasked tokens and divided by `normalizer` (tokens; by default the unmasked ones). `epsilon` is in
    units of the return; infinity turns the clip off. Metrics: `squared_error` of the values, `clip_fraction`, the
    share of tokens where the clip makes the larger square, `value` and `return`, the means. An empty mask gives loss 0
    with gradient 0. Raises ValueError for a negative epsilon.

    Example: V = 1, V_old = 0, R = 2, epsilon 0.5: (1 - 2)^2 = 1, (0.5 - 2)^2 = 2.25, loss 1.125.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    mask_BT = mask_BT.bool()
    values_BT = masked_fill_zero(at_least_float32(values_BT), mask_BT)
    old_values_BT = masked_fill_zero(old_values_BT.detach(), mask_BT)
    returns_BT = masked_fill_zero(returns_BT.detach(), mask_BT)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-epsilon, epsilon)
    error_BT, clipped_error_BT = (values_BT - returns_BT).square(), (clipped_BT - returns_BT).square()
    terms_BT = torch.maximum(error_BT, clipped_error_BT) / 2
    loss = divide_by_count(masked_sum(terms_BT, mask_BT), mask_BT.sum() if normalizer is None else normalizer)
    per_token = {
        "squared_error": error_BT,
        "clip_fraction": (clipped_error_BT > error_BT).to(loss.dtype),
        "value": values_BT,
        "return": returns_BT,
    }
    return loss, _means(per_token, mask_BT)


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    normalizer: Normalizer = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation on the log-probabilities of chosen and rejected responses, each [B].

    With h = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected):

    - `sigmoid`: -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h). Arguments are sums
      over the response's tokens. DPO, arXiv 2305.18290, equation 7; smoothing: E. Mitchell's conservative DPO.
    - `ipo`: (h - 1 / (2 beta))^2. Arguments are means over the response's tokens. IPO, arXiv 2310.12036, equation 17.

    Summed over pairs and divided by `normalizer` (pairs; by default B). Metrics: `accuracy`, the share of pairs with
    h > 0; `margin` = beta h; `reward_chosen` and `reward_rejected`, beta times the policy's less the reference's
    log-probability. Raises ValueError unless beta > 0, for label_smoothing outside [0, 0.5), for smoothing with `ipo`
    and for an unknown kind.

    Example: h = ln 3, beta 1: sigmoid gives -ln(3 / 4) = 0.28768; ipo gives (1.09861 - 0.5)^2 = 0.35834.
    """
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind == "ipo"):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 for ipo; got {label_smoothing} for {kind!r}")
    chosen_B = at_least_float32(policy_chosen_B) - ref_chosen_B.detach()
    rejected_B = at_least_float32(policy_rejected_B) - ref_rejected_B.detach()
    margin_B = chosen_B - rejected_B
    if kind == "sigmoid":
        right_B, wrong_B = functional.logsigmoid(beta * margin_B), functional.logsigmoid(-beta * margin_B)
        terms_B = -(1 - label_smoothing) * right_B - label_smoothing * wrong_B
    elif kind == "ipo":
        terms_B = (margin_B - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"unknown kind of DPO loss {kind!r}: choose sigmoid or ipo")
    loss = divide_by_count(terms_B.sum(), len(terms_B) if normalizer is None else normalizer)
    per_pair = {
        "accuracy": (margin_B > 0).to(loss.dtype),
        "margin": beta * margin_B,
        "reward_chosen": beta * chosen_B,
        "reward_rejected": beta * rejected_B,
    }
    return loss, _means(per_pair, torch.ones_like(terms_B, dtype=torch.bool))


def masked_regression_loss(
    predictions_BK: Tensor,
    targets_BK: Tensor,
    *,
    kind: Literal["mse", "huber"] = "mse",
    normalizer: Normalizer = None,
    weights_K: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Regression on K aspects with gaps: a NaN target is missing; it adds nothing, its prediction gets gradient 0.

    `mse`: e^2. `huber`: e^2 / 2 up to |e| = 1, |e| - 1/2 beyond. Summed over the observed targets, each aspect times
    its weight where `weights_K` is given, and divided by `normalizer` (by default the number of observed targets).
    Metrics over the observed targets, unweighted: `mse`, `mae`. With no observed target the loss is 0 with gradient
    0. Raises ValueError for an unknown kind or shapes that differ.

    Example: predictions [[1, 2], [3, 4]], targets [[0, nan], [3, 6]]: mse (1 + 0 + 4) / 3 = 1.66667;
    huber (0.5 + 0 + 1.5) / 3 = 0.66667.
    """
    if predictions_BK.shape != targets_BK.shape:
        raise ValueError(
            "predictions and targets need the same shape; "
            f"got {tuple(predictions_BK.shape)} and {tuple(targets_BK.shape)}"
        )
    observed_BK = ~targets_BK.isnan()
    errors_BK = masked_fill_zero(at_least_float32(predictions_BK) - targets_BK, observed_BK)
    if kind == "mse":
        terms_BK = errors_BK.square()
    elif kind == "huber":
        terms_BK = functional.huber_loss(errors_BK, torch.zeros_like(errors_BK), reduction="none")
    else:
        raise ValueError(f"unknown kind of regression loss {kind!r}: choose mse or huber")
    if weights_K is not None:
        terms_BK = terms_BK * weights_K
    loss = divide_by_count(terms_BK.sum(), observed_BK.sum() if normalizer is None else normalizer)
    return loss, _means({"mse": errors_BK.square(), "mae": errors_BK.abs()}, observed_BK)


def merge_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Put together the metrics of micro-batches (or ranks): means weighted by `count`, and the sum of the counts.

    All parts have the same keys. Raises ValueError for no parts.

    Example: {ratio: 1, count: 1} and {ratio: 4, count: 2} make {ratio: (1 + 8) / 3 = 3, count: 3}.
    """
    if not parts:
        raise ValueError("merge_metrics needs the metrics of at least one micro-batch")
    counts_N = torch.stack([part["count"] for part in parts])
    merged = {
        name: divide_by_count((torch.stack([part[name] for part in parts]) * counts_N).sum(), counts_N.sum())
        for name in parts[0]
    }
    return merged | {"count": counts_N.sum()}


def _means(values: dict[str, Tensor], mask: Tensor) -> Metrics:
    count = mask.sum()
    means = {name: masked_mean(value.detach(), mask) for name, value in values.items()}
    return means | {"count": count.to(next(iter(means.values())).dtype)}


def _reduce(
    terms_BT: Tensor, mask_BT: Tensor, reduction: str, constant: float | None, normalizer: Normalizer
) -> Tensor:
    if reduction == "sequence_mean":
        total = masked_mean(terms_BT, mask_BT, dim=1).sum()
        # A row without a token to train on (a truncated completion) leaves the denominator too.
        return divide_by_count(total, (sequence_lengths(mask_BT) > 0).sum() if normalizer is None else normalizer)
    total = masked_sum(terms_BT, mask_BT)
    if reduction == "token_mean":
        return divide_by_count(total, mask_BT.sum() if normalizer is None else normalizer)
    assert constant is not None  # _check_policy_options
    return divide_by_count(total / constant, len(mask_BT) if normalizer is None else normalizer)


def _check_policy_options(
    advantages_B: Tensor, epsilon: float, epsilon_high: float, ratio: str, reduction: str, constant: float | None
) -> None:
    if ratio not in ("token", "sequence"):
        raise ValueError(f"unknown ratio {ratio!r}: choose token or sequence")
    if reduction not in ("sequence_mean", "token_mean", "constant"):
        raise ValueError(f"unknown reduction {reduction!r}: choose sequence_mean, token_mean or constant")
    if not (epsilon >= 0 and epsilon_high >= 0):
        raise ValueError(f"epsilon and epsilon_high must be at least 0, got {epsilon} and {epsilon_high}")
    if ratio == "sequence" and advantages_B.ndim != 1:
        raise ValueError("ratio='sequence' needs one advantage for each completion, not one for each token")
    if (reduction == "constant") != (constant is not None):
        raise ValueError(
            f"constant goes with reduction='constant' and is needed there, got {constant} for {reduction!r}"
        )
    if constant is not None and not constant > 0:
        raise ValueError(f"constant must be greater than 0, got {constant}")

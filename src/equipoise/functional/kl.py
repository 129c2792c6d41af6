"""Estimates of the KL divergence from samples, and the KL terms of the GRPO loss.

Throughout, d = logp_ref - logp of the sampled token. Source: J. Schulman, "Approximating KL Divergence" (2020).
"""

from typing import Literal

import torch
from torch import Tensor

from equipoise.functional.masking import masked_fill_zero

KLEstimator = Literal["k1", "k2", "k3"]
KLLoss = Literal["k3_weighted", "k3", "k2"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Per-token estimate, in nats, of KL(policy || reference) from tokens sampled by the policy. Any shape.

    k1 = -d, unbiased, may be negative; k2 = d^2 / 2, biased; k3 = exp(d) - 1 - d >= 0, unbiased.
    As *losses* they differ from this reading: see `kl_loss_term`. Raises ValueError for another kind.

    Example: logp = ln 0.5, logp_ref = ln 0.25, d = -ln 2: k1 = 0.69315; k2 = 0.24023; k3 = 0.5 - 1 + 0.69315 = 0.19315.
    """
    difference = ref_logprobs - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return difference.expm1() - difference
    raise ValueError(f"unknown KL estimator {kind!r}: choose k1, k2 or k3")


def kl_loss_term(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: KLLoss = "k3_weighted",
    mask: Tensor | None = None,
) -> Tensor:
    """Per-token KL term to add, times beta, to a policy loss. Any shape; nats.

    With rho = exp(logp - logp_old), tokens sampled by the old policy:

    - `k3_weighted` = rho * k3. Its gradient is rho * (logp - logp_ref) * grad logp, in expectation that of
      KL(policy || reference), off-policy too.
    - `k3` (the paper and older tools). On-policy its expected gradient is that of KL(reference || policy).
    - `k2`. On-policy its expected gradient is that of KL(policy || reference); off-policy it is biased.

    k1 is not offered: on-policy its expected gradient is 0. Positions where `mask` is False give 0 with gradient 0.
    Raises ValueError for another kind.

    Example: logp = ln 0.5, logp_old = ln 0.25, logp_ref = ln 0.25: rho = 2, k3 = 0.19315, rho * k3 = 0.38629.
    """
    if mask is not None:
        logprobs, old_logprobs, ref_logprobs = (
            masked_fill_zero(values, mask) for values in (logprobs, old_logprobs, ref_logprobs)
        )
    if kind in ("k3", "k2"):
        return kl_estimate(logprobs, ref_logprobs, kind)
    if kind != "k3_weighted":
        raise ValueError(f"unknown KL loss {kind!r}: choose k3_weighted, k3 or k2")
    difference = ref_logprobs - logprobs
    ratio = (logprobs - old_logprobs).exp()
    # A policy that has all but given up a token has rho -> 0 and exp(d) -> inf, whose product is finite: there
    # rho * exp(d) is taken as exp(logp_ref - logp_old). For small d that form would lose k3 ~ d^2/2 to rounding.
    near = difference < 1
    small = torch.where(near, difference, torch.zeros_like(difference))
    exact_near = ratio * (small.expm1() - small)
    safe_far = (ref_logprobs - old_logprobs).exp() - ratio * (1 + difference)
    return torch.where(near, exact_near, safe_far)

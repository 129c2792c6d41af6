"""Log-probabilities of chosen tokens, without ever holding N x V numbers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equipoise.functional.masking import at_least_float32
from equipoise.functional.projection import LinearHead, LinearLogprobs


def selected_logprobs(logits_NV: Tensor, targets_N: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability (natural logarithm, <= 0) of each target under softmax(logits / temperature).

    Any leading shape: logits [..., V], targets [...] int64. The softmax runs in float32, or in float64 for float64
    logits. Raises ValueError unless temperature > 0.

    Example: logits [0, ln 3], target 1: ln(3 / (1 + 3)) = -0.28768.
    """
    _check_temperature(temperature)
    scaled_NV = at_least_float32(logits_NV) / temperature
    chosen_N = scaled_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    return chosen_N - scaled_NV.logsumexp(-1)


@torch.no_grad()
def entropy(logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats (0 to ln V) of softmax(logits / temperature), detached; logits of -inf add nothing.

    Example: logits [0, 0]: ln 2 = 0.69315.
    """
    _check_temperature(temperature)
    return torch.special.entr(torch.softmax(at_least_float32(logits_NV) / temperature, dim=-1)).sum(-1)


def chunked_logprobs(
    hidden_NH: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
    with_entropy: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project hidden states to the vocabulary chunk by chunk and keep only the targets' log-probabilities.

    Args:
        hidden_NH: hidden states that predict the targets, H wide.
        head: the vocabulary projection, [n, H] -> logits [n, V].
        targets_N: int64 token ids.
        temperature: divides the logits, after `transform`.
        chunk_size: rows projected at once; at most `chunk_size` x V logits exist at any time, in the backward pass
            as well, because a chunk's logits are recomputed there instead of being kept.
        with_entropy: also return the entropy of each position's distribution (no gradient).
        transform: applied to the logits, e.g. a soft cap that belongs to the model.

    Returns:
        (logprobs_N, entropy_N or None) in float32, or float64 for float64 logits.

    Raises ValueError for a temperature or chunk size that is not positive.
    """
    _check_chunk_size(chunk_size)

    def project(hidden_CH: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_CV = head(hidden_CH)
        if transform is not None:
            logits_CV = transform(logits_CV)
        # The entropy comes last: the recomputation stops once it has what the backward pass needs.
        chosen_C = selected_logprobs(logits_CV, targets_C, temperature=temperature)
        return chosen_C, entropy(logits_CV, temperature=temperature) if with_entropy else None

    logprobs, entropies = [], []
    for start in range(0, max(len(targets_N), 1), chunk_size):
        chunk = hidden_NH[start : start + chunk_size], targets_N[start : start + chunk_size]
        if torch.is_grad_enabled():
            chosen_C, entropy_C = checkpoint(project, *chunk, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            chosen_C, entropy_C = project(*chunk)
        logprobs.append(chosen_C)
        entropies.append(entropy_C)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class ProjectedScores(NamedTuple):
    """What is kept of N projected positions, float32 or float64; only `logprobs_N` carries a gradient."""

    logprobs_N: Tensor
    entropy_N: Tensor | None
    unit_logprobs_N: Tensor | None


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 512,
    scale: float = 1.0,
    cap: float | None = None,
    product_dtype: torch.dtype | None = None,
    with_entropy: bool = False,
    with_unit_logprobs: bool = False,
) -> ProjectedScores:
    """As `chunked_logprobs` for a head that is one matrix product, with a hand-written backward pass.

    With `z = scale * (W h + b)`, capped to `cap * tanh(z / cap)`, and `p = softmax(z / temperature)`:
    `d logp_t / d z_v = ([v = t] - p_v) / temperature`. That needs one number per position from the forward pass, the
    logarithm of the sum of exponentials; a chunk's logits are computed again. Where neither weight nor bias is trained
    they are not even that: the gradient of a position is known up to a factor, so the forward pass leaves its N x H
    numbers behind. One chunk of products exists at any time; what the softmax makes of it is written in place, on a CPU
    a few rows at a time, which stay in its cache meanwhile.

    Args:
        hidden_NH, weight_VH, bias_V, targets_N: the head's input, its parameters, and int64 token ids.
        temperature, chunk_size, with_entropy: as in `chunked_logprobs`.
        scale, cap: what the model does to its logits.
        product_dtype: of the matrix products, e.g. bfloat16 under autocast; None is the weight's own. Softmax and
            the sums of the weight's gradient are float32, or float64 for float64 products.
        with_unit_logprobs: also return the log-probabilities at temperature 1, from the same logits.

    Raises ValueError for a temperature or chunk size that is not positive.

    Example: h = [1], W = [[0], [ln 3]], target 1: logits (0, ln 3), log-probability ln(3 / 4); its derivative by h is
    (1 - 3/4) ln 3 - 1/4 * 0 = 0.27465.
    """
    _check_chunk_size(chunk_size)
    _check_temperature(temperature)
    head = LinearHead(temperature, chunk_size, scale, cap, product_dtype or weight_VH.dtype)
    return ProjectedScores(
        *LinearLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, head, with_entropy, with_unit_logprobs)  # type: ignore[misc]
    )


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")

"""Log-probabilities of chosen tokens, without ever holding N x V numbers."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equipoise.functional.masking import at_least_float32


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
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

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


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")

"""Intervals, correlations and corrections for results. Float64 inside; Python floats out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Numbers drawn at once while resampling: 32 MiB of indices.
CHUNK_NUMBERS = 2**22


def bootstrap_interval(
    values_N: Tensor | Sequence[float], *, seed: int, level: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """(mean, lower, upper): the mean with its percentile bootstrap interval, in the units of the values.

    Give one value for each unit that was sampled (a prompt, not a completion). The same seed gives the same interval.
    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. Raises ValueError for
    no values, a value that is NaN or infinite, a level outside (0, 1) or num_resamples < 1.

    Example: values [2, 2, 2]: (2, 2, 2).
    """
    values_N = _finite("values", values_N)
    return bootstrap_statistic(
        values_N[:, None],
        lambda resamples_RN1: resamples_RN1.mean((1, 2)),
        seed=seed,
        level=level,
        num_resamples=num_resamples,
    )


def bootstrap_statistic(
    rows_NC: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = 10_000,
) -> tuple[float, float, float]:
    """(estimate, lower, upper) of any statistic of N rows, which are resampled whole: a paired bootstrap.

    `statistic` maps resamples [R, N, C] to [R]. The difference of two models' rank correlations, with the columns
    truth, first, second: `lambda r: spearman(r[..., 1], r[..., 0]) - spearman(r[..., 2], r[..., 0])`. A resample whose
    statistic is undefined (NaN, as for a correlation with a constant) is left out of the percentiles. Raises
    ValueError as `bootstrap_interval` does, and where the statistic is undefined on the data or on every resample.
    """
    if rows_NC.ndim != 2 or not len(rows_NC):
        raise ValueError(f"the bootstrap needs at least one row, got shape {tuple(rows_NC.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    rows_NC = rows_NC.detach().to("cpu", torch.float64)
    estimate = statistic(rows_NC[None]).item()
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(rows_NC)
    per_chunk = max(CHUNK_NUMBERS // rows_NC.numel(), 1)
    estimates = []
    for start in range(0, num_resamples, per_chunk):
        drawn = min(per_chunk, num_resamples - start)
        index_RN = torch.randint(num_rows, (drawn, num_rows), generator=generator)
        estimates.append(statistic(rows_NC[index_RN]))
    estimates_R = torch.cat(estimates)
    estimates_R = estimates_R[~estimates_R.isnan()]
    if estimate != estimate or not len(estimates_R):
        raise ValueError("the statistic is undefined (NaN) on these values, so there is no interval")
    tail = (1 - level) / 2
    lower, upper = torch.quantile(estimates_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return estimate, lower, upper


def paired_difference(
    first_N: Tensor | Sequence[float],
    second_N: Tensor | Sequence[float],
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = 10_000,
) -> tuple[float, float, float]:
    """(mean, lower, upper) of first - second, unit by unit, by `bootstrap_interval`.

    Raises ValueError where the lengths differ, besides what `bootstrap_interval` refuses.

    Example: first [3, 4], second [1, 2]: (2, 2, 2).
    """
    first_N, second_N = _finite("first", first_N), _finite("second", second_N)
    if first_N.shape != second_N.shape:
        raise ValueError(
            f"a paired difference needs as many values on both sides, got {len(first_N)} and {len(second_N)}"
        )
    return bootstrap_interval(first_N - second_N, seed=seed, level=level, num_resamples=num_resamples)


def pearson(first_N: Tensor, second_N: Tensor) -> Tensor:
    """Linear correlation, -1 to 1, along the last dimension: [..., N] and [..., N] -> [...]; NaN for a constant.

    Example: [1, 2, 3] and [2, 4, 7]: centred [-1, 0, 1] and [-7/3, -1/3, 8/3]: 5 / sqrt(2 * 12.6667) = 0.99340.
    """
    first_N, second_N = _centred(first_N), _centred(second_N)
    product = (first_N * second_N).sum(-1)
    return product / (first_N.square().sum(-1) * second_N.square().sum(-1)).sqrt()


def spearman(first_N: Tensor, second_N: Tensor) -> Tensor:
    """Rank correlation, -1 to 1, ties at their mean rank: [..., N] and [..., N] -> [...]; NaN for a constant.

    Example: [1, 2, 3] and [1, 9, 4]: ranks [1, 2, 3] and [1, 3, 2]: 1 - 6 * 2 / (3 * 8) = 0.5.
    """
    return pearson(ranks(first_N), ranks(second_N))


def ranks(values_N: Tensor) -> Tensor:
    """Ranks 1 .. N along the last dimension, float64; equal values share the mean of their ranks.

    Example: [5, 1, 5]: [2.5, 1, 2.5].
    """
    values_N = values_N.double().contiguous()
    ordered_N = values_N.sort(-1).values
    below_N = torch.searchsorted(ordered_N, values_N)
    not_above_N = torch.searchsorted(ordered_N, values_N, right=True)
    return (below_N + not_above_N + 1).double() / 2


def r_squared(predictions_N: Tensor, targets_N: Tensor) -> Tensor:
    """1 - squared error / squared deviation of the targets from their own mean; at most 1; -inf or NaN for constants.

    Along the last dimension: [..., N] and [..., N] -> [...].

    Example: predictions [1, 2, 4], targets [1, 2, 3]: 1 - 1 / 2 = 0.5.
    """
    errors = (predictions_N.detach().double() - targets_N.detach().double()).square().sum(-1)
    return 1 - errors / _centred(targets_N).square().sum(-1)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: reject where the adjusted value is at most alpha.

    Keeps the family-wise error rate. Source: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure"
    (1979). Raises ValueError for a value outside [0, 1].

    Example: [0.01, 0.04, 0.03]: ascending 3 * 0.01, 2 * 0.03, max(1 * 0.04, 0.06): [0.03, 0.06, 0.06].
    """
    for p_value in p_values:
        if not 0 <= p_value <= 1:
            raise ValueError(f"a p-value lies between 0 and 1, got {p_value}")
    adjusted = list(p_values)
    floor = 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - place) * p_values[number]))
        adjusted[number] = floor
    return adjusted


def _centred(values_N: Tensor) -> Tensor:
    """Values less their mean; exactly 0 for a constant, whose computed mean may be off by rounding."""
    values_N = values_N.detach().double()
    constant = (values_N == values_N[..., :1]).all(-1, keepdim=True)
    return torch.where(constant, 0.0, values_N - values_N.mean(-1, keepdim=True))


def _finite(name: str, values_N: Tensor | Sequence[float]) -> Tensor:
    values_N = torch.as_tensor(values_N, dtype=torch.float64).cpu()
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f"{name} must be one-dimensional and hold at least one number, got {tuple(values_N.shape)}")
    wrong = (~values_N.isfinite()).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(f"{name}[{place}] is {values_N[place].item()}: leave out what was not measured")
    return values_N

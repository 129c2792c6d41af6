"""How good a reward model is on each aspect: reward_report.json and a plot per aspect."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.functional import pearson, r_squared, spearman
from equipoise.models.aspects import Aspect

PLOTTED = 2000  # points of a scatter plot; more hide each other
BINS = 10


def aspect_metrics(predictions_N: Tensor, labels_N: Tensor, training_mean: float) -> dict[str, float | int | None]:
    """Regression metrics of one aspect over the scored rows of a split, in native units.

    n; mse; mae; r2 (against the split's own mean); pearson; spearman; bias (mean prediction - label); baseline_mse
    and baseline_mae, those of predicting the training mean for every row. None where a value is undefined: no row, or
    a correlation with a constant.

    Example: predictions [1, 2, 4], labels [1, 3, nan], training mean 1: n 2, mse (0 + 1)/2 = 0.5, mae 0.5,
    bias -0.5, r2 1 - 1/2 = 0.5, pearson and spearman 1, baseline_mse (0 + 4)/2 = 2, baseline_mae 1.
    """
    scored_N = ~labels_N.isnan()
    predictions_N, labels_N = predictions_N[scored_N].double(), labels_N[scored_N].double()
    errors_N, deviations_N = predictions_N - labels_N, training_mean - labels_N
    values = {
        "mse": errors_N.square().mean(),
        "mae": errors_N.abs().mean(),
        "bias": errors_N.mean(),
        "r2": r_squared(predictions_N, labels_N) if len(labels_N) else math.nan,
        "pearson": pearson(predictions_N, labels_N) if len(labels_N) else math.nan,
        "spearman": spearman(predictions_N, labels_N) if len(labels_N) else math.nan,
        "baseline_mse": deviations_N.square().mean(),
        "baseline_mae": deviations_N.abs().mean(),
    }
    finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    return {"n": len(labels_N), **finite}


def uncertainty_metrics(std_N: Tensor, predictions_N: Tensor, labels_N: Tensor) -> dict[str, float | int | None]:
    """How well the members' disagreement says where a split's predictions are wrong, over the scored rows.

    n; mean_std (native units); rmse, which an ensemble that knows its error would have for a std (labels' own noise is
    in it); error_spearman, the rank correlation of std and |prediction - label|. None where a value is undefined.

    Example: std [1, 2, 9], predictions [0, 0, 0], labels [1, 3, nan]: n 2, mean_std 1.5, rmse sqrt(5),
    error_spearman 1.
    """
    scored_N = ~labels_N.isnan()
    std_N, errors_N = std_N[scored_N].double(), (predictions_N - labels_N)[scored_N].double().abs()
    values = {
        "mean_std": std_N.mean(),
        "rmse": errors_N.square().mean().sqrt(),
        "error_spearman": spearman(std_N, errors_N) if len(errors_N) else math.nan,
    }
    finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    return {"n": len(errors_N), **finite}


def split_metrics(scores_NK: Tensor, labels_NK: Tensor, aspects: Sequence[Aspect]) -> dict[str, dict[str, Any]]:
    """`aspect_metrics` of every aspect, by name."""
    return {
        aspect.name: aspect_metrics(scores_NK[:, k], labels_NK[:, k], aspect.mean) for k, aspect in enumerate(aspects)
    }


def no_better_than_mean(by_split: Mapping[str, Mapping[str, Mapping[str, Any]]], aspect: str) -> str | None:
    """The held-out split on which an aspect's predictions are no better than its training mean, None if they are.

    Test decides where it has scores of the aspect, validation otherwise.
    """
    for split in ("test", "validation"):
        metrics = by_split[split][aspect]
        if metrics["n"]:
            return split if metrics["mse"] >= metrics["baseline_mse"] else None
    return None


def reliability(predictions_N: Tensor, labels_N: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """(mean prediction, mean label, count) of rows grouped into bins of equal size by prediction, each [at most bins].

    Example: predictions [1, 2, 3, 4], labels [1, 1, 4, 4], 2 bins: ([1.5, 3.5], [1, 4], [2, 2]).
    """
    order = predictions_N.argsort(stable=True)
    parts = [part for part in order.tensor_split(bins) if len(part)]
    predicted = torch.stack([predictions_N[part].double().mean() for part in parts])
    true = torch.stack([labels_N[part].double().mean() for part in parts])
    return predicted, true, torch.tensor([len(part) for part in parts])


def plot_aspect(path: Path, aspect: Aspect, predictions_N: Tensor, labels_N: Tensor, title: str) -> None:
    """Two panels as PNG: predicted against true, and reliability (mean true against mean predicted)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored_N = ~labels_N.isnan()
    predictions_N, labels_N = predictions_N[scored_N].double(), labels_N[scored_N].double()
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # drawn without a display, and without pyplot's global state
    scatter, calibration = figure.subplots(1, 2)
    shown = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))[:PLOTTED]
    scatter.scatter(labels_N[shown], predictions_N[shown], s=8, alpha=0.35, linewidths=0)
    scatter.set(xlabel="true", ylabel="predicted", title="predicted against true")
    low, high = float(labels_N.min()), float(labels_N.max())
    scatter.plot([low, high], [low, high], color="grey", linewidth=1)
    predicted, true, _ = reliability(predictions_N, labels_N)
    calibration.plot(predicted, true, marker="o")
    ends = [float(torch.minimum(predicted, true).min()), float(torch.maximum(predicted, true).max())]
    calibration.plot(ends, ends, color="grey", linewidth=1)
    calibration.set(xlabel="mean predicted (tenths of the rows)", ylabel="mean true", title="reliability")
    direction = "higher is better" if aspect.higher_is_better else "lower is better"
    figure.suptitle(f"{aspect.name} ({direction}), {title}, n = {len(labels_N)}", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_names(aspects: Sequence[Aspect]) -> dict[str, str]:
    """A file name for each aspect: what is not a letter, digit, point or hyphen becomes `_`, and names stay apart.

    Example: `toxigen/toxicity` is drawn in `toxigen_toxicity.png`.
    """
    taken: dict[str, str] = {}
    for aspect in aspects:
        stem = re.sub(r"[^\w.-]", "_", aspect.name).lstrip(".") or "aspect"
        number = 2
        name = stem
        while f"{name}.png".lower() in (other.lower() for other in taken.values()):
            name = f"{stem}_{number}"
            number += 1
        taken[aspect.name] = f"{name}.png"
    return taken


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """reward_report.json, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)

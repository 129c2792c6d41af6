"""What a score means: direction, range, and the utility that training combines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.config import AspectConfig


@dataclass(frozen=True)
class Aspect:
    """One scored quality of a response.

    `mean` and `std` are those of the training labels of a reward model, in native units; a scorer without training
    labels keeps 0 and 1, so that its utility is the signed value.
    """

    name: str
    higher_is_better: bool
    range: tuple[float, float] | None = None
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def from_config(cls, name: str, config: AspectConfig, *, mean: float = 0.0, std: float = 1.0) -> Aspect:
        """The aspect a recipe declares, with the moments of its training labels."""
        return cls(name, config.higher_is_better, config.range, mean, std)

    @classmethod
    def from_json(cls, name: str, values: dict[str, Any]) -> Aspect:
        """The inverse of `to_json`."""
        bounds = values.get("range")
        return cls(
            name=name,
            higher_is_better=bool(values["higher_is_better"]),
            range=(float(bounds[0]), float(bounds[1])) if bounds is not None else None,
            mean=float(values.get("mean", 0.0)),
            std=float(values.get("std", 1.0)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "range": list(self.range) if self.range is not None else None,
            "higher_is_better": self.higher_is_better,
            "mean": self.mean,
            "std": self.std,
        }

    def utility(self, scores: Tensor) -> Tensor:
        """Utility of native scores, any shape; higher is always better, NaN (not scored) stays NaN.

        With a range (r - worst)/(best - worst): a toxicity of 2 on [1, 5], lower is better, has worst 5 and best 1,
        so (2 - 5)/(1 - 5) = 0.75. Without one, the sign times (r - mean)/std. Scores outside the range are not
        clipped: a reward model may extrapolate, and clipping would hide it from the gradient of the comparison.
        """
        if self.range is not None:
            low, high = self.range
            best, worst = (high, low) if self.higher_is_better else (low, high)
            return (scores - worst) / (best - worst)
        sign = 1.0 if self.higher_is_better else -1.0
        return sign * (scores - self.mean) / self.std


def utilities(scores_BK: Tensor, aspects: list[Aspect]) -> Tensor:
    """Native scores to utilities, column by column; NaN stays NaN."""
    return torch.stack([aspect.utility(scores_BK[:, k]) for k, aspect in enumerate(aspects)], dim=1)

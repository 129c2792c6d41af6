"""How a conditioned policy is asked: the aspects whose weights it reads in its prompt, and the words around them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.config.loading import suggest
from equipoise.config.objectives import PLACE, check_template
from equipoise.errors import ConfigError

CONDITIONED = "conditioned"  # the key in a policy's equipoise.json
STEPS = 100  # of a weight: what the message says in two decimals is what is rewarded


@dataclass(frozen=True)
class Preference:
    """What a policy was trained to read.

    `aspects` stand in the order of the message; `template` is the message, with {weights} where the weights stand.
    """

    aspects: tuple[str, ...]
    template: str

    def text(self, weights: Mapping[str, float]) -> str:
        """The message that names weights, which sum to 1, to two decimals.

        Example: safety 0.3, politeness 0.7: "Weigh your objectives in this way: safety 0.30, politeness 0.70."
        """
        return self.template.replace(PLACE, ", ".join(f"{name} {weights[name]:.2f}" for name in self.aspects))

    def shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        """What weights come to as multiples of 1/100 that sum to 1, by the largest remainders; only ratios count.

        Raises ConfigError for an unknown or missing aspect, a weight that is not a finite number of at least 0, and
        weights that are all 0.

        Example: politeness 1, safety 2: 0.33 and 0.67.
        """
        for name in weights:
            if name not in self.aspects:
                raise ConfigError(
                    f"ask: unknown aspect {name!r}{suggest(name, list(self.aspects))}; this policy reads weights of "
                    f"{', '.join(self.aspects)}"
                )
        for name in self.aspects:
            if name not in weights:
                raise ConfigError(f"ask: no weight for {name!r}; add {name}=0 to ask for nothing of it")
            if not math.isfinite(weights[name]) or weights[name] < 0:
                raise ConfigError(f"ask: {name}={weights[name]!r}; use a finite number of at least 0")
        total = math.fsum(weights.values())
        if total == 0:
            raise ConfigError("ask: all weights are 0, which asks for nothing; make one of them positive")
        return dict(zip(self.aspects, rounded([weights[name] / total for name in self.aspects]), strict=True))

    def to_json(self) -> dict[str, Any]:
        """As equipoise.json keeps it."""
        return {"aspects": list(self.aspects), "template": self.template}


def rounded(shares: list[float]) -> list[float]:
    """Shares that sum to 1 to multiples of 1/100 that do, by the largest remainders; of equal ones the first.

    Example: 1/3 three times: 0.34, 0.33, 0.33.
    """
    parts = [math.floor(share * STEPS + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda k: round(parts[k] - shares[k] * STEPS, 6))
    for k in order[: STEPS - sum(parts)]:
        parts[k] += 1
    return [part / STEPS for part in parts]


def read_preference(path: Path) -> Preference | None:
    """What a policy's equipoise.json says of it; None for a policy that reads no weights, or no such file.

    Raises ConfigError where it is broken.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get(CONDITIONED) if isinstance(values, dict) else None
        if found is None:
            return None
        check_template(found["template"])
        aspects = tuple(found["aspects"])
        if len(aspects) < 2 or len(set(aspects)) < len(aspects) or not all(isinstance(a, str) for a in aspects):
            raise ValueError(f"aspects are at least 2 different names, found {found['aspects']!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: does not say how the policy is asked ({type(error).__name__}: {error}); save the policy again"
        ) from error
    return Preference(aspects, found["template"])

"""From groups of scored responses to preference pairs: the best against the worst, and what was left out and why.

Pure selection: texts and numbers in, pairs and counts out. Nothing is sampled, scored or read here.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Scores = Mapping[str, float | None]

# Reasons to leave something out. Responses:
EMPTY, DUPLICATE, UNSCORED = "empty_responses", "duplicate_responses", "unscored_responses"
# Groups, and pairs that could have been:
TOO_FEW, TIED, BELOW_MARGIN = "groups_with_fewer_than_two", "tied_pairs", "pairs_below_min_margin"
ROUNDING = 1e-9  # of utilities: sums that are equal on paper may differ in their last digits
REASONS = (EMPTY, DUPLICATE, UNSCORED, TOO_FEW, TIED, BELOW_MARGIN)


@dataclass(frozen=True)
class Candidate:
    """One response with its combined utility (None: an aspect that counts was not scored) and its native scores."""

    response: str
    utility: float | None
    scores: Scores = field(default_factory=dict)
    truncated: bool = False  # cut at max_tokens: no EOS stands behind it


@dataclass(frozen=True)
class Group:
    """The responses to one prompt that are compared with each other."""

    prompt: Any
    kind: str
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class PreferencePair:
    """The better and the worse of two responses; `margin` is their difference in combined utility, above 0."""

    prompt: Any
    kind: str
    chosen: Candidate
    rejected: Candidate
    margin: float
    group: int = 0  # index of the group both stand in

    def row(self) -> dict[str, Any]:
        """One line of a pairs file; a response that was cut is marked, so that training puts no EOS behind it."""
        row = {
            "prompt": self.prompt,
            "chosen": self.chosen.response,
            "rejected": self.rejected.response,
            "kind": self.kind,
            "margin": self.margin,
            "scores_chosen": dict(self.chosen.scores),
            "scores_rejected": dict(self.rejected.scores),
        }
        if self.chosen.truncated:
            row["chosen_truncated"] = True
        if self.rejected.truncated:
            row["rejected_truncated"] = True
        return row


def select_pairs(
    groups: Sequence[Group], *, per_prompt: int = 1, min_margin: float = 0.0
) -> tuple[list[PreferencePair], Counter[str]]:
    """Pairs of every group, and what was left out: counts of responses, groups and pairs by reason, all `REASONS`.

    Of a group's responses, empty ones, repeated ones (equal but for surrounding space; the first stays) and unscored
    ones are dropped. The rest are ordered by utility: the best is paired with the worst, the second best with the
    second worst, and so on, up to `per_prompt` pairs, as long as the margin is above 0 and at least `min_margin`,
    both up to rounding. Equal utilities are ordered by their place in the group.

    Raises ValueError for per_prompt below 1 and for a min_margin that is negative or not finite.

    Example: utilities 0.9, 0.2, 0.5, 0.4 with per_prompt 2: 0.9 against 0.2 (margin 0.7), 0.5 against 0.4 (0.1);
    with min_margin 0.2 the first only.
    """
    if per_prompt < 1:
        raise ValueError(f"per_prompt must be at least 1, got {per_prompt}")
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin must be a finite number of at least 0, got {min_margin}")
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    for index, group in enumerate(groups):
        usable = _usable(group.candidates, dropped)
        if len(usable) < 2:
            dropped[TOO_FEW] += 1
            continue
        usable.sort(key=lambda candidate: -_utility(candidate))
        for best, worst in zip(usable[: len(usable) // 2][:per_prompt], reversed(usable), strict=False):
            margin = _utility(best) - _utility(worst)
            rounding = ROUNDING * max(1.0, abs(_utility(best)), abs(_utility(worst)))
            if margin <= rounding:
                dropped[TIED] += 1
            elif margin < min_margin - rounding:
                dropped[BELOW_MARGIN] += 1
            else:
                pairs.append(PreferencePair(group.prompt, group.kind, best, worst, margin, index))
    return pairs, dropped


def _usable(candidates: Sequence[Candidate], dropped: Counter[str]) -> list[Candidate]:
    seen: set[str] = set()
    usable: list[Candidate] = []
    for candidate in candidates:
        text = candidate.response.strip()
        if not text:
            dropped[EMPTY] += 1
        elif text in seen:
            dropped[DUPLICATE] += 1
        else:
            seen.add(text)
            if candidate.utility is None or math.isnan(candidate.utility):
                dropped[UNSCORED] += 1
            else:
                usable.append(candidate)
    return usable


def _utility(candidate: Candidate) -> float:
    assert candidate.utility is not None
    return candidate.utility


def pair_statistics(
    groups: Sequence[Group], pairs: Sequence[PreferencePair], dropped: Mapping[str, int]
) -> dict[str, Any]:
    """What was kept and what not, JSON-ready; raises ValueError without a pair.

    `margin`: quantiles and mean of the combined utility's difference. `aspects`: mean native score of the chosen and of
    the rejected responses and of their difference, over the `n` pairs in which both were scored (null where none was).
    `characters`: mean length of the two, because a judge that likes length shows here. `kinds`: pairs by prompt kind.
    """
    if not pairs:
        raise ValueError("pair_statistics needs at least one pair")
    names = list(dict.fromkeys(name for pair in pairs for name in pair.chosen.scores))
    return {
        "groups": len(groups),
        "responses": sum(len(group.candidates) for group in groups),
        "groups_with_pairs": len({pair.group for pair in pairs}),
        "pairs": len(pairs),
        "dropped": {reason: dropped[reason] for reason in REASONS},
        "truncated": {
            "chosen": sum(pair.chosen.truncated for pair in pairs),
            "rejected": sum(pair.rejected.truncated for pair in pairs),
        },
        "kinds": dict(sorted(Counter(pair.kind for pair in pairs).items())),
        "margin": quantiles([pair.margin for pair in pairs]),
        "aspects": {name: _aspect_means(name, pairs) for name in names},
        "characters": {
            "chosen": statistics.fmean(len(pair.chosen.response) for pair in pairs),
            "rejected": statistics.fmean(len(pair.rejected.response) for pair in pairs),
        },
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles, maximum and mean; quartiles by linear interpolation.

    Example: [1, 2, 3, 4]: quartiles 1.75, 2.5 and 3.25.
    """
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), points).tolist()
    return dict(zip(("min", "q25", "median", "q75", "max"), found, strict=True)) | {"mean": statistics.fmean(values)}


def _aspect_means(name: str, pairs: Sequence[PreferencePair]) -> dict[str, float | int | None]:
    both = [
        (chosen, rejected)
        for pair in pairs
        if (chosen := pair.chosen.scores.get(name)) is not None
        and (rejected := pair.rejected.scores.get(name)) is not None
    ]
    if not both:
        return {"n": 0, "chosen": None, "rejected": None, "difference": None}
    chosen, rejected = (statistics.fmean(side) for side in zip(*both, strict=True))
    return {"n": len(both), "chosen": chosen, "rejected": rejected, "difference": chosen - rejected}

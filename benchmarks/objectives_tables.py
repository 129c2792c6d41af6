"""What the pages of `benchmarks/objectives.py` are made of: tested differences, and lines of tables."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.tuning import estimate
from torch import Tensor

from equipoise.evaluation.metrics import interval
from equipoise.evaluation.significance import ALPHA, holm, sign_flip_test

SEED = 0  # of every interval and test
Values = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def tested(differences: Mapping[Key, Tensor]) -> dict[Key, Values]:
    """{"mean", "ci95", "n", "p", "adjusted", "clear"} of differences by prompt [P]; all of them are one family."""
    p_values = {key: sign_flip_test(values_P, seed=SEED) for key, values_P in differences.items()}
    adjusted = holm(p_values)
    return {
        key: {
            **interval(values_P, seed=SEED),
            "p": p_values[key],
            "adjusted": adjusted[key],
            "clear": (found := adjusted[key]) is not None and found <= ALPHA,
        }
        for key, values_P in differences.items()
    }


def header(titles: Sequence[str]) -> list[str]:
    """Two lines of a table whose first column names the row."""
    return [f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]


def row(name: str, cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {name} | {' | '.join(cells)} |"


def bold(difference: Values) -> str:
    """A difference with its interval, bold where clear; a dash where nothing was scored."""
    if difference["mean"] is None:
        return "-"
    text = estimate(difference, signed=True)
    return f"**{text}**" if difference["clear"] else text


def percent(share: float | None) -> str:
    """`12%`, a dash for none."""
    return "-" if share is None else f"{100 * share:.0f}%"

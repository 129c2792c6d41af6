"""Data sets that come with the package, by name: no file, no network.

`sandbox` is the training part, `sandbox/validation` and `sandbox/test` hold out topics (test wording too). What a name
yields depends on what is asked for: prompts, scored responses (of all splits, each row with its split), demonstrations
or preference pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from equipoise.errors import DataError
from equipoise.sandbox import SPLITS
from equipoise.sandbox.datasets import ROWS, scored_rows

BUILTIN = ("sandbox", *(f"sandbox/{split}" for split in SPLITS))


def is_builtin(name: str) -> bool:
    """Whether a name means a built-in data set (or a misspelt part of one), not a file or a hub data set."""
    return name == "sandbox" or name.startswith("sandbox/")


def builtin_rows(name: str, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of a built-in set. `kind`: prompts, scored, demonstrations or pairs.

    Raises DataError for a part that does not exist, or has no rows of this kind.
    """
    _, _, split = name.partition("/")
    if split and split not in SPLITS:
        raise DataError(f"{name}: no such part of the sandbox; use {', '.join(BUILTIN)}")
    if kind in ("demonstrations", "pairs") and split not in ("", "train"):
        raise DataError(f"{name}: {kind} exist for training only; use sandbox")
    if kind == "scored" and not split:
        return scored_rows()
    return ROWS[kind](split or "train")

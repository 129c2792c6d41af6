"""Preference pairs of the toy world, and recipes over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.toy import WORDS


def write_pairs(path: Path, count: int = 24) -> Path:
    """JSONL pairs: a polite answer against a rude one, both of several lengths."""
    rows = [
        {
            "prompt": f"how do i {WORDS[6 + i % 3]} {WORDS[20 + i % 12]}",
            "chosen": " ".join(["please", WORDS[25 + i % 14], "thanks"][: 2 + i % 2]),
            "rejected": " ".join(["no", "never", "stupid", "idiot", WORDS[20 + i % 9]][: 1 + i % 5]),
            "kind": ("benign", "borderline", "adversarial")[i % 3],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dpo_values(model: Path, pairs: Path, /, **changes: Any) -> dict[str, Any]:
    """A DPO recipe of five steps; `changes` replace top-level keys."""
    return {
        "algorithm": "dpo",
        "policy": {"model": str(model)},
        "data": str(pairs),
        "validation_fraction": 0.2,
        "batch_size": 4,
        "num_epochs": 1,
        "evaluate_every": 2,
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }

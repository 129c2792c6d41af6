"""The sandbox as ordinary files, to read, to change, or to use with other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise.errors import ConfigError
from equipoise.sandbox import SPLITS
from equipoise.sandbox.datasets import demonstration_rows, pair_rows, prompt_rows, scored_rows
from equipoise.sandbox.models import SIZES, write_model

GUIDE = """The sandbox of Equipoise, as data files. All text was written for that project.

prompts_train.jsonl       {"prompt", "kind", "category"}: for alignment
prompts_validation.jsonl  topics that training never sees: for choices made while training goes on
prompts_test.jsonl        other such topics, in wording that training never sees
demonstrations.jsonl      {"prompt", "response"}: a mediocre mixture, for the base policy
scored.jsonl              {"prompt", "kind", "response", "scores", "split", "rater"}: rubric scores with the noise and
                          bias of raters, a tenth missing
pairs.jsonl               {"prompt", "chosen", "rejected"}: best against worst rated response to a prompt
models/                   configuration and tokenizer of the three sizes, without weights

It proves machinery; it says nothing about the safety of any real model.
"""


def export_sandbox(directory: Path) -> dict[str, int]:
    """Write everything into a new or empty directory; {file: rows}.

    Raises ConfigError where something is in the way."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory}: exists and is not an empty directory; give another")
    directory.mkdir(parents=True, exist_ok=True)
    sets: dict[str, Iterator[dict[str, Any]]] = {f"prompts_{split}.jsonl": prompt_rows(split) for split in SPLITS}
    sets |= {"demonstrations.jsonl": demonstration_rows(), "scored.jsonl": scored_rows(), "pairs.jsonl": pair_rows()}
    counts = {name: _write(directory / name, rows) for name, rows in sets.items()}
    for size in SIZES:
        write_model(size, directory / "models" / size)
    (directory / "README.txt").write_text(GUIDE, encoding="utf-8")
    return counts


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(temporary, path)
    return count

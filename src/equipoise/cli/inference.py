"""`equipoise score` and `equipoise generate`: rows in, rows with more in them out."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from equipoise.cli.evaluate import parse_weights
from equipoise.cli.progress import counting
from equipoise.config import SamplingConfig
from equipoise.data import load_demonstrations, load_prompts, read_rows
from equipoise.errors import ConfigError
from equipoise.models.policy import load_policy
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.preference_conditioning import ask, asked_shares
from equipoise.rollout.sampler import generate_in_parts

SCORED_AT_ONCE = 512  # responses between two signs of progress
PROMPTS_AT_ONCE = 16


def score_file(reward_model: str, data: str, out: Path, batch_size: int) -> None:
    """Rows of `data` with `predicted`: {aspect: number on its native scale}; every other field stays."""
    model = RewardModel.load(reward_model)
    rows = [dict(row.fields) for row in read_rows(data)]
    records = load_demonstrations(data)  # scores, if any, are only passed through
    with jsonl_writer(out) as file, counting("scoring", len(rows)) as advance:
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = records[start : start + SCORED_AT_ONCE]
            scores_BK = model.score([r.prompt for r in part], [r.response for r in part], batch_size=batch_size)
            for row, values in zip(rows[start : start + SCORED_AT_ONCE], scores_BK.tolist(), strict=True):
                write_row(file, {**row, "predicted": dict(zip(model.aspects, values, strict=True))})
            advance(len(part))


def generate_file(
    policy: str,
    prompts: str,
    out: Path,
    group_size: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    asked: str | None = None,
) -> None:
    """Rows {prompt, kind, response, group, index, finish_reason, num_tokens}, and `asked` where weights were."""
    weights = parse_weights(asked, "--ask")
    records = load_prompts(prompts)
    model = load_policy(policy)
    shares = {} if weights is None else {"asked": asked_shares(model, weights)}
    if weights is not None:
        records = ask(model, records, weights)
    sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
    with jsonl_writer(out) as file, counting("generating", len(records) * group_size) as advance:
        for rollout in generate_in_parts(
            model, records, group_size, sampling, prompts_at_once=PROMPTS_AT_ONCE, seed=seed
        ):
            for row in range(len(rollout)):
                write_row(
                    file,
                    {
                        "prompt": rollout.prompts[row],
                        "kind": rollout.kinds[row],
                        "response": rollout.completions[row],
                        "group": int(rollout.group_ids_B[row]),
                        "index": int(rollout.index_in_group_B[row]),
                        "finish_reason": rollout.finish_reasons[row],
                        "num_tokens": int(rollout.lengths_B[row]),
                        **shares,
                    },
                )
            advance(len(rollout))


@contextmanager
def jsonl_writer(out: Path) -> Iterator[TextIO]:
    """A text file that appears under its name when all of it is written; .gz is compressed."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a directory; give a file name")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        opener: Any = gzip.open if out.suffix == ".gz" else open
        with opener(temporary, "wt", encoding="utf-8") as file:
            yield file
        os.replace(temporary, out)
    except FileExistsError as error:
        raise ConfigError(f"--out {out}: {error.filename} is a file, not a directory; give another path") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    """One line of JSON."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")

"""`equipoise evaluate`, and what `equipoise compare` shares with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.cli.progress import counting
from equipoise.config import SamplingConfig
from equipoise.data import PromptRecord, load_prompts
from equipoise.errors import ConfigError
from equipoise.evaluation import (
    Evaluated,
    evaluate_policy,
    evaluation_table,
    load_judge,
    save_evaluation,
    show,
)
from equipoise.models.policy import load_policy
from equipoise.rollout.scorers import Scorer


@dataclass(frozen=True)
class EvaluationOptions:
    """What both commands take."""

    prompts: str
    judge: str
    weights: str | None
    samples: int
    temperature: float
    max_tokens: int
    seed: int
    ask: str | None = None

    @property
    def sampling(self) -> SamplingConfig:
        """How completions are drawn."""
        return SamplingConfig(temperature=self.temperature, max_tokens=self.max_tokens)


def evaluate_command(policy: str, out: Path, reference: str | None, options: EvaluationOptions) -> None:
    """Evaluate one policy into `out` and show the table."""
    records, judge, weights = evaluation_inputs(options)
    model = load_policy(policy)
    other = load_policy(reference) if reference else None
    evaluated = evaluate_one(model, records, judge, weights, options, other, "evaluating")
    save_evaluation(out, evaluated.evaluation, evaluated.rows)
    show(evaluation_table(evaluated.evaluation))
    print(f"written: {out / 'evaluation.json'}", file=sys.stderr)


def parse_weights(text: str | None, option: str = "--weights") -> dict[str, float] | None:
    """`a=1,b=0.5` as a mapping. Raises ConfigError for a malformed or repeated entry."""
    if text is None:
        return None
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
            value = 0.0
        if not equals or not name:
            raise ConfigError(f"{option} {part!r}: expected aspect=number, as in politeness=1,safety=0.5")
        if name in weights:
            raise ConfigError(f"{option}: aspect {name!r} is given twice; remove one")
        weights[name] = value
    return weights


def evaluation_inputs(options: EvaluationOptions) -> tuple[list[PromptRecord], Scorer, dict[str, float] | None]:
    """Prompts, judge and weights that the options name."""
    weights = parse_weights(options.weights)
    # Evaluating on what a policy was trained on is never what is meant.
    prompts = "sandbox/test" if options.prompts == "sandbox" else options.prompts
    return load_prompts(prompts), load_judge(options.judge), weights


def evaluate_one(
    policy: Any,
    records: list[PromptRecord],
    judge: Scorer,
    weights: dict[str, float] | None,
    options: EvaluationOptions,
    reference: Any,
    description: str,
) -> Evaluated:
    """One policy's evaluation, with progress."""
    with counting(description, len(records) * options.samples) as advance:
        evaluation, rows = evaluate_policy(
            policy,
            records,
            [judge],
            samples=options.samples,
            sampling=options.sampling,
            weights=weights,
            seed=options.seed,
            reference=reference,
            judge_name=options.judge,
            progress=advance,
            asked=parse_weights(options.ask, "--ask"),
        )
    return Evaluated(evaluation, rows)

"""`equipoise evaluate` and `equipoise compare`."""

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
    compare,
    comparison_table,
    evaluate_policy,
    evaluation_table,
    load_cost,
    load_judge,
    save_evaluation,
    show,
    write_json,
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

    @property
    def sampling(self) -> SamplingConfig:
        """How completions are drawn."""
        return SamplingConfig(temperature=self.temperature, max_tokens=self.max_tokens)


def evaluate_command(policy: str, out: Path, reference: str | None, options: EvaluationOptions) -> None:
    """Evaluate one policy into `out` and show the table."""
    records, judge, weights = _inputs(options)
    model = load_policy(policy)
    other = load_policy(reference) if reference else None
    evaluated = _evaluate(model, records, judge, weights, options, other, "evaluating")
    save_evaluation(out, evaluated.evaluation, evaluated.rows)
    show(evaluation_table(evaluated.evaluation))
    print(f"written: {out / 'evaluation.json'}", file=sys.stderr)


def compare_command(runs: list[str], base: str, out: Path, options: EvaluationOptions) -> None:
    """Evaluate base and runs on the same prompts and draws; write comparison.json and show the table."""
    named = [_named_run(run) for run in runs]
    records, judge, weights = _inputs(options)
    base_policy = load_policy(base)
    base_evaluated = _evaluate(base_policy, records, judge, weights, options, None, "base")
    save_evaluation(out / "evaluation" / "base", base_evaluated.evaluation, base_evaluated.rows)
    methods: dict[str, list[Evaluated]] = {}
    for name, directory in named:
        model = load_policy(str(directory / "model"))
        evaluated = _evaluate(model, records, judge, weights, options, base_policy, name)
        evaluated = Evaluated(evaluated.evaluation, evaluated.rows, load_cost(directory))
        seed_index = len(methods.setdefault(name, []))
        methods[name].append(evaluated)
        save_evaluation(out / "evaluation" / f"{name}-{seed_index}", evaluated.evaluation, evaluated.rows)
    comparison = compare(base_evaluated, methods, seed=options.seed)
    write_json(out / "comparison.json", comparison)
    show(comparison_table(comparison))
    print(f"written: {out / 'comparison.json'}", file=sys.stderr)


def parse_weights(text: str | None) -> dict[str, float] | None:
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
            raise ConfigError(f"--weights {part!r}: expected aspect=number, as in politeness=1,safety=0.5")
        if name in weights:
            raise ConfigError(f"--weights: aspect {name!r} is given twice; remove one")
        weights[name] = value
    return weights


def _named_run(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not equals or not name or "/" in name or name.startswith("."):
        raise ConfigError(f"{text!r}: expected NAME=RUN_DIR, as in grpo=runs/grpo")
    path = Path(directory)
    if not (path / "model").is_dir():
        raise ConfigError(f"{directory}: no finished run, {path / 'model'} does not exist; give a run directory")
    return name, path


def _inputs(options: EvaluationOptions) -> tuple[list[PromptRecord], Scorer, dict[str, float] | None]:
    weights = parse_weights(options.weights)
    # Evaluating on what a policy was trained on is never what is meant.
    prompts = "sandbox/test" if options.prompts == "sandbox" else options.prompts
    return load_prompts(prompts), load_judge(options.judge), weights


def _evaluate(
    policy: Any,
    records: list[PromptRecord],
    judge: Scorer,
    weights: dict[str, float] | None,
    options: EvaluationOptions,
    reference: Any,
    description: str,
) -> Evaluated:
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
        )
    return Evaluated(evaluation, rows)

"""comparison.json: what each method changed against the base policy, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ConfigError, DataError
from equipoise.evaluation.evaluate import COMPLETIONS_FILE, EVALUATION_FILE
from equipoise.evaluation.metrics import interval, summarise
from equipoise.evaluation.rows import COMBINED, PromptTable, Row, average_tables, prompt_table, read_rows

COST_FILE = "cost.json"


@dataclass(frozen=True)
class Evaluated:
    """One policy's evaluation.json, its rows, and what its training cost (None: unknown, or not trained)."""

    evaluation: Mapping[str, Any]
    rows: Sequence[Row]
    cost: Mapping[str, Any] | None = None

    def table(self) -> PromptTable:
        """Means by prompt."""
        return prompt_table(self.rows, list(self.evaluation["aspects"]))


def load_evaluated(directory: Path, *, run_directory: Path | None = None) -> Evaluated:
    """An evaluation that `save_evaluation` wrote. Raises DataError naming what is missing or broken."""
    evaluation = _read_json(directory / EVALUATION_FILE)
    for key in ("policy", "judge", "aspects", COMBINED):
        if key not in evaluation:
            raise DataError(f"{directory / EVALUATION_FILE}: field {key!r} is missing; evaluate again")
    cost = load_cost(run_directory) if run_directory is not None else None
    return Evaluated(evaluation, read_rows(directory / COMPLETIONS_FILE), cost)


def load_cost(run_directory: Path) -> dict[str, Any] | None:
    """cost.json of a run, None where the directory has none (a policy that was not trained here)."""
    path = run_directory / COST_FILE
    return _read_json(path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a {type(values).__name__}, not a mapping")
    return values


def compare(base: Evaluated, methods: Mapping[str, Sequence[Evaluated]], *, seed: int = 0) -> dict[str, Any]:
    """The mapping written as comparison.json.

    Suffixes: P prompts. For every method the evaluations of its seeds are averaged prompt by prompt; the paired
    difference is that mean less the base's value on the same prompt, with a percentile bootstrap over prompts. Its
    interval therefore speaks of these trained policies on other prompts, not of other training seeds: the seeds' own
    means stand beside it in `seeds`. A prompt that either side has no score for is left out of that difference, and
    `n` counts those that are in.

    `cost` is the mean over seeds; `cost_per_seed` keeps each. Raises ConfigError for no methods, other prompts, other
    aspects, weights or judge than the base's, naming the first difference.
    """
    if not methods:
        raise ConfigError("compare: no methods; give NAME=RUN_DIR at least once")
    base_table = base.table()
    result: dict[str, Any] = {"base": dict(base.evaluation), "methods": {}}
    for name, seeds in methods.items():
        if not seeds:
            raise ConfigError(f"compare: method {name!r} has no evaluation; give {name}=RUN_DIR")
        for evaluated in seeds:
            _check_same_settings(name, base.evaluation, evaluated.evaluation)
        tables = [evaluated.table() for evaluated in seeds]
        for table in tables:
            _check_same_prompts(name, base_table, table)
        result["methods"][name] = _method(base_table, seeds, tables, seed)
    return result


def _method(base: PromptTable, seeds: Sequence[Evaluated], tables: Sequence[PromptTable], seed: int) -> dict[str, Any]:
    costs = [dict(evaluated.cost) if evaluated.cost is not None else None for evaluated in seeds]
    known = [cost for cost in costs if cost is not None]
    return {
        "evaluation": dict(seeds[0].evaluation) if len(seeds) == 1 else _pooled(seeds, tables, seed),
        "paired_difference": paired_differences(base, tables, seed=seed),
        "refusal_difference": refusal_differences(base, tables, seed=seed),
        "paired_by_kind": paired_differences_by_kind(base, tables, seed=seed),
        "cost": mean_cost(known) if known else None,
        "cost_per_seed": costs,
        "seeds": [_seed_point(evaluated) for evaluated in seeds],
    }


def paired_differences(base: PromptTable, tables: Sequence[PromptTable], *, seed: int) -> dict[str, dict[str, Any]]:
    """{aspect and "combined": {"mean", "ci95", "n"}} of method less base, prompt by prompt.

    A prompt's value is the mean over the seeds that have one, less the base's on the same prompt.
    Arithmetic: base (1, 2), seeds (2, 2) and (4, 3): prompt 1 (2+4)/2 - 1 = 2, prompt 2 (2+3)/2 - 2 = 0.5, mean 1.25.
    """
    return {name: interval(values_P, seed=seed) for name, values_P in _differences(base, tables).items()}


def paired_differences_by_kind(
    base: PromptTable, tables: Sequence[PromptTable], *, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """{kind: what `paired_differences` gives on the prompts of that kind alone}."""
    differences = _differences(base, tables)
    return {
        kind: {name: interval(values_P[base.of_kind(kind)], seed=seed) for name, values_P in differences.items()}
        for kind in sorted(set(base.kinds))
    }


def _differences(base: PromptTable, tables: Sequence[PromptTable]) -> dict[str, Tensor]:
    """Method less base on every prompt, [P] each, NaN where either has no score."""
    mean = average_tables(tables)
    differences_P = {name: mean.aspects[name] - base.aspects[name] for name in base.aspects}
    return {**differences_P, COMBINED: mean.combined_P - base.combined_P}


def refusal_differences(base: PromptTable, tables: Sequence[PromptTable], *, seed: int) -> dict[str, dict[str, Any]]:
    """{kind: {"mean", "ci95", "n"}}: refusal rate of method less base, prompt by prompt as in `paired_differences`."""
    difference_P = average_tables(tables).refusal_P - base.refusal_P
    return {kind: interval(difference_P[base.of_kind(kind)], seed=seed) for kind in sorted(set(base.kinds))}


def _pooled(seeds: Sequence[Evaluated], tables: Sequence[PromptTable], seed: int) -> dict[str, Any]:
    """One evaluation.json for several seeds: each prompt's value is its mean over them."""
    first = seeds[0].evaluation
    return summarise(
        average_tables(tables),
        policy_name=", ".join(dict.fromkeys(str(evaluated.evaluation["policy"]) for evaluated in seeds)),
        judge_name=str(first["judge"]),
        num_completions=sum(len(evaluated.rows) for evaluated in seeds),
        weights=first.get("weights", {}),
        seed=seed,
        settings=first.get("settings"),
    )


def _seed_point(evaluated: Evaluated) -> dict[str, Any]:
    evaluation = evaluated.evaluation
    return {
        "policy": evaluation["policy"],
        "aspects": {name: values["mean"] for name, values in evaluation["aspects"].items()},
        COMBINED: evaluation[COMBINED]["mean"],
        "kl_to_reference": evaluation.get("kl_to_reference"),
        "refusal_rate": evaluation.get("refusal_rate"),
    }


def mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number by number over seeds, nested mappings too; what is not a number in all of them is left out.

    Arithmetic: wall_s 10 and 20 give 15.
    """
    result: dict[str, Any] = {}
    for key, value in costs[0].items():
        values = [cost.get(key) for cost in costs]
        if all(isinstance(item, Mapping) for item in values):
            result[key] = mean_cost([item for item in values if isinstance(item, Mapping)])
        elif len(costs) == 1:
            result[key] = value
        else:
            numbers = [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]
            if len(numbers) == len(values):
                result[key] = float(torch.tensor(numbers, dtype=torch.float64).mean())
    return result


def _check_same_settings(name: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Scores by another judge, on other aspects or with other weights are not comparable."""
    for field in ("judge", "weights"):
        if base.get(field) != other.get(field):
            raise ConfigError(
                f"compare: {name} was evaluated with {field} {other.get(field)!r}, the base with {base.get(field)!r}; "
                "evaluate both the same way"
            )
    if list(base["aspects"]) != list(other["aspects"]):
        raise ConfigError(
            f"compare: {name} has the aspects {', '.join(other['aspects'])}, the base {', '.join(base['aspects'])}; "
            "use one judge for both"
        )
    ours, theirs = base.get("settings", {}), other.get("settings", {})
    for key in ("samples", "temperature", "max_tokens", "top_k", "top_p"):
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"compare: {name} was sampled with {key} {theirs.get(key)!r}, the base with {ours.get(key)!r}; "
                "evaluate both with the same sampling"
            )


def _check_same_prompts(name: str, base: PromptTable, other: PromptTable) -> None:
    for number, (ours, theirs) in enumerate(zip(base.prompts, other.prompts, strict=False), start=1):
        if ours != theirs:
            raise ConfigError(
                f"compare: prompt {number} of {name} is {_short(theirs)}, of the base {_short(ours)}; "
                "evaluate both on the same prompts in the same order"
            )
        if base.kinds[number - 1] != other.kinds[number - 1]:
            raise ConfigError(
                f"compare: prompt {number} is {other.kinds[number - 1]} in {name}, "
                f"{base.kinds[number - 1]} in the base; "
                "evaluate both on the same file"
            )
    if len(base) != len(other):
        raise ConfigError(
            f"compare: {name} has {len(other)} prompts, the base {len(base)}; evaluate both on the same prompts"
        )


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else text[:77] + "..."

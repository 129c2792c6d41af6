"""What came of a sweep: scores with intervals, the front, its hypervolume and its knee."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ConfigError, DataError
from equipoise.evaluation import load_evaluated
from equipoise.evaluation.evaluate import EVALUATION_FILE
from equipoise.evaluation.metrics import interval
from equipoise.evaluation.rows import prompt_table
from equipoise.functional.front import Estimated, hypervolume_difference, hypervolume_interval, knee_point
from equipoise.functional.pareto import pareto_front
from equipoise.functional.statistics import bootstrap_statistic, spearman
from equipoise.models.aspects import Aspect, utilities
from equipoise.models.preference import CONDITIONED

FRONT_FILE = "pareto.json"
TRAINED, SOUPS, LESS_TRAINED = "trained", "soups", "_less_trained"


def read_front(path: Path) -> dict[str, Any]:
    """pareto.json of a sweep. Raises ConfigError for none, or a broken one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent}: holds no sweep, {path.name} is not there") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); remove the directory, or give another --out") from error
    if not isinstance(values, dict) or not {"recipe", "settings", "objectives", "base", "points"} <= set(values):
        raise ConfigError(f"{path}: not the state of a sweep; remove the directory, or give another --out")
    return values


def results(out: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """reference, hypervolume, knee and followed of pareto.json, from the evaluations that are there.

    What was measured of the base and of every entry is written into them in `state`.
    """
    base = state["base"]
    for entry in (base, *state["points"], *state["soups"], *state[CONDITIONED]):
        entry |= _measured(out, state, entry)
    trained, souped, asked = (
        [e for e in state[kind] if e["utilities"] is not None] for kind in ("points", "soups", CONDITIONED)
    )
    corners = [entry for entry in trained if max(entry["weights"].values()) == 1]
    _mark_dominated(trained)
    _mark_dominated(souped, beside=corners)
    _mark_dominated(asked)
    _mark_dominated([base] if base["utilities"] is not None else [], beside=trained)
    reference_K = reference_corner(out, state)
    if reference_K is None or not trained:
        return {"reference": None, "hypervolume": None, "knee": None, "followed": None}
    knee = knee_point(_means(trained))
    others = {SOUPS: [*corners, *souped] if souped else [], CONDITIONED: asked}
    return {
        "reference": dict(zip(state["objectives"], reference_K.tolist(), strict=True)),
        "hypervolume": _hypervolumes(out, state, reference_K, trained, others),
        "knee": None if knee is None else trained[knee]["name"],
        "followed": {
            name: {TRAINED: _followed(out, state, trained, k), CONDITIONED: _followed(out, state, asked, k)}
            for k, name in enumerate(state["objectives"])
        }
        if asked
        else None,
    }


def _followed(out: Path, state: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], k: int) -> dict[str, Any]:
    """Spearman's correlation of the weight of objective k with its mean utility, over entries, and its interval over
    prompts; None where it does not exist."""
    weights_N = torch.tensor([list(entry["weights"].values())[k] for entry in entries], dtype=torch.float64)

    def correlation(utilities_RPN: Tensor) -> Tensor:
        means_RN = utilities_RPN.nanmean(1).round(decimals=9)  # the same scores in another order are a tie
        return spearman(weights_N.expand_as(means_RN), means_RN)

    found: dict[str, Any] = {"rank_correlation": None, "ci95": [None, None], "n": len(entries)}
    if len(entries) < 2:
        return found
    utilities_PN = torch.stack([_utilities_by_prompt(out, state, entry["name"])[:, k] for entry in entries], dim=1)
    try:
        value, low, high = bootstrap_statistic(
            utilities_PN, correlation, seed=state["settings"]["seed"], num_resamples=1000
        )
    except ValueError:  # undefined: all weights are the same, or all scores
        return found
    return found | {"rank_correlation": value, "ci95": [low, high]}


def _measured(out: Path, state: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of all aspects on their own scale and utilities of the objectives, each with its interval."""
    place = out / entry["name"]
    run = {"run": f"{entry['name']}/run"} if entry["name"].startswith("points/") else {}
    if not (place / "evaluation" / EVALUATION_FILE).is_file():
        return run | {"scores": None, "utilities": None, "kl": None, "dominated": None}
    evaluation = load_evaluated(place / "evaluation").evaluation
    utilities_PK = _utilities_by_prompt(out, state, entry["name"])
    estimates = {
        name: interval(utilities_PK[:, k], seed=state["settings"]["seed"], num_resamples=1000)
        for k, name in enumerate(state["objectives"])
    }
    known = all(estimate["mean"] is not None for estimate in estimates.values())
    return run | {
        "scores": {
            name: {key: values[key] for key in ("mean", "ci95", "n")} for name, values in evaluation["aspects"].items()
        },
        "utilities": estimates if known else None,
        "kl": evaluation.get("kl_to_reference"),
        "dominated": None,
    }


def utilities_of(out: Path, state: Mapping[str, Any], entry: Mapping[str, Any]) -> Tensor:
    """Mean utilities [K] of a point; NaN where it is not judged."""
    if not (out / entry["name"] / "evaluation" / EVALUATION_FILE).is_file():
        return torch.full((len(state["objectives"]),), float("nan"), dtype=torch.float64)
    return _utilities_by_prompt(out, state, entry["name"]).nanmean(0)


def _utilities_by_prompt(out: Path, state: Mapping[str, Any], name: str) -> Tensor:
    """[P, K], the mean over each prompt's completions; NaN: not scored. Raises DataError for other prompts than the
    base's."""
    prompts, scores_PK = _scores_by_prompt(out / name / "evaluation", tuple(state["objectives"]))
    if (out / "base" / "evaluation" / EVALUATION_FILE).is_file():
        expected, _ = _scores_by_prompt(out / "base" / "evaluation", tuple(state["objectives"]))
        if prompts != expected:
            raise DataError(
                f"{out / name}: was judged on other prompts than {out / 'base'}; did the file change? Remove "
                f"{out / name / 'evaluation'} and run again"
            )
    return utilities(scores_PK, [Aspect.from_json(name, state["aspects"][name]) for name in state["objectives"]])


@lru_cache(maxsize=512)  # an evaluation is written once, and read after every point that ends
def _scores_by_prompt(directory: Path, objectives: tuple[str, ...]) -> tuple[tuple[str, ...], Tensor]:
    table = prompt_table(load_evaluated(directory).rows, objectives)
    return tuple(map(repr, table.prompts)), torch.stack([table.aspects[name] for name in objectives], dim=1)


def reference_corner(out: Path, state: Mapping[str, Any]) -> Tensor | None:
    """Lower corner of the hypervolume [K]: utility 0, the worst that a declared range allows; for an aspect without a
    range the base policy's worst prompt. None before the base is judged."""
    if not (out / "base" / "evaluation" / EVALUATION_FILE).is_file():
        return None
    worst_K = _utilities_by_prompt(out, state, "base").nan_to_num(nan=float("inf")).min(0).values
    ranged_K = torch.tensor([state["aspects"][name]["range"] is not None for name in state["objectives"]])
    corner_K = torch.where(ranged_K, 0.0, worst_K)
    return corner_K if bool(corner_K.isfinite().all()) else None


def _means(entries: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor(
        [[estimate["mean"] for estimate in entry["utilities"].values()] for entry in entries], dtype=torch.float64
    )


def _mark_dominated(entries: Sequence[dict[str, Any]], beside: Sequence[Mapping[str, Any]] = ()) -> None:
    """Among themselves and those beside them, whose own mark stays."""
    if entries:
        on_front = pareto_front(_means([*entries, *beside])).tolist()
        for entry, undominated in zip(entries, on_front[: len(entries)], strict=True):
            entry["dominated"] = not undominated


def _hypervolumes(
    out: Path,
    state: Mapping[str, Any],
    reference_K: Tensor,
    trained: Sequence[Mapping[str, Any]],
    others: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Of the trained points, of other sets by name where they hold anything, and their differences, with intervals."""
    seed = state["settings"]["seed"]

    def values(entries: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.stack([_utilities_by_prompt(out, state, entry["name"]) for entry in entries], dim=1)

    trained_PNK = values(trained)
    found = {TRAINED: _json(hypervolume_interval(trained_PNK, reference_K, seed=seed))}
    for name, entries in others.items():
        if entries:
            others_PNK = values(entries)
            found[name] = _json(hypervolume_interval(others_PNK, reference_K, seed=seed))
            found[f"{name}{LESS_TRAINED}"] = _json(
                hypervolume_difference(others_PNK, trained_PNK, reference_K, seed=seed)
            )
    return found


def _json(estimate: Estimated) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": [estimate.low, estimate.high]}

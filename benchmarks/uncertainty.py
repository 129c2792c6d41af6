"""How well a reward ensemble's disagreement tracks the true error of what a policy is trained on.

    python benchmarks/uncertainty.py --run plain=runs/grpo --run cautious=runs/grpo-kappa1 \
        --reward runs/reward/model --out docs/results/uncertainty

Takes finished online runs (their completions/) and an ensemble: one directory with members, or several reward models.
The proxy is the score the run logged for each completion (the mean of what it was trained on), the disagreement the
ensemble's, recomputed here, and the truth the rubric's, which training never saw. All three are in units of utility. It
asks three things:

1. Per completion: is the disagreement large where |proxy - rubric| is large? Spearman over all completions, with an
   interval that resamples prompts, and the mean of the Spearmans within each step, which owes nothing to the drift.
2. Per step: does the disagreement rise with the gap (proxy - rubric)?
3. As a warning: at which step is the disagreement 1.5 times its first level (what `uncertainty/<aspect>/ratio` warns
   of), and at which step does the rubric begin to fall?
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from equipoise.algorithms.environment import describe_environment
from equipoise.algorithms.uncertainty import WARNING, WINDOW, level_ratio
from equipoise.errors import DataError, EquipoiseError
from equipoise.evaluation.judges import load_judge
from equipoise.functional.statistics import spearman
from equipoise.models.aspects import Aspect, utilities
from equipoise.models.ensemble import RewardEnsemble
from equipoise.models.reward_model import RewardModel
from equipoise.rollout.scorers import RewardModelScorer, Scorer, score_rollout, score_rollout_with_std
from equipoise.rollout.texts import rollout_of_texts

SEED = 0


@dataclass(frozen=True)
class Completions:
    """One aspect of all completions of a run, in units of utility; N completions."""

    step_N: Tensor
    prompt_N: Tensor  # an index for each distinct prompt
    proxy_N: Tensor
    truth_N: Tensor
    std_N: Tensor

    @property
    def error_N(self) -> Tensor:
        """How far the proxy is off."""
        return (self.proxy_N - self.truth_N).abs()


def ensemble_of(directories: Sequence[str]) -> Scorer:
    """A scorer with standard deviations. Raises ConfigError for a single model without members."""
    model = RewardModel.load(directories[0]) if len(directories) == 1 else RewardEnsemble.load(directories)
    if len(directories) == 1:
        model.score([], [], with_std=True)  # says what is missing
    return RewardModelScorer(model, ", ".join(directories), 64)


def read_run(directory: Path, every: int) -> dict[str, list[Any]]:
    """Columns of completions/, every n-th step, with `step`. Raises DataError where there are none."""
    files = sorted((directory / "completions").glob("step_*.parquet"))
    if not files:
        raise DataError(f"{directory}/completions: no step_*.parquet; give the directory of a finished grpo or ppo run")
    columns: dict[str, list[Any]] = {}
    for file in files:
        step = int(file.stem.removeprefix("step_"))
        if step % every and file not in (files[0], files[-1]):
            continue
        table = pq.read_table(file).to_pydict()
        for name, values in ({"step": [step] * len(table["prompt"])} | table).items():
            columns.setdefault(name, []).extend(values)
    return columns


def completions_of(columns: dict[str, list[Any]], ensemble: Scorer, judge: Scorer) -> dict[str, Completions]:
    """By aspect that proxy, ensemble and judge all have. Raises DataError where there is none."""
    prompts = [_prompt(text) for text in columns["prompt"]]
    rollout = rollout_of_texts(prompts, columns["completion"], columns["kind"])
    std_NK = score_rollout_with_std(rollout, [ensemble])[1]
    assert std_NK is not None
    truth_NK = utilities(score_rollout(rollout, [judge]), judge.aspects)
    truths = {aspect.name: truth_NK[:, k] for k, aspect in enumerate(judge.aspects)}
    numbers = {text: index for index, text in enumerate(dict.fromkeys(columns["prompt"]))}
    prompt_N = torch.tensor([numbers[text] for text in columns["prompt"]])
    found = {}
    for k, aspect in enumerate(ensemble.aspects):
        if aspect.name not in truths or f"score/{aspect.name}" not in columns:
            continue
        scores = [math.nan if value is None else value for value in columns[f"score/{aspect.name}"]]
        proxy_N = aspect.utility(torch.tensor(scores, dtype=torch.float64))
        parts = [torch.tensor(columns["step"]), prompt_N, proxy_N, truths[aspect.name], std_NK[:, k] * slope(aspect)]
        known = ~(proxy_N.isnan() | truths[aspect.name].isnan())
        found[aspect.name] = Completions(*(part[known] for part in parts))
    if not found:
        raise DataError(
            f"no aspect in common: the run has {', '.join(name for name in columns if name.startswith('score/'))}, the "
            f"ensemble {', '.join(a.name for a in ensemble.aspects)}, the judge {', '.join(truths)}"
        )
    return found


def _prompt(text: str) -> Any:
    """Message prompts stand in completions/ as JSON."""
    if text.startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def slope(aspect: Aspect) -> float:
    """Units of utility per unit of score, without the sign.

    >>> slope(Aspect("toxicity", False, (1.0, 5.0)))
    0.25
    """
    return abs(float(aspect.utility(torch.tensor(1.0)) - aspect.utility(torch.tensor(0.0))))


# -- what is asked -----------------------------------------------------------------------------------------------------


def per_completion(data: Completions, resamples: int) -> dict[str, Any]:
    """Spearman of disagreement and error: over all with its interval, and the mean over steps of each step's own."""
    groups = [(data.prompt_N == prompt).nonzero().squeeze(1) for prompt in data.prompt_N.unique()]

    def of_prompts(chosen: Tensor) -> float:
        rows = torch.cat([groups[int(prompt)] for prompt in chosen])
        return float(spearman(data.std_N[rows], data.error_N[rows]))

    value = float(spearman(data.std_N, data.error_N))
    draws = torch.randint(len(groups), (resamples, len(groups)), generator=torch.Generator().manual_seed(SEED))
    samples = torch.tensor([of_prompts(chosen) for chosen in draws], dtype=torch.float64)
    samples = samples[~samples.isnan()]
    ends = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if len(samples) else None
    within = []
    for step in data.step_N.unique():
        rows = data.step_N == step
        within.append(float(spearman(data.std_N[rows], data.error_N[rows])))
    return {
        "n": len(data.std_N),
        "prompts": len(groups),
        "spearman": finite(value),
        "ci95": ends,
        "spearman_within_steps": finite(_mean(within)),
    }


def per_step(data: Completions) -> list[dict[str, float]]:
    """Means of every step: disagreement, proxy, rubric, gap (proxy - rubric) and |proxy - rubric|."""
    rows = []
    for step in data.step_N.unique().tolist():
        at = data.step_N == step
        proxy, truth = float(data.proxy_N[at].mean()), float(data.truth_N[at].mean())
        rows.append(
            {
                "step": step,
                "disagreement": float(data.std_N[at].mean()),
                "proxy": proxy,
                "rubric": truth,
                "gap": proxy - truth,
                "error": float(data.error_N[at].mean()),
            }
        )
    return rows


def across_steps(steps: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Spearman over steps of the disagreement with the gap, and with the mean error."""
    columns = {name: torch.tensor([row[name] for row in steps]) for name in ("disagreement", "gap", "error")}
    return {name: finite(float(spearman(columns["disagreement"], columns[name]))) for name in ("gap", "error")}


def warning(steps: Sequence[dict[str, float]]) -> dict[str, int | float | None]:
    """When the disagreement warns and when the rubric turns, in windows of 5 logged steps, named by their last.

    `warned_at`: the first step with more than 1.5 times the first level. `best_at`: the step of the best rubric; where
    that is the last window, it has not turned. `fall`: what the rubric lost from there to the end. `ahead`: steps from
    the warning to the turn, below 0 where the warning came late.

    Example: rubric up to step 20 and down afterwards, warned at step 12: ahead 8.
    """
    levels, truths = [row["disagreement"] for row in steps], [row["rubric"] for row in steps]
    warned_at = None
    windows: list[tuple[int, float]] = []
    for end in range(WINDOW, len(steps) + 1):
        ratio = level_ratio(levels[:WINDOW], levels[end - WINDOW : end])
        if warned_at is None and ratio is not None and ratio > WARNING:
            warned_at = int(steps[end - 1]["step"])
        windows.append((int(steps[end - 1]["step"]), _mean(truths[end - WINDOW : end])))
    last = level_ratio(levels[:WINDOW], levels[-WINDOW:])
    if not windows:
        return {"last_ratio": None, "warned_at": None, "best_at": None, "fall": None, "ahead": None}
    best_at, best = max(windows, key=lambda window: window[1])
    turned = best_at != windows[-1][0]
    return {
        "last_ratio": last,
        "warned_at": warned_at,
        "best_at": best_at,
        "fall": best - windows[-1][1],
        "ahead": best_at - warned_at if turned and warned_at is not None else None,
    }


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def analyse(columns: dict[str, list[Any]], ensemble: Scorer, judge: Scorer, resamples: int) -> dict[str, Any]:
    """Everything of one run, by aspect."""
    aspects = {}
    for name, data in completions_of(columns, ensemble, judge).items():
        steps = per_step(data)
        aspects[name] = {
            "per_completion": per_completion(data, resamples),
            "across_steps": across_steps(steps),
            "warning": warning(steps),
            "steps": steps,
        }
    return {"steps": len(set(columns["step"])), "aspects": aspects}


# -- what is written ---------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Does a reward ensemble's disagreement show the reward model's error?",
        "",
        f"    {results['command']}",
        "",
        f"Machine: {results['environment']['processor'] or 'unknown'}; "
        f"torch {results['environment']['versions']['torch']}. The proxy is what the run was rewarded by, the "
        f"disagreement the standard deviation over the members of {results['reward']}, the truth "
        f"`{results['judge']}`; all in units of utility, means over completions. It says nothing about the safety of "
        "any real model.",
        "",
        "## Per completion: Spearman of disagreement and |proxy - rubric|",
        "",
        "| run | aspect | completions | Spearman | 95% interval (prompts) | within steps |",
        "|---|---|---|---|---|---|",
    ]
    each = [(run, aspect, found) for run, r in results["runs"].items() for aspect, found in r["aspects"].items()]
    for run, aspect, found in each:
        one = found["per_completion"]
        ends = "-" if one["ci95"] is None else f"{one['ci95'][0]:.3f} to {one['ci95'][1]:.3f}"
        lines.append(
            f"| {run} | {aspect} | {one['n']} | {_shown(one['spearman'])} | {ends} | "
            f"{_shown(one['spearman_within_steps'])} |"
        )
    lines += [
        "",
        "## Over steps",
        "",
        "First, last: means over 5 logged steps. Spearman: over steps, of the disagreement with gap and error.",
        "",
        "| run | aspect | disagreement first | last | proxy first | last | rubric first | last | Spearman with gap | "
        "with error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run, aspect, found in each:
        ends = " | ".join(
            f"{_mean([row[name] for row in part]):.3f}"
            for name in ("disagreement", "proxy", "rubric")
            for part in (found["steps"][:WINDOW], found["steps"][-WINDOW:])
        )
        across = found["across_steps"]
        lines.append(f"| {run} | {aspect} | {ends} | {_shown(across['gap'])} | {_shown(across['error'])} |")
    lines += [
        "",
        f"## As an early warning ({WARNING:g} times the first level)",
        "",
        "Ahead: steps from the warning to the rubric's best window; -: no warning, or no fall.",
        "",
        "| run | aspect | last ratio | warned at step | rubric best at step | fall from there | ahead |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, aspect, found in each:
        w = found["warning"]
        cells = [_shown(w["last_ratio"]), w["warned_at"], w["best_at"], _shown(w["fall"]), w["ahead"]]
        lines.append(f"| {run} | {aspect} | {' | '.join('-' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Read the runs, score them, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=DIR", help="a finished grpo or ppo run")
    parser.add_argument("--reward", nargs="+", required=True, help="an ensemble: its directory, or several models'")
    parser.add_argument("--judge", default="sandbox", help="the truth: `sandbox`, a function or a reward model")
    parser.add_argument("--every", type=int, default=1, help="take every n-th step")
    parser.add_argument("--resamples", type=int, default=500, help="of prompts, for the intervals")
    parser.add_argument("--out", type=Path, default=Path("docs/results/uncertainty"), help="without .md and .json")
    options = parser.parse_args()
    try:
        ensemble, judge = ensemble_of(options.reward), load_judge(options.judge)
        runs = {}
        for given in options.run:
            name, _, directory = given.rpartition("=")
            columns = read_run(Path(directory), options.every)
            runs[name or Path(directory).name] = analyse(columns, ensemble, judge, options.resamples)
    except EquipoiseError as error:
        sys.exit(f"error: {error}")
    results = {
        "command": "python benchmarks/uncertainty.py " + " ".join(sys.argv[1:]),
        "environment": describe_environment(),
        "reward": ", ".join(options.reward),
        "judge": options.judge,
        "window": WINDOW,
        "warning": WARNING,
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()

"""`equipoise quickstart`: the whole method on the sandbox, with progress, and a summary at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from equipoise.algorithms.environment import choose_threads
from equipoise.cli.pairs import PairOptions, pairs_command
from equipoise.cli.progress import counting
from equipoise.cli.train import train_recipe
from equipoise.config import BudgetConfig
from equipoise.evaluation import comparison_table, show
from equipoise.evaluation.report import build_report
from equipoise.studies.apart import default_workers
from equipoise.studies.jobs import locked
from equipoise.studies.quickstart import SAMPLING, Study, do_apart, open_study, run_quickstart


def quickstart(
    out: Path, seed: int, size: str, full: bool, workers: int | None = None, only: str | None = None
) -> None:
    """Run or go on with a quickstart in `out`; show what changed and where the report is.

    With `only`, the work of one method, as the quickstart that started this process asks for it."""

    choose_threads(None)  # before they are divided among processes

    def command(name: str) -> list[str]:
        given = ["--out", str(out), "--seed", str(seed), "--size", size, "--only", name]
        return [sys.executable, "-m", "equipoise", "quickstart", *given]

    study = open_study(
        out,
        seed=seed,
        size=size,
        train=_train,
        make_pairs=make_pairs,
        counting=counting,
        say=_say,
        command=command,
        workers=default_workers() if workers is None else workers,
    )
    if only is not None:
        do_apart(study, only)
        return
    report = run_quickstart(study)
    if full:
        from equipoise.studies.controls import full_controls

        with locked(out):
            study.stage("full controls", lambda: full_controls(study))
        report = build_report(out)
    _summarise(study, report)


def _train(recipe: Path, overrides: list[str], out: Path) -> None:
    train_recipe(recipe, overrides, out, resume=(out / "config.json").is_file())


def make_pairs(policy: Path, reward: Path, weights: Mapping[str, float], tokens: int, seed: int, out: Path) -> None:
    """Pairs of the policy's own samples for training prompts, until so many tokens are sampled."""
    options = PairOptions(
        reward=str(reward),
        weights=",".join(f"{name}={weight!r}" for name, weight in weights.items()),
        prompts="sandbox",
        max_tokens=SAMPLING.max_tokens,
        temperature=SAMPLING.temperature,
        seed=seed,
        budget=BudgetConfig(generated_tokens=tokens),
    )
    pairs_command(str(policy), out, options)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _summarise(study: Study, report: Path) -> None:
    show(comparison_table(json.loads(study.path("comparison.json").read_text(encoding="utf-8"))))
    stages = study.state["stages"]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
    total = study.state["seconds"]
    print(f"judged by the rubric on unseen topics and wording; {total:.0f} s in all ({times})")
    print(f"report: {report}")

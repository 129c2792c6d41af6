"""`equipoise pareto`: a sweep of objective weights and its front."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from equipoise.cli.progress import counting
from equipoise.errors import ConfigError
from equipoise.evaluation import show
from equipoise.evaluation.tables import TextTable
from equipoise.studies.pareto import open_sweep, run_sweep
from equipoise.studies.pareto_checks import SweepOptions
from equipoise.studies.pareto_work import do_front_job


def pareto_command(recipe: list[str], out: Path, options: SweepOptions | None, workers: int, job: str | None) -> None:
    """Run or go on with a sweep and show its front; or do one job of the sweep in `out`."""
    if job is not None:
        do_front_job(out, job, counting)
        return
    if not recipe or options is None:
        raise ConfigError("give a recipe and --points: equipoise pareto RECIPE.yaml --points 5 --out DIR")
    sweep = open_sweep(Path(recipe[0]), recipe[1:], out, options, workers=workers, say=_say)
    for note in sweep.state["notes"]:
        _say(f"note: {note}")
    report = run_sweep(sweep)
    show(front_table(sweep.state))
    print(f"report: {report}")


def front_table(state: dict[str, Any]) -> TextTable:
    """Weights and utilities of every entry, what is dominated and the knee; hypervolumes in the title."""
    objectives = state["objectives"]
    entries = (state["base"], *state["points"], *state["soups"], *state["conditioned"])
    rows = [_row(entry, objectives, state["knee"]) for entry in entries]
    header = ("", *(f"weight of {name}" for name in objectives), *objectives, "KL", "front")
    return TextTable(_title(state), header, tuple(rows))


def _title(state: dict[str, Any]) -> str:
    parts = [
        f"{name} {found['value']:.4f} [{found['ci95'][0]:.4f}, {found['ci95'][1]:.4f}]"
        for name, found in (state["hypervolume"] or {}).items()
    ]
    return f"Utilities, mean [95% interval over prompts]; hypervolume {'; '.join(parts) or 'unknown'}"


def _row(entry: dict[str, Any], objectives: list[str], knee: str | None) -> tuple[str, ...]:
    weights, values = entry.get("weights") or {}, entry["utilities"] or {}
    cells = [f"{weights[name]:.3f}" if weights else "" for name in objectives]
    for name in objectives:
        low_high = "" if name not in values else "[{:.3f}, {:.3f}]".format(*values[name]["ci95"])
        cells.append(f"{values[name]['mean']:.3f} {low_high}" if name in values else "-")
    place = {None: entry["status"], True: "dominated", False: "on it"}[entry["dominated"]]
    return (
        entry["name"],
        *cells,
        "-" if entry["kl"] is None else f"{entry['kl']:.2f}",
        f"{place}, knee" if entry["name"] == knee else place,
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

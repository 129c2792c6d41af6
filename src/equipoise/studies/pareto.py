"""A sweep of objective weights: one GRPO recipe trained at many weights from one base, and the front that they make.

Every point is trained and judged in processes of its own; what is finished is never done again, a run that broke off
goes on from its checkpoint, and a point that fails is recorded while the others go on. pareto.json says where
everything stands and what came of it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.environment import describe_environment
from equipoise.config import GRPOConfig, load_recipe, resolved
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.evaluation import write_json
from equipoise.evaluation.evaluate import EVALUATION_FILE
from equipoise.evaluation.report import build_report
from equipoise.functional.front import next_weights, simplex_lattice
from equipoise.models.preference import CONDITIONED, rounded
from equipoise.studies.comparison import cores
from equipoise.studies.jobs import JobFailed, JobStopped, Launcher, Processes, locked, stopping_on_signals
from equipoise.studies.pareto_checks import (
    SweepOptions,
    judged_aspects,
    refuse_changes,
    sweep_notes,
    sweep_settings,
    swept_objectives,
)
from equipoise.studies.pareto_results import FRONT_FILE, read_front, results, utilities_of
from equipoise.studies.pareto_work import model_of
from equipoise.studies.plan import EQUIPOISE, Step
from equipoise.studies.quickstart import now
from equipoise.studies.side_by_side import run_side_by_side

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
KINDS = ("points", "soups", CONDITIONED)


class SweepFailed(EquipoiseError):
    """Points of a sweep failed; everything else is done."""


@dataclass
class Sweep:
    """A sweep in its directory, and how it speaks to people."""

    recipe: GRPOConfig
    out: Path
    workers: int
    say: Callable[[str], None]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def objectives(self) -> list[str]:
        """What is traded off, in the order of the recipe."""
        return self.state["objectives"]

    @property
    def threads(self) -> int:
        """CPU threads of a process."""
        return max(1, cores() // self.workers)

    def entries(self) -> list[dict[str, Any]]:
        """Base, points, soups and what a conditioned policy is asked for."""
        return [self.state["base"], *(entry for kind in KINDS for entry in self.state[kind])]

    def add(self, kind: str, weights: Sequence[float]) -> dict[str, Any]:
        """A new entry of a kind at weights that sum to 1."""
        name = f"{kind}/{len(self.state[kind]):03}"
        entry = {"name": name, "weights": dict(zip(self.objectives, weights, strict=True))} | _fresh()
        self.state[kind].append(entry)
        return entry

    def weights_of(self, kind: str) -> Tensor:
        """[N, K], of the entries of a kind."""
        return torch.tensor([list(entry["weights"].values()) for entry in self.state[kind]], dtype=torch.float64)

    def save(self) -> None:
        """Write pareto.json, what is known of the front included."""
        self.state |= results(self.out, self.state)
        write_json(self.out / FRONT_FILE, self.state)

    def save_progress(self) -> None:
        """Write pareto.json; the front has not changed."""
        write_json(self.out / FRONT_FILE, self.state)


def _fresh() -> dict[str, Any]:
    return {"status": WAITING, "seconds": 0.0}


# -- opening -----------------------------------------------------------------------------------------------------------


def open_sweep(
    recipe_file: Path,
    overrides: Sequence[str],
    out: Path,
    options: SweepOptions,
    *,
    workers: int = 1,
    say: Callable[[str], None],
) -> Sweep:
    """A new sweep, or one to go on with. Everything that can be wrong with the input is said here.

    Raises ConfigError for a recipe that cannot be swept, a judge that does not score what is traded off, a directory
    of something else, or a sweep begun with other settings; DataError for prompts that cannot be read.
    """
    recipe = load_recipe(recipe_file, list(overrides))
    if not isinstance(recipe, GRPOConfig):
        raise ConfigError(f"{recipe_file}: a recipe of {recipe.algorithm}; weights are swept for grpo")
    objectives = swept_objectives(recipe)
    fresh = {
        "kind": "pareto",
        "recipe_file": str(recipe_file),
        "overrides": list(overrides),
        "recipe": resolved(recipe),
        "objectives": objectives,
        "settings": sweep_settings(recipe, options),
    }
    if options.points < len(objectives):
        raise ConfigError(
            f"--points {options.points}: a front of {', '.join(objectives)} has {len(objectives)} corners; "
            f"give at least {len(objectives)}"
        )
    sweep = Sweep(recipe, out, workers, say)
    path = out / FRONT_FILE
    if path.is_file():
        sweep.state = read_front(path)
        refuse_changes(out, sweep.state, fresh)
        fresh["settings"][CONDITIONED] = fresh["settings"][CONDITIONED] or sweep.state["settings"].get(CONDITIONED)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not a sweep; give another directory")
    else:
        sweep.state = {"started": now(), "base": {"name": "base"} | _fresh()}
    for kind in KINDS:  # a sweep begun before there was a kind has none of it
        sweep.state.setdefault(kind, [])
    sweep.state |= fresh | {"aspects": judged_aspects(recipe, fresh), "notes": sweep_notes(recipe, fresh["settings"])}
    environment = describe_environment()
    sweep.state |= {
        "machine": f"{platform.machine()}, {cores()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}",
        "environment": {**environment, "threads": sweep.threads},
        "workers": workers,
    }
    if not sweep.state["points"]:
        count = len(objectives) if options.adaptive else options.points
        for weights in simplex_lattice(len(objectives), count).tolist():
            sweep.add("points", weights)
    for entry in sweep.entries():
        entry["status"] = DONE if _is_done(sweep, entry) else FAILED if entry["status"] == FAILED else WAITING
    sweep.save()
    return sweep


# -- steps -------------------------------------------------------------------------------------------------------------


def _steps(sweep: Sweep, entry: dict[str, Any]) -> list[Step]:
    """The processes of the base or of an entry."""
    place = sweep.out / entry["name"]
    own = [*EQUIPOISE, "pareto", "--out", str(sweep.out), "--job", entry["name"]]
    judge = Step((place / "evaluation" / EVALUATION_FILE).is_file, lambda: own)
    if not entry["name"].startswith("points/"):
        return [judge]
    return [Step(model_of(sweep.out, entry["name"]).is_dir, lambda: _train_command(sweep, entry)), judge]


def _is_done(sweep: Sweep, entry: dict[str, Any]) -> bool:
    return all(step.done() for step in _steps(sweep, entry))


def _train_command(sweep: Sweep, entry: dict[str, Any]) -> list[str]:
    run, threads = sweep.out / entry["name"] / "run", sweep.threads
    begun = (run / "config.json").is_file()
    if begun:  # a resumed run keeps its threads: another number would change its sums
        threads = json.loads((run / "config.json").read_text(encoding="utf-8"))["threads"]
    settings = [
        f"objective_weights={json.dumps(trained_weights(sweep.recipe, entry['weights']))}",
        f"threads={threads}",
    ]
    recipe = [sweep.state["recipe_file"], *sweep.state["overrides"]]
    return [*EQUIPOISE, "train", *recipe, *settings, "--out", str(run)] + (["--resume"] if begun else [])


def trained_weights(recipe: GRPOConfig, shares: dict[str, float]) -> dict[str, float]:
    """A point's `objective_weights`: its shares of the recipe's total, so that rewards keep their size beside the KL.

    An objective that the recipe only logs keeps its 0.
    """
    total = sum(recipe.objective_weights.values())
    return {name: total * shares.get(name, 0.0) for name in recipe.objective_weights}


# -- running -----------------------------------------------------------------------------------------------------------


def run_sweep(sweep: Sweep, *, launcher: Launcher | None = None) -> Path:
    """Do all that is left and write pareto.json and the report; returns the report's path.

    Raises ConfigError where another process works in the directory, Stopped after a signal, SweepFailed at the end
    where points failed, naming them, or at once where the base cannot be judged.
    """
    with locked(sweep.out) as lock:
        runner = launcher if launcher is not None else Processes(lock)
        with stopping_on_signals(runner):
            _run(sweep, [sweep.state["base"]], runner)
            if sweep.state["base"]["status"] == FAILED:
                raise SweepFailed(f"the base policy could not be judged: {sweep.state['base']['reason']}")
            if sweep.state["settings"]["adaptive"]:
                _run_adaptive(sweep, runner)
            else:
                _run(sweep, sweep.state["points"], runner)
            if sweep.state["settings"]["soups"]:
                _run_soups(sweep, runner)
            if sweep.state["settings"][CONDITIONED] is not None:
                _run_conditioned(sweep, runner)
        failed = [entry for entry in sweep.entries() if entry["status"] == FAILED]
        sweep.state["finished"] = None if failed else now()
        sweep.save()
        report = build_report(sweep.out)
    if failed:
        names = "; ".join(f"{entry['name']}: {entry['reason'].splitlines()[-1]}" for entry in failed)
        raise SweepFailed(f"{len(failed)} failed, the others are done ({report}): {names}")
    return report


def _run(sweep: Sweep, entries: Sequence[dict[str, Any]], runner: Launcher) -> None:
    """Train and judge what is left of these."""

    def work(entry: dict[str, Any]) -> None:
        for step in _steps(sweep, entry):
            if not step.done():
                runner.run(step.command(), sweep.out / "logs" / f"{entry['name'].replace('/', '_')}.log", sweep.threads)

    def started(entry: dict[str, Any]) -> None:
        entry["status"] = RUNNING
        sweep.save_progress()

    def ended(entry: dict[str, Any], error: JobFailed | JobStopped | None, seconds: float) -> None:
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        if isinstance(error, JobFailed):
            entry |= {"status": FAILED, "reason": str(error)}
            sweep.say(f"{entry['name']}: failed: {str(error).splitlines()[-1]}")
        else:
            entry["status"] = DONE if _is_done(sweep, entry) else WAITING
        if entry["status"] == DONE:
            entry.pop("reason", None)
            sweep.say(f"{entry['name']}: done in {entry['seconds']:.0f} s{_shown(entry.get('weights'))}")
        sweep.save()

    left = [entry for entry in entries if entry["status"] != DONE]
    run_side_by_side(left, work, workers=sweep.workers, launcher=runner, started=started, ended=ended)


def _shown(weights: dict[str, float] | None) -> str:
    return "" if weights is None else f" ({', '.join(f'{name} {share:.3g}' for name, share in weights.items())})"


def _run_adaptive(sweep: Sweep, runner: Launcher) -> None:
    """What was begun, then the widest gap in the front, until there are as many points as were asked for."""
    _run(sweep, sweep.state["points"], runner)
    while fresh := _proposed(sweep, sweep.state["settings"]["points"] - len(sweep.state["points"])):
        _run(sweep, fresh, runner)


def _proposed(sweep: Sweep, left: int) -> list[dict[str, Any]]:
    """As many new points as there are workers; fewer where gaps wait for a point that is not there yet."""
    weights_NK = sweep.weights_of("points")
    points_NK = torch.stack([utilities_of(sweep.out, sweep.state, entry) for entry in sweep.state["points"]])
    unknown_1K = torch.full((1, len(sweep.objectives)), float("nan"), dtype=torch.float64)
    added = []
    while len(added) < min(left, sweep.workers):
        found_K = next_weights(weights_NK, points_NK)
        if found_K is None:
            if not added:
                sweep.say("no gap is left between points that are done: points failed")
            break
        added.append(sweep.add("points", found_K.tolist()))
        weights_NK, points_NK = torch.cat([weights_NK, found_K[None]]), torch.cat([points_NK, unknown_1K])
    return added


def _run_soups(sweep: Sweep, runner: Launcher) -> None:
    """A soup of the corners' models at the weights of every other point."""
    corners = {name: _corner(sweep, name) for name in sweep.objectives}
    known = sweep.weights_of("soups").tolist() if sweep.state["soups"] else []
    for entry in sweep.state["points"]:
        weights = list(entry["weights"].values())
        if max(weights) < 1 and weights not in known:
            sweep.add("soups", weights)
    ready = []
    for entry in sweep.state["soups"]:
        lacking = [name for name, weight in entry["weights"].items() if weight > 0 and corners[name]["status"] != DONE]
        if lacking:
            entry |= {"status": FAILED, "reason": f"the corner of {', '.join(lacking)} failed, which it needs"}
        else:
            ready.append(entry)
    sweep.state["corners"] = {name: corner["name"] for name, corner in corners.items()}
    sweep.save()
    _run(sweep, ready, runner)


def _run_conditioned(sweep: Sweep, runner: Launcher) -> None:
    """The conditioned policy, asked for the weights of every point, in the hundredths that it reads."""
    known = [list(entry["weights"].values()) for entry in sweep.state[CONDITIONED]]
    for entry in sweep.state["points"]:
        weights = rounded(list(entry["weights"].values()))
        if weights not in known:
            known.append(weights)
            sweep.add(CONDITIONED, weights)
    sweep.save()
    _run(sweep, sweep.state[CONDITIONED], runner)


def _corner(sweep: Sweep, objective: str) -> dict[str, Any]:
    """The point that was trained for one objective alone."""
    return next(entry for entry in sweep.state["points"] if entry["weights"][objective] == 1)

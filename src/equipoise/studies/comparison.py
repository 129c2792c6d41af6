"""A comparison study: methods x sizes x seeds on one reward model, one set of prompts, one base policy and one budget.

A job (a method with a seed) at a time, or several; what is finished is never done again, a run that broke off goes on
from its checkpoint, and a job that fails is recorded while the others go on. study.json says where everything stands.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from equipoise.algorithms.environment import describe_environment
from equipoise.config import ComparisonConfig, changed_keys, resolved
from equipoise.config.comparison import BASE
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.evaluation import load_cost, write_json
from equipoise.evaluation.report import build_report
from equipoise.models.machine import give_back_memory
from equipoise.studies.jobs import JobFailed, JobStopped, Launcher, Processes, locked, run_job, stopping_on_signals
from equipoise.studies.measuring import write_comparison
from equipoise.studies.plan import BEST_OF, Job, Plan
from equipoise.studies.projection import Projection, in_words
from equipoise.studies.quickstart import now, world_digest
from equipoise.studies.side_by_side import run_side_by_side
from equipoise.studies.tuning import write_tuning

STUDY_FILE = "study.json"
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
TOO_MUCH = 2.0  # times the budget: worth a warning


class StudyFailed(EquipoiseError):
    """Jobs of a study failed; everything else is done."""


@dataclass
class ComparisonStudy:
    """A study in its directory, and how it speaks to people."""

    plan: Plan
    sizes: list[str]
    workers: int
    say: Callable[[str], None]
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The study's directory."""
        return self.plan.out

    @property
    def threads(self) -> int:
        """CPU threads of a method's job."""
        return max(1, cores() // self.workers)

    def threads_of(self, job: Job) -> int:
        """CPU threads of any job: stages run alone, with all of them, so that workers do not change the base policy."""
        return self.threads if job.seed is not None else cores()

    def jobs(self, sizes: Sequence[str] | None = None) -> list[Job]:
        """Stages and methods of the sizes, all that this call works on unless told."""
        chosen = self.sizes if sizes is None else sizes
        return [job for size in chosen for job in (*self.plan.stages(size), *self.plan.jobs(size))]

    def entry(self, job: Job) -> dict[str, Any]:
        """What study.json says about a job."""
        for entry in self.state["jobs"]:
            if (entry["size"], entry["method"], entry["seed"]) == (job.size, job.method, job.seed):
                return entry
        fresh = {"size": job.size, "method": job.method, "seed": job.seed, "status": WAITING, "seconds": 0.0}
        self.state["jobs"].append(fresh)
        return fresh

    def save(self) -> None:
        """Write study.json."""
        write_json(self.out / STUDY_FILE, self.state)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_comparison(
    config: ComparisonConfig, out: Path, *, sizes: Sequence[str] = (), workers: int = 1, say: Callable[[str], None]
) -> ComparisonStudy:
    """A new study, or one to go on with. Everything that can be wrong with the recipes is said here.

    Raises ConfigError for an unknown size, a recipe or budget that is wrong, a directory of something else, or of a
    study whose finished jobs were made with other settings.
    """
    for size in sizes:
        if size not in config.sizes:
            raise ConfigError(f"--sizes {size}: the recipe has no such size; known: {', '.join(config.sizes)}")
    study = ComparisonStudy(Plan(config, out), list(sizes or config.sizes), workers, say)
    study.plan.check(study.sizes)
    path = out / STUDY_FILE
    if path.is_file():
        study.state = read_state(path)
        _refuse_changes(study)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not a study; give another directory")
    else:
        study.state = {"kind": "comparison", "jobs": [], "digests": {}, "started": now()}
    environment = describe_environment()
    study.state |= {
        "recipe": resolved(config),
        "algorithms": study.plan.algorithms,
        "world": world_digest(with_recipes=False),
        "workers": workers,
        "threads": study.threads,
        "machine": f"{platform.machine()}, {cores()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}",
        "environment": {**environment, "threads": study.threads},
    }
    order = {(job.size, job.method, job.seed): place for place, job in enumerate(study.jobs(list(config.sizes)))}
    for job in study.jobs(list(config.sizes)):
        entry = study.entry(job)
        done = study.plan.finished(job)
        entry["status"] = DONE if done else (WAITING if entry["status"] in (DONE, RUNNING) else entry["status"])
        study.state["digests"][job.name] = study.plan.digest(job)
    # A method that the recipe no longer has keeps its files, and is no part of the study.
    study.state["jobs"] = sorted(
        (entry for entry in study.state["jobs"] if _key(entry) in order), key=lambda entry: order[_key(entry)]
    )
    study.save()
    return study


def _key(entry: dict[str, Any]) -> tuple[str, str, int | None]:
    return entry["size"], entry["method"], entry["seed"]


def read_state(path: Path) -> dict[str, Any]:
    """study.json. Raises ConfigError for a broken one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); remove the directory, or give another --out") from error
    if not isinstance(values, dict) or not {"recipe", "jobs", "digests", "started"} <= set(values):
        raise ConfigError(f"{path}: not the state of a study; remove the directory, or give another --out")
    return values


def opened(out: Path) -> Plan:
    """The plan of a study that lies in a directory, for one of its processes."""
    return Plan(ComparisonConfig.model_validate(read_state(out / STUDY_FILE)["recipe"]), out)


def _refuse_changes(study: ComparisonStudy) -> None:
    """What is begun was made with the recipes as they were; methods, sizes and seeds may come and go."""
    state = study.state
    if state.get("world") != world_digest(with_recipes=False):
        raise ConfigError(
            f"--out {study.out}: holds a study made with other texts, prompts or rubric; results would mix. Give "
            "another --out"
        )
    for job in study.jobs():
        recorded = state["digests"].get(job.name)
        begun = job.name in state["digests"] and (study.plan.run(job).exists() or study.plan.evaluation(job).exists())
        if begun and recorded != study.plan.digest(job):
            keys = changed_keys(state["recipe"], resolved(study.plan.config))
            changed = ", ".join(keys) if keys else f"{study.plan.recipe(job)}"
            raise ConfigError(
                f"--out {study.out}: {job.title} was begun with other settings (changed since: {changed}); results "
                "would mix. Undo the change, or give another --out"
            )


# -- running ----------------------------------------------------------------------------------------------------------


def run_comparison(study: ComparisonStudy, *, launcher: Launcher | None = None) -> Path:
    """Do every job that is left, and write comparisons, tuning.json and the report; returns the report's path.

    Raises ConfigError for a budget too small for a step and where another process works in the directory, Stopped
    after a signal, StudyFailed at the end where jobs failed, naming them.
    """
    study.out.mkdir(parents=True, exist_ok=True)
    with locked(study.out) as lock:
        runner = launcher if launcher is not None else Processes(lock)
        left = [job for job in study.jobs() if study.entry(job)["status"] != DONE]
        projection = _project(study) if left else None
        with stopping_on_signals(runner):
            for size in study.sizes:
                _run_size(study, size, runner, projection)
        failed = [study.entry(job) for job in study.jobs() if study.entry(job)["status"] == FAILED]
        everything = all(entry["status"] == DONE for entry in study.state["jobs"])
        study.state["finished"] = now() if everything else None
        study.save()
        if study.plan.config.tuning is not None:
            for size in (size for size in study.sizes if study.plan.finished(Job(size, BASE))):
                write_tuning(study.plan, size, _finished(study, size), study.state)
        report = build_report(study.out)
    if failed:
        names = "; ".join(f"{_title(entry)}: {entry['reason'].splitlines()[-1]}" for entry in failed)
        raise StudyFailed(f"{len(failed)} jobs failed, the others are done ({report}): {names}")
    return report


def _title(entry: dict[str, Any]) -> str:
    return Job(*_key(entry)).title


def _project(study: ComparisonStudy) -> Projection:
    """Measure, and say about how long the study will take."""
    study.say("measuring the machine to say how long it will take ...")
    projection = Projection(study.plan, study.sizes, study.threads)
    for job in study.jobs():
        entry = study.entry(job)
        if entry["status"] == DONE and entry["seconds"]:
            projection.learn(job, entry["seconds"])
    for job in study.jobs():
        study.entry(job)["projected_s"] = round(projection.of(job), 1)
    study.state["projected_s"] = round(_left(study, projection), 1)
    study.save()
    give_back_memory()  # the largest model was measured here; jobs run in processes of their own
    for size in study.sizes:
        left = {job.method: projection.of(job) for job in study.jobs([size]) if study.entry(job)["status"] != DONE}
        each = ", ".join(f"{name} {in_words(seconds)}" for name, seconds in left.items())
        study.say(
            f"{size}: seeds {', '.join(map(str, study.plan.config.sizes[size].seeds))}; each about {each or 'done'}"
        )
    study.say(f"about {in_words(study.state['projected_s'])} in all, {study.workers} at a time")
    return projection


def _left(study: ComparisonStudy, projection: Projection) -> float:
    """Seconds of the jobs that are not done, by the clock: methods run side by side, stages do not."""
    left = [job for job in study.jobs() if study.entry(job)["status"] != DONE]
    return sum(projection.of(job) / (1 if job.seed is None else study.workers) for job in left)


def _run_size(study: ComparisonStudy, size: str, runner: Launcher, projection: Projection | None) -> None:
    """The stages one after another, then the methods; a stage that fails takes the methods of its size with it."""
    for stage in study.plan.stages(size):
        _run_jobs(study, [stage], runner, projection)
        if study.entry(stage)["status"] == FAILED:
            for job in study.jobs([size]):
                entry = study.entry(job)
                if entry["status"] not in (DONE, FAILED):
                    entry |= {"status": FAILED, "reason": f"{stage.title} failed, which it needs"}
            study.save()
            return
    _run_jobs(study, study.plan.jobs(size), runner, projection)
    write_comparison(study.plan, size, _finished(study, size))


def _finished(study: ComparisonStudy, size: str) -> list[Job]:
    """Methods that are done at a size."""
    return [job for job in study.plan.jobs(size) if study.entry(job)["status"] == DONE]


def _run_jobs(study: ComparisonStudy, jobs: list[Job], runner: Launcher, projection: Projection | None) -> None:
    """As many at a time as there are workers."""

    def started(job: Job) -> None:
        study.entry(job)["status"] = RUNNING
        study.save()

    def ended(job: Job, error: JobFailed | JobStopped | None, seconds: float) -> None:
        entry = study.entry(job)
        entry["seconds"] = round(entry["seconds"] + seconds, 1)  # of all attempts together
        if isinstance(error, JobStopped):
            entry["status"] = DONE if study.plan.finished(job) else WAITING
            study.save()
        else:
            _conclude(study, job, error, projection)

    run_side_by_side(
        [job for job in jobs if study.entry(job)["status"] != DONE],
        lambda job: run_job(study.plan, job, runner, study.threads_of(job)),
        workers=study.workers,
        launcher=runner,
        started=started,
        ended=ended,
    )


def _conclude(study: ComparisonStudy, job: Job, failure: JobFailed | None, projection: Projection | None) -> None:
    """Record how a job ended; a comparison of what is finished is written after every method."""
    entry = study.entry(job)
    if failure is not None:
        entry |= {"status": FAILED, "reason": str(failure)}
        study.say(f"{job.title}: failed: {entry['reason'].splitlines()[-1]}")
        study.save()
        return
    entry["status"] = DONE
    entry.pop("reason", None)
    if job.seed is not None:
        entry |= _spent(study, job)
        write_comparison(study.plan, job.size, _finished(study, job.size))
    if projection is not None:
        projection.learn(job, entry["seconds"])
    study.save()
    jobs = study.jobs()
    done = sum(study.entry(other)["status"] == DONE for other in jobs)
    left = ""
    if projection is not None and done < len(jobs):
        left = f", about {in_words(_left(study, projection))} left"
    study.say(f"{done}/{len(jobs)} {job.title}: done in {in_words(entry['seconds'])}{left}")


def _spent(study: ComparisonStudy, job: Job) -> dict[str, Any]:
    """What a method spent of the budget; much more or less than the others is said."""
    cost = load_cost(study.plan.run(job))
    if cost is None or study.plan.algorithms[job.method] == BEST_OF:
        return {}
    spent = {
        "generated_tokens": cost["generated_tokens"],
        "flops": sum(cost["flops"].values()),
        "seconds": round(cost["wall_s"], 1),
    }
    ((name, limit),) = study.plan.config.budget.model_dump(exclude_none=True).items()
    if spent[name] > TOO_MUCH * limit:
        study.say(
            f"warning: {job.title} spent {spent[name]:.4g} {name}, {spent[name] / limit:.1f} times the budget: its "
            "first step alone is larger; raise the budget, or lower its completions per step"
        )
    if spent[name] < limit / TOO_MUCH:
        study.say(f"warning: {job.title} spent {spent[name]:.4g} {name} of {limit:.4g}: it ended for another reason")
    return {"spent": spent}

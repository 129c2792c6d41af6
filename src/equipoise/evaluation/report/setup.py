"""What was done, on what: data, stages, models, machine, versions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from equipoise.evaluation.report.inputs import ReportData
from equipoise.evaluation.report.section import Section
from equipoise.evaluation.report.text import amount, counted, duration, judge_label, plain, policy_label

STAGES = {
    "sft": "Supervised fine-tuning on demonstrations: the base policy.",
    "reward": "Multi-label reward regression: one network, one output per aspect.",
    "grpo": "Multi-objective GRPO on the reward model's scores.",
    "ppo": "PPO on the reward model's scores.",
    "dpo": "DPO on pairs ranked by the reward model.",
}
SETTINGS = (
    "seed", "num_steps", "num_epochs", "batch_size", "prompts_per_step", "group_size", "beta", "objective_weights",
)  # fmt: skip


def content(data: ReportData) -> dict[str, Any] | None:
    """Facts in pairs, and a row per stage."""
    pairs = [*_data_facts(data), *_judge_facts(data), *_machine_facts(data)]
    stages = [
        {
            "name": policy_label(name),
            "what": STAGES.get(run.algorithm, f"Algorithm {run.algorithm}."),
            "settings": _settings(run.config),
            "recipe": data.quickstart.recipes.get(name, "") if data.quickstart is not None else "",
        }
        for name, run in data.runs.items()
    ]
    return {"pairs": pairs, "stages": stages} if pairs or stages else None


def _data_facts(data: ReportData) -> list[tuple[str, str]]:
    start = data.quickstart
    if start is None:
        return []
    facts = []
    if start.size is not None or start.model_parameters is not None:
        size = f"{amount(start.model_parameters).strip()} parameters" if start.model_parameters is not None else ""
        facts.append(("Model", ", ".join(part for part in (start.size or "", size) if part)))
    names = {"train_prompts": "Training prompts", "test_prompts": "Test prompts", "held_out": "Held out of training"}
    for key, value in start.data.items():
        facts.append((names.get(key, key.replace("_", " ").capitalize()), _counts(value)))
    facts.append(("Seed", str(start.seed)))
    if start.started and start.finished:
        facts.append(("When", period(start.started, start.finished)))
    if start.stages:
        facts.append(("Time", duration(start.total_seconds)))
    return facts


def period(started: str, finished: str) -> str:
    """ "2025-11-02 10:00 to 10:04 UTC"; what is not an ISO date is shown as it is."""
    try:
        first, last = datetime.fromisoformat(started), datetime.fromisoformat(finished)
    except ValueError:
        return f"{started} to {finished}"
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} {first.tzname() or ''}".rstrip()


def _counts(value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(item, int) for item in value.values()):
        return f"{sum(value.values()):,} ({', '.join(f'{item:,} {key}' for key, item in value.items())})"
    return plain(value)


def _judge_facts(data: ReportData) -> list[tuple[str, str]]:
    first = next(iter(data.evaluations.values()), None)
    if first is None:
        return []
    drawn = {key: first.settings[key] for key in ("samples", "temperature", "max_tokens") if key in first.settings}
    facts = [("Judge", f"{judge_label(first.judge)}, {counted(first.num_prompts, 'prompt')}")]
    if drawn:
        facts.append(("Sampling for evaluation", ", ".join(f"{key} {plain(value)}" for key, value in drawn.items())))
    return facts


def _machine_facts(data: ReportData) -> list[tuple[str, str]]:
    environment = next((run.environment for run in data.runs.values() if run.environment), {})
    facts = []
    if data.quickstart is not None and data.quickstart.machine:
        facts.append(("Machine", data.quickstart.machine))
    elif environment:
        parts = [environment.get("processor"), environment.get("cuda")]
        cores = environment.get("cores")
        shown = [plain(part) for part in parts if part] + ([counted(cores, "core")] if isinstance(cores, int) else [])
        facts.append(("Machine", ", ".join(shown)))
    versions = environment.get("versions")
    if isinstance(versions, dict):
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    if environment.get("git"):
        facts.append(("Commit", str(environment["git"])[:12]))
    return [(key, value) for key, value in facts if value]


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {plain(config[key])}" for key in SETTINGS if config.get(key) is not None)


SECTION = Section("setup", "What was done", content)

"""docs/results/real_data.md from the benchmark's results: tables and transcripts, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "make bench-install && .venv/bin/python benchmarks/real_data.py --data ../shared/data"


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the Markdown page, and the numbers beside it as JSON."""
    notes = path.with_name("real_data_notes.md")
    environment = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        "# Real data: reward models and GRPO",
        "",
        f"Command: `{COMMAND}`. Run on {results['date']}, seed {results['seed']}; {environment['processor']}, "
        f"{environment['cores']} cores, {environment['memory_gib']} GiB; {versions}. "
        f"All stages together: {sum(results['seconds'].values()) / 60:.1f} minutes. "
        "Numbers: [real_data.json](real_data.json).",
        "",
        *_reward_section(results["reward_models"]),
        *_policy_section(results["policy"]),
        *_seconds_section(results["seconds"]),
    ]
    if notes.is_file():  # what a person saw, kept apart so that a new run does not overwrite it
        lines += ["", notes.read_text(encoding="utf-8").strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = {key: value for key, value in results.items() if key != "policy"}
    summary["policy"] = results["policy"]["comparison"]
    text = json.dumps(summary, indent=1).replace(f"{ROOT}/", "")  # where the repository lies says nothing
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _interval(point: float, bounds: list[float]) -> str:
    return f"{point:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"


def _reward_section(methods: dict[str, Any]) -> list[str]:
    lines = [
        "## (a) Reward models: test Spearman per aspect",
        "",
        "Ridge: TF-IDF of word and character n-grams of prompt and response, penalty chosen on validation. Scratch: a "
        "4-layer, 128-wide BERT from random weights. Pretrained: all-MiniLM-L6-v2, a model per set. Joint: the same "
        "encoder, one model with all ten aspects. Differences to the ridge with 95% paired bootstrap intervals over "
        "prompts (10,000 resamples).",
        "",
        "| aspect | test rows | ridge | scratch | pretrained | joint | pretrained - ridge | joint - ridge |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for aspect, row in methods["pretrained"]["aspects"].items():
        others = {name: method["aspects"][aspect] for name, method in methods.items()}
        joint = others["joint"]
        lines.append(
            f"| {aspect} | {row['n']} | {row['ridge']:.3f} | {others['scratch']['spearman']:.3f} | "
            f"{row['spearman']:.3f} | {joint['spearman']:.3f} | "
            f"{_interval(row['difference'], row['ci95'])} | {_interval(joint['difference'], joint['ci95'])} |"
        )
    lines.append("")
    for name, method in methods.items():
        lines.append(
            f"- {name}: mean difference to the ridge over aspects "
            f"{_interval(method['mean_difference'], method['mean_ci95'])}"
        )
    return [*lines, ""]


def _policy_section(policy: dict[str, Any]) -> list[str]:
    comparison = policy["comparison"]
    base, method = comparison["base"], comparison["methods"]["grpo"]
    after = method["evaluation"]
    lines = [
        "## (b) GRPO on real prompts against the joint reward model",
        "",
        f"A 4-layer, 256-wide Llama trained from scratch on `instructions/`, then GRPO. {base['num_prompts']} held-out "
        f"prompts, {base['num_completions']} completions each side, judged by the reward model that training used: "
        "it shows that the objective is optimised, not that the model became safe. The reward's labels come from "
        "requests, forum replies and single statements; replies of a small language model lie outside. Mean with "
        "95% interval over prompts, native scales; toxicity is better when lower.",
        "",
        "| aspect | before | after | paired difference |",
        "|---|---|---|---|",
    ]
    names = [*base["aspects"], "combined"]
    for name in names:
        left = base["aspects"].get(name, base["combined"])
        right = after["aspects"].get(name, after["combined"])
        change = method["paired_difference"][name]
        lines.append(
            f"| {name} | {left['mean']:.3f} | {right['mean']:.3f} | {_interval(change['mean'], change['ci95'])} |"
        )
    lines += ["", f"KL to the base: {after['kl_to_reference']:.2f} nats per completion.", ""]
    lines += ["| kind | combined before | combined after | refusals before | refusals after |", "|---|---|---|---|---|"]
    for kind, values in base["combined"]["by_kind"].items():
        lines.append(
            f"| {kind} | {values['mean']:.3f} | {after['combined']['by_kind'][kind]['mean']:.3f} | "
            f"{base['refusal_rate'][kind]:.3f} | {after['refusal_rate'][kind]:.3f} |"
        )
    lines += ["", "### Ten transcripts, as they are", "", "First completions of every eighteenth held-out prompt.", ""]
    for before, later in policy["transcripts"]:
        lines += [
            f"**{before['kind']}**: {_quoted(before['prompt'], most=300)}",
            "",
            f"- before ({before['combined']:.2f}): {_quoted(before['response'])}",
            f"- after ({later['combined']:.2f}): {_quoted(later['response'])}",
            "",
        ]
    return lines


def _quoted(text: object, most: int | None = None) -> str:
    """Text as inline code, so that nothing in it is Markdown or HTML; prompts are cut at `most` characters."""
    flat = " ".join(str(text).split()).replace("`", "'")
    if most is not None and len(flat) > most:
        flat = f"{flat[:most]} [...]"
    return f"`{flat}`" if flat else "(empty)"


def _seconds_section(seconds: dict[str, float]) -> list[str]:
    slow = {name: value for name, value in seconds.items() if value >= 5}
    return [
        "## Seconds per stage",
        "",
        ", ".join(f"{name} {value:.0f}" for name, value in slow.items()),
    ]

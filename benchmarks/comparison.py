"""docs/results/comparison.md from a comparison study.

    equipoise compare recipes/sandbox/comparison.yaml --out runs/comparison
    python benchmarks/comparison.py runs/comparison

The numbers, tests and sentences are those of the study's report. What somebody has to say about them is kept: the part
of the page after the line `<!-- read by hand -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tuning import RESULTS, shown

from equipoise.evaluation import write_json
from equipoise.evaluation.report.study.cost import costs_of, flops_by_part, mean_of
from equipoise.evaluation.report.study.inputs import SizeData, StudyData, read_study
from equipoise.evaluation.report.study.results import Difference
from equipoise.evaluation.report.study.summary import against_base, against_main, fallen
from equipoise.evaluation.report.text import policy_label
from equipoise.evaluation.rows import COMBINED, write_text

BY_HAND = "<!-- read by hand -->"
KINDS = (("safety", "adversarial"), ("actionability", "benign"), ("actionability", "borderline"))


def main() -> None:
    """Read the study, write the page and the comparison of every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="directory of the study")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where comparison.md and comparison.json go")
    arguments = parser.parse_args()
    study = read_study(arguments.study)
    page, results = arguments.out / "comparison.md", arguments.out / "comparison.json"
    here = {size.name for size in study.compared}
    kept = {name: lines for name, lines in sections_of(page).items() if name not in here}
    write_page(page, lines_of(study, kept))
    before = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    found = {size.name: compact(arguments.study / size.name / "comparison.json") for size in study.compared}
    write_json(results, {name: values for name, values in before.items() if name in kept} | found)
    print(page)


def sections_of(page: Path) -> dict[str, list[str]]:
    """The sections of a page that this script wrote, by the size's name: sizes may be run apart, in studies of
    their own."""
    text = page.read_text(encoding="utf-8").partition(BY_HAND)[0] if page.is_file() else ""
    found: dict[str, list[str]] = {}
    for part in ("\n" + text).split("\n## ")[1:]:
        name, *lines = part.rstrip().splitlines()
        found[name] = lines
    return found


def write_page(page: Path, lines: Sequence[str]) -> None:
    """Write the lines, and keep what follows the mark for remarks in the page that is there."""
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    remarks = before.partition(BY_HAND)[2]
    write_text(page, "\n".join(lines) + f"\n\n{BY_HAND}{remarks or chr(10)}")


def compact(path: Path) -> dict[str, Any]:
    """comparison.json without what the tables do not need."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for method in values["methods"].values():
        method.pop("cost_per_seed", None)
    return values


def lines_of(study: StudyData, kept: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The page, without remarks; `kept` are sections of sizes that this study has not run."""
    kept = kept or {}
    recipe = study.study.recipe
    budget = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in recipe.get("budget", {}).items() if v is not None)
    lines = [
        "# GRPO, PPO, DPO and others on the same work",
        "",
        "One base policy, one reward model and one set of prompts per size; the same budget for every method",
        f"({budget} in training; best-of-n trains nothing and pays with every answer);",
        "hyperparameters chosen by the same number of trials on other prompts ([tuning.md](tuning.md)). Judged by the",
        "sandbox's rubric, which no training sees, on test prompts about unseen things and in unseen wording.",
        "",
        "```",
        "equipoise compare recipes/sandbox/comparison.yaml --out runs/comparison",
        "python benchmarks/comparison.py runs/comparison        # this page",
        "```",
        "",
        f"Machine: {study.study.machine}. {study.study.started} to {study.study.finished or 'not finished'}.",
        "Differences are to the base policy, prompt by prompt, means over seeds, with 95% bootstrap intervals over",
        "prompts; they speak of these trained policies on other prompts, the seeds stand beside them. Bold: clear",
        "after Holm's correction over all methods and aspects of a size (two-sided sign-flip test). Seconds: of",
        "the processor in sampling, scoring and updates (of DPO: making its pairs too), where they were counted; of",
        "the clock in the same (of DPO: updates only); of the clock in all, loading and evaluations too. Methods ran",
        "two at a time on one thread each, beside other work: processor seconds are the fairer measure.",
    ]
    if missing := [what for what in study.missing if re.split("[,:]", what)[0] not in kept]:
        lines += ["", "Missing: " + "; ".join(missing) + "."]
    if kept:
        lines += ["", f"The time is that of the last size run; {' and '.join(kept)} ran apart, before it."]
    sections = {name: list(section) for name, section in kept.items()}
    sections |= {size.name: ["", *size_lines(size)] for size in study.compared}
    for name in sorted(sections, key=lambda name: (len(name), name)):  # 1m, 4m, 16m
        lines += ["", f"## {name}", *sections[name]]
    return lines


def size_lines(size: SizeData) -> list[str]:
    """Tables and findings of a size."""
    assert size.results is not None and size.comparison is not None
    base, results = size.comparison.base, size.results
    aspects = [*base.aspects, COMBINED]
    before = {**{name: value.mean for name, value in base.aspects.items()}, COMBINED: base.combined.mean}
    lines = [f"| | seeds | {' | '.join(aspects)} |", "| --- | ---: |" + " ---: |" * len(aspects)]
    lines.append("| base policy | | " + " | ".join(shown(before[name]) for name in aspects) + " |")
    for method, scores in results.scores.items():
        cells = " | ".join(change(scores[name]) for name in aspects)
        lines.append(f"| {policy_label(method)} | {len(size.evaluated(method))} | {cells} |")
    lines += ["", *(f"- {sentence}" for sentence in [*against_base(results), *against_main(results), *fallen(results)])]
    return [*lines, "", *kind_table(size), "", *cost_table(size)]


def change(tested: Difference) -> str:
    """`+0.21 [+0.19, +0.23]`, bold where clear."""
    low, high = tested.estimate.ci95
    text = f"{shown(tested.estimate.mean, signed=True)} [{shown(low, signed=True)}, {shown(high, signed=True)}]"
    return f"**{text}**" if tested.clear else text


def kind_table(size: SizeData) -> list[str]:
    """Where the objectives pull against each other, the KL paid, and every seed's combined score."""
    assert size.comparison is not None
    titles = [f"{aspect}, {kind}" for aspect, kind in KINDS]
    lines = [
        f"| | {' | '.join(titles)} | refusals of borderline | KL, nats | wins against base | combined, each seed |",
        "| --- |" + " ---: |" * (len(titles) + 4),
    ]
    entries: dict[str, tuple[Any, Any, str | None]] = {"base policy": (size.comparison.base, None, None)}
    for name, method in size.comparison.methods.items():
        entries[policy_label(name)] = (method.evaluation, method, name)
    for label, (evaluation, method, name) in entries.items():
        cells = [shown(kind_mean(evaluation, aspect, kind)) for aspect, kind in KINDS]
        cells.append(shown((evaluation.refusal_rate or {}).get("borderline")))
        seeds = method.seeds if method is not None else []
        judged = [seed.evaluated.evaluation for seed in size.evaluated(name)] if name is not None else []  # type: ignore[union-attr]
        kl = [found["kl_to_reference"] for found in judged if found.get("kl_to_reference") is not None]
        cells.append(shown(sum(kl) / len(kl), digits=1) if kl else "-")
        win = size.results.wins.get((name, "base")) if size.results is not None and name is not None else None
        cells.append(shown(win.mean, digits=2) if win is not None else "-")
        cells.append(", ".join(shown(seed.combined) for seed in seeds) or "-")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def kind_mean(evaluation: Any, aspect: str, kind: str) -> float | None:
    """Mean of an aspect on prompts of a kind, None where there are none."""
    found = evaluation.aspects[aspect].by_kind.get(kind)
    return found.mean if found is not None else None


def cost_table(size: SizeData) -> list[str]:
    """Tokens, FLOPs by part, seconds and memory, means over seeds."""
    lines = [
        "| | sampled tokens | trained tokens | TFLOP: generate, score, reference, forward, backward, critic | TFLOP | "
        "seconds: processor, clock, all | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in size.methods:
        costs = costs_of(size, method)
        if not costs:
            continue
        parts = flops_by_part(costs)
        shares = ", ".join(f"{parts.get(name, 0.0) / 1e12:.2f}" for name in
                           ("generate", "score", "reference", "forward", "backward", "critic"))  # fmt: skip
        tokens = [f"{mean_of(costs, name) or 0:,.0f}" for name in ("generated_tokens", "trained_tokens")]
        total = f"{sum(parts.values()) / 1e12:.2f}"
        working = [mean_of(costs, name) for name in ("generate_s", "score_s", "update_s")]
        at_work = sum(value for value in working if value is not None) if any(working) else None
        times = (mean_of(costs, "cpu_s"), at_work, mean_of(costs, "wall_s"))
        seconds = " / ".join(shown(value, digits=0) for value in times)
        memory = shown(mean_of(costs, "peak_rss_mb"), digits=0)
        lines.append(f"| {policy_label(method)} | " + " | ".join([*tokens, shares, total, seconds, memory]) + " |")
    return lines


if __name__ == "__main__":
    main()

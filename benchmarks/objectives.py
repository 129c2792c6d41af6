"""docs/results/objectives.md from a study of the ways to combine objectives, and from one of a constraint.

    equipoise compare recipes/sandbox/objectives.yaml --out runs/objectives
    equipoise compare recipes/sandbox/constraints.yaml --out runs/constraints
    python benchmarks/objectives.py runs/objectives runs/constraints

The numbers are in objectives.json beside it. What somebody has to say about them is kept: the part of the page after
the line `<!-- read by hand -->`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comparison import write_page
from benchmarks.objectives_constraint import constraint_lines, constraints_of, title
from benchmarks.objectives_methods import EQUAL, methods_of, weighting_lines
from benchmarks.objectives_tables import Values
from benchmarks.tuning import RESULTS

from equipoise.evaluation import write_json
from equipoise.evaluation.report.study.inputs import StudyData, read_study
from equipoise.evaluation.rows import COMBINED


def main() -> None:
    """Read the studies, write the page and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="directory of the study of methods")
    parser.add_argument("constraint_study", type=Path, nargs="?", help="directory of the study of a constraint")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where objectives.md and objectives.json go")
    arguments = parser.parse_args()
    found = found_in(arguments.study, arguments.constraint_study)
    page = arguments.out / "objectives.md"
    write_page(page, lines_of(found))
    write_json(arguments.out / "objectives.json", found)
    print(page)


def found_in(methods: Path, constraint: Path | None) -> Values:
    """Everything that the page says, as JSON."""
    study = read_study(methods)
    found = {"methods": setting(study) | {"sizes": {size.name: methods_of(size) for size in study.compared}}}
    if constraint is not None:
        other = read_study(constraint)
        sizes = {size.name: constraints_of(other.directory, size) for size in other.compared}
        found["constraint"] = setting(other) | {"sizes": sizes}
    return found


def setting(study: StudyData) -> Values:
    """Where and how a study ran."""
    recipe = study.study.recipe
    limits = {name: value for name, value in recipe.get("budget", {}).items() if value is not None}
    return {
        "machine": str(study.study.machine),
        "started": study.study.started,
        "finished": study.study.finished,
        "budget": ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in limits.items()),
        "prompts": recipe.get("evaluation", {}).get("prompts"),
        "judge": recipe.get("evaluation", {}).get("judge"),
        "missing": study.missing,
    }


def lines_of(found: Values) -> list[str]:
    """The page, without remarks."""
    lines = [
        "# Ways to combine objectives, and a constraint",
        "",
        "```",
        "equipoise compare recipes/sandbox/objectives.yaml --out runs/objectives",
        "equipoise compare recipes/sandbox/constraints.yaml --out runs/constraints",
        "python benchmarks/objectives.py runs/objectives runs/constraints        # this page",
        "```",
        "",
        "GRPO throughout, on one base policy, one reward model and one set of prompts per size; the recipes say how to",
        "start from those of a finished study. Judged by the sandbox's rubric, which no training sees. Intervals: 95%",
        "bootstraps over prompts of means over seeds; they speak of these trained policies on other prompts, not of",
        "other seeds, which stand beside them. Bold: clear after Holm's correction over all methods and scores of a",
        "table (two-sided sign-flip test). What each method computes: [objectives](../algorithms/objectives.md).",
        "",
        "## Methods",
        "",
        *setting_lines(found["methods"]),
        "No method was tuned: all have the learning rate and beta that were tuned for `weighted_sum`, and their own",
        f"default options. `{COMBINED}` weighs as training does, `{EQUAL}` gives every aspect the same weight. Worst",
        "aspect: the lowest mean. (\\*): takes no weights, the same run stands under every weighting. Dead: groups",
        "whose advantages are all 0; collapsed: reward vectors that got the advantage of another one.",
    ]
    for size, values in found["methods"]["sizes"].items():
        for weighting in values["weightings"]:
            lines += ["", f"### {size}, {weighting['title']}", "", *weighting_lines(weighting, values["base"])]
    if "constraint" in found:
        lines += ["", "## A constraint", "", *setting_lines(found["constraint"])]
        for size, entries in found["constraint"]["sizes"].items():
            for values in entries:
                lines += ["", f"### {size}, {title(values)}", "", *constraint_lines(values)]
    return lines


def setting_lines(values: Values) -> list[str]:
    """Machine, time, budget, and what is missing."""
    lines = [
        f"Budget: {values['budget']} for every run. Prompts: `{values['prompts']}`. Machine: {values['machine']}.",
        f"{values['started']} to {values['finished'] or 'not finished'}.",
    ]
    return lines + (["Missing: " + "; ".join(values["missing"]) + "."] if values["missing"] else [])


if __name__ == "__main__":
    main()

"""How a step's time grows with group size, completion and prompt length: Equipoise alone, sizes in turn.

    python benchmarks/cost_growth.py --rounds 3 --out docs/results/speed_growth.json

`grpo_step.py --sweep` has TRL beside it and takes an hour; here every size is run once in every round, so that a drift
of the machine meets all of them alike. Each run is a process of its own: a step that does not count, and `--steps` that
do. Seconds are medians over rounds (range in brackets); an exponent p says seconds ~ size^p between the ends, in each
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_step import Bench, say, step_medians
from grpo_step_report import growth
from grpo_step_world import SHAPES, Shape

SIZES = {"group": (4, 8, 16, 32), "completion_tokens": (16, 32, 64, 128), "prompt_tokens": (16, 64, 256)}


def seconds_of(bench: Bench, shape: Shape, dtype: str) -> float:
    """Median step of one process."""
    return step_medians(bench.run("equipoise", shape, dtype))["total"]


def measure(bench: Bench, base: Shape, dtype: str) -> list[dict[str, Any]]:
    """Seconds of every size in every round."""
    points = [
        {"size": size, "value": value, "seconds": []}
        for size, values in SIZES.items()
        for value in sorted({*values, getattr(base, size)})
    ]
    for number in range(bench.rounds):
        for point in points:
            shape = replace(base, **{point["size"]: point["value"]})
            point["completions"] = shape.completions
            point["seconds"].append(seconds_of(bench, shape, dtype))
            say(f"round {number + 1}: {point['size']} {point['value']}: {point['seconds'][-1]:.2f} s")
    return points


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: seconds and milliseconds a completion, and exponents."""
    lines = ["| | s a step | ms a completion |", "| --- | ---: | ---: |"]
    for size in SIZES:
        chosen = [point for point in points if point["size"] == size]
        for point in chosen:
            low, middle, high = (f(point["seconds"]) for f in (min, statistics.median, max))
            each = 1e3 * middle / point["completions"]
            name = f"{size.replace('_', ' ')} {point['value']}"
            lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {each:.1f} |")
        first, last = chosen[0], chosen[-1]
        powers = [
            growth((first["value"], one), (last["value"], other))
            for one, other in zip(first["seconds"], last["seconds"], strict=True)
        ]
        spread = f"{statistics.median(powers):.2f} ({min(powers):.2f} to {max(powers):.2f})"
        lines.append(f"| {size.replace('_', ' ')}: exponent | {spread} | |")
    return "\n".join(lines)


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = {"equipoise": sys.executable}
        bench = Bench(Path(scratch), python, given.threads, given.steps, given.rounds, timeout=600)
        points = measure(bench, SHAPES[given.shape], given.dtype)
    print(table(points))
    if given.out is not None:
        found = {"shape": given.shape, "dtype": given.dtype, "threads": given.threads, "points": points}
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A GRPO step of Equipoise and of TRL, side by side: time by phase, peak memory, and the machine's floor.

    make bench-install
    .venv/bin/python benchmarks/grpo_step.py --shape small qwen2.5-0.5b --dtype float32 bfloat16 \\
        --sweep --results docs/results/speed.json --report docs/results/speed.md

Per shape and dtype: a parity check (both compute loss and gradient on the same completions), a short run of each of
TRL's generation settings, then rounds of one process per tool, Equipoise, TRL, Equipoise, TRL, ..., the fastest of
TRL's settings against ours. Every round measures the machine first. The numbers are medians over rounds, of each
round's median step; the range over rounds stands beside them, and ratios are taken within a round. A process's first
step does not count. `--sweep` varies prompt length, group size and completion length of the first shape one at a time.

TRL may live in another environment (`--trl-python`), which needs no Equipoise: trl==1.16.0, peft, datasets and the same
torch and transformers. The exit code is 1 where the loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.grpo_step_floor import Machine, floor_seconds, measure_machine
from benchmarks.grpo_step_report import write_page
from benchmarks.grpo_step_world import PHASES, SHAPES, TRL_FOR_MEMORY, TRL_SETTINGS, Shape, write_model

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "grpo_step_worker.py"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of loss and of gradient norm
SWEEP = {"prompt_tokens": (16, 128, 512), "group": (4, 8, 16, 32), "completion_tokens": (16, 48, 96)}
SETTINGS_STEPS = 2
Values = dict[str, Any]


class WorkerFailed(Exception):
    """A process ended with an error; the message is the last lines it wrote."""


@dataclass(frozen=True)
class Bench:
    """How every process is run."""

    scratch: Path
    python: dict[str, str]  # by tool
    threads: int
    steps: int
    rounds: int
    timeout: float

    def run(self, tool: str, shape: Shape, dtype: str, **changes: Any) -> Values:
        """One process of one tool. Raises WorkerFailed."""
        job = {
            "shape": shape.values(),
            "dtype": dtype,
            "threads": self.threads,
            "steps": self.steps,
            "model": str(self.model(shape)),
            "scratch": str(self.scratch),
            "completions": str(self.scratch / "completions.safetensors"),
            "settings": TRL_SETTINGS[0],
            "parity": False,
            **changes,
        }
        files = [self.scratch / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job), encoding="utf-8")
        files[1].unlink(missing_ok=True)
        threads = str(self.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [self.python[tool], str(WORKER), tool, *map(str, files)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(f"{tool}: no result after {self.timeout:.0f} s") from error
        if done.returncode or not files[1].is_file():
            raise WorkerFailed(f"{tool}: " + "\n".join(done.stderr.strip().splitlines()[-5:]))
        result = json.loads(files[1].read_text(encoding="utf-8"))
        if not job["parity"]:
            check_tokens(tool, shape, result)
        return result

    def model(self, shape: Shape) -> Path:
        """The shape's random model; written once, since lengths and groups do not change it."""
        name = f"model-{shape.hidden}-{shape.layers}-{shape.vocabulary}"
        directory = self.scratch / name
        return directory if directory.is_dir() else write_model(shape, directory)


def check_tokens(tool: str, shape: Shape, result: Values) -> None:
    """Raises WorkerFailed unless every step sampled and trained the tokens that the shape says."""
    for kind, count in result["tokens_per_step"].items():
        if count != shape.sampled_tokens:
            raise WorkerFailed(f"{tool}: {kind} {count} tokens a step instead of {shape.sampled_tokens}")


def parity(bench: Bench, shape: Shape, dtype: str) -> Values:
    """Loss and gradient norm of both tools on the completions that Equipoise sampled."""
    ours = bench.run("equipoise", shape, dtype, parity=True)
    theirs = bench.run("trl", shape, dtype, parity=True)
    difference = max(relative(ours[name], theirs[name]) for name in ("loss", "grad_norm"))
    return {"equipoise": ours, "trl": theirs, "difference": difference, "agrees": difference <= TOLERANCE[dtype]}


def relative(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|. Example: 1.1 and 1.0: 0.1."""
    return abs(ours - theirs) / abs(theirs)


def try_settings(bench: Bench, shape: Shape, dtype: str) -> dict[str, Values]:
    """A short run of each of TRL's settings: seconds and peak memory, or why it does not run."""
    found: dict[str, Values] = {}
    for settings in (*TRL_SETTINGS, TRL_FOR_MEMORY):
        try:
            result = bench.run("trl", shape, dtype, settings=settings, steps=SETTINGS_STEPS)
        except WorkerFailed as error:
            found[settings] = {"error": str(error).splitlines()[-1]}
            continue
        seconds = min(step["total"] for step in result["steps"])  # too few for a median; what disturbs only adds
        found[settings] = {"seconds": seconds, "peak_mib": result["memory_mib"]["peak"]}
        say(f"  TRL, {settings}: {seconds:.3f} s")
    return found


def fastest(found: dict[str, Values]) -> str:
    """The setting to compare with. Raises WorkerFailed where none runs."""
    times = {name: found[name]["seconds"] for name in TRL_SETTINGS if "seconds" in found.get(name, {})}
    if not times:
        raise WorkerFailed(f"trl: no setting runs: {found}")
    return min(times, key=lambda name: times[name])


def step_medians(result: Values) -> dict[str, float]:
    """Median over a process's steps of every phase and of the total."""
    return {key: statistics.median(step[key] for step in result["steps"]) for key in (*PHASES, "total")}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest. Example: 3, 1, 2: 2, 1, 3."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(bench: Bench, shape: Shape, dtype: str, settings: str) -> Values:
    """Interleaved rounds of both tools."""
    rounds = []
    for index in range(bench.rounds):
        machine = measure_machine(bench.threads)
        load = os.getloadavg()[0]
        results = {
            "equipoise": bench.run("equipoise", shape, dtype),
            "trl": bench.run("trl", shape, dtype, settings=settings),
        }
        rounds.append({"machine": machine.values(), "load": load, **results})
        times = {tool: step_medians(result)["total"] for tool, result in results.items()}
        say(f"  round {index + 1}: Equipoise {times['equipoise']:.3f} s, TRL {times['trl']:.3f} s")
    return {"shape": shape.values(), "dtype": dtype, "settings": settings, **summary(shape, dtype, rounds)}


def summary(shape: Shape, dtype: str, rounds: list[Values]) -> Values:
    """Medians and ranges over rounds. Ratios, and percentages of the floor, are taken within a round."""
    tools = ("equipoise", "trl")
    steps = {tool: [step_medians(one[tool]) for one in rounds] for tool in tools}
    memory = {tool: [one[tool]["memory_mib"] for one in rounds] for tool in tools}
    floors = [floor_seconds(shape, dtype, Machine(**one["machine"])) for one in rounds]
    pairs = list(zip(steps["equipoise"], steps["trl"], strict=True))
    return {
        "seconds": {
            tool: {key: spread([step[key] for step in steps[tool]]) for key in (*PHASES, "total")} for tool in tools
        },
        "ratio": spread([theirs["total"] / ours["total"] for ours, theirs in pairs]),
        "floor": {key: statistics.median(floor[key] for floor in floors) for key in floors[0]},
        "percent_of_floor": {
            tool: spread([100 * f["total"] / s["total"] for f, s in zip(floors, steps[tool], strict=True)])
            for tool in tools
        },
        "memory_mib": {
            tool: {key: spread([m[key] for m in memory[tool]]) for key in memory[tool][0]} for tool in tools
        },
        "machine": {key: spread([one["machine"][key] for one in rounds]) for key in rounds[0]["machine"]},
        "load": spread([one["load"] for one in rounds]),
        "tokens_per_step": shape.sampled_tokens,
        "rounds": [{"load": one["load"], "machine": one["machine"], **_steps(one)} for one in rounds],
        "versions": {**rounds[0]["equipoise"]["versions"], **rounds[0]["trl"]["versions"]},
    }


def _steps(one: Values) -> Values:
    return {tool: one[tool]["steps"] for tool in ("equipoise", "trl")}


def sweep(bench: Bench, base: Shape, dtype: str, settings: str) -> list[Values]:
    """One size at a time varied, the others as in `base`."""
    found = []
    for size, values in SWEEP.items():
        for value in values:
            say(f"sweep: {size} {value}")
            measured = measure(bench, replace(base, **{size: value}), dtype, settings)
            found.append({"size": size, "value": value, **measured})
    return found


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["small"])
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=5, help="processes per tool")
    parser.add_argument("--steps", type=int, default=3, help="steps per process that count, after one that does not")
    parser.add_argument("--threads", type=int, default=2, help="of every process, and of the machine's measurement")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL; default: this one")
    parser.add_argument("--trl-settings", choices=TRL_SETTINGS, help="compare with these instead of trying all")
    parser.add_argument("--sweep", action="store_true", help="vary the first shape's lengths and group size")
    parser.add_argument("--sweep-rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one process may take")
    parser.add_argument("--results", type=Path, help="JSON file; results of other shapes and dtypes in it stay")
    parser.add_argument("--report", type=Path, help="Markdown page with a marked part that is written anew")
    return parser.parse_args()


def main() -> int:
    """Run what was asked for and print the tables."""
    from equipoise.algorithms.environment import describe_environment

    given = options()
    results: Values = {"cases": {}, "sweeps": {}}
    if given.results and given.results.is_file():
        results = json.loads(given.results.read_text(encoding="utf-8"))
    environment = {**describe_environment(), "threads": given.threads}
    with tempfile.TemporaryDirectory() as scratch:
        python = {"equipoise": sys.executable, "trl": given.trl_python}
        bench = Bench(Path(scratch), python, given.threads, given.steps, given.rounds, given.timeout)
        try:
            for name in given.shape:
                for dtype in given.dtype:
                    run_case(bench, name, dtype, given, results)
                    results["cases"][f"{name}, {dtype}"]["environment"] = environment
                    if given.results:  # kept at once, since a later one may fail
                        given.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        except WorkerFailed as error:
            print(error, file=sys.stderr)
            return 1
    print(write_page(results, given.report))
    return 0 if all(case["parity"]["agrees"] for case in results["cases"].values()) else 1


def run_case(bench: Bench, name: str, dtype: str, given: argparse.Namespace, results: Values) -> None:
    """Everything about one shape in one dtype."""
    shape, key = SHAPES[name], f"{name}, {dtype}"
    say(f"{key}: parity")
    agreement = parity(bench, shape, dtype)
    say(f"  relative difference {agreement['difference']:.1e}")
    tried = {} if given.trl_settings else try_settings(bench, shape, dtype)
    settings = given.trl_settings or fastest(tried)
    results["cases"][key] = {**measure(bench, shape, dtype, settings), "parity": agreement, "tried": tried}
    if given.sweep and name == given.shape[0]:
        quicker = replace(bench, rounds=given.sweep_rounds)
        results["sweeps"][key] = sweep(quicker, shape, dtype, settings)


if __name__ == "__main__":
    sys.exit(main())

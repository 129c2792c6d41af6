"""`equipoise plan` against the memory that real GRPO steps take on this machine.

    python benchmarks/plan_check.py [--only NAME ...] [--allocators NAME ...] [--out docs/results/plan.json]
    python benchmarks/plan_check.py --replan --out docs/results/plan.json     # the plan anew beside what was measured
    python benchmarks/plan_check.py --shapes        # the paper's three sizes on GPUs of three sizes; nothing is run

Each case runs `train_grpo` in a process of its own for two steps (the second one has Adam's moments) and compares the
peak of its resident memory, less what was resident before the model was loaded, with the plan's peak. A tiny step comes
first, so that what imports and kernels take does not count. Prompts are longer than `max_prompt_tokens`, and models are
random and hardly ever end a completion, so that the steps have the lengths that the plan assumes.

Each case is run under several settings of the C library's allocator, in turn: what glibc keeps of freed memory is no
tensor, and a plan of tensors cannot know it. Processor seconds of the two steps say what returning it costs; unlike
the clock's they mean the same on a machine that others use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.grpo_step_watch import _status
from benchmarks.grpo_step_world import Shape, write_model

STEPS = 2
MIB = 2**20
MID = Shape("mid", 512, 6, 8, 2, 1408, 32_768, prompts=4, group=8, prompt_tokens=64, completion_tokens=64)
LORA = {"lora": {"r": 16, "alpha": 32}}


# Environment of a process; glibc reads it before the process begins. Thresholds in bytes: what is at least as large as
# the first goes back to the system when it is freed, what is smaller once the second lies free at the heap's end.
ALLOCATORS: dict[str, dict[str, int]] = {
    "default": {},
    "returned from 128 KiB": {"MALLOC_MMAP_THRESHOLD_": 2**17},
    "returned from 1 MiB": {"MALLOC_MMAP_THRESHOLD_": 2**20, "MALLOC_TRIM_THRESHOLD_": 2**26},
    "returned from 4 MiB": {"MALLOC_MMAP_THRESHOLD_": 2**22, "MALLOC_TRIM_THRESHOLD_": 2**26},
    # torch then asks for pages of 2 MiB for tensors of at least that size, where the system has them on request.
    "returned from 4 MiB, huge pages": {
        "MALLOC_MMAP_THRESHOLD_": 2**22,
        "MALLOC_TRIM_THRESHOLD_": 2**26,
        "THP_MEM_ALLOC_ENABLE": 1,
    },
    "huge pages": {"THP_MEM_ALLOC_ENABLE": 1},
}


@dataclass(frozen=True)
class Case:
    """A model, and what its recipe says besides."""

    name: str
    model: str  # built-in, or `mid`
    policy: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("sandbox 1m, full", "sandbox/1m"),
    Case("sandbox 4m, full", "sandbox/4m"),
    Case("sandbox 16m, full", "sandbox/16m"),
    Case("sandbox 16m, full, 8 rows at once", "sandbox/16m", recipe={"micro_batch_size": 8}),
    Case("sandbox 16m, full, checkpointing", "sandbox/16m", {"gradient_checkpointing": True}),
    Case("Qwen2 6x512, full", "mid"),
    Case("Qwen2 6x512, LoRA", "mid", LORA),
    Case("Qwen2 6x512, full, bfloat16", "mid", {"precision": "bfloat16"}),
    Case("Qwen2 6x512, LoRA, bfloat16", "mid", {**LORA, "precision": "bfloat16"}),
    Case("Qwen2 6x512, LoRA, 1 row at once", "mid", LORA, {"micro_batch_size": 1}),
    Case("Qwen2 6x512, LoRA, checkpointing", "mid", {**LORA, "gradient_checkpointing": True}),
]


def recipe_of(case: Case, model: str) -> dict[str, Any]:
    """The recipe of a case."""
    scorer = {"function": "benchmarks.grpo_step_world:scored"}
    return {
        "algorithm": "grpo",
        "policy": {"model": model, "precision": "float32", "prompt_format": "text", **case.policy},
        "data": "unused",
        "scorers": [{**scorer, "aspects": {"evenness": {"higher_is_better": True, "range": [0, 1]}}}],
        "objective_weights": {"evenness": 1.0},
        "num_steps": STEPS,
        "prompts_per_step": 8,
        "group_size": 8,
        "max_prompt_tokens": 64,
        "sampling": {"max_tokens": 64},
        "checkpoint": {"every": STEPS},
        "threads": 1,
        **case.recipe,
    }


# -- one case, in a process of its own -------------------------------------------------------------------------------


def measured(recipe: dict[str, Any], warm: dict[str, Any], scratch: Path) -> dict[str, float]:
    """MiB resident before loading, and at the peak from then on; seconds of the processor for loading and two steps."""
    step(warm, scratch / "warm")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    began = time.process_time()
    step(recipe, scratch / "run")
    return {"before": before, "peak": _status("VmHWM"), "processor_s": time.process_time() - began}


def step(recipe: dict[str, Any], out: Path) -> None:
    """What `equipoise train` does."""
    from equipoise.algorithms.grpo import train_grpo
    from equipoise.algorithms.run import Run
    from equipoise.config import GRPOConfig, recipe_from_mapping
    from equipoise.data import PromptRecord
    from equipoise.models.policy import load_policy
    from equipoise.rollout.scorers import build_scorers

    config = recipe_from_mapping(recipe)
    assert isinstance(config, GRPOConfig)
    run = Run(out, config)
    policy = load_policy(config.policy, trainable=True, with_reference=config.beta > 0)
    prompts = [PromptRecord(prompt=f"{index} " + "how do plants grow? " * 60) for index in range(16)]
    train_grpo(policy, build_scorers(config.scorers), prompts, config, run)


def worker(file: Path) -> None:
    """Runs the job in `file` and prints its memory."""
    job = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps(measured(job["recipe"], job["warm"], Path(job["scratch"]))))


# -- all cases -------------------------------------------------------------------------------------------------------


def planned(recipe: dict[str, Any], allocator: str) -> dict[str, Any]:
    """The plan's peak in MiB and its phase, made where the allocator's settings hold."""
    from equipoise.config import recipe_from_mapping
    from equipoise.studies.planning import Configs, Lengths, need_of

    with patch.dict(os.environ, {name: str(value) for name, value in ALLOCATORS[allocator].items()}):
        need = need_of(recipe_from_mapping(recipe), Configs({}), Lengths(), on_gpu=False)
    return {"peak": need.peak / MIB, "phase": need.peak_phase}


def model_of(case: Case, scratch: Path) -> str:
    """The name of a case's model, or the directory it is written to."""
    if case.model != "mid":
        return case.model
    directory = scratch / "mid"
    if not directory.exists():
        write_model(MID, directory)
    return str(directory)


def replan(out: Path, scratch: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, each with what is planned now."""
    rows = json.loads(out.read_text(encoding="utf-8"))["cases"]
    cases = {case.name: case for case in CASES}
    for row in rows:
        case = cases[row["case"]]
        plan = planned(recipe_of(case, model_of(case, scratch)), row["allocator"])
        row |= {"planned_mib": plan["peak"], "phase": plan["phase"], "error": plan["peak"] / row["measured_mib"] - 1}
    return rows


def check(case: Case, scratch: Path, allocator: str) -> dict[str, Any]:
    """Plan and measurement of one case under one allocator."""
    recipe = recipe_of(case, model_of(case, scratch))
    small = Case("warm", "sandbox/1m", {"precision": recipe["policy"]["precision"]})
    warm = {**recipe_of(small, small.model), "prompts_per_step": 1, "group_size": 2}
    directory = Path(tempfile.mkdtemp(dir=scratch))
    job = directory / "job.json"
    job.write_text(json.dumps({"recipe": recipe, "warm": warm, "scratch": str(directory)}), encoding="utf-8")
    command = [sys.executable, __file__, "--worker", str(job)]
    settings = {name: str(value) for name, value in ALLOCATORS[allocator].items()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(directory)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    plan = planned(recipe, allocator)
    peak = found["peak"] - found["before"]
    return {"case": case.name, "allocator": allocator, "measured_mib": peak, "planned_mib": plan["peak"],
            "phase": plan["phase"], "error": plan["peak"] / peak - 1, "processor_s": found["processor_s"]}  # fmt: skip


def shapes() -> None:
    """Peak and verdict of recipes/paper at 24, 80 and 141 GB, as a table."""
    from equipoise.config import load_recipe
    from equipoise.studies.planning import GB, USABLE, Configs, Lengths, need_of

    root = Path(__file__).resolve().parents[1]
    files = {size: root / "tests" / "configs" / f"qwen2.5-{size}.json" for size in ("0.5b", "7b", "14b")}
    named = {f"Qwen/Qwen2.5-{size.upper()}-Instruct": file for size, file in files.items()}
    configs = Configs({**named, "REWARD_MODEL": files["0.5b"]})
    print("| recipe | peak, GB | fullest phase | 24 GB | 80 GB | 141 GB |\n| --- | ---: | --- | --- | --- | --- |")
    for algorithm in ("grpo", "ppo", "dpo"):
        for size in files:
            config = load_recipe(root / "recipes" / "paper" / f"{algorithm}_{size}.yaml")
            need = need_of(config, configs, Lengths(), on_gpu=True)
            fits = ["fits" if need.peak <= USABLE * memory * GB else "no" for memory in (24, 80, 141)]
            print(f"| {algorithm}_{size} | {need.peak / GB:.1f} | {need.peak_phase} | {' | '.join(fits)} |", flush=True)


def main() -> None:
    """Check every case, print a table as documents have it, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    parser.add_argument("--allocators", nargs="*", choices=ALLOCATORS, default=list(ALLOCATORS)[:2])
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--shapes", action="store_true", help="the table of the paper's recipes")
    parser.add_argument("--replan", action="store_true", help="of the rows in --out; nothing is run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.shapes:
        shapes()
        return
    rows = []
    print("| case | allocator | measured, MiB | planned, MiB | difference | fullest phase | processor, s |")
    print("| --- | --- | ---: | ---: | ---: | --- | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.replan:
            rows = replan(arguments.out, Path(scratch))
            for row in rows:
                show(row)
            write(arguments.out, rows)
            return
        for case in CASES:
            if arguments.only and case.name not in arguments.only:
                continue
            for allocator in arguments.allocators:
                rows.append(check(case, Path(scratch), allocator))
                show(rows[-1])
                if arguments.out:
                    write(arguments.out, rows)


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        f"| {row['case']} | {row['allocator']} | {row['measured_mib']:.0f} | {row['planned_mib']:.0f} | "
        f"{row['error']:+.0%} | {row['phase']} | {row['processor_s']:.1f} |",
        flush=True,
    )


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """The rows so far, with what they were measured on; rows of other cases that the file holds already stay."""
    import torch
    import transformers

    measured = {(row["case"], row["allocator"]) for row in rows}
    earlier = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.is_file() else []
    kept = [row for row in earlier if (row["case"], row["allocator"]) not in measured]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": 1}
    values = {"versions": versions, "machine": machine, "steps": STEPS, "cases": [*kept, *rows]}
    out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

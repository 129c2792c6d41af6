"""What each technique of the sampler gains: time of the plain loop over time with the technique, interleaved.

    python benchmarks/sampler_speed.py --shapes small prompt-512 --threads 2 --out docs/results/speed_sampler.json

`copied, all stay`: the model's own cache, a copy of the prompt's for every completion; a row that has ended is computed
until the last one ends. `copied`: such rows leave. `shared`: a prompt's keys and values once for its group. `shared,
joining`: and waiting groups take the places of those that have left. `own step`: and neither prompts nor tokens go
through the model's own layers. `compiled`: and loops in C take the place of torch's operations between products, and of
oneDNN's products in bfloat16 where the processor allows; that is how `generate` runs. Completions end at random, a
fortieth of the vocabulary being ends, so that lengths are geometric. All ways give the same tokens in exact arithmetic;
the share that did here is printed. Ratios are taken within an alternation; median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from grpo_step_world import SHAPES, Shape, prompt_texts, write_model

from equipoise.config import ModelConfig, SamplingConfig
from equipoise.kernels import cpu
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout import decoding, sampler
from equipoise.rollout.types import Rollout

WAYS = ("copied, all stay", "copied", "shared", "shared, joining", "own step", "compiled")
PLAIN = WAYS[0]
ENDS = 40  # one id in so many ends a completion
WORKLOADS = {
    "small": replace(SHAPES["small"], prompts=32),
    "tiny": replace(SHAPES["tiny"], prompts=8),
    "prompt-512": replace(SHAPES["small"], name="prompt-512", prompts=8, prompt_tokens=512, completion_tokens=64),
    "qwen2.5-0.5b": replace(SHAPES["qwen2.5-0.5b"], prompts=4),
}


def policy_of(shape: Shape, dtype: str, directory: Path) -> Policy:
    """A random model whose completions end at random."""
    policy = load_policy(ModelConfig.model_validate({"model": str(write_model(shape, directory)), "precision": dtype}))
    policy.eos_ids = tuple(range(7, shape.vocabulary, ENDS))
    return policy


def runner(policy: Policy, shape: Shape, way: str) -> Callable[[int], Rollout]:
    """Samples all prompts of a shape, a quarter of the rows at a time."""
    prompts, settings = prompt_texts(shape, shape.prompts), SamplingConfig(max_tokens=shape.completion_tokens)

    def copied(*_: Any) -> str:
        return "not shared, to see what sharing gains"

    def run(seed: int) -> Rollout:
        with ExitStack() as changes:
            if way.startswith("copied"):
                changes.enter_context(patch.object(decoding, "groups_share_prompts", copied))
            if way == PLAIN:
                changes.enter_context(patch.object(sampler, "COMPACT_BELOW", 0.0))
            if way != "compiled":
                changes.enter_context(cpu.by_torch())
            if way not in ("own step", "compiled"):
                changes.enter_context(patch.object(decoding, "_own_step", lambda _: None))
            if way == "shared":
                changes.enter_context(patch.object(decoding.GroupedBatch, "joins", False))
            at_once = max(shape.group, shape.completions // 4)
            return sampler.generate(policy, prompts, shape.group, settings, seed=seed, rows_at_once=at_once)

    return run


def measure(policy: Policy, shape: Shape, repeats: int) -> dict[str, dict[str, Any]]:
    """Per way: seconds (medians), ratios to the plain way within each alternation, share of equal tokens."""
    runs = {way: runner(policy, shape, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    equal: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):  # the first one warms up
        first: Rollout | None = None
        for way, run in runs.items():
            started = time.perf_counter()
            rollout = run(repeat)
            if repeat:
                seconds[way].append(time.perf_counter() - started)
            first = first or rollout
            equal[way].append(share_equal(first, rollout))
    found = {}
    for way in WAYS:
        ratios = [plain / own for plain, own in zip(seconds[PLAIN], seconds[way], strict=True)]
        found[way] = {
            "seconds": statistics.median(seconds[way]),
            "times_faster": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "equal_tokens": statistics.fmean(equal[way]),
        }
    return found


def share_equal(first: Rollout, second: Rollout) -> float:
    """Of the first rollout's tokens, those that the second has at the same place."""
    width = min(first.completion_ids_BT.shape[1], second.completion_ids_BT.shape[1])
    same = first.completion_ids_BT[:, :width] == second.completion_ids_BT[:, :width]
    both = first.completion_mask_BT[:, :width] & second.completion_mask_BT[:, :width]
    return float((same & both).sum() / first.completion_mask_BT.sum())


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "prompt-512"], choices=list(WORKLOADS))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    print(
        "| shape | dtype | way | seconds | times faster | quartiles | equal tokens |\n|---|---|---|---:|---:|---|---:|"
    )
    for name in options.shapes:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as directory:
                shape = WORKLOADS[name]
                found = measure(policy_of(shape, dtype, Path(directory)), shape, options.repeats)
            results.append({"shape": shape.values(), "dtype": dtype, "ways": found})
            for way, row in found.items():
                low, high = row["quartiles"]
                print(f"| {name} | {dtype} | {way} | {row['seconds']:.2f} | {row['times_faster']:.2f} "
                      f"| {low:.2f} to {high:.2f} | {row['equal_tokens']:.4f} |", flush=True)  # fmt: skip
    if options.out is not None:
        setting = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
        setting |= {"repeats": options.repeats, "one id in so many ends a completion": ENDS}
        options.out.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

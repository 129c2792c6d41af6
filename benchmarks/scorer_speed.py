"""What each technique of the scorer gains: time of the old way over time of the new, in one interleaved process.

    python benchmarks/scorer_speed.py --sizes 1m 4m --threads 1 --out docs/results/speed_scorer.json

`padded, autograd`: rows padded, the projection by autograd with chunks computed again. `padded`: the hand-written
projection alone. `group rows`: a prompt and its completions as one padded row under a block-causal mask. `packed`:
rows without padding through the model's own layers. `by hand`: through hand-written blocks of torch's operations.
`compiled`: and loops in C between products, as `score_tokens` does.
Every alternation runs each of them once; ratios are taken within an alternation, and their median and quartiles are
given, because a shared machine drifts between alternations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from equipoise.functional.logprobs import linear_logprobs
from equipoise.kernels import cpu
from equipoise.models import policy_module
from equipoise.models.policy_module import PolicyModule
from equipoise.sandbox.models import SIZES, model_config

PROMPTS, GROUP = 16, 8
PROMPT_TOKENS, COMPLETION_TOKENS = (30, 60), (5, 80)
OLD = "padded, autograd"
WAYS = (OLD, "padded", "group rows", "packed", "by hand", "compiled")


def build(name: str) -> PolicyModule:
    """A randomly initialised policy of a sandbox size, or `qwen2`: two layers of the 0.5B shape, 896 wide."""
    torch.manual_seed(0)
    if name in SIZES:
        config: Any = model_config(name)
    else:
        config = Qwen2Config(
            vocab_size=32768,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=2,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    module = PolicyModule(AutoModelForCausalLM.from_config(config))
    module.train()
    return module


def make_rows(vocabulary: int, prompts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and completion mask of `prompts` groups of ragged completions; prompts are padded on the left."""
    generator = torch.Generator().manual_seed(0)

    def lengths(bounds: tuple[int, int], count: int) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (count,), generator=generator)

    before = lengths(PROMPT_TOKENS, prompts).repeat_interleave(GROUP)
    after = lengths(COMPLETION_TOKENS, prompts * GROUP)
    width, longest = PROMPT_TOKENS[1], COMPLETION_TOKENS[1]
    prompt = torch.randint(5, vocabulary, (prompts, width), generator=generator).repeat_interleave(GROUP, dim=0)
    completion = torch.randint(5, vocabulary, (prompts * GROUP, longest), generator=generator)
    prompt_mask = torch.arange(width)[None] >= width - before[:, None]
    completion_mask = torch.arange(longest)[None] < after[:, None]
    return torch.cat([prompt, completion], 1), torch.cat([prompt_mask, completion_mask], 1), completion_mask


def group_rows(module: PolicyModule, ids_BL: Tensor, mask_BL: Tensor, completion_mask_BT: Tensor) -> Tensor:
    """Log-probabilities [N] from one row a group: its prompt, then all of its completions, block-causal."""
    tokens = completion_mask_BT.shape[1]
    first = ids_BL.shape[1] - tokens
    groups = len(ids_BL) // GROUP
    ids = torch.cat([ids_BL[::GROUP, :first], ids_BL[:, first:].reshape(groups, -1)], dim=1)
    real = torch.cat([mask_BL[::GROUP, :first], completion_mask_BT.reshape(groups, -1)], dim=1)
    prompt_positions = (mask_BL[::GROUP, :first].long().cumsum(1) - 1).clamp(min=0)
    after = prompt_positions[:, -1:, None] + 1 + torch.arange(tokens)
    positions = torch.cat([prompt_positions, after.expand(-1, GROUP, -1).reshape(groups, -1)], dim=1)
    segment = torch.cat([torch.zeros(first), torch.arange(1, GROUP + 1).repeat_interleave(tokens)])
    same = (segment[:, None] == segment[None]) | (segment[None] == 0)
    causal = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    visible = (same & causal)[None] & real[:, None] | torch.eye(len(segment), dtype=torch.bool)
    hidden = module._backbone(
        input_ids=ids, attention_mask=visible[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    own = hidden[:, first:].unflatten(1, (GROUP, tokens))
    before = torch.cat([hidden[:, None, first - 1 : first].expand(-1, GROUP, -1, -1), own[:, :, :-1]], dim=2)
    chosen = before.flatten(0, 1)[completion_mask_BT]
    head = module._head
    targets = ids_BL[:, first:][completion_mask_BT]
    return linear_logprobs(chosen, head.weight, None, targets, chunk_size=1024, with_entropy=True).logprobs_N  # type: ignore[arg-type]


def runner(module: PolicyModule, rows: tuple[Tensor, Tensor, Tensor], way: str) -> Callable[[], Tensor]:
    """A pass that returns the wanted log-probabilities [N]."""

    def run() -> Tensor:
        if way == "group rows":
            return group_rows(module, *rows)
        module.packed = way in ("packed", "by hand", "compiled")
        module._own_blocks = way in ("by hand", "compiled")
        plain = policy_module._plain_linear
        policy_module._plain_linear = (lambda head: None) if way == OLD else plain
        try:
            return module(*rows, with_entropy=True).logprobs_BT[rows[2]]
        finally:
            policy_module._plain_linear = plain

    return run


def measure(module: PolicyModule, rows: tuple[Tensor, Tensor, Tensor], backward: bool, repeats: int) -> dict[str, Any]:
    """Medians of seconds, and of the ratios to the old way within each alternation."""
    runs = {way: runner(module, rows, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):  # the first one warms up
        for way, run in runs.items():
            module.zero_grad()
            start = time.perf_counter()
            with nullcontext() if way == "compiled" else cpu.by_torch():
                with torch.set_grad_enabled(backward):
                    logprobs = run()
                if backward:
                    logprobs.sum().backward()
            found[way] = logprobs.detach()
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    result: dict[str, Any] = {}
    for way in WAYS:
        ratios = [old / new for old, new in zip(seconds[OLD], seconds[way], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        result[way] = {
            "seconds": statistics.median(seconds[way]),
            "times_faster": statistics.median(ratios),
            "quartiles": [quartiles[0], quartiles[2]],
            "largest_difference": float((found[way] - found[OLD]).abs().max()),
        }
    return result


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1m", "4m", "16m", "qwen2"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"groups of {GROUP} completions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    print(f"{'model':8}{'threads':>8} {'pass':20}{'way':20}{'seconds':>9}{'faster':>8}   quartiles")
    for size in options.sizes:
        module = build(size)
        rows = make_rows(module.causal.config.vocab_size, options.prompts)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for backward in (False, True):
                found = measure(module, rows, backward, options.repeats)
                label = "forward + backward" if backward else "forward"
                results.append({"model": size, "threads": threads, "pass": label, "ways": found})
                for way, row in found.items():
                    low, high = row["quartiles"]
                    print(
                        f"{size:8}{threads:8} {label:20}{way:20}{row['seconds']:9.3f}{row['times_faster']:8.2f}   "
                        f"{low:.2f} to {high:.2f}",
                        flush=True,
                    )
    if options.out is not None:
        setting = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "prompts": options.prompts,
            "group": GROUP,
            "repeats": options.repeats,
        }
        options.out.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

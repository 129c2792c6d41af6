"""What the parts of benchmarks/gpu_check.py share: shapes, the random policy, the budget of time, and timing.

Nothing is downloaded: a shape is a `config.json` with a tokenizer of bytes beside it, and its weights are drawn on the
device in bfloat16. The one id that would end a completion does not exist in the vocabulary, so every completion has
exactly as many tokens as were asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.grpo_step_world import LORA_ALPHA, SHAPES, Shape, qwen2_config, tokenizer

from equipoise.config import LoraConfig, ModelConfig
from equipoise.models.policy import Policy, load_policy

MIB = 2**20
PROMPTS, PROMPT_TOKENS = 8, 128
UNTIED = ("7b", "14b")  # with a head of their own, and trained with gradient checkpointing


def _shape(name: str, hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int, words: int) -> Shape:
    return Shape(
        name, hidden, layers, heads, kv_heads, feed_forward, words,
        prompts=PROMPTS, group=8, prompt_tokens=PROMPT_TOKENS, completion_tokens=256, lora_r=16,
    )  # fmt: skip


GPU_SHAPES = {
    "tiny": replace(SHAPES["tiny-lora"], name="tiny"),
    "0.5b": _shape("0.5b", 896, 24, 14, 2, 4864, 151_936),
    "7b": _shape("7b", 3584, 28, 28, 4, 18_944, 152_064),
    "14b": _shape("14b", 5120, 48, 40, 8, 13_824, 152_064),
}


class Budget:
    """Seconds that are left. `clock` is a function that returns seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        """May be negative."""
        return self._end - self._clock()

    def part(self, seconds: float) -> Budget:
        """At most so many of what is left."""
        return Budget(min(seconds, self.left()), self._clock)

    def refuses(self, estimate: float) -> str | None:
        """None where `estimate` seconds fit, else why not, in words for the table."""
        left = self.left()
        if estimate <= left:
            return None
        return f"skipped: it needs about {estimate:.0f} s, {max(0.0, left):.0f} s are left"


def synchronised(device: torch.device) -> float:
    """The time, once everything that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    started = synchronised(device)
    call()
    return synchronised(device) - started


@contextmanager
def peak_memory(device: torch.device, into: dict[str, Any], name: str) -> Iterator[None]:
    """The most memory that tensors held on the GPU meanwhile, MiB; None on a CPU, where nobody counts it."""
    if device.type != "cuda":
        yield
        into[name] = None
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield
    into[name] = torch.cuda.max_memory_allocated(device) / MIB


def write_shape(shape: Shape, directory: Path) -> Path:
    """The shape's architecture and tokenizer as transformers saves them, without weights."""
    config = qwen2_config(shape, tie_word_embeddings=shape.name not in UNTIED, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(directory)
    tokenizer(shape).save_pretrained(directory)
    return directory


def build_policy(
    shape: Shape, scratch: Path, device: torch.device, *, precision: str = "bfloat16", initial_scale: float = 0.02
) -> Policy:
    """A trainable policy of random weights on `device`, by the package's own loading.

    LoRA as the shape says; the 7B and 14B shapes recompute activations, as the recipes for them do. `initial_scale` is
    the standard deviation of the weights.
    """
    directory = scratch / f"model-{shape.name}"
    if not directory.is_dir():
        write_shape(shape, directory)
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {"dtype": precision if shape.lora_r else "float32", "initializer_range": initial_scale}
    file.write_text(json.dumps(values), encoding="utf-8")
    config = ModelConfig(
        model=str(directory),
        initialise="random",
        lora=LoraConfig(r=shape.lora_r, alpha=LORA_ALPHA) if shape.lora_r else None,
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=shape.name in UNTIED,
        prompt_format="text",
    )
    with torch.device(device):  # weights are drawn where they stay: 14B parameters never pass through the host
        policy = load_policy(config, trainable=True, device=device)
    return replace(policy, eos_ids=(shape.vocabulary,))

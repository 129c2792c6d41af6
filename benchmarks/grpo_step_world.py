"""What both sides of benchmarks/grpo_step.py share: shapes, the random model, its tokenizer, prompts and the reward.

Nothing here imports Equipoise or TRL. Every completion has exactly `completion_tokens` tokens: the one id that would
end it does not exist in the vocabulary, so both tools look for it and neither can sample it.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BETA = 0.04
LEARNING_RATE = 1e-5
LORA_ALPHA = 32
SPECIAL = ("<pad>",)
PHASES = ("generate", "score", "reference", "forward", "backward", "optimiser")
TRL_SETTINGS = ("dynamic cache", "static cache", "continuous batching")  # the fastest of them is compared
TRL_FOR_MEMORY = "gradient checkpointing"  # shown beside them, with a dynamic cache: less memory, more time


@dataclass(frozen=True)
class Shape:
    """One workload: a Qwen2 architecture and the sizes of a step."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    prompts: int  # per step
    group: int  # completions per prompt
    prompt_tokens: int
    completion_tokens: int
    lora_r: int | None = None  # None: every parameter is trained, and the reference is a second copy
    beta: float = BETA

    @property
    def completions(self) -> int:
        """Rows of a step."""
        return self.prompts * self.group

    @property
    def sampled_tokens(self) -> int:
        """Tokens that one step samples, and trains on."""
        return self.completions * self.completion_tokens

    def values(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


SHAPES = {
    "tiny": Shape("tiny", 32, 2, 4, 2, 64, 320, prompts=2, group=4, prompt_tokens=6, completion_tokens=5),
    "tiny-lora": Shape("tiny-lora", 32, 2, 4, 2, 64, 320, 2, 4, prompt_tokens=6, completion_tokens=5, lora_r=4),
    "small": Shape("small", 256, 6, 8, 8, 704, 4096, prompts=8, group=8, prompt_tokens=16, completion_tokens=48),
    "prompt-512": Shape(
        "prompt-512", 256, 6, 8, 8, 704, 4096, prompts=4, group=8, prompt_tokens=512, completion_tokens=64
    ),
    "qwen2.5-0.5b": Shape(
        "qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151_936,
        prompts=2, group=8, prompt_tokens=64, completion_tokens=64, lora_r=16,
    ),
}  # fmt: skip


def write_model(shape: Shape, directory: Path, *, seed: int = 0) -> Path:
    """A float32 model with random weights and tied embeddings, saved with its tokenizer as transformers saves them."""
    import torch
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(shape)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    # Checked after every token like any other, and never sampled: the vocabulary ends before it.
    generation = {"eos_token_id": shape.vocabulary, "pad_token_id": config.pad_token_id, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    tokenizer(shape).save_pretrained(directory)
    return directory


def qwen2_config(shape: Shape, **changes: Any) -> Any:
    """The shape's architecture, with tied embeddings and no id that ends a text; `changes` replace or add values."""
    from transformers import Qwen2Config

    values = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": len(_bytes()),
    }
    return Qwen2Config(**values | changes)


def tokenizer(shape: Shape) -> Any:
    """One token per byte and no merges, so n letters are n tokens; the rest of the vocabulary has names, no text."""
    from transformers import Qwen2Tokenizer

    words = [*_bytes(), *SPECIAL]
    words += [f"w{index}" for index in range(shape.vocabulary - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    none: Any = None  # no such token; the signature says str
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], pad_token="<pad>", eos_token=none, bos_token=none, unk_token=none
    )


def _bytes() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def prompt_texts(shape: Shape, count: int, *, seed: int = 0) -> list[str]:
    """Random letters, `prompt_tokens` tokens each."""
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_lowercase, k=shape.prompt_tokens)) for _ in range(count)]


def reward(text: str) -> float:
    """Share of characters with an even code point: costs nothing, and differs between completions."""
    return sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))


def scored(prompts: list[Any], completions: list[str]) -> dict[str, list[float]]:
    """`reward` as an Equipoise function scorer."""
    return {"evenness": [reward(text) for text in completions]}


def disturb(model: Any, *, scale: float = 0.02) -> None:
    """Move every trainable parameter away from the reference by noise that depends on its name alone.

    For the parity check: a policy that still is its reference has KL 0, and a fresh adapter is 0. Adapters are set, not
    moved, since each tool draws its own.
    """
    import zlib

    import torch

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = scale * torch.randn(parameter.shape, generator=generator)
                base = 0.0 if "lora_" in name else parameter
                parameter.copy_(base + noise.to(parameter.dtype))

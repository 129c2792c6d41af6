"""A world small enough for tests: a word tokenizer, random models of any architecture, and rewards one can compute.

Nothing is downloaded. Models are built from configs with a fixed seed and saved as ordinary directories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [
    "please",
    "thanks",
    "kindly",
    "no",
    "never",
    "stop",
    "go",
    "walk",
    "run",
    "the",
    "a",
    "to",
    "how",
    "do",
    "i",
    "you",
    "can",
    "what",
    "is",
    "it",
    "make",
    "cake",
    "garden",
    "fix",
    "bike",
    "sorry",
    "cannot",
    "help",
    "first",
    "then",
    "mix",
    "plant",
    "pump",
    "tyre",
    "water",
    "flour",
    "sugar",
    "seeds",
    "soil",
    "rude",
    "stupid",
    "idiot",
    "yes",
    "good",
    "bad",
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
POLITE = {"please", "thanks", "kindly"}
RUDE = {"rude", "stupid", "idiot"}


def toy_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One id per word; `<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3."""
    words = [*SPECIAL, *WORDS, "user", "assistant", "system"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def toy_config(architecture: str = "llama", *, hidden: int = 32, layers: int = 2, vocabulary: int = 64) -> Any:
    """A config of a few thousand parameters."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if architecture == "gpt2":
        return GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, **common)
    common |= {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if architecture == "gemma2":
        return Gemma2Config(head_dim=8, sliding_window=128, **common)
    if architecture == "qwen3":
        return Qwen3Config(head_dim=8, **common)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](**common)


def toy_policy_directory(
    directory: Path, *, architecture: str = "llama", chat: bool = False, seed: int = 0, **sizes: int
) -> Path:
    """A random causal LM with its tokenizer, saved as transformers saves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(toy_config(architecture, **sizes))
    model.save_pretrained(directory)
    toy_tokenizer(chat=chat).save_pretrained(directory)
    return directory


def politeness(prompts: list[Any], completions: list[str]) -> dict[str, list[float | None]]:
    """Share of polite words, in [0, 1]."""
    return {"politeness": [_share(text, POLITE) for text in completions]}


def two_aspects(prompts: list[Any], completions: list[str]) -> dict[str, list[float | None]]:
    """Share of polite words, and share of rude words (lower is better)."""
    return {**politeness(prompts, completions), "rudeness": [_share(text, RUDE) for text in completions]}


def _share(text: str, words: set[str]) -> float:
    found = text.split()
    return sum(word in words for word in found) / max(1, len(found))


def write_prompts(path: Path, count: int = 16) -> Path:
    """JSONL prompts of a few words, alternating kinds."""
    kinds = ("benign", "borderline", "adversarial")
    rows = [{"prompt": f"how do i {WORDS[6 + i % 3]} {WORDS[20 + i % 12]}", "kind": kinds[i % 3]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def grpo_values(model: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    """A GRPO recipe over `politeness`; `changes` replace top-level keys."""
    return {
        "algorithm": "grpo",
        "policy": {"model": str(model)},
        "data": str(prompts),
        "scorers": [
            {
                "function": "tests.toy:politeness",
                "aspects": {"politeness": {"higher_is_better": True, "range": [0, 1]}},
            }
        ],
        "objective_weights": {"politeness": 1.0},
        "num_steps": 3,
        "prompts_per_step": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 6},
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }

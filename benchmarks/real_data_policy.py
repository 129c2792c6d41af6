"""Part (b): a small language model from scratch, then GRPO against the reward model learned from real labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from equipoise.data import load_demonstrations, load_prompts

VOCABULARY = 4096
TRAINING_PER_KIND = 300
HELD_OUT_PER_KIND = 60
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_small_model(data: Path, directory: Path) -> Path:
    """config.json and a byte-level BPE tokenizer trained on the instructions: what `initialise: random` needs."""
    texts = [
        text
        for name in ("benign_responses", "safe_responses")
        for record in load_demonstrations(data / "instructions" / f"{name}.jsonl.gz")
        for text in (str(record.prompt), record.response)
    ]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    ).save_pretrained(directory)
    return directory


def write_prompt_splits(data: Path, directory: Path) -> tuple[Path, Path]:
    """Training and held-out prompts of every kind, told apart by a hash of the text; equal ones fall together."""
    paths = directory / "prompts_train.jsonl", directory / "prompts_held_out.jsonl"
    rows: tuple[list[dict[str, object]], list[dict[str, object]]] = ([], [])
    for kind in ("adversarial", "borderline", "benign"):
        distinct = {str(record.prompt): record for record in load_prompts(data / "prompts" / f"{kind}.jsonl.gz")}
        ordered = sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        held_out = ordered[:HELD_OUT_PER_KIND]
        training = ordered[HELD_OUT_PER_KIND : HELD_OUT_PER_KIND + TRAINING_PER_KIND]
        for part, texts in zip(rows, (training, held_out), strict=True):
            part += [{"prompt": text, "kind": kind} for text in texts]
    for path, part in zip(paths, rows, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


def paired_transcripts(comparison: Path, count: int) -> Iterable[tuple[dict[str, object], dict[str, object]]]:
    """The first `count` held-out prompts' first completions, base and GRPO side by side: spread over the kinds."""
    both = []
    for name in ("base", "grpo-0"):
        lines = (comparison / "evaluation" / name / "completions.jsonl").read_text(encoding="utf-8").splitlines()
        both.append([row for row in map(json.loads, lines) if row["index"] == 0])
    step = len(both[0]) // count
    return list(zip(*(rows[::step][:count] for rows in both), strict=True))
